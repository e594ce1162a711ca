"""smallNORB as its page publishes it: `smallnorb-*-dat.mat` and `-cat.mat` of each part, packed or not.

A file is a matrix, little-endian: a magic number, the number of dimensions D, max(3, D) dimensions (those
beyond D are 1), and the values. `dat` (N, 2, 96, 96) holds each toy as the left and the right camera see it,
`cat` (N,) its category. The left image is taken: the right one is nearly the same, and would lie in another
part than its twin.
"""

import math
from pathlib import Path

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.published.arrays import Parts, find_files, read_arrays, read_bytes
from readers.source import Source
from utils import UserError

NAMES = {'train': 'smallnorb-5x46789x9x18x6x2x96x96-training',
         'test': 'smallnorb-5x01235x9x18x6x2x96x96-testing'}
KINDS = ('dat', 'cat')
TYPES = {0x1E3D4C55: np.dtype('u1'), 0x1E3D4C54: np.dtype('<i4')}      # by magic number
CLASSES = ('animal', 'human', 'airplane', 'truck', 'car')
LEFT = 0


def read_smallnorb(config: ReaderConfig, row: DataSet) -> Source:
    """The left images of the chosen categories, 'animal' to 'car'."""
    names = [f'{NAMES[part]}-{kind}.mat' for part in row.parts for kind in KINDS]
    files = find_files(config, row, names, ('', 'smallnorb', 'SmallNORB', 'raw'))

    def load() -> Parts:
        return {part: read_part(*paths)
                for part, *paths in zip(row.parts, files[::2], files[1::2], strict=True)}

    return read_arrays(config, row, 'smallNORB', load, files, CLASSES)


def read_part(images: Path, categories: Path) -> tuple[np.ndarray, list[str]]:
    """The left images (N, 96, 96) uint8 and their categories. Raises UserError naming a damaged file."""
    x, labels = read_matrix(images), read_matrix(categories).reshape(-1)           # (N, 2, H, W), (N,)
    if x.ndim != 4 or x.dtype != np.uint8 or len(labels) != len(x):
        raise UserError(f"{images} holds {x.dtype} {x.shape} and {categories.name} {labels.shape}: they do "
                        f"not belong together, fetch both again.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise UserError(f"{categories} has the categories {labels.min()} to {labels.max()}, expected 0 to "
                        f"{len(CLASSES) - 1}: fetch it again.")
    return x[:, LEFT], [CLASSES[label] for label in labels.tolist()]


def read_matrix(path: Path) -> np.ndarray:
    """A matrix of bytes or of 32-bit integers. Raises UserError naming the file if it is not whole."""
    data = read_bytes(path)
    head = np.frombuffer(data[:8], '<u4') if len(data) >= 8 else [0, 0]
    kind, dimensions = TYPES.get(int(head[0])), int(head[1])
    start = 8 + 4 * max(3, dimensions)
    if kind is None or not 1 <= dimensions <= 4 or len(data) < start:
        raise UserError(f"{path} is not a matrix file of bytes or integers: fetch it again.")
    shape = np.frombuffer(data[8:start], '<i4').tolist()[:dimensions]
    expected = math.prod(shape) * kind.itemsize
    if len(data) - start != expected:
        raise UserError(f"{path} has {len(data) - start} bytes of data, expected {expected}: fetch it again.")
    return np.frombuffer(data, kind, offset=start).reshape(shape)
