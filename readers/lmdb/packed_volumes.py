"""Volumes in an LMDB of scripts/create_lmdb.py: as they were prepared, on the model's grid.

The format is that of packed.py (docs/lmdb.md): `data` is (C, D, H, W), `mask` (D, H, W), `info` has the
grids. Read back, a data set is what it was from its files.
"""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from readers.config import VolumeConfig
from readers.duplicates import near_duplicates
from readers.images.folder import ImageFile, stamp
from readers.lmdb.packed import Packed, Record, facts_of, list_images, payload, raw_of
from readers.source import DTYPES, Entry, Source, Unreadable, cached, check_room, choose_classes, same_name
from utils import UserError

FREE_FLAGS = ('augment', 'key_files')                # do not say what is stored, or say it by a path


def preparation_flags(config: VolumeConfig, image_size: int) -> dict[str, Any]:
    """The flags that decide what a volume is stored as, as JSON."""
    named = {f.name: getattr(config, f.name) for f in fields(VolumeConfig) if f.name not in FREE_FLAGS}
    named = {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
    return named | {'image_size': image_size}


def volume_record(entry: Entry, pixels: np.ndarray, mask: np.ndarray | None) -> Record:
    """A volume (C, *S) uint8 or uint16 with its mask (*S) uint8, as it goes into the LMDB."""
    data = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder('<')).tobytes()
    info = facts_of(ImageFile(entry.id, '', entry.class_name, '', entry.part, entry.patient))
    info |= payload(data, 'raw', pixels.shape, pixels.dtype.name)
    info |= {'original': {'sha256': entry.sha256, 'num_bytes': entry.file_bytes}, 'grids': entry.grids}
    if mask is None:
        return Record(info, data)
    drawn = mask.tobytes()
    return Record(info | {'mask': {'name': '', **payload(drawn, 'raw', mask.shape, 'uint8')}}, data, drawn)


def read_packed_volumes(path: str | Path, config: VolumeConfig, *, image_size: int, normal: Sequence[str],
                        normal_wanted: Sequence[str], anomalous: Sequence[str], depth: int, cache_dir: str
                        ) -> Source:
    """The volumes of the chosen classes of a packed LMDB, as (N, C, *S) of `depth` 8 or 16 bits.

    Records that cannot be read are in Source.bad. Raises UserError if it holds images, or volumes that were
    prepared by other flags than `config` and `image_size` name; those that are not given say nothing.
    """
    given, usually = (preparation_flags(c, size) for c, size in ((config, image_size), (VolumeConfig(), 0)))
    given = {name: value for name, value in given.items() if value != usually[name]}
    file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else str(path)
    key = {'packed volumes': os.path.realpath(file), 'stamp': stamp(file), 'flags': given, 'depth': depth,
           'normal': list(normal), 'normal_wanted': list(normal_wanted), 'anomalous': list(anomalous)}

    def make(target: Path) -> dict:
        with Packed(path) as packed:
            _expect_prepared(packed, given, depth)
            files, bad = list_images(packed)                             # {number: file}
            found = sorted({*packed.meta['classes'], *(f.class_name for f in files.values())})
            usual = normal_wanted or [c for c in found if any(same_name(c, n) for n in normal)]
            if not usual:
                raise UserError(f"--data: {path} has no class of normal subjects named "
                                f"{' or '.join(normal)}: found {', '.join(found)}. Name the normal ones with "
                                f"--normal_classes.")
            usual, abnormal = choose_classes(found, usual, anomalous, True, str(path))
            numbers = [n for n, f in files.items() if f.class_name in usual + abnormal]
            made = _unpack(packed, numbers, target, depth)
            return {**made, 'bad': bad + made['bad'], 'notes': packed.meta['volumes']['notes'],
                    'flags': packed.meta['volumes']['flags'], 'normal_classes': usual,
                    'anomalous_classes': abnormal}

    return cached(cache_dir, key, make)


def _expect_prepared(packed: Packed, given: dict[str, Any], depth: int) -> None:
    stored = packed.meta.get('volumes')
    if not stored:
        raise UserError(f"--data {packed.path} is an LMDB of images, --dataset says volumes: take --dataset "
                        f"{packed.meta['dataset']}, which it was made from.")
    for name, value in given.items():
        if value != stored['flags'].get(name):
            raise UserError(f"--{name} {value}: {packed.path} was made with {stored['flags'].get(name)}. "
                            f"Leave it out, or make an LMDB with it.")
    if packed.meta['dtypes'] != [np.dtype(DTYPES[depth]).name]:
        raise UserError(f"--num_x_bits: {packed.path} holds {' and '.join(packed.meta['dtypes'])}, {depth} "
                        f"bits are wanted. Make an LMDB with the same --num_x_bits.")


def _unpack(packed: Packed, numbers: list[int], target: Path, depth: int) -> dict[str, Any]:
    """Writes `target`/pixels.npy and masks.npy; the entries, near-duplicates and what cannot be read."""
    infos = [packed.info(number) for number in numbers]
    if not infos:
        return {'entries': [], 'bad': [], 'twins': []}
    shape, with_mask = tuple(infos[0]['shape']), [i for i, info in enumerate(infos) if 'mask' in info]
    voxels = int(np.prod(shape))
    check_room(target, voxels * len(infos) * depth // 8 + voxels // shape[0] * len(with_mask))
    new = np.lib.format.open_memmap
    pixels = new(target / 'pixels.npy', 'w+', DTYPES[depth], (len(infos), *shape))
    masks = new(target / 'masks.npy', 'w+', np.uint8, (len(with_mask), 1, *shape[1:])) if with_mask else None
    rows, entries, bad = {i: row for row, i in enumerate(with_mask)}, [], []
    for i, (number, info) in enumerate(zip(numbers, infos, strict=True)):
        try:
            pixels[i] = raw_of(packed.payload('data', number, info), info)
            if i in rows:
                masks[rows[i], 0] = raw_of(packed.payload('mask', number, info['mask']), info['mask']) > 0
        except Unreadable as error:
            bad.append((info['id'], str(error)))
            continue
        entries.append(Entry(info['id'], '', info['class'], info['original']['sha256'],
                             info['original']['num_bytes'], i, rows.get(i, -1), info['part'],
                             patient=info['patient'], grids=info['grids']))
    pairs = near_duplicates(pixels)
    pixels.flush()
    if masks is not None:
        masks.flush()
    return {'entries': entries, 'bad': bad,
            'twins': [(infos[i]['id'], infos[j]['id'], c) for i, j, c in pairs]}
