"""Reads a data set from one self-describing LMDB (format.py).

Records go through the importer that files go through, so a data set is the same from its folder and from its
LMDB. Volumes are stored as they were prepared, on the model's grid.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from readers.cache import stamp
from readers.config import DataSet, ReaderConfig, volume_flags
from readers.images.decode import FIRST_PAGE, ImageLoader, has_pages, load_mask
from readers.items import Item, Listing, Loaded, import_items
from readers.lmdb.file import Closing, Lmdb, data_file, is_lmdb, refused
from readers.lmdb.format import META, REMEDY, Damaged, info_of, key_of, marked_by, meta_of, raw_of, values_of
from readers.source import DTYPES, Source, Unreadable
from readers.split import noted
from utils import UserError

FREE_FLAGS = ('augment', 'key_files')      # of volumes: they do not say what is stored, or say it by a path


class Sealed(Lmdb):
    """An LMDB whose damaged records are named."""

    def get(self, key: bytes) -> bytes | None:
        try:
            return super().get(key)
        except Unreadable as error:
            raise Damaged(key, str(error)) from None


def read_meta(records: Sealed) -> dict[str, Any]:
    """The facts of a whole LMDB, finished or not. Raises UserError."""
    try:
        return meta_of(records.get(META))
    except Unreadable as error:
        raise UserError(f"{records.path} {error}.") from None


class Packed(Closing):
    """A finished packed LMDB; `len` is the number of its images."""

    def __init__(self, path: str | Path):
        """Raises UserError if there is none, if its making was interrupted or if it is damaged."""
        if not is_lmdb(path):
            raise UserError(f"{path} is not an LMDB, or its first page is damaged: {REMEDY}.")
        self.path, self.records = str(path), Sealed(path)
        self.meta = read_meta(self.records)
        with refused(path):
            held = len(self.records)
        if not 0 <= self.meta['count'] <= held:
            raise UserError(f"{path} does not hold the {self.meta['count']:,} images that it counts: "
                            f"{REMEDY}.")
        if not self.meta['complete']:
            raise UserError(f"{path} is not finished ({self.meta['count']:,} images so far): give the "
                            f"scripts/create_lmdb.py command that makes it again, it goes on.")

    def __len__(self) -> int:
        return self.meta['count']

    def info(self, number: int) -> dict[str, Any]:
        """The facts of an image. Raises Unreadable."""
        key = key_of('info', number)
        return info_of(key, self.records.get(key), bool(self.meta.get('volumes')))

    def payload(self, kind: str, number: int, facts: dict[str, Any]) -> bytes:
        """The bytes of an image or mask. Raises Unreadable if they are not what its info record says."""
        key = key_of(kind, number)
        data = self.records.get(key)
        if data is None:
            raise Damaged(key, 'is missing')
        if len(data) != facts['num_bytes'] or hashlib.sha256(data).hexdigest() != facts['sha256']:
            raise Damaged(key, 'does not have its SHA-256')
        return data

    def load(self, number: int, item: Item, loader: ImageLoader | None) -> Loaded:
        """An image as the `loader` prepares it, or a volume as it is. Raises Unreadable."""
        info = self.info(number)
        data, facts = self.payload('data', number, info), info.get('mask')
        original = info.get('original', info)
        drawn = self.payload('mask', number, facts) if item.masks else None
        if loader is None:
            mask = None if drawn is None else (raw_of(drawn, facts) > 0)[None]
            return Loaded(raw_of(data, info), mask, original['sha256'], original['num_bytes'], info['grids'])
        image = values_of(data, info)
        mask = None if drawn is None else load_mask(lambda: marked_by(drawn, facts), facts['name'],
                                                    image.shape)
        notes = [FIRST_PAGE] * (info['encoding'] == 'file' and has_pages(data))
        return loader.finish(image, mask, original['sha256'], original['num_bytes'], notes)

    def examine(self, number: int) -> tuple[dict[str, Any] | None, list[tuple[bytes, str]]]:
        """The facts of an image, None if they are lost; (key, what) of all that is wrong with its records."""
        try:
            info = self.info(number)
        except Unreadable as error:
            return None, [(key_of('info', number), getattr(error, 'what', str(error)))]
        found, decoded = [], raw_of if 'grids' in info else values_of
        for kind, facts in {'data': info, 'mask': info.get('mask')}.items():
            if facts is None:
                continue
            try:
                shape = list(decoded(self.payload(kind, number, facts), facts).shape)
                if facts['shape'] not in (shape, shape[:2]):
                    raise Unreadable(f"is {shape}, its info record says {facts['shape']}")
            except Unreadable as error:
                found.append((key_of(kind, number), getattr(error, 'what', str(error))))
        return info, found

    def close(self) -> None:
        self.records.close()


def is_packed(path: str | Path) -> bool:
    """Whether there is a packed LMDB at `path`, be it damaged or unfinished."""
    if not path or not is_lmdb(path):
        return False
    with Sealed(path) as records:
        try:
            # One damaged byte leaves one of these true.
            return (records.get(META) or b'')[8:10] == b' {' or records.get(key_of('info', 0)) is not None
        except Unreadable:
            return True                              # whoever reads it says what is wrong


# ------------------------------------------------------------------------------------------------- data set

def read_packed(config: ReaderConfig, row: DataSet) -> Source:
    """The images of the chosen classes, as (N, C, S, S) with the border of the row; or the volumes, as
    (N, C, *S). Raises UserError for volumes that were prepared by other flags than those that are given.
    """
    config.check_table(False)
    path = config.data
    file = data_file(path)
    loader, usual = None if row.dims == 3 else ImageLoader.of(config, row), stored_flags(ReaderConfig())
    given = {name: value for name, value in stored_flags(config).items() if value != usual[name]}
    key = {'packed': os.path.realpath(file), 'stamp': stamp(file),
           **(vars(loader) if loader else {'flags': given})}

    def read() -> Listing:
        try:
            return list_records(Packed(path), loader, given, config.depth)
        except UserError:
            raise
        except Exception as error:                   # facts of another kind than ours may raise any of them
            raise UserError(f"{path} does not hold what docs/lmdb.md says ({type(error).__name__}): "
                            f"{REMEDY}.") from None

    return import_items(config, row, key, read)


def stored_flags(config: ReaderConfig) -> dict[str, Any]:
    """The flags that decide what a volume is stored as, as JSON."""
    flags = {**volume_flags(config, *FREE_FLAGS), 'image_size': config.image_size}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


def list_records(packed: Packed, loader: ImageLoader | None, given: dict[str, Any], depth: int) -> Listing:
    """All images of an LMDB, or without a `loader` all volumes. Raises UserError."""
    meta, path = packed.meta, packed.path
    listing = Listing(f"{path} (an LMDB of --dataset {meta['dataset']})", [],
                      loader.shape if loader else (), list(map(str, meta['classes'])),
                      near_duplicates=meta.get('near_duplicates', True))
    volumes = meta.get('volumes')
    if bool(volumes) == bool(loader):
        raise UserError(f"{path} is an LMDB of {'volumes' if volumes else 'images'}, --dataset says "
                        f"{'images' if volumes else 'volumes'}: take --dataset {meta['dataset']}, which it "
                        f"was made from.")
    if volumes:
        expect_prepared(packed, given, depth)
        listing.notes, listing.flags, listing.kind = list(volumes['notes']), volumes['flags'], 'subject'
    else:
        left_out = [f'{name} {reason}' for name, reason in meta.get('left_out', [])]
        listing.notes += noted(left_out, 'file', f'had been left out when {path} was made')
        origin = vars(loader) | {'image_size': 0} | meta.get('origin', {})
        listing.flags = {name: origin[name] for name in ('fit', 'frames')}
        listing.notes += [f'the images in {path} were made with --{name} {value}: so are new files'
                          for name, value in listing.flags.items() if value != getattr(loader, name)]
        if (side := origin['image_size']) not in (0, loader.size):
            listing.notes.append(f'the images in {path} have {side} x {side} pixels: they are resized to '
                                 f'{loader.size} x {loader.size}')
    for number in range(len(packed)):
        try:
            info = packed.info(number)
            if volumes and listing.shape not in ((), tuple(info['shape'])):
                raise Damaged(key_of('info', number), f"is {info['shape']}, others {listing.shape}")
        except Unreadable as error:
            listing.bad.append((f'image {number} of {path}', str(error)))
            continue
        if volumes:
            listing.shape = tuple(info['shape'])
        masks = (key_of('mask', number).decode(),) if 'mask' in info else ()
        listing.items.append(Item(info['id'], info['class'], info['part'], info['patient'], masks=masks,
                                  read=lambda item, number=number: packed.load(number, item, loader)))
    return listing


def expect_prepared(packed: Packed, given: dict[str, Any], depth: int) -> None:
    """Raises UserError unless the volumes were prepared as the given flags say."""
    flags, path = packed.meta['volumes']['flags'], packed.path
    for name, value in given.items():
        if value != flags.get(name):
            raise UserError(f"--{name} {value}: {path} was made with {flags.get(name)}. Leave it out, or "
                            f"make an LMDB with it.")
    if packed.meta['dtypes'] != [DTYPES[depth]]:
        raise UserError(f"--num_x_bits: {path} holds {' and '.join(packed.meta['dtypes'])}, {depth} bits are "
                        f"wanted. Make an LMDB with the same --num_x_bits.")
