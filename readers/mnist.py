"""MNIST in torchvision's layout, `<data>/MNIST/raw/*-ubyte` or `*-ubyte.gz`, read as it is.

torchvision itself reads only the unpacked files and has to be installed; the packed ones in a read-only
folder do here.
"""

import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from readers.source import Entry, Source, cached, choose_classes
from utils import UserError

FILES = {'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
         'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')}
IDX_UNSIGNED_BYTE = 8                 # third byte of an IDX file; the fourth is the number of dimensions


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


def read_mnist(folder: str | Path, *, normal: tuple[str, ...], anomalous: tuple[str, ...], padding: int,
               cache_dir: str, where: str) -> Source:
    """The digits of the chosen classes, '0' to '9', as (N, 1, 28 + 2 padding, 28 + 2 padding) uint8, black
    around.

    Anomalous digits come from the test part alone: no model has seen their writers.
    """
    if not folder:
        raise UserError(f"--data is missing. {where}")
    places = (Path(folder, 'MNIST', 'raw'), Path(folder, 'raw'), Path(folder))
    raw = next((p for p in places if _is_there(p)), None)
    if raw is None:
        raise UserError(f"--data: {str(folder)!r} has no MNIST/raw with "
                        f"{', '.join(FILES['train'] + FILES['test'])} "
                        f"(or the same with .gz). {where}")
    paths = {part: [_path(raw, name) for name in names] for part, names in FILES.items()}
    usual, abnormal = choose_classes([str(d) for d in range(10)], normal, anomalous, False, 'MNIST')
    stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for pair in paths.values() for p in pair]

    def make(target: Path) -> dict:
        entries, images = [], []
        for part, (image_path, label_path) in paths.items():
            x, labels = read_idx(image_path), read_idx(label_path)              # (N, 28, 28), (N,)
            if x.ndim != 3 or labels.shape != x.shape[:1]:
                raise UserError(f"{image_path} holds {x.shape} and {label_path.name} {labels.shape}: "
                                f"they do not belong together, fetch both again.")
            for i, digit in enumerate(labels.tolist()):
                if str(digit) in usual or (str(digit) in abnormal and part == 'test'):
                    sha256 = hashlib.sha256(x[i].tobytes()).hexdigest()
                    entries.append(Entry(id=f'{part}/{i:05d}', path='', class_name=str(digit), sha256=sha256,
                                         file_bytes=_png_bytes(x[i]), row=len(images), part=part))
                    images.append(x[i])
        if not images:
            raise UserError(f"{raw} holds no digit of the classes {', '.join(usual + abnormal)}: choose "
                            f"others.")
        pixels = np.pad(np.stack(images), ((0, 0), (padding, padding), (padding, padding)))[:, None]
        np.save(target / 'pixels.npy', pixels)                                  # (N, 1, H, W)
        return {'entries': entries, 'normal_classes': usual, 'anomalous_classes': abnormal}

    return cached(cache_dir, {'mnist': stamps, 'root': str(raw.resolve()), 'padding': padding,
                              'normal': usual, 'anomalous': abnormal}, make)


def _path(raw: Path, name: str) -> Path | None:
    return next((p for p in (raw / name, raw / f'{name}.gz') if p.is_file()), None)


def _is_there(raw: Path) -> bool:
    return all(_path(raw, name) for names in FILES.values() for name in names)


def _png_bytes(x: np.ndarray) -> int:
    """The size of an image (H, W) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(x).save(file, 'PNG')
    return file.tell()
