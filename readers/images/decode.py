"""One image file (PNG, JPEG, TIFF, BMP, DICOM) as a model sees it.

H x W the size of the file, S the size that is asked for, C channels.
"""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from readers.config import DataSet, ReaderConfig
from readers.dicom import decode_dicom, is_dicom
from readers.items import Loaded
from readers.paths import Found, file_content, find_files
from readers.source import DTYPES, MOST_PIXELS, Unreadable

SUFFIXES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.dcm', '.dicom')
FORMATS = ('PNG', 'JPEG', 'TIFF', 'BMP')            # of Pillow; decided by content, not by suffix
DARK = 1 / 15                                       # 4095 of 65535 is 1/16
DARK_NOTE = ('with less than 1/15 of the gray scale in use look black (if these are 12-bit values in 16-bit '
             'files, rescale them)')
LUMA = np.array([0.299, 0.587, 0.114], np.float32)               # ITU-R BT.601
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def decode(data: bytes) -> np.ndarray:
    """The image in the bytes of a PNG, JPEG, TIFF, BMP or DICOM file: (H, W, C) float32 in [0, 1], C = 1 gray
    or 3 RGB. Of DICOM see `decode_dicom`.

    Full scale is white: 255, 65535, or what the bits of the TIFF allow. Integers beyond 16 bits and floats
    outside [0, 1] have no full scale: they are stretched from their smallest to their largest value.
    Transparent pixels show black. EXIF orientation is applied; of several pages the first is read. Raises
    Unreadable.
    """
    if not data:
        raise Unreadable('is empty (0 bytes)')
    if is_dicom(data):
        return decode_dicom(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Unreadable(f'has {image.width} x {image.height} pixels, over {MOST_PIXELS:,}: make it '
                             f'smaller')
        if image.format == 'PNG':
            image.verify()                       # checksums, and that the file goes on to its end
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        tags = dict(getattr(image, 'tag_v2', {}))
        image.load()
        return _values(ImageOps.exif_transpose(image), tags)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(f'is not a {", ".join(FORMATS)} or DICOM image') from None
    except Image.DecompressionBombError:
        raise Unreadable(f'has more than {MOST_PIXELS:,} pixels: make it smaller') from None
    except Exception as error:           # on damaged bytes decoders raise anything: SyntaxError, struct.error
        raise Unreadable(f'cannot be decoded '
                         f'({" ".join(str(error).split()) or type(error).__name__})') from None


def _values(image: Image.Image, tags: dict[int, object]) -> np.ndarray:
    """The pixels of a decoded image: (H, W, C) float32 in [0, 1]. `tags` are those of a TIFF."""
    if image.mode.startswith('I;16') or image.mode in ('I', 'F'):
        x = np.asarray(image).astype(np.float64)
        if not np.isfinite(x).all():
            raise Unreadable('has pixels that are not finite')
        bits = tags.get(TIFF_BITS, 16)
        bits = bits[0] if isinstance(bits, tuple) else bits
        full = 1.0 if image.mode == 'F' else 2.0 ** min(bits, 16) - 1
        low, high = x.min(), x.max()
        if low < 0 or high > full:
            x, full = x - low, max(high - low, 1e-12)
        x = x / full
        # Pillow turns 8-bit WhiteIsZero round, 16-bit not
        x = 1 - x if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else x
        return x.astype(np.float32)[..., None]
    transparent = 'transparency' in image.info or image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa')
    if transparent:
        rgba = np.asarray(image.convert('RGBA'), np.float32) / 255              # (H, W, 4)
        return rgba[..., :3] * rgba[..., 3:]
    if image.mode in ('1', 'L'):
        return np.asarray(image.convert('L'), np.float32)[..., None] / 255
    return np.asarray(image.convert('RGB'), np.float32) / 255


def to_channels(x: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 1 or 3) as (H, W, channels): luma of a color image, or gray three times over."""
    if x.shape[-1] == channels:
        return x
    return (x @ LUMA)[..., None] if channels == 1 else np.repeat(x, channels, axis=-1)


def to_size(x: np.ndarray, size: int, fit: str) -> np.ndarray:
    """(H, W, C) resized with antialiasing to (C, S, S) float32; `fit` says what happens to an image that is
    not square.

    pad      all of it, black borders to both sides
    crop     its center
    stretch  all of it, out of proportion
    """
    height, width = x.shape[:2]
    new_height = new_width = size
    box = (0, 0, width, height)
    if fit == 'pad':
        longest = max(height, width)
        new_height, new_width = max(1, round(size * height / longest)), max(1, round(size * width / longest))
    elif fit == 'crop':
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    out = np.zeros((x.shape[2], size, size), np.float32)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    for channel, plane in zip(out, np.moveaxis(x, 2, 0), strict=True):
        image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        channel[top:top + new_height, left:left + new_width] = image.resize(
            (new_width, new_height), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return out


def to_integers(x: np.ndarray, size: int, channels: int, depth: int, fit: str) -> np.ndarray:
    """(H, W, C) in [0, 1] as a model's image: (channels, S, S) uint8 or uint16, of `depth` 8 or 16 bits."""
    dtype = np.dtype(DTYPES[depth])
    return np.rint(to_size(to_channels(x, channels), size, fit) * np.iinfo(dtype).max).astype(dtype)


def mask_to_integers(mask: np.ndarray, size: int, fit: str) -> np.ndarray:
    """(H, W, 1) as (1, S, S) uint8 0 or 1: anomalous where at least half of the pixel is. 0/1 and 0/255 files
    both do.
    """
    inside = (mask > mask.max() / 2).astype(np.float32)
    return (to_size(inside, size, fit) >= 0.5).astype(np.uint8)


def load_mask(read: Callable[[], np.ndarray], name: str, image: np.ndarray) -> np.ndarray:
    """The mask (H, W, C) that `read` gives, as (H, W, 1). Raises Unreadable if it cannot be read or has
    another size than the image.
    """
    try:
        mask = to_channels(read(), 1)
    except Unreadable as error:
        raise Unreadable(f'has a mask {name} that {error}') from None
    if mask.shape[:2] != image.shape[:2]:
        raise Unreadable(f'is {image.shape[1]} x {image.shape[0]} pixels, its mask {name} {mask.shape[1]} x '
                         f'{mask.shape[0]}')
    return mask


@dataclass(frozen=True)
class ImageLoader:
    """What is done to every image file, whether of a run's data set or new: S x S pixels of `depth` 8 or 16
    bits and a black border around them.
    """
    size: int                            # S, without the border
    channels: int
    depth: int
    fit: str = 'pad'
    border: int = 0

    @classmethod
    def of(cls, config: ReaderConfig, row: DataSet) -> 'ImageLoader':
        """As the flags say."""
        border = row.border(config)
        return cls((config.image_size or row.size) - 2 * border, config.channels or row.channels,
                   config.depth, config.fit, border)

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.size + 2 * self.border
        return self.channels, side, side

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """All files below a folder but for the folder `without`, or the one file."""
        return find_files(path, without)

    def load(self, path: str, mask_path: str = '') -> Loaded:
        """An image file, and that of its mask. Raises Unreadable."""
        data = file_content(path)
        image, mask = decode(data), None                                                 # (H, W, C)
        if mask_path:
            mask = load_mask(lambda: decode(file_content(mask_path)), os.path.basename(mask_path), image)
        return self.finish(image, mask, hashlib.sha256(data).hexdigest(), len(data))

    def finish(self, image: np.ndarray, mask: np.ndarray | None, sha256: str, num_bytes: int) -> Loaded:
        """An image (H, W, C) and its mask (H, W, 1), both in [0, 1]."""
        around = ((0, 0), (self.border, self.border), (self.border, self.border))
        pixels = np.pad(to_integers(image, self.size, self.channels, self.depth, self.fit), around)
        if mask is not None:
            mask = np.pad(mask_to_integers(mask, self.size, self.fit), around)
        return Loaded(pixels, mask, sha256, num_bytes, repairs=(DARK_NOTE,) if image.max() < DARK else ())
