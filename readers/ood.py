"""Images from elsewhere that are to be told from a run's own: what `--ood NAME=PATH[:CHANGE]` names.

B images, C channels, H x W pixels; S x S pixels as the model sees them, with its border.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from readers.arrays import png_bytes
from readers.images import ImageFile, image_files, scan, stamp
from readers.source import Entry, Images, Source, cached
from utils import UserError, mix_seed

OWN = 'test'               # in place of a path: the run's own normal test images
INVERT = 'invert'          # light for dark: a Part does it, before it makes an image binary
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {               # of (B, C, H, W), H = W
    'rot90': lambda x: np.rot90(x, 1, (2, 3)),                         # counter-clockwise
    'rot180': lambda x: np.rot90(x, 2, (2, 3)),
    'rot270': lambda x: np.rot90(x, 3, (2, 3)),
    'flip': lambda x: x[..., ::-1],                                    # left for right
}
CHANGES = (*TURNS, INVERT)


@dataclass(frozen=True)
class Wanted:
    """One set of images: the class that they are to be, where they lie, what is done to them."""
    name: str
    path: str
    changes: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        return tuple(c for c in self.changes if c != INVERT)

    @property
    def inverted(self) -> bool:
        return self.changes.count(INVERT) % 2 == 1


def parse(text: str) -> Wanted:
    """'fashion=/data/fashion:rot90:invert'. A path may hold colons. Raises UserError."""
    name, _, path = text.partition('=')
    changes: list[str] = []
    while path.rpartition(':')[2] in CHANGES and ':' in path:
        path, _, change = path.rpartition(':')
        changes.insert(0, change)
    if not name or not path or '/' in name:
        raise UserError(f"--ood {text!r}: expected NAME=PATH, or NAME=PATH:CHANGE with a change of "
                        f"{', '.join(CHANGES)}.")
    if path.startswith(f'{OWN}:') or (path == OWN and not changes):
        raise UserError(f"--ood {text!r}: the run's own test images need a change of {', '.join(CHANGES)}; a "
                        f"folder of this name is ./{OWN}.")
    return Wanted(name, path, tuple(changes))


def read_images(path: str, name: str, *, most: int, seed: int, size: int, channels: int, depth: int, fit: str,
                cache_dir: str) -> Source:
    """All image files below a folder, of whatever class folders, as (N, C, S, S); no border.

    With `most`, only so many, drawn by `seed`; 0 = all. Raises UserError if there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--ood {name}: {path} is no folder of images and no LMDB of scripts/create_lmdb.py. "
                        f"Correct the path; for a published data set take its name of --dataset as the name.")
    files = [ImageFile(p.relative_to(folder).as_posix(), str(p), name) for p in image_files(folder)]
    if not files:
        raise UserError(f"--ood {name}: there is no image below {path}. Correct the path; for a published "
                        f"data set take its name of --dataset as the name.")
    files = drawn(files, most, seed)

    def make(target: Path) -> dict:
        return {**scan(files, target, size=size, channels=channels, depth=depth, fit=fit, twins=False),
                'normal_classes': (), 'anomalous_classes': (name,)}

    return cached(cache_dir, {'images': str(folder.resolve()), 'name': name, 'size': size,
                              'channels': channels, 'depth': depth, 'fit': fit,
                              'files': [[f.id, *stamp(f.path)] for f in files]}, make)


def drawn(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """`most` of the items at random, in their order; 0 = all. Each has an id, on which its luck depends."""
    if not most or len(items) <= most:
        return list(items)
    chosen = sorted(range(len(items)), key=lambda i: mix_seed(seed, 'ood', items[i].id))[:most]
    return [items[i] for i in sorted(chosen)]


def as_anomalies(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The entries as images of the anomalous class `name`, under ids of their own."""
    return [replace(e, id=f'{name}/{e.id}', class_name=name, label=1, mask_row=-1, part=OWN) for e in entries]


def with_sizes(entries: list[Entry], images: 'Changed | None') -> list[Entry]:
    """The entries with file sizes, as a PNG where there is no file; all unknown (0) without `images`."""
    if images is None:
        return [replace(e, file_bytes=0) for e in entries]
    return [e if e.file_bytes else replace(e, file_bytes=images.png_bytes(e.row)) for e in entries]


class Changed:
    """Images turned, in the bits of the run and with its border: (N, C, S, S)."""

    def __init__(self, images: Images, turns: Sequence[str] = (), depth: int = 8, border: int = 0):
        self.images, self.turns, self.depth, self.border = images, tuple(turns), depth, border
        count, channels, height, width = images.shape
        self.shape = (count, channels, height + 2 * border, width + 2 * border)

    def __getitem__(self, rows: Any) -> np.ndarray:
        x = self.images[rows]                                                    # (B, C, H, W)
        if self.depth == 16 and x.dtype == np.uint8:
            x = x.astype(np.uint16) * 257                                        # 255 becomes 65535
        for turn in self.turns:
            x = TURNS[turn](x)
        around = (self.border, self.border)
        return np.pad(x, ((0, 0), (0, 0), around, around)) if self.border else np.ascontiguousarray(x)

    def png_bytes(self, row: int) -> int:
        """The size of one image without its border as a PNG, of 8 bits."""
        (height, width), border = self.shape[2:], self.border
        x = self[[row]][0, :, border:height - border, border:width - border].transpose(1, 2, 0)    # (H, W, C)
        x = x if x.dtype == np.uint8 else (x >> 8).astype(np.uint8)
        return png_bytes(x[..., 0] if x.shape[-1] == 1 else x)
