"""What every reader hands over, and the cache on disk that keeps it: scanned once, shared by all processes.

N images, C channels, *S the size. A cache entry is one folder `<cache_dir>/<key>/` with `pixels.npy`,
`masks.npy` and `index.json`. It appears whole by one rename, so a killed scan leaves nothing half done;
checksums tell a damaged one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from utils import UserError, write_json

CACHE_VERSION = 1      # raise it when what the readers make of the same files changes
CACHE_NAME = 'medical-anomaly'
CLASSES_SHOWN = 20     # named in an error
MOST_PIXELS = 100_000_000     # of an image; a larger one is a decompression bomb or a whole slide

DTYPES = {8: 'uint8', 16: 'uint16'}                # of pixels, by the bits of a gray level

if TYPE_CHECKING:
    import numpy as np

T = TypeVar('T')


class Unreadable(ValueError):
    """Why a file is no image: words that go on from its name."""


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
        """True where the anomalous pixels are known: a mask file is there, or the image is normal and has
        none.
        """
        return self.label == 0 or self.mask_row >= 0


class Array:
    """A read-only .npy file, memory-mapped at first use in each process, so that it costs nothing to
    pickle.
    """

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
    twins: list[tuple[str, str, float]] = field(default_factory=list)    # ids of near-duplicates, correlation
    notes: list[str] = field(default_factory=list)                            # what the user should know
    flags: dict[str, Any] = field(default_factory=dict)                  # by which a packed set was prepared


def same_name(a: str, b: str) -> bool:
    """Whether two class names differ only in case or in the sign between words ('Lung_Opacity', 'lung
    opacity').
    """
    return _plain(a) == _plain(b)


def _plain(name: str) -> str:
    return name.casefold().replace('_', ' ').replace('-', ' ')


def choose_classes(found: Sequence[str], normal: Sequence[str], anomalous: Sequence[str], others: bool,
                   where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The normal and the anomalous classes among `found`, with the spelling found.

    An empty `normal` means all that is not anomalous; an empty `anomalous` means all that is not normal if
    `others`, else none. Raises UserError for a class that is not there and for one that is both.
    """
    known = {_plain(f) for f in found}

    def pick(names: Sequence[str], kind: str) -> list[str]:
        for name in names:
            if _plain(name) not in known:
                some = sorted(found)[:CLASSES_SHOWN] + ['others'] * (len(found) > CLASSES_SHOWN)
                raise UserError(f"{kind} class {name!r} is not in {where}: found {', '.join(some)}. "
                                f"Check --data, or name the classes with --{kind}_classes.")
        wanted = {_plain(name) for name in names}
        return sorted(f for f in found if _plain(f) in wanted)

    abnormal = pick(anomalous, 'anomalous')
    usual = pick(normal, 'normal') if normal else sorted(set(found) - set(abnormal))
    if not anomalous and others:
        abnormal = sorted(set(found) - set(usual))
    if both := set(usual) & set(abnormal):
        raise UserError(f"class {min(both)!r} is both normal and anomalous: "
                        f"take it out of --normal_classes or of --anomalous_classes.")
    return tuple(usual), tuple(abnormal)


# ------------------------------------------------------------------------------------------------------ cache

def cache_folder(wanted: str) -> Path:
    """`wanted`, or a folder for this project in $XDG_CACHE_HOME, ~/.cache or the temporary folder:
    writable.
    """
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / CACHE_NAME
    spare = Path(tempfile.gettempdir()) / f'{CACHE_NAME}-{os.getuid() if hasattr(os, "getuid") else "cache"}'
    for folder in [Path(wanted)] if wanted else [home, spare]:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise UserError(f"the cache folder {wanted or home} cannot be written: name another with --cache_dir.")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """One process at a time, where the file system can lock (else it yields False); the lock ends with its
    process.
    """
    with contextlib.ExitStack() as stack:
        alone = False
        with contextlib.suppress(ImportError, OSError):    # without a lock work is done twice, never wrongly
            import fcntl
            fcntl.flock(stack.enter_context(path.open('w')), fcntl.LOCK_EX)
            alone = True
        yield alone


def cached(cache_dir: str, key: Any, make: Callable[[Path], dict]) -> Source:
    """The Source that `make(folder)` writes, from the cache if it is there and sound.

    `key` is JSON of all that the result depends on. `make` writes `pixels.npy` and perhaps `masks.npy` into
    the folder and returns the other fields of Source.
    """
    def make_plain(folder: Path) -> dict:
        fields = make(folder)
        return fields | {'entries': [dataclasses.astuple(e) for e in fields['entries']]}

    return cached_files(cache_dir, key, make_plain, _source)


def cached_files(cache_dir: str, key: Any, make: Callable[[Path], dict],
                 load: Callable[[Path, dict], T]) -> T:
    """`load(folder, fields)` of a cache folder: its .npy files were written by `make(folder)`, which returned
    the JSON `fields`, now or in an earlier run.
    """
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, key]).encode()).hexdigest()[:32]
    home = cache_folder(cache_dir)
    final = home / digest
    with locked(home / f'{digest}.lock') as alone:
        found = _load(final, load)
        if found is None:
            for left_over in [final, *(home.glob(f'{digest}.*.tmp') if alone else ())]:
                shutil.rmtree(left_over, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f'{digest}.', suffix='.tmp', dir=home))
            try:
                fields = make(temporary)
                fields['checksums'] = {p.name: _checksum(p) for p in sorted(temporary.glob('*.npy'))}
                write_json(temporary / 'index.json', fields)
                os.rename(temporary, final)
            except OSError as error:
                if _load(final, load) is None:     # else another process, without locks here, was first
                    raise UserError(f"cannot write the cache folder {home} ({error.strerror or error}): "
                                    f"make room there or name another with --cache_dir.") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            found = _load(final, load)
    if found is None:
        raise UserError(f"what was written to the cache folder {home} reads back wrongly: "
                        f"check that disk, or name another folder with --cache_dir.")
    return found


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError if so much does not fit: a memory map on a full disk ends the process without a word."""
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f'{num_bytes / 2 ** 20:,.0f} MiB do not fit')


def _load(folder: Path, load: Callable[[Path, dict], T]) -> T | None:
    """What is kept in `folder`; None if there is nothing or it is damaged."""
    try:
        fields = json.loads((folder / 'index.json').read_text())
        if any(_checksum(folder / name) != value for name, value in fields.pop('checksums').items()):
            return None
        return load(folder, fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _source(folder: Path, fields: dict) -> Source:
    masks = folder / 'masks.npy'
    return Source(entries=[Entry(*values) for values in fields.pop('entries')],
                  pixels=Array(folder / 'pixels.npy'), masks=Array(masks) if masks.exists() else None,
                  normal_classes=tuple(fields.pop('normal_classes')),
                  anomalous_classes=tuple(fields.pop('anomalous_classes')), **fields)


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open('rb') as f:
        while block := f.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
