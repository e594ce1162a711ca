"""Volumes of DICOM files: the slices in a folder, or the frames of a file, each at the place that it names.

The world of DICOM runs to the left and the back (LPS), as that of ITK. X, Y, Z voxels along the rows, along
the columns and from slice to slice.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers.dicom import count_frames, is_dicom_file, open_dataset, stored_values, take_groups, without_words
from readers.dicom_display import is_padding, rescaled
from readers.source import Unreadable
from readers.volumes.itk import TO_RAS
from storage.limits import excess

PLACE = ('ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'SeriesInstanceUID')
FRAME_PLACE = ('PlanePositionSequence', 'PlaneOrientationSequence', 'PixelMeasuresSequence',
               'PixelValueTransformationSequence')
UNEVEN, LEAST = 0.02, 0.02         # of the step from slice to slice, and mm: differences that rounding makes


def members(path: str | Path) -> list[str]:
    """The DICOM files of a folder of slices, sorted; of a file itself."""
    if not os.path.isdir(path):
        return [str(path)]
    return [str(Path(path, name)) for name in sorted(os.listdir(path)) if is_dicom_file(Path(path, name))]


def series_in(root: Path, names: Iterable[str]) -> tuple[list[str], set[str]]:
    """The volumes among files of these names relative to `root`: folders of slices, '.' for `root`, and files
    of several frames outside of these; and the names of all DICOM files.
    """
    slices = {name for name in names if is_dicom_file(root / name)}
    several = {name for name in slices if count_frames(root / name) > 1}
    folders = {os.path.dirname(name) or '.' for name in slices - several}
    return sorted(folders | {name for name in several if os.path.dirname(name) not in folders}), slices


class Slice(NamedTuple):
    """A slice: values (X, Y), padding nan; place of its first pixel (3,) and steps of its axes (2, 3), mm."""
    values: np.ndarray
    place: np.ndarray
    steps: np.ndarray
    series: str


def read_slices(data: bytes, number: int) -> Iterator[Slice]:
    """The slices in one of `number` DICOM files, in the unit of the modality. Raises Unreadable."""
    dataset = open_dataset(data, PLACE)
    if not dataset.PhotometricInterpretation.startswith('MONOCHROME'):
        raise Unreadable('is a DICOM file in color: volumes are gray')
    if words := excess(4 * dataset.Rows * dataset.Columns * dataset.NumberOfFrames * number):
        raise Unreadable(words)
    for frame in range(dataset.NumberOfFrames):
        take_groups(dataset, frame, FRAME_PLACE)
        if absent := [name for name in PLACE[:3] if not dataset.get(name)]:
            raise Unreadable(f'is a DICOM file without {absent[0]}')
        place, turn, size = (np.array(dataset.get(name), np.float64) for name in PLACE[:3])
        stored = stored_values(dataset, frame)                                             # (Y, X)
        values = np.where(is_padding(dataset, stored), np.nan, rescaled(dataset, stored)[0])
        yield Slice(values.T, place, turn.reshape(2, 3) * size[::-1, None], str(dataset.get(PLACE[3])))


def read_series(contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A volume from the bytes of its files: (X, Y, Z) float32, and its affine (4, 4), index to mm, RAS+.

    Raises Unreadable if their slices are no straight stack.
    """
    with without_words():
        slices = [piece for data in contents for piece in read_slices(data, len(contents))]
        slices, step = stacked(slices)
    values, affine = np.stack([piece.values for piece in slices], axis=-1), np.eye(4)
    affine[:3] = np.column_stack([*slices[0].steps, step, slices[0].place])
    return np.where(np.isnan(values), np.nanmin(values), values).astype(np.float32), TO_RAS @ affine


def stacked(slices: Sequence[Slice]) -> tuple[list[Slice], np.ndarray]:
    """The slices in their order along the normal, and the step (3,) from one to the next in mm. Raises
    Unreadable for slices that are no straight, even stack.
    """
    first = slices[0]
    if len(slices) == 1:
        raise Unreadable('holds a single DICOM slice: a volume has two or more')
    if (number := len({piece.series for piece in slices})) > 1:
        raise Unreadable(f'holds {number} DICOM series: put each into a folder of its own')
    if any(piece.values.shape != first.values.shape or not np.allclose(piece.steps, first.steps, atol=1e-3)
           for piece in slices):
        raise Unreadable('holds DICOM slices of different sizes, spacings or directions')
    normal = np.cross(*first.steps)
    normal /= np.linalg.norm(normal)
    slices = sorted(slices, key=lambda piece: piece.place @ normal)
    moves = np.diff([piece.place for piece in slices], axis=0)                             # (Z - 1, 3)
    gaps = moves @ normal
    usual, rounding = float(np.median(gaps)), max(LEAST, UNEVEN * float(np.median(gaps)))
    if gaps.min() < LEAST:
        raise Unreadable('holds several DICOM slices at one place: take apart its phases or echoes')
    if gaps.max() - usual > rounding:
        raise Unreadable(f'lacks a DICOM slice: they are {usual:.4g} mm apart, two of them '
                         f'{gaps.max():.4g} mm')
    if usual - gaps.min() > rounding:
        raise Unreadable(f'holds DICOM slices unevenly apart, {gaps.min():.4g} to {gaps.max():.4g} mm')
    if (aside := math.dist(moves.mean(0), gaps.mean() * normal)) > rounding:
        raise Unreadable(f'is a DICOM series with a tilted gantry: from slice to slice the image moves by '
                         f'{aside:.3g} mm aside. Resample it to a straight grid')
    return slices, moves.mean(0)
