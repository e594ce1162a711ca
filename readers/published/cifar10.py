"""CIFAR-10 in torchvision's layout, `<data>/cifar-10-batches-py/*`, as its page publishes it for Python.

The files are pickles, which can run any program when they are opened. torchvision opens them only after their
MD5; here they may name nothing but NumPy arrays, so that a smaller or changed set can be read too. Batches of
the published size must have the published MD5: a flipped bit shows nowhere else.
"""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.published.arrays import Parts, find_files, read_arrays
from readers.source import Source
from utils import UserError

BATCHES = {'train': tuple(f'data_batch_{i}' for i in range(1, 6)), 'test': ('test_batch',)}
MD5 = {'data_batch_1': 'c99cafc152244af753f735de768cd75f', 'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
       'data_batch_3': '54ebc095f3ab1f0389bbae665268c751', 'data_batch_4': '634d18415352ddfa80567beed471001a',
       'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb', 'test_batch': '40351d587109b95175f43aff81a1287e'}
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
PUBLISHED_BATCH = 10_000
ALLOWED = {('numpy', 'ndarray'), ('numpy', 'dtype'), ('numpy.core.multiarray', '_reconstruct'),
           ('numpy._core.multiarray', '_reconstruct'), ('_codecs', 'encode')}


def read_cifar10(config: ReaderConfig, row: DataSet) -> Source:
    """The images of the chosen classes, 'airplane' to 'truck'."""
    names = [name for part in row.parts for name in BATCHES[part]]
    files = find_files(config, row, names, ('cifar-10-batches-py', ''))

    def load() -> Parts:
        made = {}
        for part in row.parts:
            images, labels = zip(*(read_batch(path) for path in files if path.name in BATCHES[part]),
                                 strict=True)
            made[part] = np.concatenate(images), [CLASSES[i] for batch in labels for i in batch]
        return made

    return read_arrays(config, row, 'CIFAR-10', load, files, CLASSES)


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 and labels 0 to 9 of a batch. Raises UserError naming a damaged file."""
    try:
        data = path.read_bytes()
        batch = _Arrays(io.BytesIO(data), encoding='latin1').load()
        x = np.asarray(batch['data'], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(i) for i in batch['labels']]
        if len(labels) != len(x) or any(not 0 <= i < len(CLASSES) for i in labels):
            raise ValueError(f'{len(x)} images and {len(labels)} labels')
    except Exception as error:                                # on damaged bytes a pickle raises anything
        raise UserError(f"{path} is not a batch of CIFAR-10 ({' '.join(str(error).split())}): fetch it "
                        f"again.") from None
    if len(x) == PUBLISHED_BATCH and hashlib.md5(data, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise UserError(f"{path} is damaged: its MD5 is not the published one. Fetch it again.")
    return x, labels


class _Arrays(pickle.Unpickler):
    """Reads a pickle of plain containers and NumPy arrays."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')
        return super().find_class(module.replace('numpy.core', 'numpy._core'), name)
