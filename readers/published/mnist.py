"""MNIST in torchvision's layout, `<data>/MNIST/raw/*-ubyte` or `*-ubyte.gz`, read as it is; FashionMNIST and
KMNIST, which have the same files in folders of their own; and StackedMNIST.

torchvision itself reads only the unpacked files and has to be installed; the packed ones in a read-only
folder do here.
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

FILES = {'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
         'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')}
IDX_UNSIGNED_BYTE = 8                 # third byte of an IDX file; the fourth is the number of dimensions
CLASSES = {'MNIST': tuple('0123456789'),
           'FashionMNIST': ('T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker',
                            'Bag', 'Ankle boot'),
           'KMNIST': ('o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo')}
STACK_SEEDS = {'train': 0, 'test': 1}       # the published ones are drawn anew every run


def read_mnist(folder: str | Path, *, where: str, parts: Sequence[str], name: str = 'MNIST',
               **options: object) -> Source:
    """The images of the chosen classes of MNIST or one of its like, a name of CLASSES.

    Only the files of `parts` are looked for; `options` are those of read_arrays.
    """
    paths = _find(folder, name, parts, where)
    return read_arrays(name, lambda: _digits(paths, CLASSES[name]),
                       [p for pair in paths.values() for p in pair], classes=CLASSES[name], **options)


def read_stacked_mnist(folder: str | Path, *, where: str, parts: Sequence[str], **options: object) -> Source:
    """Three random digits of a part as red, green and blue, twice as many as digits; '407' is a class.

    Which three is fixed: they come from a seed, and so the data set is the same in every run.
    """
    paths = _find(folder, 'MNIST', parts, where)

    def load() -> Parts:
        digits = _digits(paths, CLASSES['MNIST'])
        return {part: stack(*digits[part], seed=STACK_SEEDS[part]) for part in digits}

    return read_arrays('StackedMNIST', load, [p for pair in paths.values() for p in pair],
                       classes=[f'{i:03d}' for i in range(1000)], **options)


def stack(images: np.ndarray, names: list[str], seed: int) -> tuple[np.ndarray, list[str]]:
    """2N random triples of the images (N, H, W) as (2N, H, W, 3), each named by the names of its three."""
    # RandomState, because its numbers are promised never to change.
    triples = np.random.RandomState(seed).randint(0, len(images), (2 * len(images), 3))
    return images[triples].transpose(0, 2, 3, 1), [''.join(names[i] for i in t) for t in triples]


def _find(folder: str | Path, name: str, parts: Sequence[str], where: str) -> dict[str, list[Path]]:
    """The files of images and of labels of each of `parts`."""
    if not folder:
        raise UserError(f"--data is missing. {where}")
    wanted = [file for part in parts for file in FILES[part]]
    places = (Path(folder, name, 'raw'), Path(folder, 'raw'), Path(folder))
    raw = next((p for p in places if all(_path(p, file) for file in wanted)), None)
    if raw is None:
        raise UserError(f"--data: {str(folder)!r} has no {name}/raw with {', '.join(wanted)} "
                        f"(or the same with .gz). {where}")
    return {part: [_path(raw, file) for file in FILES[part]] for part in parts}


def _digits(paths: dict[str, list[Path]], classes: Sequence[str]) -> Parts:
    parts = {}
    for part, (image_path, label_path) in paths.items():
        x, labels = read_idx(image_path), read_idx(label_path)                  # (N, 28, 28), (N,)
        if x.ndim != 3 or labels.shape != x.shape[:1]:
            raise UserError(f"{image_path} holds {x.shape} and {label_path.name} {labels.shape}: "
                            f"they do not belong together, fetch both again.")
        if labels.size and labels.max() >= len(classes):
            raise UserError(f"{label_path} has the label {labels.max()}, expected 0 to {len(classes) - 1}: "
                            f"fetch it again.")
        parts[part] = x, [classes[label] for label in labels.tolist()]
    return parts


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, packed with gzip or not. Raises UserError naming the file if it is not
    whole.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    if len(data) < 4 or data[:3] != bytes([0, 0, IDX_UNSIGNED_BYTE]):
        raise UserError(f"{path} is not an IDX file of bytes: fetch it again.")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], '>u4').astype(int).tolist()
    if len(data) - start != math.prod(shape):
        raise UserError(f"{path} has {len(data) - start} bytes of data, expected {math.prod(shape)}: fetch "
                        f"it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _path(raw: Path, name: str) -> Path | None:
    return next((p for p in (raw / name, raw / f'{name}.gz') if p.is_file()), None)
