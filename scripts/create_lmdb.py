"""Packs a data set into one self-describing LMDB (docs/lmdb.md), and checks one.

    python scripts/create_lmdb.py --data FOLDER --out chest.lmdb             the files of a folder of classes
    python scripts/create_lmdb.py ... --image_size 64                        resized to 64 x 64, as arrays
    python scripts/create_lmdb.py --dataset mnist --data FOLDER --out m.lmdb        any row of DATASETS
    python scripts/create_lmdb.py --dataset brain --data FOLDER --spacing 2 --out b.lmdb    volumes, prepared
    python scripts/create_lmdb.py --verify chest.lmdb                        every byte that a reader uses
    python train.py --dataset folder --data chest.lmdb ...

All classes go in, whatever is trained on later. A stopped command goes on when it is given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from command_line.parser import parse_flags
from datasets import DATASETS, DataConfig, check
from readers.cache import stamp
from readers.config import VolumeConfig
from readers.images.decode import ImageLoader
from readers.images.folder import find_items, with_frames
from readers.images.tables import is_arrays
from readers.items import Item
from readers.lmdb.file import LmdbWriter, is_lmdb
from readers.lmdb.format import FORMAT, META, VERSION, Record, array_record, file_record, key_of, seal
from readers.lmdb.packed import Packed, Sealed, is_packed, read_meta, stored_flags
from readers.parallel import in_order
from readers.source import CLASSES_SHOWN, Unreadable
from readers.split import count, left_out, some, with_patients
from utils import UserError, flag, flags, read_flags, run_program

MOST_ROWS, MOST_BYTES = 512, 32 << 20            # in a transaction: what a kill can lose
DATA_FLAGS = ('dataset', 'data', 'image_size', 'channels', 'num_x_bits', 'fit', 'frames',
              'normal_classes', 'patient_pattern', 'patient_metadata', 'columns', 'class_columns', 'images',
              'tables', 'skip_corrupt', 'num_phantoms', 'phantom_confound', 'cache_dir',
              *(f.name for f in fields(VolumeConfig) if f.name != 'augment'))
PIXEL_FLAGS = ('channels', 'num_x_bits', 'fit', 'frames')  # do nothing to files that are stored as they are


@flags
class FolderConfig(DataConfig):
    """Data"""
    dataset: str = flag('folder', 'data set', choices=tuple(DATASETS), basic=True)
    image_size: int = flag(0, 'store arrays of this height and width; 0 = files as they are, or arrays at '
                              "the data set's own size", least=0, basic=True)
    normal_classes: tuple = flag((), 'a class that tells the folder of classes from the one above it; none '
                                     "given = the data set's own. All classes are stored", basic=True)


@flags
class LmdbConfig:
    """LMDB"""
    out: str = flag('', 'file to make', basic=True)
    workers: int = flag(0, 'threads that read and decode; 0 = one per core', least=0, basic=True)
    verify: str | None = flag(None, 'check this LMDB, or after --data the one just made', type=str, nargs='?',
                              const='', basic=True)


@dataclass(frozen=True)
class Job:
    """What is to be packed: images by their numbers, and what `meta` says of them all."""
    total: int
    item: Callable[[int], Item]
    load: Callable[[int], Record]                    # raises Unreadable
    state: Callable[[int], Any]                      # another one if the image has changed
    facts: dict[str, Any]
    settings: dict[str, Any]                         # the flags that decide what is stored
    notes: list[str]

    def stamp(self, number: int) -> bytes:
        """Tells whether an image is the same as when an earlier run stored it."""
        item = self.item(number)
        return json.dumps([item.id, item.class_name, item.part, item.patient, self.state(number)]).encode()


# ------------------------------------------------------------------------------------------------------- jobs

def plan(config: DataConfig) -> Job:
    """The job that the flags describe. Raises UserError."""
    row = DATASETS[config.dataset]
    check(config, row)
    if is_packed(config.data):
        raise UserError(f"--data {config.data} is such an LMDB already: use it as it is.")
    files = row.folder and row.dims == 2 and not is_arrays(config.data)
    return (plan_files if files else plan_arrays)(config)


def plan_files(config: DataConfig) -> Job:
    """From class folders: files as they are, or the arrays that the reader makes of them."""
    row = DATASETS[config.dataset]
    given = [f'--{name}' for name in PIXEL_FLAGS if getattr(config, name) != getattr(DataConfig, name)]
    if given and not config.image_size:
        raise UserError(f"{', '.join(given)} would change images that are stored as they are: leave it out, "
                        f"or give --image_size.")
    root, items, notes = find_items(config, row)
    items = with_patients(items, config.patient_metadata, config.patient_pattern, notes)
    settings = {'dataset': config.dataset, 'image_size': config.image_size}
    if config.image_size:
        settings |= {name: getattr(config, name) for name in PIXEL_FLAGS}
    loader = ImageLoader.of(config, row)
    items = [framed for item in items for framed in with_frames(item, loader)]

    def load(number: int) -> Record:
        return (resized_record if config.image_size else file_record)(items[number])

    def state(number: int) -> Any:
        item = items[number]
        return [item.masks, *map(stamp, item.files)]

    facts = {'dataset': config.dataset, 'classes': sorted({item.class_name for item in items}),
             'near_duplicates': True, 'made_from': root.name}
    return Job(len(items), items.__getitem__, load, state, facts, settings, notes)


def resized_record(item: Item) -> Record:
    """An image file as its reader hands it over. Raises Unreadable."""
    loaded = item.load()
    mask = None if loaded.mask is None else loaded.mask[0] * np.uint8(255)                      # (S, S)
    return array_record(item, loaded.pixels, mask, {'sha256': loaded.sha256, 'num_bytes': loaded.num_bytes})


def plan_arrays(config: DataConfig) -> Job:
    """From any other data set: the arrays that its reader makes, images without the border that the model
    sees, volumes with their grids.
    """
    row = DATASETS[config.dataset]
    config = replace(config, anomalous_classes=())
    if row.dims == 2:
        own = row.size - 2 * row.padding
        normal = config.normal_classes if row.normal else ()
        config = replace(config, normal_classes=normal, image_size=config.image_size or own)
        if row.padding and config.image_size != own:
            raise UserError(f"--image_size {config.image_size}: images of {config.dataset} are stored "
                            f"without border, {own} x {own}: leave it out. Programs that read them make the "
                            f"border.")
    source = row.read(config, row)
    notes = [*source.notes, *left_out(source.bad, len(source.entries), config.skip_corrupt,
                                      'subject' if row.dims == 3 else 'file')]
    entries = with_patients(source.entries, config.patient_metadata, config.patient_pattern, notes)

    def item(number: int) -> Item:
        entry = entries[number]                      # made when asked for, where there are millions
        return Item(entry.id, entry.class_name, entry.part, entry.patient)

    def load(number: int) -> Record:
        entry = entries[number]
        try:
            pixels = source.pixels[np.array([entry.row])][0]                     # (C, *S)
        except UserError as error:
            raise Unreadable(f'cannot be read ({error})') from None
        mask = None if entry.mask_row < 0 else source.masks[entry.mask_row][0]
        original = {'sha256': entry.sha256, 'num_bytes': entry.file_bytes} if entry.sha256 else {}
        record = array_record(item(number), pixels, mask, original)
        return record._replace(info=record.info | ({'grids': entry.grids} if entry.grids else {}))

    settings = {'dataset': config.dataset, 'num_x_bits': config.num_x_bits, 'channels': config.channels,
                **stored_flags(config)}
    classes = sorted({*source.normal_classes, *source.anomalous_classes})
    facts = {'dataset': config.dataset, 'classes': classes, 'near_duplicates': row.dims == 3,
             'made_from': Path(config.data).resolve().name}
    if row.dims == 3:
        facts['volumes'] = {'flags': stored_flags(config), 'notes': notes}
    elif entries:                                    # large sets keep no hash of each image
        settings['first_sha256'] = hashlib.sha256(source.pixels[np.array([0])].tobytes()).hexdigest()
    return Job(len(entries), item, load, lambda number: entries[number].sha256, facts, settings, notes)


# ---------------------------------------------------------------------------------------------------- writing

def pack(job: Job, out: Path, workers: int, skip_corrupt: bool) -> None:
    """Makes the LMDB, or goes on with it. Raises UserError for unreadable images unless they are left out."""
    meta, digest = start(job, out)
    if meta['complete']:
        print(f"{out} is there already: {count(meta['count'], 'image')}. Delete it to make it anew.")
        return
    began, bad = time.monotonic(), []
    numbers = range(meta['origin']['done'], job.total)
    with LmdbWriter(out, subdir=False) as writer, \
            tqdm(desc=f'packing {out.name}', total=job.total, initial=numbers.start, unit='image',
                 disable=None, leave=False) as bar:
        rows: list[tuple[bytes, bytes]] = []
        stored = writer.get(META)

        def write() -> bytes:
            if writer.get(META) != stored:
                raise UserError(f"another process writes {out} too: let one of them do it.")
            meta['origin']['digest'] = digest.hexdigest()
            sealed = seal(META, meta)
            writer.put([*rows, (META, sealed)])
            rows.clear()
            return sealed

        for number, record in zip(numbers, in_order(job.load, numbers, workers), strict=True):
            bar.update()
            if isinstance(record, str):
                bad.append([job.item(number).id, record])
            if bad and not skip_corrupt:
                continue                              # nothing more goes in, but every bad file is found
            if isinstance(record, str):
                meta['left_out'].append(bad[-1])
            else:
                rows += add(meta, record)
            meta['origin']['done'] = number + 1
            digest.update(job.stamp(number))
            if len(rows) >= MOST_ROWS or sum(len(value) for _, value in rows) >= MOST_BYTES:
                stored = write()
        meta['complete'] = meta['count'] > 0 and meta['origin']['done'] == job.total
        write()
    report(job, out, meta, bad, time.monotonic() - began)


def add(meta: dict[str, Any], record: Record) -> list[tuple[bytes, bytes]]:
    """Counts an image in `meta`; its keys and values."""
    key = key_of('info', meta['count'])
    rows = [(key, seal(key, record.info)), (key_of('data', meta['count']), record.data)]
    rows += [(key_of('mask', meta['count']), record.mask)] if record.mask else []
    meta['count'] += 1
    shape = record.info['shape']
    channels = shape[0] if 'grids' in record.info else shape[2] if len(shape) == 3 else 1
    meta['channels'] = sorted({*meta['channels'], channels})
    meta['dtypes'] = sorted({*meta['dtypes'], record.info['dtype']})
    return rows


def start(job: Job, out: Path) -> tuple[dict[str, Any], Any]:
    """The `meta` to go on from, and the hash of what is stored. Raises UserError if `out` is something else.
    """
    digest = hashlib.sha256(json.dumps(job.settings, sort_keys=True).encode())
    meta = {'format': FORMAT, 'version': VERSION, 'complete': False, 'count': 0, **job.facts, 'channels': [],
            'dtypes': [], 'left_out': [], 'made_by': Path(__file__).name,
            'origin': {'done': 0, 'digest': digest.hexdigest(), **job.settings}}
    if not out.exists() or (out.is_file() and out.stat().st_size == 0):
        return meta, digest
    if not out.is_file() or not is_lmdb(out):
        raise UserError(f"--out {out} is there and is no LMDB file: choose another name.")
    with Sealed(out) as records:
        try:
            if len(records) == 0:                     # stopped before its first record
                return meta, digest
            if not is_packed(out):
                raise UserError(f"--out {out} is an LMDB of something else: choose another name.")
        except Unreadable as error:
            raise UserError(f"--out {out} {error}: delete it.") from None
        found = read_meta(records)
    origin = found.get('origin')
    if not isinstance(origin, dict) or not isinstance(origin.get('done'), int):
        origin = {}                                   # what another program has made does not go on here
    for number in range(min(origin.get('done', 0), job.total)):
        digest.update(job.stamp(number))
    grown = found['complete'] and origin.get('done') != job.total
    if origin.get('digest') != digest.hexdigest() or grown:
        state = 'finished' if found['complete'] else 'begun'
        raise UserError(f"--out {out} was {state} with other images or flags "
                        f"({count(found['count'], 'image')} from {found.get('made_from')!r}): choose another "
                        f"name, or delete it.")
    return (found if found['complete'] else found | job.facts), digest


def report(job: Job, out: Path, meta: dict[str, Any], bad: list[tuple[str, str]], seconds: float) -> None:
    """Says what was made. Raises UserError if it could not be finished."""
    for note in job.notes:
        print(note)
    if meta['origin']['done'] < job.total:
        for name, reason in bad:
            print(f'unreadable: {name} {reason}', file=sys.stderr)
        raise UserError(f"{count(len(bad), 'file')} of {job.total} cannot be used: "
                        f"{some([f'{name} {reason}' for name, reason in bad])}. Replace or remove them and "
                        f"give the command again, or pass --skip_corrupt to leave them out.")
    for name, reason in meta['left_out']:
        print(f'left out: {name} {reason}')
    if not meta['complete']:
        raise UserError(f"no image of {meta['made_from']} can be used: delete {out}.")
    out.with_name(f'{out.name}-lock').unlink(missing_ok=True)         # LMDB's, of use to writers only
    names = ', '.join(meta['classes'][:CLASSES_SHOWN])
    print(f"{out}: {count(meta['count'], 'image')} of the classes {names}; "
          f"{out.stat().st_size / 2 ** 20:,.1f} MiB, {seconds:.1f} s")


# --------------------------------------------------------------------------------------------------- checking

def verify(path: Path, workers: int) -> int:
    """Looks at every record of an LMDB; prints `OK`, or each damage. 0 if it is whole, 1 if it is not."""
    damages, ids, masks = [], set(), 0
    with Packed(path) as packed:
        numbers = tqdm(range(len(packed)), f'checking {path.name}', unit='image', disable=None, leave=False)
        for info, found in in_order(packed.examine, numbers, workers):
            name = info['id'] if info else 'an image'
            damages += [f'{name}, record {key.decode()} {what}' for key, what in found]
            if info and name in ids:
                damages.append(f'{name} is the id of two images')
            ids.add(name)
            masks += 'mask' in (info or {})
        expected = 1 + 2 * len(packed) + masks
        try:
            if not damages and (entries := len(packed.records)) != expected:
                damages.append(f'it has {entries:,} records, expected {expected:,}')
        except Unreadable as error:
            damages.append(str(error))
    for line in damages:
        print(f'damaged: {line}')
    print(f"{path}: {count(len(damages), 'damage')}" if damages else f"OK: {count(len(packed), 'record')}")
    return 1 if damages else 0


def main() -> int:
    args = parse_flags(sys.argv[1:], __doc__, (FolderConfig, LmdbConfig),
                       without={f.name for f in fields(FolderConfig)} - {*DATA_FLAGS})
    workers = read_flags(LmdbConfig, args).workers
    if args.verify is None or args.data:
        if not args.out:
            raise UserError("--out is missing: name the LMDB to make, such as --out images.lmdb.")
        config = read_flags(FolderConfig, args)
        pack(plan(config), Path(args.out), workers, config.skip_corrupt)
    if args.verify is None:
        return 0
    if not (args.verify or args.out):
        raise UserError("--verify: name the LMDB to check.")
    return verify(Path(args.verify or args.out), workers)


if __name__ == '__main__':
    run_program(main)
