"""SVHN, cropped digits, in torchvision's layout: `<data>/train_32x32.mat` and `<data>/test_32x32.mat`.

`X` (32, 32, 3, N) holds the images, `y` (N, 1) their digits, where 10 stands for the digit 0. The 531,131
easier digits of `extra_32x32.mat` are not read.
"""

from pathlib import Path

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.published.arrays import Parts, find_files, read_arrays
from readers.source import Source
from utils import UserError

FILES = {'train': 'train_32x32.mat', 'test': 'test_32x32.mat'}
CLASSES = tuple('0123456789')
SHAPE = (32, 32, 3)


def read_svhn(config: ReaderConfig, row: DataSet) -> Source:
    """The digits of the chosen classes, '0' to '9'."""
    files = find_files(config, row, [FILES[part] for part in row.parts], ('', 'svhn', 'SVHN'))

    def load() -> Parts:
        return {part: read_mat(path) for part, path in zip(row.parts, files, strict=True)}

    return read_arrays(config, row, 'SVHN', load, files, CLASSES)


def read_mat(path: Path) -> tuple[np.ndarray, list[str]]:
    """Images (N, 32, 32, 3) uint8 and the digit of each. Raises UserError naming a damaged file."""
    import scipy.io
    try:
        file = scipy.io.loadmat(path, variable_names=('X', 'y'))
        x, labels = file['X'], np.asarray(file['y']).reshape(-1)                # (32, 32, 3, N), (N,)
        if x.dtype != np.uint8 or x.shape != (*SHAPE, len(labels)):
            raise ValueError(f'X is {x.dtype} {x.shape}, y has {len(labels)} labels')
        if len(labels) and not 0 <= labels.min() <= labels.max() <= 10:
            raise ValueError(f'labels from {labels.min()} to {labels.max()}')
    except Exception as error:                           # on damaged bytes SciPy raises anything
        reason = f'no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise UserError(f"{path} is not a file of SVHN's cropped digits ({reason}): fetch it "
                        f"again.") from None
    return x.transpose(3, 0, 1, 2), [CLASSES[int(label) % 10] for label in labels]
