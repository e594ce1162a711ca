"""A data set in one self-describing LMDB: what a program needs to read it, and a checksum over all of it.

    meta            facts of the whole          info/00000012   facts of image 12: id, class, hash, ...
    data/00000012   the bytes of the image      mask/00000012   those of its mask, where it has one

docs/lmdb.md is the format. `meta` and `info` carry a CRC-32 of key and content, `data` and `mask` a SHA-256.
LMDB's own pages carry none, and a damaged one can end the process that reads it: here a child process reads.
Records go through the same scan into the same cache as files do, so a data set is the same from its folder
and from its LMDB. S x S pixels as the model sees them, without border.
"""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from readers.dicom import FULL, is_dicom
from readers.images.folder import FORMATS, ImageFile, Picture, decode, file_content, load_mask, scan, stamp
from readers.lmdb import child as lmdb_child
from readers.lmdb.file import is_lmdb
from readers.source import CLASSES_SHOWN, Source, Unreadable, cached, choose_classes, same_name
from readers.split import count, some
from utils import UserError

FORMAT, VERSION = 'anomaly-lmdb', 1
META = b'meta'
DTYPES = {'I': 'int32', 'F': 'float32'}          # of Pillow's modes; others are uint8, or uint16 ('I;16...')
RAW_TYPES = {'uint8': np.dtype('u1'), 'uint16': np.dtype('<u2')}
PAYLOAD = {'encoding': str, 'shape': list, 'dtype': str, 'num_bytes': int, 'sha256': str}
INFO = {'id': str, 'class': str, 'part': str, 'patient': str, **PAYLOAD}
MASK = {'name': str, **PAYLOAD}
ORIGINAL = {'sha256': str, 'num_bytes': int}
FACTS = {'format': str, 'version': int, 'complete': bool, 'count': int, 'dataset': str, 'classes': list}
PARTS = ('', 'train', 'val', 'test')
MOST_ENDS = 20                 # reading processes that a damaged file may end before the rest is given up
REMEDY = 'make the LMDB anew or restore it'


class Damaged(Unreadable):
    """A record that is not what was written; `what` goes on from its key."""

    def __init__(self, key: bytes, what: str):
        super().__init__(f'is damaged (record {key.decode()} {what}): {REMEDY}')
        self.what = what


# ----------------------------------------------------------------------------------------------------- format

def key_of(kind: str, number: int) -> bytes:
    """The key of image `number`: kind is info, data or mask."""
    return f'{kind}/{number:08d}'.encode()


def seal(key: bytes, value: dict[str, Any]) -> bytes:
    """JSON behind the CRC-32 of key and JSON: 8 hexadecimal digits and a space."""
    text = json.dumps(value, sort_keys=True, separators=(',', ':')).encode()
    return b'%08x ' % zlib.crc32(key + text) + text


def unseal(key: bytes, sealed: bytes | None, fields: dict[str, type]) -> dict[str, Any]:
    """What `seal` sealed, if it is whole and has these fields. Raises Unreadable."""
    if sealed is None:
        raise Damaged(key, 'is missing')
    if sealed[:9] != b'%08x ' % zlib.crc32(key + sealed[9:]):
        raise Damaged(key, 'does not have its CRC-32')
    try:
        value = json.loads(sealed[9:])
    except ValueError:
        raise Damaged(key, 'is not JSON') from None
    _expect(value, fields, key)
    return value


def _expect(value: Any, fields: dict[str, type], key: bytes) -> None:
    for field, kind in fields.items():
        if not isinstance(value, dict) or not isinstance(value.get(field), kind):
            raise Damaged(key, f'has no {field!r} that is a {kind.__name__}')


def payload(data: bytes, encoding: str, shape: Sequence[int], dtype: str) -> dict[str, Any]:
    """The facts that a record keeps of the bytes of an image or mask."""
    return {'encoding': encoding, 'shape': list(shape), 'dtype': dtype, 'num_bytes': len(data),
            'sha256': hashlib.sha256(data).hexdigest()}


def values_of(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """The image in the bytes of a record: (H, W, C) float32 in [0, 1]. Raises Unreadable."""
    if facts['encoding'] == 'file':
        return decode(data)
    x = raw_of(data, facts)
    if x.ndim not in (2, 3) or x.shape[2:] not in ((), (1,), (3,)):
        raise Unreadable(f'has the shape {x.shape}: expected (H, W) or (H, W, 1 or 3)')
    x = x.reshape(*x.shape[:2], -1)
    return (x / np.float64(np.iinfo(x.dtype).max)).astype(np.float32)


def raw_of(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """The array in the bytes of a record, of any shape: uint8 or uint16. Raises Unreadable."""
    encoding, dtype, shape = facts['encoding'], facts['dtype'], facts['shape']
    if encoding != 'raw' or dtype not in RAW_TYPES:
        raise Unreadable(f"is stored as {encoding!r} {dtype}: expected 'file', or 'raw' uint8 or uint16")
    kind = RAW_TYPES[dtype]
    if not all(isinstance(n, int) and n > 0 for n in shape) or len(data) != math.prod(shape) * kind.itemsize:
        raise Unreadable(f'has {len(data)} bytes for the shape {shape} of {dtype}')
    return np.frombuffer(data, kind).reshape(shape)


# ---------------------------------------------------------------------------------------------------- records

class Record(NamedTuple):
    """An image as it goes into the LMDB; `mask` is b'' where it has none."""
    info: dict[str, Any]
    data: bytes
    mask: bytes = b''


def file_record(file: ImageFile) -> Record:
    """The bytes of a file and of its mask. Raises Unreadable if they cannot be decoded."""
    data, facts = read_encoded(file.path)
    if not file.mask:
        return Record(facts_of(file) | facts, data)
    name = Path(file.mask).name
    try:
        mask, mask_facts = read_encoded(file.mask)
    except Unreadable as error:
        raise Unreadable(f'has a mask {name} that {error}') from None
    return Record(facts_of(file) | facts | {'mask': {'name': name, **mask_facts}}, data, mask)


def read_encoded(path: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes of an image file and what a record says of them; of DICOM the pixels alone, without a name.

    Raises Unreadable.
    """
    data = file_content(path)
    x = decode(data)                                                             # (H, W, C)
    if is_dicom(data):
        original = {'sha256': hashlib.sha256(data).hexdigest(), 'num_bytes': len(data)}
        data = np.rint(x * FULL).astype(RAW_TYPES['uint16']).tobytes()
        return data, payload(data, 'raw', x.shape, 'uint16') | {'original': original}
    mode = Image.open(io.BytesIO(data), formats=FORMATS).mode
    dtype = 'uint16' if mode.startswith('I;16') else DTYPES.get(mode, 'uint8')
    return data, payload(data, 'file', x.shape if x.shape[2] > 1 else x.shape[:2], dtype)


def array_record(file: ImageFile, x: np.ndarray, original: dict[str, Any]) -> Record:
    """An image (C, H, W) uint8 or uint16; `original` is the hash and the size of what it was made from."""
    x = x[0] if len(x) == 1 else x.transpose(1, 2, 0)                            # (H, W) or (H, W, C)
    data = np.ascontiguousarray(x, x.dtype.newbyteorder('<')).tobytes()
    facts = payload(data, 'raw', x.shape, x.dtype.name)
    return Record(facts_of(file) | facts | ({'original': original} if original else {}), data)


def facts_of(file: ImageFile) -> dict[str, Any]:
    return {'id': file.id, 'class': file.class_name, 'part': file.part, 'patient': file.patient}


# ---------------------------------------------------------------------------------------------------- reading

class GuardedLmdb:
    """The values of an LMDB, fetched by a child process: a damaged file may end that. For any threads."""

    def __init__(self, path: str | Path):
        self.path, self._child, self._ends, self._lock = str(path), None, 0, threading.Lock()

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it is not there. Raises Unreadable if the file is damaged there."""
        with self._lock:
            if self._ends == MOST_ENDS:
                raise Damaged(key, f'was not tried: {MOST_ENDS} others ended the process that reads')
            status, value = self._ask(key)
        if status == lmdb_child.ERROR:
            raise Damaged(key, f'cannot be read ({value.decode(errors="replace")})')
        return None if status == lmdb_child.ABSENT else value

    def _ask(self, key: bytes) -> tuple[bytes, bytes]:
        self._child = self._child or subprocess.Popen(
            [sys.executable, '-P', lmdb_child.__file__, self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self._child.stdin.write(key + b'\n')
            self._child.stdin.flush()
            head = self._child.stdout.read(lmdb_child.HEAD.size)
            status, length = lmdb_child.HEAD.unpack(head)
            value = self._child.stdout.read(length)
            if len(value) == length:
                return status, value
        except (BrokenPipeError, lmdb_child.struct.error):
            pass
        self._ends += 1
        self.close()
        return lmdb_child.ERROR, b'it ends the process that reads'

    def __len__(self) -> int:
        return int(self.get(b''))

    def close(self) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()              # takes it off the table of processes, closes the pipes
            self._child = None

    def __enter__(self) -> 'GuardedLmdb':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_meta(records: GuardedLmdb) -> dict[str, Any]:
    """The facts of a whole LMDB, finished or not. Raises UserError."""
    try:
        meta = unseal(META, records.get(META), FACTS)
    except Unreadable as error:
        raise UserError(f"{records.path} {error}.") from None
    if (meta['format'], meta['version']) != (FORMAT, VERSION):
        raise UserError(f"{records.path} is {meta['format']} version {meta['version']}, this program reads "
                        f"{FORMAT} version {VERSION}: take the program that made it, or make the LMDB anew.")
    return meta


class Packed:
    """A finished packed LMDB; `len` is the number of its images."""

    def __init__(self, path: str | Path):
        """Raises UserError if there is none, if its making was interrupted or if it is damaged."""
        if not is_lmdb(path):
            raise UserError(f"{path} is not an LMDB, or its first page is damaged: {REMEDY}.")
        self.path, self.records = str(path), GuardedLmdb(path)
        try:
            self.meta = read_meta(self.records)
            if not self.meta['complete']:
                raise UserError(f"{path} is not finished ({self.meta['count']:,} images so far): give the "
                                f"scripts/create_lmdb.py command that makes it again, it goes on.")
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        return self.meta['count']

    def info(self, number: int) -> dict[str, Any]:
        """The facts of an image. Raises Unreadable."""
        key = key_of('info', number)
        info = unseal(key, self.records.get(key), INFO)
        if info['part'] not in PARTS:
            raise Damaged(key, f"has the part {info['part']!r}: expected 'train', 'val', 'test' or ''")
        for field, fields in {'mask': MASK, 'original': ORIGINAL}.items():
            if field in info:
                _expect(info[field], fields, key)
        return info

    def payload(self, kind: str, number: int, facts: dict[str, Any]) -> bytes:
        """The bytes of an image or mask. Raises Unreadable if they are not what its info record says."""
        key = key_of(kind, number)
        data = self.records.get(key)
        if data is None:
            raise Damaged(key, 'is missing')
        if len(data) != facts['num_bytes'] or hashlib.sha256(data).hexdigest() != facts['sha256']:
            raise Damaged(key, 'does not have its SHA-256')
        return data

    def picture(self, number: int, with_mask: bool) -> Picture:
        """An image ready for `scan`. Raises Unreadable."""
        info = self.info(number)
        image, mask = values_of(self.payload('data', number, info), info), None
        if with_mask:
            facts = info['mask']
            data = self.payload('mask', number, facts)
            mask = load_mask(lambda: values_of(data, facts), facts['name'], image)
        original = info.get('original', info)
        return Picture(image, mask, original['sha256'], original['num_bytes'])

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

    def __enter__(self) -> 'Packed':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_packed(path: str | Path) -> bool:
    """Whether there is a packed LMDB at `path`, be it damaged or unfinished."""
    if not path or not is_lmdb(path):
        return False
    with GuardedLmdb(path) as records:
        try:
            meta = records.get(META)
            # One damaged byte leaves one of these true.
            return any([meta is not None and (FORMAT.encode() in meta or meta[8:10] == b' {'),
                        meta is None and records.get(key_of('info', 0)) is not None])
        except Unreadable:
            return True                              # whoever reads it says what is wrong


# ------------------------------------------------------------------------------------------------- data set

def read_packed(path: str | Path, *, normal: Sequence[str], normal_wanted: Sequence[str],
                anomalous: Sequence[str], size: int, border: int, channels: int, depth: int, fit: str,
                masks: bool, cache_dir: str) -> Source:
    """The images of the chosen classes of a packed LMDB, as (N, C, S + 2 border, S + 2 border).

    Classes are chosen as in a folder where `normal` names what a normal class may be called; without such
    names all that is not anomalous is normal. Of a set with parts of its own, anomalous images come from the
    part test alone. Records that cannot be read are in Source.bad. Raises UserError.
    """
    file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else str(path)
    key = {'packed': os.path.realpath(file), 'stamp': stamp(file), 'normal': list(normal),
           'normal_wanted': list(normal_wanted), 'anomalous': list(anomalous), 'size': size, 'border': border,
           'channels': channels, 'depth': depth, 'fit': fit, 'masks': masks}

    def make(target: Path) -> dict:
        with Packed(path) as packed:
            if 'volumes' in packed.meta:
                raise UserError(f"{path} is an LMDB of volumes, images are wanted: take --dataset "
                                f"{packed.meta['dataset']}, which it was made from.")
            files, bad = list_images(packed)                             # {number: file}
            found = sorted({*packed.meta['classes'], *(f.class_name for f in files.values())})
            usual = normal_wanted or [c for c in found if any(same_name(c, n) for n in normal)]
            if normal and not usual:
                raise UserError(f"--data: {path} has no class of normal images named {' or '.join(normal)}: "
                                f"found {', '.join(found[:CLASSES_SHOWN])}. Name the normal ones with "
                                f"--normal_classes, or take --dataset {packed.meta['dataset']}, which it was "
                                f"made from.")
            usual, abnormal = choose_classes(found, usual, anomalous, bool(normal), str(path))

            def chosen(file: ImageFile) -> bool:
                return file.class_name in usual or (file.class_name in abnormal and file.part != 'train')

            numbers = {f.id: number for number, f in files.items() if chosen(f)}
            files = [f if masks and f.class_name in abnormal else replace(f, mask='')
                     for f in files.values() if f.id in numbers]
            if not files and not bad:
                raise UserError(f"--data: {path} has no image of the classes {', '.join(usual + abnormal)}: "
                                f"choose others.")
            made = scan(files, target, size=size, channels=channels, depth=depth, fit=fit, border=border,
                        load=lambda f: packed.picture(numbers[f.id], bool(f.mask)),
                        twins=packed.meta.get('near_duplicates', True))
            left_out = [f'{name} {reason}' for name, reason in packed.meta.get('left_out', [])]
            notes = [f'{count(len(left_out), "file")} had been left out when {path} was made: '
                     f'{some(left_out)}'] if left_out else []
            return {**made, 'bad': bad + made['bad'], 'notes': notes + made['notes'],
                    'normal_classes': usual, 'anomalous_classes': abnormal}

    return cached(cache_dir, key, make)


def list_images(packed: Packed) -> tuple[dict[int, ImageFile], list[tuple[str, str]]]:
    """All images of an LMDB by their numbers, without their bytes, and (record, reason) of the damaged ones.

    Raises UserError if two have one id.
    """
    files, bad, seen = {}, [], set()
    for number in range(len(packed)):
        try:
            info = packed.info(number)
        except Unreadable as error:
            bad.append((f'image {number} of {packed.path}', str(error)))
            continue
        if info['id'] in seen:
            raise UserError(f"{packed.path} holds the id {info['id']!r} twice: {REMEDY}.")
        seen.add(info['id'])
        mask = key_of('mask', number).decode() if 'mask' in info else ''
        files[number] = ImageFile(info['id'], '', info['class'], mask, info['part'], info['patient'])
    return files, bad
