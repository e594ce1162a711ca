"""The format of the LMDB, as docs/lmdb.md describes it."""

import io
import json
import zlib
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image
from test_packed import load, write_lmdb

from readers.lmdb.format import raw_of, seal, unseal
from readers.source import Unreadable
from scripts.create_lmdb import verify


def test_a_record_is_json_behind_the_crc_of_key_and_json():
    assert seal(b'meta', {'b': 1, 'a': 'ü'}) == b'%08x {"a":"\\u00fc","b":1}' % zlib.crc32(
        b'meta{"a":"\\u00fc","b":1}')
    sealed = seal(b'info/00000001', {'id': 'x'})
    assert unseal(b'info/00000001', sealed, {'id': str}) == {'id': 'x'}
    for place in range(len(sealed)):
        broken = bytearray(sealed)
        broken[place] ^= 0x20                                      # a becomes A: still a hexadecimal digit
        with pytest.raises(Unreadable, match='CRC-32'):
            unseal(b'info/00000001', bytes(broken), {'id': str})
    with pytest.raises(Unreadable, match='CRC-32'):
        unseal(b'info/00000002', sealed, {'id': str})              # a record under a wrong key


def test_what_another_program_writes_by_the_document_is_read(tmp_path):
    """docs/lmdb.md, followed without this project's writer."""
    def sealed(key, value):
        text = json.dumps(value).encode()
        return key.encode(), b'%08x ' % zlib.crc32(key.encode() + text) + text

    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 51, np.uint8)).save(file, 'PNG')
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[..., 0] = 255
    images = [(file.getvalue(), 'file', [2, 2], 'uint8'),
              (np.full((2, 2), 13107, '<u2').tobytes(), 'raw', [2, 2], 'uint16'),
              (colour.tobytes(), 'raw', [2, 2, 3], 'uint8')]
    records = dict([sealed('meta', {'format': 'anomaly-lmdb', 'version': 1, 'complete': True, 'count': 3,
                                    'dataset': 'folder', 'classes': ['normal']})])
    for i, (data, encoding, shape, dtype) in enumerate(images):
        info = {'id': f'normal/{i}', 'class': 'normal', 'part': '', 'patient': f'p{i}', 'encoding': encoding,
                'shape': shape, 'dtype': dtype, 'num_bytes': len(data), 'sha256': sha256(data).hexdigest()}
        records |= dict([sealed(f'info/{i:08d}', info), (f'data/{i:08d}'.encode(), data)])
    path = write_lmdb(tmp_path / 'theirs.lmdb', records)
    data = load(path, tmp_path, image_size=2, channels=3, val_fraction=0, test_fraction=0)
    x = data.train.items([0, 1, 2]).x
    assert torch.allclose(x[:2], torch.tensor(0.2))
    assert torch.equal(x[2, 0], torch.ones(2, 2)) and not x[2, 1:].any()
    assert [e.patient for e in data.train.entries] == ['p0', 'p1', 'p2']
    assert verify(path, 1) == 0


@pytest.mark.parametrize('shape', [[True, 4], [2.0, 2], ['4'], [-2, -2], [4, 4]], ids=str)
def test_a_shape_that_is_none_is_named(shape):
    with pytest.raises(Unreadable, match='has 4 bytes for the shape'):
        raw_of(bytes(4), {'encoding': 'raw', 'dtype': 'uint8', 'shape': shape})
