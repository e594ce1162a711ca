"""DICOM files of several frames, TIFF files of several pages, animated PNG: which of them are images."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL import Image

from readers.dicom import count_frames


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
    if frames != 'refuse':
        try:
            with open(path, 'rb') as file:
                number = max(num_pages(file), count_frames(path))
        except OSError:              # loading it will say so
            pass
    if number == 1:
        yield '', path
    elif frames == 'middle':
        yield '', Frame(path, number // 2)
    else:
        yield from ((f'#{k + 1}', Frame(path, k)) for k in range(number))
