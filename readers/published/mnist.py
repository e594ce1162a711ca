"""MNIST in torchvision's layout, `<data>/MNIST/raw/*-ubyte` or `*-ubyte.gz`, read as it is; FashionMNIST and
KMNIST, which have the same files in folders of their own; and StackedMNIST.

torchvision itself reads only the unpacked files and has to be installed; the packed ones in a read-only
folder do here.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.published.arrays import Parts, find_files, read_arrays, read_bytes
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


def read_mnist(config: ReaderConfig, row: DataSet, name: str = 'MNIST') -> Source:
    """The images of the chosen classes of MNIST or one of its like, a name of CLASSES."""
    files = _find(config, row, name)
    return read_arrays(config, row, name, lambda: _digits(row, files, CLASSES[name]), files, CLASSES[name])


def read_stacked_mnist(config: ReaderConfig, row: DataSet) -> Source:
    """Three random digits of a part as red, green and blue, twice as many as digits; '407' is a class.

    Which three is fixed: they come from a seed, and so the data set is the same in every run.
    """
    files = _find(config, row, 'MNIST')

    def load() -> Parts:
        digits = _digits(row, files, CLASSES['MNIST'])
        return {part: stack(*digits[part], seed=STACK_SEEDS[part]) for part in digits}

    return read_arrays(config, row, 'StackedMNIST', load, files, [f'{i:03d}' for i in range(1000)])


def stack(images: np.ndarray, names: list[str], seed: int) -> tuple[np.ndarray, list[str]]:
    """2N random triples of the images (N, H, W) as (2N, H, W, 3), each named by the names of its three."""
    # RandomState, because its numbers are promised never to change.
    triples = np.random.RandomState(seed).randint(0, len(images), (2 * len(images), 3))
    return images[triples].transpose(0, 2, 3, 1), [''.join(names[i] for i in t) for t in triples]


def _find(config: ReaderConfig, row: DataSet, name: str) -> list[Path]:
    """The files of images and labels of each part, in turn."""
    names = [file for part in row.parts for file in FILES[part]]
    return find_files(config, row, names, (f'{name}/raw', 'raw', ''))


def _digits(row: DataSet, files: Sequence[Path], classes: Sequence[str]) -> Parts:
    parts = {}
    for part, image_path, label_path in zip(row.parts, files[::2], files[1::2], strict=True):
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
    data = read_bytes(path)
    if len(data) < 4 or data[:3] != bytes([0, 0, IDX_UNSIGNED_BYTE]):
        raise UserError(f"{path} is not an IDX file of bytes: fetch it again.")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], '>u4').astype(int).tolist()
    if len(data) - start != math.prod(shape):
        raise UserError(f"{path} has {len(data) - start} bytes of data, expected {math.prod(shape)}: fetch "
                        f"it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
