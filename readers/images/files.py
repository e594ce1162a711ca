"""Which files below a folder are images or masks; and which frames of DICOM files, pages of TIFF files and
pictures of animated PNG.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from readers.dicom import MAGIC, MAGIC_START, count_frames, is_dicom_file
from readers.images.masks import OVERLAY, are_of_masks, masks_beside
from readers.paths import FOREIGN, MASKS, Passed, files_below, first_bytes, pass_over

SUFFIXES = ('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.tif', '.tiff', '.bmp', '.dcm', '.dicom')
SIGNATURES = (b'\x89PNG', b'\xff\xd8\xff', b'II*\0', b'MM\0*', b'II+\0', b'MM\0+', b'BM')
OVERLAYS = 'pictures laid over images'


def is_image_file(path: str) -> bool:
    """Whether a file is looked at: by its suffix, or because it is DICOM, whose names often have none."""
    return path.lower().endswith(SUFFIXES) or (
        (first_bytes(path) or b'')[MAGIC_START:] == MAGIC and is_dicom_file(path))


def may_be_image(path: str) -> bool:
    """Whether a file has the suffix of an image, begins like one, or cannot be opened: it may be one."""
    start = None if path.lower().endswith(SUFFIXES) else first_bytes(path)
    return start is None or start.startswith(SIGNATURES) or is_dicom_file(path)


def image_files(root: Any, passed: Passed, below: str = '', wanted: Callable[[str], bool] = is_image_file,
                **search: Any) -> tuple[list[str], list[str]]:
    """The images and the masks in the folder `below` of `root`, found by the `search` of `files_below`. Other
    files go to `passed`, and those whose folder has the name of masks of something else, as `lung masks`.
    """
    names = files_below(root, passed, below, **search)
    found = [name for name in names if wanted(os.path.join(root, name))]
    pass_over(passed, FOREIGN, *({*names} - {*found}))
    beside, images, masks = masks_beside(found), [], []
    for name in found:
        of_masks = are_of_masks(name[len(below):].rpartition('/')[0])
        if not all(of_masks):
            pass_over(passed, MASKS, name)
        elif name in beside and OVERLAY.search(name):
            pass_over(passed, OVERLAYS, name)
        else:
            (masks if of_masks or name in beside else images).append(name)
    return images, masks


class Frame(NamedTuple):
    """One frame or page of a file, counted from 0 on."""
    path: str
    number: int


def num_pages(file: BinaryIO) -> int:
    """The pages of a TIFF file, the pictures of an animated PNG; 1 of any other or damaged one."""
    try:
        return getattr(Image.open(file, formats=('TIFF', 'PNG')), 'n_frames', 1)
    except Exception:                # decoding it will say what is wrong
        return 1


def places(path: str, frames: str) -> Iterator[tuple[str, str | Frame]]:
    """What is to be loaded of a file, as --frames says: what is added to its id, and the file or a Frame."""
    number = 1
    if frames != 'refuse' and os.path.isfile(path):              # else loading it will say what it is
        with contextlib.suppress(OSError), open(path, 'rb') as file:
            number = max(num_pages(file), count_frames(path))
    if number == 1:
        yield '', path
    elif frames == 'middle' or number > os.path.getsize(path):   # a false count: loading the middle one fails
        yield '', Frame(path, number // 2)
    else:
        yield from ((f'#{k + 1}', Frame(path, k)) for k in range(number))
