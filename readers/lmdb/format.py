"""The records of a data set in one self-describing LMDB: what a program needs to read it, and checksums.

    meta            facts of the whole          info/00000012   facts of image 12: id, class, hash, ...
    data/00000012   the bytes of the image      mask/00000012   those of its mask, where it has one

docs/lmdb.md is the format. `meta` and `info` carry a CRC-32 of key and content, `data` and `mask` a SHA-256.
"""

import hashlib
import io
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from readers.dicom import FULL, is_dicom
from readers.images.decode import FORMATS, decode, decode_mask, load_masks
from readers.items import Item
from readers.paths import file_content
from readers.source import Unreadable
from readers.split import PARTS
from readers.volumes.nifti import Grid
from utils import WRONG_VALUES

FORMAT, VERSION = 'anomaly-lmdb', 1
META = b'meta'
DTYPES = {'I': 'int32', 'F': 'float32'}          # of Pillow's modes; others are uint8, or uint16 ('I;16...')
RAW_TYPES = {'uint8': np.dtype('u1'), 'uint16': np.dtype('<u2')}
PAYLOAD = {'encoding': str, 'shape': list, 'dtype': str, 'num_bytes': int, 'sha256': str}
INFO = {'id': str, 'class': str, 'part': str, 'patient': str, **PAYLOAD}
MASK = {'name': str, **PAYLOAD}
ORIGINAL = {'sha256': str, 'num_bytes': int}
FACTS = {'format': str, 'version': int, 'complete': bool, 'count': int, 'dataset': str, 'classes': list}
REMEDY = 'make the LMDB anew or restore it'


class Damaged(Unreadable):
    """A record that is not what was written; `what` goes on from its key."""

    def __init__(self, key: bytes, what: str):
        super().__init__(f'is damaged (record {key.decode()} {what}): {REMEDY}')
        self.what = what


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
    except (ValueError, RecursionError):
        raise Damaged(key, 'is not JSON') from None
    expect(value, fields, key)
    return value


def meta_of(sealed: bytes | None) -> dict[str, Any]:
    """The facts of a whole LMDB. Raises Unreadable."""
    meta = unseal(META, sealed, FACTS)
    if (meta['format'], meta['version']) != (FORMAT, VERSION):
        raise Unreadable(f"is {meta['format']} version {meta['version']}, this program reads {FORMAT} "
                         f"version {VERSION}: take the program that made it, or make the LMDB anew")
    return meta


def info_of(key: bytes, sealed: bytes | None, is_volume: bool) -> dict[str, Any]:
    """The facts of an image; of a volume with its `grids` as a pair of Grid. Raises Unreadable."""
    info = unseal(key, sealed, INFO)
    if info['part'] not in ('', *PARTS):
        raise Damaged(key, f"has the part {info['part']!r}: expected 'train', 'val', 'test' or ''")
    for field, fields in {'mask': MASK, 'original': ORIGINAL}.items():
        if field in info:
            expect(info[field], fields, key)
    if is_volume:
        try:
            info['grids'] = tuple(map(Grid.from_json, info['grids']))
            fits = [list(grid.affine.shape) for grid in info['grids']] == [[4, 4]] * 2 \
                and [int(info['shape'][0]), *info['grids'][0].shape] == info['shape']
        except WRONG_VALUES:
            fits = False
        if not fits:
            raise Damaged(key, "has no 'grids' of its 'shape'")
    return info


def expect(value: Any, fields: dict[str, type], key: bytes) -> None:
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


def marked_by(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """What the mask in the bytes of a record marks: (H, W, 1) bool. Raises Unreadable."""
    return decode_mask(data) if facts['encoding'] == 'file' else values_of(data, facts).any(-1, keepdims=True)


def raw_of(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """The array in the bytes of a record, of any shape: uint8 or uint16. Raises Unreadable."""
    encoding, dtype, shape = facts['encoding'], facts['dtype'], facts['shape']
    if encoding != 'raw' or dtype not in RAW_TYPES:
        raise Unreadable(f"is stored as {encoding!r} {dtype}: expected 'file', or 'raw' uint8 or uint16")
    kind = RAW_TYPES[dtype]
    if not all(type(n) is int and n > 0 for n in shape) or len(data) != math.prod(shape) * kind.itemsize:
        raise Unreadable(f'has {len(data)} bytes for the shape {shape} of {dtype}')
    return np.frombuffer(data, kind).reshape(shape)


# ---------------------------------------------------------------------------------------------------- records

class Record(NamedTuple):
    """An image as it goes into the LMDB; `mask` is b'' where it has none."""
    info: dict[str, Any]
    data: bytes
    mask: bytes = b''


def file_record(item: Item) -> Record:
    """The bytes of a file and of its mask. Raises Unreadable if they cannot be decoded."""
    data, facts = read_encoded(item.path)
    if not item.masks:
        return Record(facts_of(item) | facts, data)
    if len(item.masks) == 1 and isinstance(item.masks[0], str):
        name = Path(item.masks[0]).name
        try:
            mask, mask_facts = read_encoded(item.masks[0])
        except Unreadable as error:
            raise Unreadable(f'has a mask {name} that {error}') from None
    else:
        name, marked = 'union', load_masks(item.masks, facts['shape'])                          # (H, W, 1)
        mask = (marked[..., 0] * np.uint8(255)).tobytes()
        mask_facts = payload(mask, 'raw', marked.shape[:2], 'uint8')
    return Record(facts_of(item) | facts | {'mask': {'name': name, **mask_facts}}, data, mask)


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


def array_record(item: Item, pixels: np.ndarray, mask: np.ndarray | None, original: dict[str, Any]) -> Record:
    """Pixels (C, *S), uint8 or uint16, and a mask (*S) uint8; `original` has hash and size of their file."""
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)    # (H, W) or (H, W, C)
    data = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder('<')).tobytes()
    info = facts_of(item) | payload(data, 'raw', pixels.shape, pixels.dtype.name)
    info |= {'original': original} if original else {}
    if mask is None:
        return Record(info, data)
    drawn = mask.tobytes()
    facts = {'name': 'mask', **payload(drawn, 'raw', mask.shape, 'uint8')}
    return Record(info | {'mask': facts}, data, drawn)


def facts_of(item: Item) -> dict[str, Any]:
    return {'id': item.id, 'class': item.class_name, 'part': item.part, 'patient': item.patient}
