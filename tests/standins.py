"""Tiny stand-ins for every data set, in the layout in which it is published.

    path = make_standin('celeba_64', tmp_path / 'celeba')           # for --data

They are deterministic: soft blobs of colour on grey, so that a model has something to learn. Checksums and
record formats are written here anew, slowly and by the book, so that a fault of the readers does not hide.
"""

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import scipy.io
from PIL import Image

from phantoms import brain as brain_phantom
from phantoms.chest import VERSION
from readers.lmdb.file import LmdbWriter

TEST_COUNT = 9
CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def make_standin(dataset: str, folder: str | Path, count: int = 24, test_count: int = TEST_COUNT) -> Path:
    """Writes `count` training and `test_count` test images of a data set below `folder`; what --data takes.

    Sets without parts of their own (covid, folder, phantom) get `count` normal and `test_count` anomalous
    images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return STANDINS[dataset](folder, count, test_count)


def image(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8: a soft disc somewhere, on a slope of grey."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    cy, cx, radius = rng.uniform(0.3, 0.7, 2).tolist() + [rng.uniform(0.1, 0.25)]
    disc = 1 / (1 + np.exp(((y - cy) ** 2 + (x - cx) ** 2 - radius ** 2) * 200))
    colour, slope = rng.uniform(80, 200, channels), rng.uniform(0, 50)
    return (slope * x[..., None] + disc[..., None] * colour).astype(np.uint8)


def encoded(pixels: np.ndarray, file_format: str = 'JPEG') -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, file_format)
    return file.getvalue()


def write_lmdb(path: Path, items: Iterable[tuple[bytes, bytes]]) -> Path:
    with LmdbWriter(path) as writer:
        writer.put(items)
    return path


def write_indexed(path: Path, values: Iterable[bytes]) -> Path:
    """An LMDB whose keys are '0', '1', ..."""
    return write_lmdb(path, ((str(i).encode(), value) for i, value in enumerate(values)))


def lead_astray(lmdb: bytes) -> bytes:
    """An LMDB every node of whose branch pages points to a page far behind the end of the file."""
    data = bytearray(lmdb)
    branches = [p for p in range(0, len(data), 4096) if struct.unpack_from('<H', data, p + 10)[0] == 1]
    assert branches
    for page in branches:
        for i in range((struct.unpack_from('<H', data, page + 12)[0] - 16) // 2):
            node = page + struct.unpack_from('<H', data, page + 16 + 2 * i)[0]
            struct.pack_into('<H', data, node, 0x3ff0)                    # the low 16 bits of the page number
    return bytes(data)


# ---------------------------------------------------------------------------------------- in class folders

def class_folders(normal: str, anomalous: str, masks: bool = False) -> Callable[[Path, int, int], Path]:
    def make(folder: Path, count: int, test_count: int) -> Path:
        for name, number, first in ((normal, count, 0), (anomalous, test_count, 1000)):
            (folder / name / 'images').mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = image(first + i, 64, 64, 1)
                mask = np.zeros((64, 64), np.uint8)
                if name == anomalous:
                    mask[20:30, 20 + i:30 + i] = 255
                    if masks:
                        (folder / name / 'masks').mkdir(exist_ok=True)
                        Image.fromarray(mask).save(folder / name / 'masks' / f'{name}-{i}.png')
                pixels = np.maximum(pixels[..., 0], mask)
                Image.fromarray(pixels).save(folder / name / 'images' / f'{name}-{i}.png')
        return folder
    return make


def phantom(folder: Path, count: int, test_count: int) -> Path:
    """A drawn set that says it is the 1200 and 3 x 100 images of the default."""
    root = folder / f'synthetic-1200-100-seed0-v{VERSION}'
    class_folders('Normal', 'Marked', masks=True)(root, count, test_count)
    (root / 'finished.json').write_text(json.dumps({'normal': 1200, 'lesions': 100}))
    return folder


def volume(seed: int, side: int) -> np.ndarray:
    """(X, Y, Z) uint8: a soft disc that is thickest in the middle of the last axis."""
    profile = np.sin(np.linspace(0.2, np.pi - 0.2, side))
    return (image(seed, side, side, 1) * profile).astype(np.uint8)


def volumes(side: int, label: str, modalities: Sequence[str] = ()) -> Callable[[Path, int, int], Path]:
    """Class folders of volumes, with folders of channels in them if these are named; uncompressed."""
    def make(folder: Path, count: int, test_count: int) -> Path:
        def save(values: np.ndarray, *path: str) -> None:
            file = folder.joinpath(*path)
            file.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.diag([3, 3, 3, 1])), file)

        for name, number, first in (('normal', count, 0), ('tumour', test_count, 1000)):
            for i in range(number):
                for channel, modality in enumerate(modalities or ['']):
                    save(volume(first + i + 500 * channel, side), name, modality, f'{name}{i}.nii')
                if name == 'tumour':
                    mask = np.zeros((side,) * 3, np.uint8)
                    mask[5:9, 5:9, 5:9] = 1
                    save(mask, name, label, f'{name}{i}.nii')
        return folder
    return make


def drawn_brains(folder: Path, count: int, test_count: int) -> Path:
    """A drawn set that says it is the 120 and 2 x 15 volumes of the default."""
    root = folder / f'synthetic-120-15-64-seed0-v{brain_phantom.VERSION}'
    volumes(64, brain_phantom.LABELS, brain_phantom.MODALITIES)(root, count, test_count)
    (root / 'finished.json').write_text('{}')
    return folder


# ---------------------------------------------------------------------------------------- small sets

def idx(name: str) -> Callable[[Path, int, int], Path]:
    """IDX files in torchvision's layout, the test files packed and the training files not."""
    def make(folder: Path, count: int, test_count: int) -> Path:
        raw = folder / name / 'raw'
        raw.mkdir(parents=True, exist_ok=True)
        for part, number, first, pack in (('train', count, 0, False), ('t10k', test_count, 1000, True)):
            pixels = np.stack([image(first + i, 28, 28, 1)[..., 0] for i in range(number)])
            files = {
                f'{part}-images-idx3-ubyte': struct.pack('>4I', 0x803, number, 28, 28) + pixels.tobytes(),
                f'{part}-labels-idx1-ubyte': struct.pack('>2I', 0x801, number)
                + bytes(i % 10 for i in range(number))}
            for file, data in files.items():
                (raw / (file + '.gz' * pack)).write_bytes(gzip.compress(data) if pack else data)
        return folder
    return make


def part_folders(train: str, test: str, names: Callable[[bool, int], str], side: int) -> Callable:
    """A folder for each part, and in it one for each class: names(is it the test part, number)."""
    def make(folder: Path, count: int, test_count: int) -> Path:
        for part, number, first in ((train, count, 0), (test, test_count, 1000)):
            for i in range(number):
                path = folder / part / names(part == test, i) / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(image(first + i, side, side, 1), 'PNG'))
        return folder
    return make


def svhn(folder: Path, count: int, test_count: int) -> Path:
    """MATLAB files: images along the last axis; the digit 0 has the label 10."""
    for part, number, first in (('train', count, 0), ('test', test_count, 1000)):
        pixels = np.stack([image(first + i, 32, 32) for i in range(number)], axis=-1)
        labels = np.array([[i % 10 or 10] for i in range(number)], np.uint8)
        scipy.io.savemat(folder / f'{part}_32x32.mat', {'X': pixels, 'y': labels})
    return folder


def smallnorb(folder: Path, count: int, test_count: int) -> Path:
    """Matrices by the book of the page: left image(i), right black; the test part packed."""
    for part, number, first in (('5x46789x9x18x6x2x96x96-training', count, 0),
                                ('5x01235x9x18x6x2x96x96-testing', test_count, 1000)):
        files = {'cat': struct.pack('<2i3i', 0x1E3D4C54, 1, number, 1, 1)
                 + struct.pack(f'<{number}i', *(i % 5 for i in range(number))),
                 'dat': struct.pack('<2i4i', 0x1E3D4C55, 4, number, 2, 96, 96)
                 + b''.join(image(first + i, 96, 96, 1).tobytes() + bytes(96 * 96) for i in range(number))}
        for kind, data in files.items():
            name = f'smallnorb-{part}-{kind}.mat'
            if first:
                (folder / f'{name}.gz').write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return folder


def cifar10(folder: Path, count: int, test_count: int) -> Path:
    """Pickles as the CIFAR-10 page has them: rows of 3072, all red, all green, all blue; labels in turn."""
    base = folder / 'cifar-10-batches-py'
    base.mkdir(exist_ok=True)
    sizes = {f'data_batch_{b}': range(b - 1, count, 5) for b in range(1, 6)}
    sizes['test_batch'] = range(1000, 1000 + test_count)
    for name, numbers in sizes.items():
        rows = [image(i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in numbers]
        batch = {'batch_label': name, 'labels': [i % 10 for i in numbers],
                 'data': np.array(rows, np.uint8).reshape(-1, 3072),
                 'filenames': [f'{i}.png' for i in numbers]}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {'num_cases_per_batch': 10000, 'label_names': list(CIFAR10), 'num_vis': 3072}
    (base / 'batches.meta').write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def omniglot(folder: Path, count: int, test_count: int) -> Path:
    """chardata.mat: characters as columns of 784 in [0, 1], each lying on its side; alphabets one-hot."""
    def columns(first: int, number: int) -> np.ndarray:
        upright = np.stack([image(first + i, 28, 28, 1)[..., 0] for i in range(number)])       # (N, 28, 28)
        return (upright.transpose(0, 2, 1).reshape(number, 784) / 255).T.astype(np.float64)

    def alphabets(number: int) -> np.ndarray:
        return np.eye(50)[:, np.arange(number) % 50]

    scipy.io.savemat(folder / 'chardata.mat', {
        'data': columns(0, count), 'target': alphabets(count),
        'targetchar': np.arange(count)[None] % 20 + 1.0,
        'testdata': columns(1000, test_count), 'testtarget': alphabets(test_count),
        'testtargetchar': np.arange(test_count)[None] % 20 + 1.0})
    return folder


# ---------------------------------------------------------------------------------------- large sets

def indexed_lmdbs(value: Callable[[int], bytes]) -> Callable[[Path, int, int], Path]:
    def make(folder: Path, count: int, test_count: int) -> Path:
        write_indexed(folder / 'train.lmdb', (value(i) for i in range(count)))
        write_indexed(folder / 'validation.lmdb', (value(1000 + i) for i in range(test_count)))
        return folder
    return make


def raw(side: int) -> Callable[[int], bytes]:
    return lambda i: image(i, side, side).tobytes()


def lsun(name: str) -> Callable[[Path, int, int], Path]:
    """Photographs of different shapes, the shorter side 150, under keys that look like hashes."""
    def make(folder: Path, count: int, test_count: int) -> Path:
        for part, number, first in (('train', count, 0), ('val', test_count, 1000)):
            items = ((f'{(i + first) * 2654435761 % 2 ** 32:08x}'.encode() * 5,
                      encoded(image(first + i, *((150, 170 + i % 5), (190, 150))[i % 2])))
                     for i in range(number))
            write_lmdb(folder / f'{name}_{part}_lmdb', items)
        return folder
    return make


def celeba_files(folder: Path, count: int, test_count: int) -> Path:
    """CelebA as torchvision.datasets.CelebA keeps it: parts 0 train, 1 valid and 2 test, mixed."""
    images = folder / 'celeba' / 'img_align_celeba'
    images.mkdir(parents=True, exist_ok=True)
    parts = [0] * count + [1] * test_count + [2] * test_count
    order = np.random.default_rng(0).permutation(len(parts))
    lines = []
    for number, position in enumerate(order, 1):
        (images / f'{number:06d}.jpg').write_bytes(encoded(image(number, 218, 178)))
        lines.append(f'{number:06d}.jpg {parts[position]}\n')
    (folder / 'celeba' / 'list_eval_partition.txt').write_text(''.join(lines))
    return folder


STANDINS = {
    'mnist': idx('MNIST'),
    'fashion_mnist': idx('FashionMNIST'),
    'kmnist': idx('KMNIST'),
    'notmnist': part_folders('notMNIST_large', 'notMNIST_small',
                              lambda test, i: 'ABCDEFGHIJ'[i % 10], 28),
    'omniglot_py': part_folders('omniglot-py/images_background', 'omniglot-py/images_evaluation',
                                lambda test, i: f'{("Greek", "Tengwar")[test]}/character{i % 4:02d}', 105),
    'svhn': svhn,
    'smallnorb': smallnorb,
    'stacked_mnist': idx('MNIST'),
    'cifar10': cifar10,
    'omniglot': omniglot,
    'covid': class_folders('Normal', 'COVID'),
    'mednist': class_folders('Hand', 'CXR'),
    'folder': class_folders('normal', 'spot', masks=True),
    'phantom': phantom,
    'brain': volumes(16, 'label'),
    'brain_phantom': drawn_brains,
    'celeba_64': indexed_lmdbs(lambda i: encoded(image(i, 218, 178))),
    'celeba_256': indexed_lmdbs(raw(256)),
    'imagenet_32': indexed_lmdbs(raw(32)),
    'ffhq': indexed_lmdbs(raw(256)),
    'lsun_bedroom_128': lsun('bedroom'),
    'lsun_church_64': lsun('church_outdoor'),
    'lsun_church_128': lsun('church_outdoor'),
}


# ---------------------------------------------------------------------------------------- TFRecord

def crc32c(data: bytes) -> int:
    """Bit by bit: the polynomial 0x1EDC6F41 reflected, all ones before and after."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def tfrecord(data: bytes) -> bytes:
    """One record of a TFRecord file: length, its checksum, data, its checksum."""
    def checksum(part: bytes) -> bytes:
        value = crc32c(part)
        return struct.pack('<I', ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack('<Q', len(data))
    return length + checksum(length) + data + checksum(data)


def varint(value: int) -> bytes:
    out = b''
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, value: bytes) -> bytes:
    """A protobuf field that holds bytes or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def example(pixels: np.ndarray, packed: bool = True) -> bytes:
    """tf.train.Example with the features `shape`, `data` and `label`, as in Glow's files."""
    def numbers(values: Sequence[int]) -> bytes:
        inside = message(1, b''.join(map(varint, values))) if packed \
            else b''.join(b'\x08' + varint(v) for v in values)
        return message(3, inside)

    features = {'shape': numbers(pixels.shape), 'data': message(1, message(1, pixels.tobytes())),
                'label': numbers([0])}
    entries = [message(1, message(1, name.encode()) + message(2, value)) for name, value in features.items()]
    return message(1, b''.join(entries))


def write_tfrecords(folder: Path, part: str, side: int, count: int, shards: int = 2, first: int = 0) -> Path:
    """Glow's layout: <folder>/<part>/<part>-r05-s-0000-of-0002.tfrecords; record i holds image(first + i)."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(count)[shard * count // shards:(shard + 1) * count // shards]
        name = f'{part}-r{side.bit_length() - 1:02d}-s-{shard:04d}-of-{shards:04d}.tfrecords'
        (folder / part / name).write_bytes(
            b''.join(tfrecord(example(image(first + i, side, side))) for i in numbers))
    return folder
