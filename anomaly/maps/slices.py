"""Axial, coronal and sagittal slices of a volume, and sheets of all slices of one view.

*S = (D, H, W) voxels, which run to the right, to the front and upwards (RAS+). Pictures follow the
radiological convention: the patient's right is on the left of the picture; the front is at the top, or on the
left of a sagittal one. n slices of h x w pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONVENTION = "radiological: the patient's right is on the left of the picture"


class View(NamedTuple):
    """Axes are those of *S; rows and columns of a picture run backwards."""
    name: str
    across: int              # the axis along which slices follow one another
    rows: int
    columns: int
    letters: str             # what is at the left, right, top and bottom


VIEWS = (View('axial', 2, 1, 0, 'RLAP'), View('coronal', 1, 2, 0, 'RLSI'), View('sagittal', 0, 2, 1, 'APSI'))


def stack(volume: np.ndarray, view: View) -> np.ndarray:
    """All slices of a volume (..., *S) as they are shown, in the order of the voxels: (..., n, h, w)."""
    axes = [axis - 3 for axis in (view.across, view.rows, view.columns)]
    return np.moveaxis(volume, axes, (-3, -2, -1))[..., ::-1, ::-1]


def cuts(volume: np.ndarray, place: Sequence[int]) -> list[np.ndarray]:
    """The slices (..., h, w) of every view through one voxel of a volume (..., *S)."""
    return [stack(volume, view)[..., place[view.across], :, :] for view in VIEWS]


def focus(anomaly_map: np.ndarray | None, size: Sequence[int]) -> tuple[int, ...]:
    """The voxel through which slices go: the maximum of the map (*S), or without a map, or in a constant one,
    the middle of `size`.
    """
    if anomaly_map is not None:
        values = np.nan_to_num(anomaly_map.astype(np.float64), nan=-np.inf)
        if values.min() < values.max():
            return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))
    return tuple(n // 2 for n in size)


def sheet_columns(number: int) -> int:
    """How many of `number` slices are in a row of a sheet that is about square."""
    return math.ceil(math.sqrt(number))


def sheet(slices: np.ndarray) -> np.ndarray:
    """Slices (n, h, w, ...) side by side in one picture, row by row; the rest is 0."""
    number, height, width, *rest = slices.shape
    columns = sheet_columns(number)
    full = np.pad(slices, [(0, -number % columns), *[(0, 0)] * (slices.ndim - 1)])
    rows = full.reshape(-1, columns, height, width, *rest).swapaxes(1, 2)       # (rows, h, columns, w, ...)
    return rows.reshape(-1, columns * width, *rest)
