"""Published large data sets: two LMDBs, as the official scripts or LSUN leave them; CelebA also as files.

    <data>/train.lmdb               <data>/bedroom_train_lmdb           <data>/celeba/img_align_celeba/*.jpg
    <data>/validation.lmdb          <data>/bedroom_val_lmdb             <data>/celeba/list_eval_partition.txt

`<data>` may also be the folder above. The second part is the test part, as published. torchvision's reader
of LSUN is not used: it opens the LMDB when it is made, so that it cannot be sent to another process, and
leaves a pickle of the keys in the working folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from readers.lmdb.file import Lmdb, is_lmdb
from readers.lmdb.maker import unfinished
from readers.published.celeba import celeba_store, find_celeba
from readers.published.records import Decoding, LazyImages, LmdbStore, Records, Store
from readers.source import Array, Source, cached_files, choose_classes
from utils import UserError


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its two parts, and what is in their records."""
    decoding: Decoding = field(default_factory=Decoding)
    class_name: str = 'image'
    train: str = 'train.lmdb'
    test: str = 'validation.lmdb'
    listed: bool = False             # keys are no numbers: they are listed once and kept in the cache
    celeba: bool = False             # the files of CelebA do as well


def read_records(folder: str, layout: Layout, *, size: int, channels: int, num_train: int,
                 normal: Sequence[str], anomalous: Sequence[str], cache_dir: str, where: str) -> Source:
    """A published data set, (N, C, S, S) uint8, read lazily.

    Raises UserError if a part is missing, unfinished or cut off, or if its first image cannot be decoded.
    `num_train` is the number of training images that the published set has.
    """
    usual, abnormal = choose_classes([layout.class_name], normal, anomalous, False, 'this data set')
    stores = _stores(folder, layout, cache_dir, where)
    images = LazyImages(stores, layout.decoding, channels, size)
    images[[0, len(stores[0])]]                                      # raises UserError if these are damaged
    width, height = layout.decoding.open(stores[0].read(0)).size
    notes = []
    if len(stores[0]) != num_train:
        notes.append(f'{stores[0].path} has {len(stores[0]):,} images, the published training part '
                     f'{num_train:,}')
    if not layout.decoding.encoded and width != size:
        notes.append(f'the images in {stores[0].path} have {width} x {height} pixels: they are resized to '
                     f'{size} x {size}')
    return Source(Records(stores, layout.class_name), images, None, usual, abnormal, notes=notes)


def _stores(folder: str, layout: Layout, cache_dir: str, where: str) -> list[Store]:
    """The two parts, 'train' and 'test'."""
    if not folder:
        raise UserError(f"--data is missing. {where}")
    root = _find(Path(folder), (layout.train, layout.test), where)
    if root is None and layout.celeba and (celeba := find_celeba(folder)):
        return [celeba_store('train', celeba, 'train'), celeba_store('test', celeba, 'valid')]
    if root is None:
        raise UserError(f"--data: {folder} has no {layout.train} and {layout.test}. {where}")
    stores = []
    for part, name in (('train', layout.train), ('test', layout.test)):
        path = root / name
        if not path.exists():
            state = 'is unfinished: give the command that makes it once more, it goes on where it stopped' \
                if unfinished(path).exists() else 'is missing'
            raise UserError(f"{path} {state}. {where}")
        if not is_lmdb(path):
            raise UserError(f"{path} is not an LMDB: expected a folder with data.mdb. {where}")
        stores.append(LmdbStore(part, path, _keys(path, cache_dir) if layout.listed else None))
    return stores


def _find(folder: Path, names: Sequence[str], where: str) -> Path | None:
    """`folder`, or the one folder in it, that holds one of `names`, finished or not; None if none does."""
    def holds(place: Path) -> bool:
        return any((place / n).exists() or unfinished(place / n).exists() for n in names)

    try:
        if not folder.is_dir():
            raise UserError(f"--data: the folder {str(folder)!r} does not exist. {where}")
        if holds(folder):
            return folder
        roots = sorted(p for p in folder.iterdir() if p.is_dir() and holds(p))
    except OSError as error:
        raise UserError(f"--data: {folder} cannot be read ({error.strerror or error}).") from None
    if len(roots) > 1:
        raise UserError(f"--data: {folder} holds several data sets: name one of "
                        f"{', '.join(r.name for r in roots)}.")
    return roots[0] if roots else None


def _keys(path: Path, cache_dir: str) -> Array:
    """The keys of an LMDB in their order, (N,) bytes, listed once and kept in the cache."""
    status = (path / 'data.mdb' if path.is_dir() else path).stat()
    stamp = {'keys': str(path.resolve()), 'bytes': status.st_size, 'time': status.st_mtime_ns}

    def make(target: Path) -> dict:
        lmdb = Lmdb(path)
        longest = max(map(len, lmdb.keys()), default=1)
        np.save(target / 'keys.npy', np.fromiter(lmdb.keys(), f'S{longest}', len(lmdb)))
        return {}

    return cached_files(cache_dir, stamp, make, lambda folder, _: Array(folder / 'keys.npy'))
