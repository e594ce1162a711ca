"""smallNORB as its page publishes it: `smallnorb-*-dat.mat` and `-cat.mat` of each part, packed or not.

A file is a matrix, little-endian: a magic number, the number of dimensions D, max(3, D) dimensions (those
beyond D are 1), and the values. `dat` (N, 2, 96, 96) holds each toy as the left and the right camera see it,
`cat` (N,) its category. The left image is taken: the right one is nearly the same, and would lie in another
part than its twin.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from readers.published.arrays import Parts, read_arrays
from readers.source import Source
from utils import UserError

NAMES = {'train': 'smallnorb-5x46789x9x18x6x2x96x96-training',
         'test': 'smallnorb-5x01235x9x18x6x2x96x96-testing'}
KINDS = ('dat', 'cat')
TYPES = {0x1E3D4C55: np.dtype('u1'), 0x1E3D4C54: np.dtype('<i4')}      # by magic number
CLASSES = ('animal', 'human', 'airplane', 'truck', 'car')
LEFT = 0


def read_smallnorb(folder: str | Path, *, where: str, parts: Sequence[str], **options: object) -> Source:
    """The left images of the chosen categories, 'animal' to 'car'; `options` are those of read_arrays.

    Only the files of `parts` are looked for.
    """
    if not folder:
        raise UserError(f"--data is missing. {where}")
    names = [f'{NAMES[part]}-{kind}.mat' for part in parts for kind in KINDS]
    places = (Path(folder), Path(folder, 'smallnorb'), Path(folder, 'SmallNORB'), Path(folder, 'raw'))
    base = next((p for p in places if all(_path(p, name) for name in names)), None)
    if base is None:
        raise UserError(f"--data: {str(folder)!r} has no {', '.join(names)} (or the same with .gz). {where}")

    def load() -> Parts:
        return {part: read_part(*(_path(base, f'{NAMES[part]}-{kind}.mat') for kind in KINDS))
                for part in parts}

    return read_arrays('smallNORB', load, [_path(base, name) for name in names], classes=CLASSES, **options)


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
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
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


def _path(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)
