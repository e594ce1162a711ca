"""One image file (PNG, JPEG, TIFF, BMP, DICOM) as a model sees it.

H x W the size of the file, S the size that is asked for, C channels.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from readers.config import DataSet, ReaderConfig
from readers.dicom import decode_dicom, is_dicom
from readers.images.files import Frame, image_files, may_be_image, num_pages, places
from readers.images.masks import Box
from readers.items import Loaded
from readers.paths import FOREIGN, MASKS, Found, Passed, file_content, pass_over, printable, relative_name
from readers.source import Unreadable, check_pixels, decoding, to_integers
from readers.split import count
from utils import UserError

FORMATS = ('PNG', 'JPEG', 'TIFF', 'BMP')            # of Pillow; decided by content, not by suffix
DARK = 1 / 15                                       # 4095 of 65535 is 1/16
DARK_NOTE = ('with less than 1/15 of the gray scale in use look black (if these are 12-bit values in 16-bit '
             'files, rescale them)')
CONSTANT = 'of a single gray level, with nothing to be seen in them'
NARROW = ('with less than 1/15 of the gray scale in use, but for 1 % of the pixels, look empty (if a few '
          'pixels or a wrong window take the scale, correct the files)')
OUTLIERS = 0.005                                    # of the pixels, at either end
FIRST_PAGE = 'of several pages, of which the first is taken (--frames each or middle takes others)'
CORNERS_MASK = 'with a mask that marks all four corners (is its background 0?)'
EMPTY_MASK = 'with a mask that marks nothing at this size'
Image.MAX_IMAGE_PIXELS = None                       # check_pixels takes its place, whose limit can be raised
LUMA = np.array([0.299, 0.587, 0.114], np.float32)               # ITU-R BT.601
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
TIFF_COMPRESSION, TIFF_JPEG = 259, 7
LOSSY = 0.25                                        # of the largest value of a JPEG mask: less is background


def decode(data: bytes, frame: int | None = None) -> np.ndarray:
    """The image in the bytes of a PNG, JPEG, TIFF, BMP or DICOM file: (H, W, C) float32 in [0, 1], C = 1 gray
    or 3 RGB; of several frames or pages this one, from 0 on. Of DICOM see `decode_dicom`.

    Full scale is white: 255, 65535, or what the bits of the TIFF allow. Integers beyond 16 bits and floats
    outside [0, 1] have no full scale: they are stretched from their smallest to their largest value.
    Transparent pixels show black. EXIF orientation is applied. Raises Unreadable.
    """
    if is_dicom(data):
        return decode_dicom(data, frame)
    return _decoded(data, _values, frame)


def decode_mask(data: bytes, frame: int | None = None) -> np.ndarray:
    """What the bytes of a mask file mark: (H, W, 1) bool, True where it is not background. Raises Unreadable.

    Background is 0, black, or transparent. A drawing that is black on transparent ground, and a palette
    without black, count by what is visible and by index 0. Lossy files leave gray around what they mark:
    of JPEG, what is above a quarter of the largest value counts.
    """
    if is_dicom(data):
        return (decode_dicom(data, frame) > 0).any(-1, keepdims=True)
    return _decoded(data, _marked, frame)[..., None]


def _decoded(data: bytes, read: Callable[[Image.Image, dict[int, object]], np.ndarray],
             frame: int | None) -> np.ndarray:
    """What `read` makes of the picture in the bytes of a file, and of its TIFF tags. Raises Unreadable."""
    if not data:
        raise Unreadable('is empty (0 bytes)')
    with decoding():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise Unreadable(f'is not a {", ".join(FORMATS)} or DICOM image') from None
        check_pixels(image.width * image.height, len(data))
        if image.format == 'PNG':
            image.verify()                       # checksums, and that the file goes on to its end
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if frame:
            if frame >= (pages := getattr(image, 'n_frames', 1)):
                raise Unreadable(f'has {count(pages, "page")}: there is no page {frame + 1}')
            image.seek(frame)
            check_pixels(image.width * image.height, len(data))              # pages differ in size
        tags = dict(getattr(image, 'tag_v2', {}))
        if image.format == 'JPEG':
            tags[TIFF_COMPRESSION] = TIFF_JPEG
        image.load()
        return read(ImageOps.exif_transpose(image), tags)


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


def _marked(image: Image.Image, tags: dict[int, object]) -> np.ndarray:
    """Where a mask is not background: (H, W) bool."""
    if tags.get(TIFF_COMPRESSION) == TIFF_JPEG:
        x = np.asarray(image.convert('L'), np.int32)
        return x > x.max() * LOSSY
    if image.mode in ('1', 'L', 'I', 'F') or image.mode.startswith('I;16'):
        return np.asarray(image) != 0
    rgba = np.asarray(image.convert('RGBA'))                                    # (H, W, 4)
    visible = rgba[..., 3] > 0
    marked = visible & (rgba[..., :3] > 0).any(-1)
    if not marked.any() and not visible.all():
        marked = visible                                        # black on transparent ground
    if image.mode == 'P' and (marked.all() or not marked.any()):
        index = np.asarray(image)
        marked = index != 0 if (index == 0).any() else marked
    return marked


def range_notes(image: np.ndarray, pixels: np.ndarray) -> Iterator[str]:
    """What looks wrong in an image (H, W, C) in [0, 1], or in the `pixels` (C, S, S) that it became."""
    low, high = image.min(), image.max()
    if low == high:
        yield CONSTANT
    if high < DARK:
        yield DARK_NOTE
    elif low < high:
        few = int(OUTLIERS * pixels.size)
        levels = np.partition(pixels, (few, pixels.size - 1 - few), axis=None)
        if int(levels[-1 - few]) - int(levels[few]) < DARK * np.iinfo(pixels.dtype).max:
            yield NARROW


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


def from_size(values: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    """The inverse of `to_size`: (S, S) -> (height, width), nearest neighbors; 0 where a crop cut off."""
    size = len(values)
    side = max(height, width) if fit == 'pad' else min(height, width)
    steps = (side, side) if fit != 'stretch' else (height, width)
    places = [np.floor((np.arange(n) + 0.5 - (n - step) / 2) * size / step).astype(int)
              for n, step in zip((height, width), steps)]
    inside = [(place >= 0) & (place < size) for place in places]
    rows, columns = (place.clip(0, size - 1) for place in places)
    return np.where(inside[0][:, None] & inside[1], values[rows[:, None], columns], values.dtype.type(0))


def load_masks(masks: Sequence[str | Box], shape: Sequence[int],
               frame: int | None = None) -> np.ndarray | None:
    """What any of these marks of an image (H, W, ...): (H, W, 1) bool; None if none. Raises Unreadable."""
    marked = [mask.marked(shape) if isinstance(mask, Box) else
              load_mask(lambda mask=mask: decode_mask(file_content(mask), frame), os.path.basename(mask),
                        shape) for mask in masks]
    return np.any(marked, axis=0) if marked else None


def load_mask(read: Callable[[], np.ndarray], name: str, shape: Sequence[int]) -> np.ndarray:
    """The mask (H, W, 1) bool that `read` gives. Raises Unreadable if it is not as large as the image."""
    try:
        mask = read()
    except Unreadable as error:
        raise Unreadable(f'has a mask {name} that {error}') from None
    if mask.shape[:2] != tuple(shape[:2]):
        raise Unreadable(f'is {shape[1]} x {shape[0]} pixels, its mask {name} {mask.shape[1]} x '
                         f'{mask.shape[0]}')
    return mask


def png_bytes(values: np.ndarray, optimize: bool = True) -> int:
    """Bytes of an image (C, *S), uint8 or uint16, as a PNG: the smallest, or as most programs write it.

    Three channels of 8 bits are stored as RGB. Other channels, and the slices of volumes, are stacked in one
    gray image.
    """
    rgb = values.ndim == 3 and len(values) == 3 and values.dtype == np.uint8
    image = Image.fromarray(np.moveaxis(values, 0, -1) if rgb else values.reshape(-1, values.shape[-1]))
    file = io.BytesIO()
    image.save(file, 'PNG', optimize=optimize)
    return file.tell()


def has_pages(data: bytes) -> bool:
    """Whether the bytes of a file are those of several pages or pictures."""
    return not is_dicom(data) and num_pages(io.BytesIO(data)) > 1


@dataclass(frozen=True)
class ImageLoader:
    """From an image file, new or not, to S x S pixels of `depth` 8 or 16 bits in a black border."""
    size: int                            # S, without the border
    channels: int
    depth: int
    fit: str = 'pad'
    border: int = 0
    frames: str = 'refuse'                # what becomes of files of several: see FrameConfig

    @classmethod
    def of(cls, config: ReaderConfig, row: DataSet) -> 'ImageLoader':
        """As the flags say."""
        border = row.border(config)
        return cls((config.image_size or row.size) - 2 * border, config.channels or row.channels,
                   config.depth, config.fit, border, config.frames)

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.size + 2 * self.border
        return self.channels, side, side

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """All files below a folder but for the folder `without`, masks and files of other kinds, or the one
        file; frames as --frames says. Raises UserError if there is nothing.
        """
        root, passed, unlisted = Path(path), Passed(), []
        if not os.path.lexists(root):
            raise UserError(f"--data: {root} does not exist. Give a folder of images, or an image file.")
        names = [root.name]
        if root.is_dir():
            names, masks = image_files(root, passed, wanted=may_be_image, without=without,
                                       unlisted=lambda error: unlisted.append(error.filename))
            pass_over(passed, MASKS, *masks)
            names = names or passed.pop(FOREIGN, [])               # loading them says why they are no images
            # A folder that may not be listed takes the place of its files.
            names = sorted([*names, *(relative_name(folder, root) for folder in unlisted)])
        if not names:
            raise UserError(f"--data: there is no file below {root}. Give a folder of images, or an image "
                            f"file.")
        folder = root if root.is_dir() else root.parent
        return Found({printable(name) + mark: place for name in names
                      for mark, place in places(str(folder / name), self.frames)}, passed)

    def load(self, file: str | Frame, masks: Sequence[str | Box] = ()) -> Loaded:
        """An image file, or one of its frames, and those of its masks. Raises Unreadable."""
        path, frame = file if isinstance(file, Frame) else (file, None)
        data = file_content(path)
        image = decode(data, frame)                                                      # (H, W, C)
        mask = load_masks(masks, image.shape, frame)
        notes = [FIRST_PAGE] * (frame is None and has_pages(data))
        return self.finish(image, mask, hashlib.sha256(data).hexdigest(), len(data), notes)

    def finish(self, image: np.ndarray, mask: np.ndarray | None, sha256: str, num_bytes: int,
               notes: Sequence[str] = ()) -> Loaded:
        """An image (H, W, C) in [0, 1] and its mask (H, W, 1) bool."""
        pixels = to_size(to_channels(image, self.channels), self.size, self.fit)           # (C, S, S)
        pixels = to_integers(pixels, self.depth)
        notes = [*range_notes(image, pixels), *notes]
        if mask is not None:
            corners = mask[[0, 0, -1, -1], [0, -1, 0, -1]].all()
            shares = to_size(mask.astype(np.float32), self.size, self.fit)
            mask = self.framed((shares >= 0.5).astype(np.uint8))
            notes += [CORNERS_MASK] * bool(corners) + [EMPTY_MASK] * (not mask.any())
        return Loaded(self.framed(pixels), mask, sha256, num_bytes, repairs=tuple(notes))

    def framed(self, x: np.ndarray) -> np.ndarray:
        """x (C, S, S) with its border."""
        around = (self.border, self.border)
        return np.pad(x, ((0, 0), around, around)) if self.border else x
