"""What every reader hands over: a Source, the entries and pixels of a data set.

N images, C channels, *S the size.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from storage.limits import excess
from utils import UserError

CLASSES_SHOWN = 20     # named in an error
MOST_PIXELS = 100_000_000     # of an image, which sets how large a file may be
PIXEL_BYTES = 30              # of memory that decoding takes for each pixel, at most

DTYPES = {8: 'uint8', 16: 'uint16'}                # of pixels, by the bits of a gray level

if TYPE_CHECKING:
    import numpy as np


class Unreadable(ValueError):
    """Why a file is no image: words that go on from its name."""


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return ' '.join(str(error).split()) or type(error).__name__


@contextmanager
def decoding(words: str = 'cannot be decoded', quoted: bool = True) -> Iterator[None]:
    """Raises Unreadable with these words, and if `quoted` its own, for any error of a decoder: damaged bytes
    lead to all kinds.
    """
    try:
        yield
    except (Unreadable, UserError):
        raise
    except Exception as error:
        raise Unreadable(f'{words} ({reason(error)})' if quoted else words) from None


def check_pixels(pixels: int, num_bytes: int) -> None:
    """Raises Unreadable for more pixels than --max_gb allows, or than a file of this size can hold."""
    if words := excess(PIXEL_BYTES * pixels, num_bytes):
        raise Unreadable(f'has {pixels:,} pixels and {words}')


def to_integers(x: np.ndarray, depth: int) -> np.ndarray:
    """Values in [0, 1] as integers of `depth` bits: uint8 or uint16."""
    return (x * (2 ** depth - 1)).round().astype(DTYPES[depth])


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: where it comes from, and what is known of it."""
    id: str                   # path relative to the data folder, with '/'; unique in the data set
    path: str                 # the file; empty where the data set is not kept in files
    class_name: str
    sha256: str               # of the file's bytes; of the pixels where there is no file; '' = not computed
    file_bytes: int           # size of the file; as a PNG where there is no file; 0 = unknown
    row: int                  # its place in Source.pixels
    mask_row: int = -1        # its place in Source.masks; -1 = no mask file
    part: str = ''            # 'train', 'val' or 'test' where the data set has its own parts
    patient: str = ''         # '' = unknown
    label: int = 0            # 0 normal, 1 anomalous
    grids: tuple = ()         # of a volume: the model's grid and the file's; () = an image

    @property
    def has_mask(self) -> bool:
        """True where the anomalous pixels are known: it has a mask file, or is normal."""
        return self.label == 0 or self.mask_row >= 0


class Array:
    """A read-only .npy file, memory-mapped at first use in each process: it costs nothing to pickle."""

    def __init__(self, path: str | Path):
        self.path, self._array = Path(path), None

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._array is None:
            import numpy as np
            self._array = np.load(self.path, mmap_mode='r')
        return self._array[rows]

    def __getstate__(self) -> dict:
        return {'path': self.path, '_array': None}

    @property
    def shape(self) -> tuple[int, ...]:
        return self[:].shape


class Images(Protocol):
    """N images: `images[rows]` is (B, C, *S) uint8 or uint16 for an array of B rows."""
    shape: tuple[int, ...]            # (N, C, *S)

    def __getitem__(self, rows: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """A data set as its reader found it: `pixels` (N, C, *S) uint8 or uint16, `masks` (M, 1, *S) uint8 0 or
    1. A large one has its entries and pixels made when asked for (readers/published/records.py).
    """
    entries: Sequence[Entry]
    pixels: Images
    masks: Array | None
    normal_classes: tuple[str, ...]
    anomalous_classes: tuple[str, ...]
    bad: list[tuple[str, str]] = field(default_factory=list)            # (id, reason) of each unreadable file
    near_duplicates: list[tuple[str, str, float]] = field(default_factory=list)      # (id, id, correlation)
    notes: list[str] = field(default_factory=list)                            # what the user should know
    flags: dict[str, Any] = field(default_factory=dict)                  # by which a packed set was prepared


def is_among(name: str, names: Iterable[str]) -> bool:
    """Whether a class has one of these names, up to case and to the sign between words."""
    return plain_name(name) in map(plain_name, names)


def plain_name(name: str) -> str:
    """'lung opacity' of 'Lung_Opacity' and of 'LUNG-OPACITY'."""
    return unicodedata.normalize('NFC', name).casefold().replace('_', ' ').replace('-', ' ')
