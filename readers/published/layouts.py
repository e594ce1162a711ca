"""Published large data sets: two LMDBs, as the official scripts or LSUN leave them; CelebA also as files.

    <data>/train.lmdb               <data>/bedroom_train_lmdb           <data>/celeba/img_align_celeba/*.jpg
    <data>/validation.lmdb          <data>/bedroom_val_lmdb             <data>/celeba/list_eval_partition.txt

`<data>` may also be the folder above. The second part is the test part, as published.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from readers.cache import cached_files, stamp
from readers.config import DataSet, ReaderConfig
from readers.lmdb.file import Lmdb, data_file, is_lmdb, refused, unfinished
from readers.paths import find_root
from readers.published.records import Decoding, FileStore, LazyImages, LmdbStore, Records, Store
from readers.source import Array, Source
from utils import UserError, read_text


@dataclass(frozen=True)
class Layout(Decoding):
    """Where a data set keeps its two parts, and what is in their records."""
    class_name: str = 'image'
    train: str = 'train.lmdb'
    test: str = 'validation.lmdb'
    listed: bool = False             # keys are no numbers: they are listed once and kept in the cache
    celeba: bool = False             # the files of CelebA do as well


def read_records(config: ReaderConfig, row: DataSet, **layout: Any) -> Source:
    """A published data set, (N, C, S, S) uint8, decoded when it is used; `layout` are fields of Layout, those
    of Decoding among them.

    Raises UserError if a part is missing, unfinished or cut off, or if its first image cannot be decoded.
    """
    layout, size = Layout(**layout), config.image_size or row.size
    stores = _stores(config, row, layout)
    images = LazyImages(stores, layout, config.channels or row.channels, size)
    images[[0, len(stores[0])]]                                      # raises UserError if these are damaged
    width, height = layout.open(stores[0].read(0)).size
    notes = []
    if len(stores[0]) != row.num_train:
        notes.append(f'{stores[0].path} has {len(stores[0]):,} images, the published training part '
                     f'{row.num_train:,}')
    if not layout.encoded and width != size:
        notes.append(f'the images in {stores[0].path} have {width} x {height} pixels: they are resized to '
                     f'{size} x {size}')
    return Source(Records(stores, layout.class_name), images, None, (layout.class_name,), (), notes=notes)


def _stores(config: ReaderConfig, row: DataSet, layout: Layout) -> list[Store]:
    """The two parts, 'train' and 'test'."""
    names = {'train': layout.train, 'test': layout.test}

    def holds(place: Path) -> bool:
        """Whether a part is there, finished or not."""
        return any((place / name).exists() or unfinished(place / name).exists() for name in names.values())

    root = find_root(config.data, row.where, holds)
    if root is None and layout.celeba and (celeba := find_celeba(config.data)):
        return [celeba_store('train', celeba, 'train'), celeba_store('test', celeba, 'valid')]
    if root is None:
        raise UserError(f"--data: {config.data} has no {layout.train} and {layout.test}. {row.where}")
    for path in (root / name for name in names.values()):
        if not path.exists():
            state = 'is unfinished: give the command that makes it once more, it goes on where it stopped' \
                if unfinished(path).exists() else 'is missing'
            raise UserError(f"{path} {state}. {row.where}")
        if not is_lmdb(path):
            raise UserError(f"{path} is not an LMDB: expected a folder with data.mdb. {row.where}")
        with refused(path), Lmdb(path) as records:
            records.check_whole()
    return [LmdbStore(part, root / name, _keys(root / name, config.cache_dir) if layout.listed else None)
            for part, name in names.items()]


def _keys(path: Path, cache_dir: str) -> Array:
    """The keys of an LMDB in their order, (N,) bytes, listed once and kept in the cache."""
    key = {'keys': str(path.resolve()), 'stamp': stamp(data_file(path))}

    def make(target: Path) -> dict:
        with refused(path), Lmdb(path) as records:
            np.save(target / 'keys.npy', np.array(records.keys(), 'S'))
        return {}

    return cached_files(cache_dir, key, make, lambda folder, _: Array(folder / 'keys.npy'))


# ----------------------------------------------------------------------------------------------------- CelebA

IMAGES, PARTITION = 'img_align_celeba', 'list_eval_partition.txt'
PARTS = {'train': '0', 'valid': '1', 'test': '2'}              # in list_eval_partition.txt
LAYOUT = f'celeba/{PARTITION} and celeba/{IMAGES}/*.jpg, as torchvision.datasets.CelebA leaves them'


def find_celeba(folder: str | Path) -> Path | None:
    """`folder` or `folder`/celeba, whichever holds CelebA; None if neither does."""
    places = (Path(folder), Path(folder, 'celeba'))
    return next((p for p in places if (p / PARTITION).is_file() and (p / IMAGES).is_dir()), None)


def celeba_store(part: str, folder: Path, split: str) -> FileStore:
    """The files of the published part `split`, 'train', 'valid' or 'test', in the order of the list."""
    path = folder / PARTITION
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if bad := next((line for line in lines if len(line) != 2 or line[1] not in PARTS.values()), None):
        raise UserError(f"{path} has the line {' '.join(bad)!r}: expected a file name and 0, 1 or 2. "
                        f"Fetch it again.")
    names = [name for name, part in lines if part == PARTS[split]]
    if not names:
        raise UserError(f"{path} lists no image of the part {split}: fetch it again.")
    return FileStore(part, folder / IMAGES, names)
