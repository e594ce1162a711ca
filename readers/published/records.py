"""Large data sets: an image is read and decoded when it is asked for, and nothing is kept of each.

A Store holds the images of one part, encoded or raw: an LMDB or a folder of files. Over the stores of a data
set stand its entries (Records) and its pixels (LazyImages). N images in all, B of them asked for, C channels,
S x S pixels.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from readers.lmdb.file import Lmdb, refused
from readers.paths import file_content
from readers.source import Array, Entry, Unreadable, check_pixels, reason
from utils import UserError

FORMATS = ('JPEG', 'PNG', 'WEBP')              # decided by content; LSUN is in WebP
MODES = {1: 'L', 3: 'RGB'}                   # number of channels -> Pillow's mode; 'L' is luma, ITU-R BT.601


# ----------------------------------------------------------------------------------------------------- stores

class Store:
    """The images of a part by their names, which are '0' to 'N - 1' or `keys` (N,) bytes."""

    def __init__(self, part: str, path: str | Path, count: int, keys: Array | np.ndarray | None = None):
        self.part, self.path, self.count, self.keys = part, str(path), count, keys

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> bytes:
        return str(index).encode() if self.keys is None else bytes(self.keys[index])

    def name(self, index: int) -> str:
        return self.key(index).decode(errors='replace')

    def names(self) -> Iterator[str]:
        if self.keys is None:
            return map(str, range(self.count))
        return (key.decode(errors='replace') for key in self.keys[:].tolist())


class LmdbStore(Store):
    """An LMDB."""

    def __init__(self, part: str, path: str | Path, keys: Array | None = None):
        """Raises UserError if the file is damaged, as far as can be told without reading it all."""
        self.lmdb = Lmdb(path)
        with refused(path):
            super().__init__(part, path, len(self.lmdb), keys)
            if not self.count:
                raise UserError(f"{path} is an LMDB without records. Make it anew.")
            for index in (0, self.count - 1):
                if self.lmdb.get(self.key(index)) is None:
                    raise UserError(f"{path} has {self.count:,} records but none with the key "
                                    f"{self.name(index)!r}: expected 0 to {self.count - 1}. Make it anew.")

    def read(self, index: int) -> bytes:
        with refused(f'{self.path}: record {self.name(index)!r}'):
            value = self.lmdb.get(self.key(index))
        if value is None:
            raise UserError(f"{self.path}: record {self.name(index)!r} is missing. Make the file anew.")
        return value


class FileStore(Store):
    """Files of a folder, in the order of their list."""

    def __init__(self, part: str, folder: str | Path, files: Sequence[str]):
        super().__init__(part, folder, len(files), np.array(files, 'S'))

    def read(self, index: int) -> bytes:
        path = Path(self.path, self.name(index))
        try:
            return file_content(path)
        except Unreadable as error:
            raise UserError(f"{path} {error}. Restore the file.") from None


# ----------------------------------------------------------------------------------------- entries and pixels

class _Rows:
    """Which image of which store a row is: the stores stand one after the other."""

    def __init__(self, stores: Sequence[Store]):
        self.stores = list(stores)
        self.ends = np.cumsum([len(s) for s in stores])

    def place(self, row: int) -> tuple[Store, int]:
        which = int(np.searchsorted(self.ends, row, 'right'))
        return self.stores[which], int(row) - int(self.ends[which] - len(self.stores[which]))


class Records(Sequence[Entry]):
    """The entries of images in stores, each made when asked for: a list of millions would cost gigabytes, and
    once more in every process that prepares batches. All are normal, of one class, without hash or patient.
    """

    def __init__(self, stores: Sequence[Store], class_name: str, rows: np.ndarray | None = None):
        """`rows` picks images by their place in the stores; None = all."""
        self.class_name, self._rows = class_name, _Rows(stores)
        self.rows = np.arange(self._rows.ends[-1]) if rows is None else rows         # (N,) int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Entry:
        store, place = self._rows.place(self.rows[index])
        return Entry(id=f'{store.part}/{store.name(place)}', path='', class_name=self.class_name, sha256='',
                     file_bytes=0, row=int(self.rows[index]), part=store.part)

    def ids(self) -> Iterator[str]:
        """The ids of all images of the stores, much faster than one by one."""
        return (f'{store.part}/{name}' for store in self._rows.stores for name in store.names())

    def at(self, indices: np.ndarray) -> 'Records':
        """Some of them."""
        return Records(self._rows.stores, self.class_name, self.rows[indices])

    def in_test(self) -> np.ndarray:
        """(N,) bool: whether the data set itself puts an image into the part `test`."""
        of_store = np.array([s.part == 'test' for s in self._rows.stores])
        return of_store[np.searchsorted(self._rows.ends, self.rows, 'right')]


def columns(entries: Sequence[Entry]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, row and mask row of each entry, (N,) int64 each."""
    if isinstance(entries, Records):
        return np.zeros(len(entries), np.int64), entries.rows, np.full(len(entries), -1)
    label, row, mask_row = (np.array([getattr(e, name) for e in entries], np.int64)
                            for name in ('label', 'row', 'mask_row'))
    return label, row, mask_row


@dataclass(frozen=True)
class Decoding:
    """What is done to the bytes of an image."""
    encoded: bool = False            # a file of FORMATS; else a square of RGB bytes, row by row, no header
    box: tuple[int, ...] = ()        # (left, top, right, bottom) is cut out first; () = all
    crop: bool = False               # the shorter side becomes S, a square is cut out; else it becomes S x S

    def open(self, data: bytes) -> Image.Image:
        """The image in `data`. Raises ValueError or, for damaged bytes, whatever Pillow does."""
        if self.encoded:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_pixels(image.width * image.height, len(data))
            image.load()
        else:
            side = math.isqrt(len(data) // 3)
            if 3 * side * side != len(data) or not data:
                raise ValueError(f'{len(data):,} bytes are no square of RGB pixels')
            image = Image.frombytes('RGB', (side, side), data)
        if self.box and (image.width < self.box[2] or image.height < self.box[3]):
            raise ValueError(f'{image.width} x {image.height} pixels, expected {self.box[2]} x {self.box[3]} '
                             f'or more')
        return image.crop(self.box) if self.box else image

    def fit(self, image: Image.Image, size: int, place: tuple[float, float] | None) -> Image.Image:
        """S x S pixels; `place`, two numbers in [0, 1), says what a crop cuts out; None = the center."""
        width, height = image.size
        if not self.crop:
            return _resized(image, size, size)
        shorter = min(width, height)
        image = _resized(image, size * width // shorter, size * height // shorter)
        room = image.width - size, image.height - size
        left, top = (round(r / 2) if place is None else int(p * (r + 1))
                     for r, p in zip(room, place or (0, 0), strict=True))
        return image.crop((left, top, left + size, top + size))


class LazyImages:
    """The images of stores as an array (N, C, S, S) uint8 that is decoded where it is indexed."""

    def __init__(self, stores: Sequence[Store], decoding: Decoding, channels: int, size: int):
        self._rows, self.decoding, self.channels, self.size = _Rows(stores), decoding, channels, size
        self.shape = (int(self._rows.ends[-1]), channels, size, size)

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        """(B, C, S, S). Raises UserError naming the file and the record that is damaged."""
        return self.cropped(rows, [None] * len(rows))

    def cropped(self, rows: Sequence[int], places: Sequence[tuple[float, float] | None]) -> np.ndarray:
        """The same, each image cut out at its own place (see Decoding.fit)."""
        return np.stack([self._image(row, place) for row, place in zip(rows, places, strict=True)])

    def _image(self, row: int, place: tuple[float, float] | None) -> np.ndarray:
        """(C, S, S) uint8."""
        store, index = self._rows.place(row)
        data = store.read(index)
        try:
            image = self.decoding.fit(self.decoding.open(data), self.size, place)
            x = np.asarray(image.convert(MODES[self.channels]))             # (S, S) or (S, S, C)
            return x.reshape(self.size, self.size, -1).transpose(2, 0, 1)
        except Exception as error:       # on damaged bytes decoders raise anything: SyntaxError, struct.error
            raise UserError(f"{store.path}: record {store.name(index)!r} cannot be decoded "
                            f"({reason(error)}). Make or fetch it anew.") from None


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """As torchvision.transforms.Resize does it: bilinear, antialiased."""
    if image.mode not in MODES.values():
        image = image.convert('RGB')                           # a palette cannot be interpolated
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)

