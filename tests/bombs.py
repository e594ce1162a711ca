"""Small files that claim much memory: what each costs before it is refused.

    python tests/bombs.py          a table: CPU seconds, MB and the words of each
"""

import gzip
import io
import json
import math
import os
import resource
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
import scipy.io
import torch
from PIL import Image

import train
from families.autoencoder.config import AEConfig
from model import restore
from readers.dicom import decode_dicom
from readers.images.archive import unpacked
from readers.images.decode import decode
from readers.published import arrays
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti
from storage.arrays import read_npz
from storage.checkpoint import read_checkpoint
from utils import UserError, read_json

LIMIT = 8 << 30              # bytes that a bomb may take here: far more than any test allows
ZEROS = bytes(1 << 20)


def packed(megabytes, wbits=31):
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b''.join([packer.compress(ZEROS) for _ in range(megabytes)]) + packer.flush()


def nifti(path):
    """A header of 20000^3 voxels, packed."""
    import nibabel
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header['dim'] = [3, 20000, 20000, 20000, 1, 1, 1, 1]
    header['magic'], header['vox_offset'] = b'n+1', 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)) + packed(1))
    return partial(read_nifti, path)


def nifti_beyond_its_header(path):
    """One voxel, and then 60 MB."""
    import nibabel
    voxel = nibabel.Nifti1Image(np.zeros((1, 1, 1), 'u1'), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(voxel) + packed(60))
    return partial(read_nifti, path)


def idx(path):
    path = path.with_suffix('.gz')
    path.write_bytes(packed(60))
    return partial(arrays.read_idx, path)


def dicom(path):
    """The deflated transfer syntax: pydicom unpacks it unasked."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian
    meta, file = FileMetaDataset(), io.BytesIO()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    write_file_meta_info(file, meta, enforce_standard=False)
    return partial(decode_dicom, bytes(128) + b'DICM' + file.getvalue() + packed(60, -15))


def mat(path):
    """A matrix of 6 GB, by its header."""
    with path.open('wb') as file:
        scipy.io.savemat(file, {'X': np.zeros((32, 32, 3, 2), np.uint8), 'y': np.uint8([[1], [2]])})
    dims = struct.pack('<4i', 32, 32, 3, 2)
    path.write_bytes(path.read_bytes().replace(dims, struct.pack('<4i', 32, 32, 3, 1 << 21)))
    return partial(arrays.read_svhn, 'train', path)


def mat_beyond_its_header(path):
    """An element that unpacks to more than its matrix."""
    with path.open('wb') as file:
        scipy.io.savemat(file, {'X': np.zeros((32, 32, 3, 2), np.uint8)}, do_compression=True)
    data = path.read_bytes()
    element = zlib.decompress(data[136:]) + 40 * ZEROS
    element = zlib.compress(element)
    path.write_bytes(data[:128] + struct.pack('<2I', 15, len(element)) + element)
    return partial(arrays.read_svhn, 'train', path)


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
    return partial(read_npz, path)


def checkpoint(path):
    torch.save({'weights': torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(path.with_suffix('.new'), 'w',
                                                         zipfile.ZIP_DEFLATED) as file:
        for member in whole.infolist():
            file.writestr(member.filename, whole.read(member))
        with file.open('archive/data/9', 'w', force_zip64=True) as more:
            for _ in range(20):
                more.write(ZEROS)
    return partial(read_checkpoint, path.with_suffix('.new'))


def description(path):
    """A model of 100,000 x 100,000 filters."""
    wide = dict(vars(AEConfig()), width=100_000, latent_dim=100_000)
    return partial(restore, {'weights': {'w': torch.zeros(1)}, 'args': {}, 'description': {
        'model': 'ae', 'shape': [1, 64, 64], 'config': wide,
        'pixels': {'likelihood': 'discretized', 'bits': 8, 'padding': 0}}})


def tiff(path):
    """500 bytes of 10,000 x 9,000 pixels."""
    tags = {256: (4, 10_000), 257: (4, 9_000), 258: (3, 8), 259: (3, 5), 262: (3, 1), 273: (4, 150),
            278: (4, 9_000), 279: (4, 300)}
    entries = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, (kind, value) in tags.items())
    return partial(decode, b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(490 - len(entries)))


def tiff_page(path):
    """A first page of 2 x 2 pixels, a second of 9,000 x 9,000."""
    pages = [Image.new('L', (side, side)) for side in (2, 9_000)]
    pages[0].save(path, 'TIFF', save_all=True, append_images=pages[1:], compression='tiff_adobe_deflate')
    return partial(decode, path.read_bytes(), 1)


def png(path):
    """300 KB of 10,000 x 10,000 colors."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    head = struct.pack('>2I5B', 10_000, 10_000, 8, 2, 0, 0, 0)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', packed(1, 15) + bytes(300_000)) + chunk(b'IEND', b'')
    return partial(decode, b'\x89PNG\r\n\x1a\n' + body)


def tar(path):
    """A file of 60 MB, packed."""
    with tarfile.open(path, 'w:gz') as file:
        member = tarfile.TarInfo('a.png')
        member.size = 60 << 20
        file.addfile(member, io.BytesIO(ZEROS * 60))
    return partial(unpacked, path, str(path.with_name('cache')))


def deep(path):
    """JSON of 200,000 lists, each in the one before."""
    path.write_text('[' * 200_000)
    return partial(read_json, path)


def laughs(path):
    """YAML whose lists name one another: a billion words, once they are written out."""
    lists = [f'a{i + 1}: &a{i + 1} [{", ".join([f"*a{i}"] * 10)}]' for i in range(9)]
    path = path.with_suffix('.yaml')
    path.write_text('\n'.join(['a0: &a0 [ha]', *lists, 'epochs: *a9']))
    return partial(train.parse_args, ['--config', str(path)])


BOMBS = (nifti, nifti_beyond_its_header, idx, dicom, mat, mat_beyond_its_header, npz, checkpoint, description,
         tiff, tiff_page, png, tar, deep, laughs)


class Refusal(NamedTuple):
    """What a reader says of a bomb, and what that took: CPU seconds, and MB at most beyond those before."""
    told: str
    seconds: float
    megabytes: float


def refusal(bomb: Callable[[Path], Callable[[], Any]], path: Path) -> Refusal:
    """Reads a bomb in a process of its own, which may take LIMIT of memory. `told` is '' if it is read, and
    begins with the type of any error but those that programs show as one line.
    """
    read, (ours, theirs) = bomb(path), os.pipe()
    if not (child := os.fork()):
        try:
            used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
            before, told = resource.getrusage(resource.RUSAGE_SELF), ''
            try:
                read()
            except (UserError, Unreadable) as error:
                told = str(error)
            except BaseException as error:
                told = f'{type(error).__name__}: {error}'
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            megabytes = (after.ru_maxrss - before.ru_maxrss) / 1024
            os.write(theirs, json.dumps([told[:2000], seconds, megabytes]).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return Refusal(*json.loads(answer)) if answer else Refusal('it ends the process', math.nan, math.nan)


def main() -> int:
    print('| file | CPU seconds | MB | error message |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for bomb in BOMBS:
            told, seconds, megabytes = refusal(bomb, Path(folder, 'bomb'))
            print(f'| {bomb.__name__} | {seconds:.3f} | {megabytes:.1f} | {told.replace(folder, "")[:160]} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
