"""Data sets that fit into memory and have parts of their own: arrays in, one cached array out.

N images of H x W as the files have them, C channels, S x S pixels as the model sees them, border included.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from readers.images.png import png_bytes
from readers.published.records import MODES, to_array
from readers.source import Entry, Source, cached, choose_classes
from utils import UserError

BLOCK = 4096         # images prepared at once

# {'train' or 'test': (images (N, H, W) or (N, H, W, 3) uint8, class names (N,))}
Parts = Mapping[str, tuple[np.ndarray, Sequence[str]]]


def read_arrays(name: str, load: Callable[[], Parts], files: Sequence[Path], *, classes: Sequence[str],
                normal: Sequence[str], anomalous: Sequence[str], size: int, channels: int, padding: int,
                cache_dir: str) -> Source:
    """The images of the chosen classes that `load()` gives, as (N, C, S, S) uint8 with `padding` black pixels
    around.

    Anomalous images come from the test part alone: no model has seen their writers. `load` runs only if the
    `files` it reads have changed since the array was cached. Images that do not fit are resized.
    """
    from tqdm import tqdm
    usual, abnormal = choose_classes(classes, normal, anomalous, False, name)
    stamps = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]

    def make(target: Path) -> dict:
        entries, chosen = [], []
        for part, (images, names) in load().items():
            wanted = {*usual, *abnormal} if part == 'test' else {*usual}
            keep = [i for i, class_name in enumerate(names) if class_name in wanted]
            for i in tqdm(keep, f'reading {name}, {part}', unit='image', disable=None, leave=False):
                entries.append(Entry(id=f'{part}/{i:05d}', path='', class_name=names[i],
                                     sha256=hashlib.sha256(images[i].tobytes()).hexdigest(),
                                     file_bytes=png_bytes(channels_first(images[i]), optimize=False),
                                     row=len(entries), part=part))
            chosen.append((images, keep))
        if not entries:
            raise UserError(f"{name} in {files[0].parent} has no image of the classes "
                            f"{', '.join((usual + abnormal)[:10])}: choose others.")
        with (target / 'pixels.npy').open('wb') as file:      # by blocks: (N, C, S, S) may be half a gigabyte
            header = {'descr': '|u1', 'fortran_order': False, 'shape': (len(entries), channels, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for images, keep in chosen:
                for start in range(0, len(keep), BLOCK):
                    block = images[keep[start:start + BLOCK]]
                    file.write(prepare(block, size, channels, padding).tobytes())
        return {'entries': entries, 'normal_classes': usual, 'anomalous_classes': abnormal}

    return cached(cache_dir, {'arrays': name, 'files': stamps, 'size': size, 'channels': channels,
                              'padding': padding, 'normal': usual, 'anomalous': abnormal}, make)


def channels_first(images: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) as (C, H, W)."""
    return np.moveaxis(np.atleast_3d(images), -1, 0)


def prepare(images: np.ndarray, size: int, channels: int, padding: int) -> np.ndarray:
    """(B, H, W) or (B, H, W, 3) as (B, C, S, S): resized if they do not fit into the border, grey by luma."""
    inner = size - 2 * padding
    images = images[..., None] if images.ndim == 3 else images                           # (B, H, W, 1 or 3)
    if images.shape[1:] == (inner, inner, channels):
        x = images.transpose(0, 3, 1, 2)
    else:
        x = np.stack([_fitted(image, inner, channels) for image in images])
    return np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))


def _fitted(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert(MODES[channels])
    return to_array(picture.resize((size, size), Image.Resampling.BILINEAR), channels)
