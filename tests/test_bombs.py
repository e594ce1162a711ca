"""Small files that claim much memory, and pipes: each is refused at once, before anything is decoded."""

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from audit.headers import read_file_header
from families.autoencoder.config import AEConfig
from model import restore
from readers.dicom import decode_dicom
from readers.images.decode import decode
from readers.lmdb.file import is_lmdb
from readers.published import arrays
from readers.source import Unreadable
from readers.volumes.nifti import read_header, read_nifti
from storage import limits
from storage.arrays import read_npz
from storage.checkpoint import read_checkpoint
from utils import UserError, read_json, read_text

ZEROS = bytes(1 << 20)


def packed(megabytes, wbits=31):
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b''.join([packer.compress(ZEROS) for _ in range(megabytes)]) + packer.flush()


def nifti(path):
    """A header of 20000^3 voxels, packed."""
    nibabel = pytest.importorskip('nibabel')
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header['dim'] = [3, 20000, 20000, 20000, 1, 1, 1, 1]
    header['magic'], header['vox_offset'] = b'n+1', 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)) + packed(1))
    read_nifti(path)


def nifti_beyond_its_header(path):
    """One voxel, and then 60 MB."""
    nibabel = pytest.importorskip('nibabel')
    voxel = nibabel.Nifti1Image(np.zeros((1, 1, 1), 'u1'), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(voxel) + packed(60))
    read_nifti(path)


def idx(path):
    path = path.with_suffix('.gz')
    path.write_bytes(packed(60))
    arrays.read_idx(path)


def dicom(path):
    """The deflated transfer syntax: pydicom unpacks it unasked."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian
    meta, file = FileMetaDataset(), io.BytesIO()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    write_file_meta_info(file, meta, enforce_standard=False)
    decode_dicom(bytes(128) + b'DICM' + file.getvalue() + packed(60, -15))


def mat(path):
    """A matrix of 4 GB, by its header."""
    with path.open('wb') as file:
        scipy.io.savemat(file, {'X': np.zeros((32, 32, 3, 2), np.uint8), 'y': np.uint8([[1], [2]])})
    dims = struct.pack('<4i', 32, 32, 3, 2)
    path.write_bytes(path.read_bytes().replace(dims, struct.pack('<4i', 32, 32, 3, 1 << 21)))
    arrays.read_svhn('train', path)


def mat_beyond_its_header(path):
    """An element that unpacks to more than its matrix."""
    with path.open('wb') as file:
        scipy.io.savemat(file, {'X': np.zeros((32, 32, 3, 2), np.uint8)}, do_compression=True)
    data = path.read_bytes()
    element = zlib.decompress(data[136:]) + 40 * ZEROS
    element = zlib.compress(element)
    path.write_bytes(data[:128] + struct.pack('<2I', 15, len(element)) + element)
    arrays.read_svhn('train', path)


def npz(path):
    header = {'descr': '<f8', 'fortran_order': False, 'shape': (1 << 29,)}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file, file.open('x.npy', 'w') as x:
        np.lib.format.write_array_header_1_0(x, header)
        for _ in range(20):
            x.write(ZEROS)
    with zipfile.ZipFile(path) as file:
        size = struct.pack('<I', file.infolist()[0].file_size)
    data = path.read_bytes()
    path.write_bytes(data.replace(size, struct.pack('<I', 0xFFFFFF00)))      # as if it unpacked to 4 GB
    read_npz(path)


def checkpoint(path):
    torch.save({'weights': torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(path.with_suffix('.new'), 'w',
                                                         zipfile.ZIP_DEFLATED) as file:
        for member in whole.infolist():
            file.writestr(member.filename, whole.read(member))
        with file.open('archive/data/9', 'w', force_zip64=True) as more:
            for _ in range(20):
                more.write(ZEROS)
    read_checkpoint(path.with_suffix('.new'))


def description(path):
    """A model of 100,000 x 100,000 filters."""
    wide = dict(vars(AEConfig()), width=100_000, latent_dim=100_000)
    restore({'weights': {'w': torch.zeros(1)}, 'args': {}, 'description': {
        'model': 'ae', 'shape': [1, 64, 64], 'config': wide,
        'pixels': {'likelihood': 'discretized', 'bits': 8, 'padding': 0}}})


def tiff(path):
    """500 bytes of 10,000 x 9,000 pixels."""
    file = io.BytesIO()
    Image.new('L', (10_000, 9_000)).save(file, 'TIFF', compression='tiff_lzw')
    tags = {256: (4, 10_000), 257: (4, 9_000), 258: (3, 8), 259: (3, 5), 262: (3, 1), 273: (4, 150),
            278: (4, 9_000), 279: (4, 300)}
    entries = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, (kind, value) in tags.items())
    decode(b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(500 - 10 - len(entries)))


def png(path):
    """300 KB of 10,000 x 10,000 colors."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    head = struct.pack('>2I5B', 10_000, 10_000, 8, 2, 0, 0, 0)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', packed(1, 15) + bytes(300_000)) + chunk(b'IEND', b'')
    decode(b'\x89PNG\r\n\x1a\n' + body)


@pytest.mark.parametrize('bomb', [nifti, nifti_beyond_its_header, idx, dicom, mat,
                                  mat_beyond_its_header, npz, checkpoint,
                                  description, tiff, png], ids=lambda bomb: bomb.__name__)
def test_a_bomb_is_refused_before_it_takes_memory(bomb, tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises((UserError, Unreadable)) as told:
            bomb(tmp_path / 'bomb')
        assert tracemalloc.get_traced_memory()[1] < 200 << 20 and '\n' not in str(told.value)
    finally:
        tracemalloc.stop()
    words = ('GB of memory', 'unpacks to more', 'exhaust memory')
    assert any(one in str(told.value) for one in words), told.value


def test_the_limit_can_be_raised(monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, '3')
    assert limits.excess(4 << 30) and not limits.excess(2 << 30) and limits.excess(2 << 30, held=1000)
    limits.allow(30)
    assert not limits.excess(4 << 30) and not limits.excess(2 << 30, held=1000)


def test_packed_data_are_unpacked_up_to_the_limit():
    whole = gzip.compress(b'a' * 1000) + gzip.compress(b'b' * 1000) + b'\0\0'
    assert limits.unpack(whole) == limits.unpack(whole, 2000) == b'a' * 1000 + b'b' * 1000
    assert limits.unpack(gzip.compress(b'')) == b''
    assert limits.unpack(packed(1, -15) + b'checksum', wbits=-15) == limits.unpack(packed(1, -15), wbits=-15)
    with pytest.raises(ValueError, match='more than 1,999 bytes'):
        limits.unpack(whole, 1999)
    for cut in (whole[:20], whole[:40]):
        with pytest.raises(EOFError):
            limits.unpack(cut)


@pytest.mark.parametrize('read', [
    read_json, read_text, read_npz, read_checkpoint, read_nifti, read_header, read_file_header, is_lmdb,
    arrays.read_idx], ids=lambda read: read.__name__)
def test_a_pipe_is_never_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    if read is is_lmdb:
        assert not is_lmdb(tmp_path / 'pipe')
        return
    with pytest.raises((UserError, Unreadable), match='a device or a pipe'):
        read(tmp_path / 'pipe')
