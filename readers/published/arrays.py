"""Data sets that fit into memory and have parts of their own: arrays in, one cached array out.

Files are those of torchvision, or of the page that publishes a set, packed with gzip or not. N images of
H x W as the files have them, C channels, S x S pixels as the model sees them, border included.
"""

import hashlib
import pickletools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from readers.cache import stamp
from readers.config import DataSet, ReaderConfig
from readers.images.decode import ImageLoader, png_bytes
from readers.items import Item, Listing, Loaded, import_items
from readers.paths import find_root
from readers.published.matlab import matrices
from readers.source import Source, Unreadable, reason
from storage.limits import unpack
from utils import UserError, check_regular

T = TypeVar('T')
Labeled = tuple[np.ndarray, np.ndarray]           # images (N, H, W) or (N, H, W, 3) uint8, labels (N,)


@dataclass(frozen=True)
class Arrays:
    """A data set: the names of the files of each part, the folders below --data where these may be, the names
    of the classes, and `read(part, *files)`, whose labels are places among the classes.
    """
    files: Mapping[str, Sequence[str]]
    folders: Sequence[str]
    classes: Sequence[str]
    read: Callable[..., Labeled]


def read_arrays(config: ReaderConfig, row: DataSet, name: str) -> Source:
    """The images of the chosen classes of a data set in SETS, as (N, C, S, S).

    Its files are read only if they have changed since the arrays were cached.
    """
    arrays = SETS[name]
    files = find_files(config, row, {part: arrays.files[part] for part in row.parts}, arrays.folders)
    paths = [path for found in files.values() for path in found]
    key = {'arrays': name, 'files': [[str(path.resolve()), *stamp(path)] for path in paths]}

    def parts() -> Iterable[tuple[str, np.ndarray, list[str]]]:
        for part, found in files.items():
            images, labels = arrays.read(part, *found)
            check_labels(found[-1], images, labels, len(arrays.classes))
            yield part, images, [arrays.classes[label] for label in labels.tolist()]

    return import_arrays(config, row, key, f'{name} in {paths[0].parent}', parts, arrays.classes)


def import_arrays(config: ReaderConfig, row: DataSet, key: dict[str, Any], name: str,
                  parts: Callable[[], Iterable[tuple[str, np.ndarray, Sequence[str]]]],
                  classes: Sequence[str] = ()) -> Source:
    """The images of the chosen classes, where `parts()` gives (part, images, class of each image)."""
    loader = ImageLoader.of(config, row)

    def list_images() -> Listing:
        items = [Item(f'{part}/{i:05d}', class_name, part, read=lambda item, x=x: prepare(x, loader))
                 for part, images, names in parts()
                 for i, (x, class_name) in enumerate(zip(images, names, strict=True))]
        return Listing(name, items, loader.shape, classes, near_duplicates=False)

    return import_items(config, row, {**key, **vars(loader)}, list_images)


def prepare(image: np.ndarray, loader: ImageLoader) -> Loaded:
    """An image (H, W) or (H, W, 3) uint8 as the loader makes it of a file. Raises Unreadable."""
    if not image.size:
        raise Unreadable('has no pixels')
    x = image.reshape(*image.shape[:2], -1)
    return loader.finish(x / np.float32(255), None, hashlib.sha256(image.tobytes()).hexdigest(),
                         png_bytes(np.moveaxis(x, 2, 0), optimize=False))


def find_files(config: ReaderConfig, row: DataSet, names: Mapping[str, Sequence[str]],
               folders: Sequence[str]) -> dict[str, list[Path]]:
    """The files of these names in one of the `folders` below --data, packed with gzip or not, of each part.

    Raises UserError, which says where to get them, if one is missing.
    """
    root = find_root(config.data, row.where)
    for folder in folders:
        found = {part: [next((p for p in (path, path.with_name(f'{path.name}.gz')) if p.is_file()), None)
                        for path in (root / folder / name for name in wanted)]
                 for part, wanted in names.items()}
        if all(map(all, found.values())):
            return found
    place = f'{folders[0]} with ' if folders[0] else ''
    wanted = ', '.join(name for of_part in names.values() for name in of_part)
    raise UserError(f"--data: {config.data!r} has no {place}{wanted} (or the same with .gz). "
                    f"{row.where}")


def check_labels(path: Path, images: np.ndarray, labels: np.ndarray, number: int) -> None:
    """Raises UserError unless these are images with a label each, from 0 to number - 1."""
    whole = images.dtype == np.uint8 and images.ndim in (3, 4) and labels.shape == images.shape[:1]
    limits = f'from {labels.min()} to {labels.max()}' if labels.size else 'of nothing'
    if not whole or (labels.size and not 0 <= labels.min() <= labels.max() < number):
        raise UserError(f"{path} has {labels.size} labels {limits}, expected 0 to {number - 1} for images "
                        f"that are {images.dtype} {images.shape}: fetch this part of the data set again.")


def read_file(path: Path, what: str, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the bytes of a file, unpacked if its name ends in .gz.

    Raises UserError that names a damaged file, and says `what` it should be.
    """
    try:
        check_regular(path)
        data = path.read_bytes()
        return decode(unpack(data) if path.suffix == '.gz' else data)
    except Exception as error:             # on damaged bytes gzip and pickle raise anything
        missing = 'no ' * isinstance(error, KeyError)
        raise UserError(f"{path} is not {what} ({missing}{reason(error)}): fetch it again.") from None


# ----------------------------------------------------------------------------------------- MNIST and its like

MNIST_FILES = {'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
               'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')}
IDX_BYTES = bytes([0, 0, 8])                # how IDX files of unsigned bytes begin
DIGITS = tuple('0123456789')
STACK_SEEDS = {'train': 0, 'test': 1}       # the published ones are drawn anew every run


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes. Raises UserError naming the file if it is not whole."""
    def decode(data: bytes) -> np.ndarray:
        if data[:3] != IDX_BYTES:
            raise ValueError('it begins otherwise')
        start = 4 + 4 * data[3]                                             # after the number of dimensions
        return np.frombuffer(data, np.uint8, offset=start).reshape(np.frombuffer(data[4:start], '>u4'))
    return read_file(path, 'a whole IDX file of bytes', decode)


def read_mnist(part: str, images: Path, labels: Path) -> Labeled:
    return read_idx(images), read_idx(labels)                                       # (N, 28, 28), (N,)


def read_stacked_mnist(part: str, images: Path, labels: Path) -> Labeled:
    """Three random digits of a part as red, green and blue, twice as many as digits; '407' is a class.

    Which three is fixed: they come from a seed, and so the data set is the same in every run.
    """
    x, digits = read_mnist(part, images, labels)
    # RandomState, because its numbers are promised never to change.
    triples = np.random.RandomState(STACK_SEEDS[part]).randint(0, len(x), (2 * len(x), 3))
    return x[triples].transpose(0, 2, 3, 1), digits[triples] @ (100, 10, 1)


# --------------------------------------------------------------------------------------------------- CIFAR-10

# Batches of the published size must have the published MD5: a flipped bit shows nowhere else.
CIFAR10_MD5 = {
    'data_batch_1': 'c99cafc152244af753f735de768cd75f', 'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
    'data_batch_3': '54ebc095f3ab1f0389bbae665268c751', 'data_batch_4': '634d18415352ddfa80567beed471001a',
    'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb', 'test_batch': '40351d587109b95175f43aff81a1287e'}
PUBLISHED_BATCH = 10_000
BATCH_KEYS = ('data', 'labels', 'batch_label', 'filenames')
FLAGS = {'NEWTRUE': True, 'NEWFALSE': False}
NUMBERS = ('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1')


def sections(data: bytes) -> dict[str, list[str | int]]:
    """The texts, numbers and flags that follow each of BATCH_KEYS in a pickled dictionary, bytes as Latin-1.
    The pickle is only looked at: nothing that it asks for is made or called. Raises ValueError.
    """
    found, key = defaultdict(list), ''
    for code, value, _ in pickletools.genops(data):
        value = FLAGS.get(code.name, value)
        value = value.decode('latin1') if isinstance(value, bytes) else value
        if value in BATCH_KEYS:
            key = value
        elif isinstance(value, (str, bool)) or code.name in NUMBERS:
            found[key].append(value)
    return found


def pickled_bytes(found: Sequence[str | int]) -> np.ndarray:
    """The array (N, 3072) of bytes among what follows a key. Raises ValueError if there is none."""
    texts = [value for value in found if isinstance(value, str)]
    flags = [value for value in found if isinstance(value, bool)]
    # The arrays of NumPy that are made by `_reconstruct` end in (type, stored by columns, bytes).
    if 'u1' not in texts or not flags or not any(text.endswith('_reconstruct') for text in texts):
        raise ValueError('it has no array of bytes')
    values = np.frombuffer(max(texts, key=len).encode('latin1'), np.uint8)
    return values.reshape(-1, 3072, order='F' if flags[-1] else 'C')


def read_cifar10(part: str, *paths: Path) -> Labeled:
    images, labels = zip(*map(read_batch, paths), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def read_batch(path: Path) -> Labeled:
    """A batch as the page publishes it for Python. Raises UserError naming a damaged file."""
    def decode(data: bytes) -> Labeled:
        found = sections(data)
        x = pickled_bytes(found['data']).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if len(x) == PUBLISHED_BATCH and md5 != CIFAR10_MD5[path.stem]:
            raise ValueError('its MD5 is not the published one')
        return x, np.array(found['labels'], np.int64)
    return read_file(path, 'a batch of CIFAR-10', decode)


# ------------------------------------------------------------------------------- SVHN, smallNORB and OMNIGLOT

OMNIGLOT_KEYS = {'train': ('data', 'target'), 'test': ('testdata', 'testtarget')}
MATRIX_TYPES = {0x1E3D4C55: 'u1', 0x1E3D4C54: '<i4'}                     # by magic number
LEFT = 0


def read_svhn(part: str, path: Path) -> Labeled:
    """The cropped digits, of which `y` calls the 0 a 10. `extra_32x32.mat` is not read."""
    def decode(data: bytes) -> Labeled:
        x, labels = matrices(data, 'X', 'y')                                  # (32, 32, 3, N), (N, 1)
        if x.dtype != np.uint8 or x.shape[:3] != (32, 32, 3):
            raise ValueError(f'X is {x.dtype} {x.shape}')
        return x.transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels).reshape(-1).astype(int)
    return read_file(path, "a file of SVHN's cropped digits", decode)


def read_smallnorb(part: str, images: Path, categories: Path) -> Labeled:
    """Each toy as the left of two cameras sees it: the right image is nearly the same."""
    return read_matrix(images, 4)[:, LEFT], read_matrix(categories, 1)                 # (N, 2, H, W), (N,)


def read_matrix(path: Path, dimensions: int) -> np.ndarray:
    """A matrix of bytes or of 32-bit integers. Raises UserError naming the file if it is not whole.

    It is a magic number, the number of dimensions D, max(3, D) dimensions (those beyond D are 1), the values.
    """
    def decode(data: bytes) -> np.ndarray:
        magic, found = np.frombuffer(data[:8], '<i4').tolist()
        if found != dimensions:
            raise ValueError(f'it has {found} dimensions')
        start = 8 + 4 * max(3, dimensions)
        shape = np.frombuffer(data[8:start], '<i4')[:dimensions]
        return np.frombuffer(data, MATRIX_TYPES[magic], offset=start).reshape(shape)
    return read_file(path, 'a whole matrix file of bytes or integers', decode)


def read_omniglot(part: str, path: Path) -> Labeled:
    """OMNIGLOT as the importance-weighted autoencoder has it: chardata.mat of github.com/yburda/iwae.

    Gray levels are rounded to 8 bits, where the published reader cuts them off: they differ by 1 of 255.
    """
    def decode(data: bytes) -> Labeled:
        x, alphabets = matrices(data, *OMNIGLOT_KEYS[part])    # (784, N) in [0, 1], (50, N) 1 at its alphabet
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError('its images are not within [0, 1]')
        x = np.rint(255 * x.T.astype(np.float64)).astype(np.uint8)
        return x.reshape(-1, 28, 28).transpose(0, 2, 1), alphabets.argmax(0)      # written column by column
    return read_file(path, 'chardata.mat', decode)


MNIST = Arrays(MNIST_FILES, ('MNIST/raw', 'raw', ''), DIGITS, read_mnist)
SETS = {
    'MNIST': MNIST,
    'FashionMNIST': Arrays(MNIST_FILES, ('FashionMNIST/raw', 'raw', ''), (
        'T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Ankle boot'), read_mnist),
    'KMNIST': Arrays(MNIST_FILES, ('KMNIST/raw', 'raw', ''), (
        'o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo'), read_mnist),
    'StackedMNIST': Arrays(MNIST_FILES, MNIST.folders, [f'{i:03d}' for i in range(1000)],
                           read_stacked_mnist),
    'CIFAR-10': Arrays({'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']},
                       ('cifar-10-batches-py', ''),
                       ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship',
                        'truck'), read_cifar10),
    'SVHN': Arrays({'train': ['train_32x32.mat'], 'test': ['test_32x32.mat']}, ('', 'svhn', 'SVHN'), DIGITS,
                   read_svhn),
    'smallNORB': Arrays({part: [f'smallnorb-{name}-{kind}.mat' for kind in ('dat', 'cat')]
                         for part, name in (('train', '5x46789x9x18x6x2x96x96-training'),
                                            ('test', '5x01235x9x18x6x2x96x96-testing'))},
                        ('', 'smallnorb', 'SmallNORB', 'raw'),
                        ('animal', 'human', 'airplane', 'truck', 'car'), read_smallnorb),
    'OMNIGLOT': Arrays({'train': ['chardata.mat'], 'test': ['chardata.mat']}, ('', 'omniglot'),
                       [str(i) for i in range(50)], read_omniglot),
}
