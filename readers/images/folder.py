"""Folders of image files (PNG, JPEG, TIFF, BMP, DICOM), one folder a class.

    <root>/<class>/images/*.png     or    <root>/<class>/*.png            any depth below
    <root>/<class>/masks/*.png      or    <root>/masks/<class>/*.png      same stem; not zero = anomalous

Every file is opened, decoded to its end, hashed and resized before anything else happens: a damaged file is
found here. Images that are kept elsewhere (in records of an LMDB) take the same way: `scan` is told how to
load one. H x W the size of a file, S the target size, C channels.
"""

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from readers.dicom import decode_dicom, is_dicom
from readers.duplicates import near_duplicates
from readers.source import (
    DTYPES,
    MOST_PIXELS,
    Entry,
    Source,
    Unreadable,
    cached,
    check_room,
    choose_classes,
    same_name,
)
from utils import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.dcm', '.dicom')
FORMATS = ('PNG', 'JPEG', 'TIFF', 'BMP')            # of Pillow; decided by content, not by suffix
MOST_BYTES = 8 * MOST_PIXELS                        # of a file: the largest image as doubles
DARK = 1 / 15                                       # 4095 of 65535 is 1/16
LUMA = np.array([0.299, 0.587, 0.114], np.float32)               # ITU-R BT.601
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


@dataclass(frozen=True)
class ImageFile:
    """A file found in a class folder; `mask` is '' where it has none. A record of an LMDB has no paths."""
    id: str
    path: str
    class_name: str
    mask: str = ''
    part: str = ''
    patient: str = ''


class Picture(NamedTuple):
    """What a file holds: image (H, W, C) and perhaps mask (H, W, 1), in [0, 1]; the file's hash and size."""
    image: np.ndarray
    mask: np.ndarray | None
    sha256: str
    num_bytes: int


# --------------------------------------------------------------------------------------------- one image file

def decode(data: bytes) -> np.ndarray:
    """The image in the bytes of a PNG, JPEG, TIFF, BMP or DICOM file: (H, W, C) float32 in [0, 1], C = 1 grey
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
    """(H, W, 1 or 3) as (H, W, channels): luma of a colour image, or grey three times over."""
    if x.shape[-1] == channels:
        return x
    return (x @ LUMA)[..., None] if channels == 1 else np.repeat(x, channels, axis=-1)


def to_size(x: np.ndarray, size: int, fit: str) -> np.ndarray:
    """(H, W, C) resized with antialiasing to (C, S, S) float32; `fit` says what happens to an image that is
    not square.

    pad      all of it, black borders to both sides
    crop     its centre
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
    dtype = DTYPES[depth]
    return np.rint(to_size(to_channels(x, channels), size, fit) * np.iinfo(dtype).max).astype(dtype)


def mask_to_integers(mask: np.ndarray, size: int, fit: str) -> np.ndarray:
    """(H, W, 1) as (1, S, S) uint8 0 or 1: anomalous where at least half of the pixel is. 0/1 and 0/255 files
    both do.
    """
    inside = (mask > mask.max() / 2).astype(np.float32)
    return (to_size(inside, size, fit) >= 0.5).astype(np.uint8)


def file_content(path: str | Path) -> bytes:
    """The bytes of a file. Raises Unreadable if there are none to be had, or too many."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Unreadable('is a folder')
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable('is a device or a pipe')                   # which may never end
        if status.st_size > MOST_BYTES:
            raise Unreadable(f'has {status.st_size:,} bytes, over {MOST_BYTES:,}: make it smaller')
        return Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(f'cannot be opened ({error.strerror or type(error).__name__})') from None


def read_image(path: str | Path, size: int, channels: int = 1, fit: str = 'pad') -> np.ndarray:
    """One image file ready for a model: (C, S, S) float32 in [0, 1]. Raises UserError naming the file."""
    try:
        return to_size(to_channels(decode(file_content(path)), channels), size, fit)
    except Unreadable as error:
        raise UserError(f"{path} {error}. Replace or remove the file.") from None


# ---------------------------------------------------------------------------------------------- class folders

def find_classes(folder: Path, normal: Sequence[str],
                 where: str) -> tuple[Path, dict[str, list[ImageFile]], list[str]]:
    """The classes in `folder`, or in the one folder below it that has a normal class: (root, {class: files},
    notes).

    Raises UserError if there is no folder, no normal class or a class folder without images; `where` says
    where the data set comes from.
    """
    if not folder.is_dir():
        raise UserError(f"--data: the folder {str(folder)!r} does not exist. {where}")

    def has_normal(root: Path) -> bool:
        return any(same_name(sub.name, name) for sub in _subfolders(root) for name in normal)

    roots = [folder] if has_normal(folder) else [sub for sub in _subfolders(folder) if has_normal(sub)]
    if len(roots) > 1:
        raise UserError(f"--data: {folder} holds several data sets: "
                        f"name one of {', '.join(r.name for r in roots)}.")
    if not roots:
        found = ', '.join(sub.name for sub in _subfolders(folder)) or 'no folders'
        raise UserError(f"--data: {folder} has no folder of normal images named {' or '.join(normal)}: "
                        f"found {found}. {where}")
    root, classes, notes = roots[0], {}, []
    for sub in _subfolders(root):
        if sub.name.lower() == 'masks':
            continue
        images = next((s for s in _subfolders(sub) if s.name.lower() == 'images'), sub)
        files = image_files(images)
        is_normal = any(same_name(sub.name, name) for name in normal)
        if not files and images is sub and next(sub.iterdir(), None) and not is_normal:
            notes.append(f"folder {sub.name} holds no {', '.join(SUFFIXES)} file: it is not taken for a "
                         f"class")
            continue
        if not files:
            raise UserError(f"class folder {images} holds no image ({', '.join(SUFFIXES)}): fill it or "
                            f"remove it.")
        classes[sub.name] = [_image_file(f, root, images, sub.name) for f in files]
    return root, classes, notes


def _image_file(path: Path, root: Path, images: Path, class_name: str) -> ImageFile:
    return ImageFile(id=path.relative_to(root).as_posix(), path=str(path), class_name=class_name)


def _subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without hidden ones."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(('.', '__MACOSX')))
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}): check its "
                        f"permissions.") from None


def image_files(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted, without hidden ones and those below a folder `masks`."""
    found = []

    def stop(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): check its "
                        f"permissions.")

    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [f for f in folders if f.lower() != 'masks' and not f.startswith('.')]
        found += [Path(place, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith('.')]
    return sorted(found)


def with_masks(root: Path, class_name: str, files: list[ImageFile]) -> list[ImageFile]:
    """The files of a class, each with its mask where one of the same stem is there."""
    masks = {}
    for folder in (root / 'masks' / class_name, root / class_name / 'masks'):
        if folder.is_dir():
            masks |= {_stem(p.relative_to(folder).as_posix()): str(p) for p in image_files(folder)}
    prefix = re.compile(re.escape(class_name) + r'/(images/)?', re.IGNORECASE)
    return [replace(f, mask=masks.get(_stem(prefix.sub('', f.id, count=1)), '')) for f in files]


def _stem(name: str) -> str:
    """'sub/scan1_mask.png' -> 'sub/scan1'."""
    return re.sub(r'_mask$', '', os.path.splitext(name)[0])


# ------------------------------------------------------------------------------------------------------- scan

def read_folder(folder: str | Path, *, normal: Sequence[str], normal_wanted: Sequence[str],
                anomalous: Sequence[str], size: int, channels: int, depth: int, fit: str, masks: bool,
                cache_dir: str, where: str) -> Source:
    """Every image of the chosen classes below `folder`, as (N, C, S, S) of `depth` 8 or 16 bits.

    `normal` are the names that a folder of normal images may have, `normal_wanted` the classes that the user
    took instead (may be empty). `masks` says that masks mark anomalies: a lung mask does not. Files that
    cannot be read are in Source.bad.
    """
    if not folder:
        raise UserError(f"--data is missing. {where}")
    root, classes, notes = find_classes(Path(folder), normal_wanted or normal, where)
    usual = normal_wanted or [c for c in classes if any(same_name(c, n) for n in normal)]
    usual, abnormal = choose_classes(tuple(classes), usual, anomalous, True, str(root))
    files = [f for c in usual for f in classes[c]]
    for c in abnormal:
        files += with_masks(root, c, classes[c]) if masks else classes[c]
    files.sort(key=lambda f: f.id)
    stamps = [[f.id, *stamp(f.path), *stamp(f.mask)] for f in files]
    key = {'root': str(root.resolve()), 'size': size, 'channels': channels, 'depth': depth, 'fit': fit,
           'normal': usual, 'anomalous': abnormal, 'files': stamps}

    def make(target: Path) -> dict:
        return {**scan(files, target, size=size, channels=channels, depth=depth, fit=fit),
                'normal_classes': usual, 'anomalous_classes': abnormal}

    source = cached(cache_dir, key, make)
    return replace(source, notes=notes + source.notes)


def stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of change; zeros where there is no file."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return 0, 0


def load_file(file: ImageFile) -> Picture:
    """An image file with its mask. Raises Unreadable."""
    data = file_content(file.path)
    image, mask = decode(data), None                                                     # (H, W, C)
    if file.mask:
        mask = load_mask(lambda: decode(file_content(file.mask)), os.path.basename(file.mask), image)
    return Picture(image, mask, hashlib.sha256(data).hexdigest(), len(data))


def load_mask(read: Callable[[], np.ndarray], name: str, image: np.ndarray) -> np.ndarray:
    """The mask (H, W, C) that `read` gives, as (H, W, 1). Raises Unreadable, also if the image has another
    size.
    """
    try:
        mask = to_channels(read(), 1)
    except Unreadable as error:
        raise Unreadable(f'has a mask {name} that {error}') from None
    if mask.shape[:2] != image.shape[:2]:
        raise Unreadable(f'is {image.shape[1]} x {image.shape[0]} pixels, its mask {name} {mask.shape[1]} x '
                         f'{mask.shape[0]}')
    return mask


def scan(files: list[ImageFile], target: Path, *, size: int, channels: int, depth: int, fit: str,
         load: Callable[[ImageFile], Picture] = load_file, border: int = 0, twins: bool = True) -> dict:
    """Loads every image, on all cores, into `target`/pixels.npy and masks.npy; returns the other fields of a
    Source.

    `border` black pixels go around images of `size`; near-duplicates are searched for if `twins`.
    Threads, not processes: decoding, hashing and resizing release Python's lock, and threads are safe beside
    CUDA, in spawned ranks and in notebooks, where new processes are not.
    """
    from tqdm import tqdm
    side = size + 2 * border
    inner = (slice(None), slice(border, border + size), slice(border, border + size))
    check_room(target, len(files) * (channels * depth // 8 + 1) * side * side)
    pixels = np.lib.format.open_memmap(target / 'pixels.npy', 'w+', DTYPES[depth],
                                       (len(files), channels, side, side))
    with_mask = {f.id: i for i, f in enumerate(f for f in files if f.mask)}
    mask_shape = (len(with_mask), 1, side, side)
    dark = []
    masks = np.lib.format.open_memmap(target / 'masks.npy', 'w+', np.uint8, mask_shape) if with_mask else None

    Image.init()                                 # all decoders, before threads ask for them at once

    def read(row: int) -> Entry | str:
        file = files[row]
        try:
            picture = load(file)
        except Unreadable as error:
            return str(error)
        if picture.image.max() < DARK:
            dark.append(file.id)
        pixels[row][inner] = to_integers(picture.image, size, channels, depth, fit)
        if picture.mask is not None:
            masks[with_mask[file.id]][inner] = mask_to_integers(picture.mask, size, fit)
        return Entry(id=file.id, path=file.path, class_name=file.class_name, sha256=picture.sha256,
                     file_bytes=picture.num_bytes, row=row, mask_row=with_mask.get(file.id, -1),
                     part=file.part, patient=file.patient)

    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        warnings.simplefilter('ignore')     # Pillow warns of odd metadata and of large images: no matter here
        results = list(tqdm(pool.map(read, range(len(files))), total=len(files), desc='reading images',
                            unit='image', disable=None, leave=False))
    notes = [f'{len(dark):,} files use less than 1/15 of their grey scale and look black, such as '
             f'{min(dark)}: '
             f'if they are 12-bit values in 16-bit files, rescale them'] if dark else []
    entries = [r for r in results if isinstance(r, Entry)]
    bad = [(f.id, r) for f, r in zip(files, results, strict=True) if isinstance(r, str)]
    ids = [e.id for e in entries]
    rows = [e.row for e in entries]
    pairs = near_duplicates(pixels if not bad else pixels[rows]) if twins else []
    pixels.flush()
    if masks is not None:
        masks.flush()
    return {'entries': entries, 'bad': bad, 'twins': [(ids[i], ids[j], c) for i, j, c in pairs],
            'notes': notes}


def cores() -> int:
    """The processor cores that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
