"""Three orthogonal slices of a volume, as radiologists look at them, and sheets of all slices of a direction.

*S = (D, H, W) voxels, which run to the right, to the front and upwards (RAS+). Pictures follow the
radiological convention: one looks at the patient from the feet and from the front, so that the right is on
the left of the picture; the front is at the top, or on the left of a sagittal one. n slices of h x w pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONVENTION = "radiological: the patient's right is on the left of the picture"


class View(NamedTuple):
    """One direction to look along. Axes are those of *S; rows and columns of a picture run backwards."""
    name: str
    across: int              # the axis along which slices follow one another
    rows: int
    columns: int
    letters: str             # what is at the left, right, top and bottom


VIEWS = (View('axial', 2, 1, 0, 'RLAP'), View('coronal', 1, 2, 0, 'RLSI'), View('sagittal', 0, 2, 1, 'APSI'))


def stack(volume: np.ndarray, view: View) -> np.ndarray:
    """All slices of a volume (..., *S), as they are shown: (..., n, h, w), in the order of the voxels."""
    first = volume.ndim - 3
    axes = (*range(first), *(first + axis for axis in (view.across, view.rows, view.columns)))
    return volume.transpose(axes)[..., ::-1, ::-1]


def cuts(volume: np.ndarray, place: Sequence[int]) -> list[np.ndarray]:
    """The slices (..., h, w) of every view through one voxel of a volume (..., *S)."""
    return [stack(volume, view)[..., place[view.across], :, :] for view in VIEWS]


def focus(anomaly_map: np.ndarray | None, size: Sequence[int]) -> tuple[int, ...]:
    """The voxel that slices go through: the largest of the map (*S); the middle of `size` without a map, or
    if the map is the same everywhere.
    """
    if anomaly_map is not None:
        values = np.nan_to_num(anomaly_map.astype(np.float64), nan=-np.inf)
        if values.min() < values.max():
            return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))
    return tuple(n // 2 for n in size)


def sheet_columns(number: int) -> int:
    """Slices in a row of a sheet of so many, which has about as many rows."""
    return math.ceil(math.sqrt(number))


def sheet(slices: np.ndarray) -> np.ndarray:
    """Slices (n, h, w, ...) side by side in one picture, row by row; what is left over is 0."""
    number, height, width, *rest = slices.shape
    columns = sheet_columns(number)
    rows = math.ceil(number / columns)
    full = np.zeros((rows * columns, height, width, *rest), slices.dtype)
    full[:number] = slices
    joined = full.reshape(rows, columns, height, width, *rest).swapaxes(1, 2)
    return joined.reshape(rows * height, columns * width, *rest)
