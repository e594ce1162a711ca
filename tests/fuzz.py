"""Damaged files of every kind that a program reads: each gives a value, or one line that says what is wrong.

    python tests/fuzz.py --seconds 600 --seed 0              inputs for 10 minutes, in turn for each reader
    python tests/fuzz.py --inputs 10000 --only png nifti     10,000 inputs for each of two readers

An input is a whole file with bits flipped, bytes set to extremes, parts cut out, repeated or exchanged. A
reader must not crash, take more than 5 s or 1 GB, or raise anything but UserError and Unreadable. What fails
is kept in --keep. Prints a table, and ends with status 1 if anything failed.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
os.environ['OMP_NUM_THREADS'] = '1'

import numpy as np
import scipy.io
import torch
from PIL import Image

from audit.headers import read_file_header
from command_line.parser import with_config
from datasets import DataConfig
from evaluation.latent_space import read_latents
from model import describe, open_model, restore
from readers.dicom import decode_dicom
from readers.images.archive import unpacked
from readers.images.decode import decode
from readers.lmdb.file import Lmdb, make_lmdb
from readers.published import arrays
from readers.source import Unreadable
from readers.split import read_split
from readers.volumes.nifti import read_nifti
from storage.checkpoint import save_checkpoint
from storage.run_log import RunLog
from utils import UserError, read_flags, read_json, read_text, write_npz

LONGEST, MOST_MEMORY = 5, 1 << 30              # seconds and bytes of one input
BLOCK = 50                                     # inputs a process
EXTREMES = (b'\0', b'\xff', b'\x7f', b'\x80', b'\xff\xff\xff\xff', b'\0\0\0\0', b'\x7f\xff\xff\xff',
            b'\xff\xff\xff\x7f', b'-1', b'1e999', b'null', b'[' * 2000)


class Target(NamedTuple):
    """Something that reads a file: whole files to begin with, and how a path is read."""
    wholes: list[bytes]
    read: Callable[[Path], Any]


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """The file with one to four changes."""
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 2, 4, 16, 200))
        part = bytes(data[place:place + length])
        match chance.randrange(6):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                extreme = chance.choice(EXTREMES)
                data[place:place + len(extreme)] = extreme
            case 2:
                del data[place:place + length]
            case 3:
                data[place:place] = part
            case 4:
                data[place:place + length] = chance.randbytes(length)
            case 5 if chance.random() < 0.3:
                del data[place:]
    return bytes(data)


# ---------------------------------------------------------------------------------------------------- targets

def bytes_of(write: Callable[[Path], Any], name: str = 'file') -> bytes:
    """What `write` writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name))
        return Path(folder, name).read_bytes()


def image_files() -> dict[str, list[bytes]]:
    gray = np.arange(400, dtype=np.uint8).reshape(20, 20)
    images = {'8': Image.fromarray(gray), '16': Image.fromarray(gray.astype(np.uint16) * 200),
              'color': Image.fromarray(np.stack([gray] * 3, -1)),
              'palette': Image.fromarray(gray).convert('P')}

    def saved(kind: str, name: str, **options: Any) -> bytes:
        file = io.BytesIO()
        images[name].save(file, kind, **options)
        return file.getvalue()
    tiffs = [saved('TIFF', name, compression=packing) for name in ('8', '16', 'color')
             for packing in (None, 'tiff_lzw', 'tiff_adobe_deflate')]
    return {'png': [saved('PNG', name) for name in images], 'tiff': tiffs, 'bmp': [saved('BMP', '8')],
            'jpeg': [saved('JPEG', '8'), saved('JPEG', 'color', progressive=True)]}


def dicom_files() -> list[bytes]:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
    files = []
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.3'
        meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
        dataset = FileDataset('', {}, file_meta=meta, preamble=bytes(128))
        for name, value in {'Rows': 16, 'Columns': 16, 'SamplesPerPixel': 1, 'BitsAllocated': 16,
                            'PhotometricInterpretation': 'MONOCHROME2', 'BitsStored': 12, 'HighBit': 11,
                            'PixelRepresentation': 0, 'RescaleSlope': 2, 'RescaleIntercept': -100,
                            'WindowCenter': 40, 'WindowWidth': 80}.items():
            setattr(dataset, name, value)
        dataset.PixelData = np.arange(256, dtype=np.uint16).tobytes()
        if syntax is RLELossless:
            dataset.compress(RLELossless)
        else:
            meta.TransferSyntaxUID = syntax
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    return files


def run_files(folder: Path) -> dict[str, Target]:
    """The files of a run folder and of its user."""
    from distributions import Pixels
    from families.autoencoder.config import AEConfig
    from families.autoencoder.model import AE
    model = AE((1, 8, 8), AEConfig(width=2, num_layers=1, latent_dim=2), Pixels())
    content = {'description': describe(model), 'weights': model.state_dict(), 'ema': None, 'step': 3,
               'args': {'dataset': 'folder', 'data': 'x', 'batch_size': 4}}
    split = {'dataset': 'folder', 'split_seed': 0, 'normal_classes': ['a'], 'anomalous_classes': [],
             'duplicates': [], 'files': [{'id': f'{i}.png', 'class': 'a', 'part': 'train', 'sha256': '0'}
                                         for i in range(3)]}
    lines = b''.join(b'{"step": %d, "time": 1.5, "loss": 2.0}\n' % i for i in range(5))
    latents = bytes_of(lambda p: write_npz(p, group_0=np.zeros((2, 2, 4, 4), np.float32)))

    class Latent:
        latent_shapes = [(2, 4, 4)]

    def log(path: Path) -> None:
        os.replace(path, path.with_name('metrics.jsonl'))
        RunLog(path.parent, tensorboard=False, step=3)

    def config(suffix: str) -> Callable[[Path], Any]:
        return lambda path: with_config(['--config', str(path.rename(path.with_suffix(suffix)))])
    legacy = bytes_of(lambda p: torch.save(content, p, _use_new_zipfile_serialization=False))
    return {
        # The legacy format has no checksums, so damage reaches what is inside.
        'checkpoint': Target([bytes_of(lambda p: save_checkpoint(p, content)), legacy, legacy], open_model),
        'description': Target([json.dumps(content['description']).encode()],
                              lambda path: restore(content | {'description': read_json(path)})),
        'split.json': Target([json.dumps(split).encode()], read_split),
        'args.json': Target([json.dumps(vars(DataConfig())).encode()],
                            lambda path: read_flags(DataConfig, mapping(read_json(path)))),
        'config.json': Target([b'{"epochs": 3, "data": "x", "flip": true, "kinds": ["a", "b"]}'],
                              config('.json')),
        'config.yaml': Target([b'epochs: 3\ndata: x\nflip: true\nkinds: [a, b]\n'], config('.yaml')),
        'metrics.jsonl': Target([lines], log),
        'text': Target([b'a,b\n1,2\n', '\ufeffä\n'.encode('utf-16')], read_text),
        'latents.npz': Target([latents], lambda path: list(read_latents(path, Latent)))}


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError('no flags')
    return value


def published_files() -> dict[str, Target]:
    images, labels = np.arange(2 * 784, dtype=np.uint16).astype(np.uint8).reshape(2, 28, 28), np.uint8([0, 1])
    idx = bytes([0, 0, 8, 3]) + struct.pack('>3I', *images.shape) + images.tobytes()
    batch = {'data': np.zeros((2, 3072), np.uint8), 'labels': [1, 2]}
    svhn = {'X': np.zeros((32, 32, 3, 2), np.uint8), 'y': labels[:, None] + 1}
    matrix = struct.pack('<2i3i', 0x1E3D4C55, 2, 2, 3, 1) + bytes(6)

    def named(read: Callable[[Path], Any], suffix: str) -> Callable[[Path], Any]:
        return lambda path: read(path.rename(path.with_suffix(suffix)))
    mats = [bytes_of(lambda p, packed=packed: scipy.io.savemat(p, svhn, False, do_compression=packed))
            for packed in (False, True)]
    return {'idx': Target([idx], arrays.read_idx),
            'idx.gz': Target([gzip.compress(idx)], named(arrays.read_idx, '.gz')),
            'cifar10': Target([pickle.dumps(batch, protocol) for protocol in (0, 2, 4)], arrays.read_batch),
            'svhn': Target(mats, lambda path: arrays.read_svhn('train', path)),
            'matrix': Target([matrix], lambda path: arrays.read_matrix(path, 2))}


def archive_files(folder: Path) -> dict[str, Target]:
    import tarfile
    with tempfile.TemporaryDirectory() as place:
        Path(place, 'a.png').write_bytes(b'x' * 100)
        with tarfile.open(Path(place, 'a.tar'), 'w') as tar:
            tar.add(Path(place, 'a.png'), 'normal/a.png')
        plain = Path(place, 'a.tar').read_bytes()
        make_lmdb(Path(place, 'a.lmdb'), lambda first: iter([b'x' * 300] * (20 - first)), 20)
        pages = Path(place, 'a.lmdb', 'data.mdb').read_bytes()

    def records(path: Path) -> None:
        with Lmdb(path) as records:
            for i in range(20):
                records.get(b'%d' % i)
    return {'tar': Target([plain, gzip.compress(plain)], lambda path: unpacked(path, str(folder / 'cache'))),
            'lmdb': Target([pages], records)}


def targets(folder: Path) -> dict[str, Target]:
    found = {name: Target(wholes, lambda path: decode(path.read_bytes()))
             for name, wholes in image_files().items()}
    found['dicom'] = Target(dicom_files(), lambda path: decode_dicom(path.read_bytes()))
    everything = [whole for target in found.values() for whole in target.wholes]
    found['header'] = Target(everything, read_file_header)
    try:
        import nibabel
        volume = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes()
        found['nifti'] = Target([volume], read_nifti)
        found['nifti.gz'] = Target([gzip.compress(volume)], read_nifti)
        # Damage below the packing, which its checksum would else hide.
        found['nifti, packed again'] = Target([volume], lambda path: (
            path.write_bytes(gzip.compress(path.read_bytes())), read_nifti(path)))
    except ImportError:
        pass
    return found | published_files() | archive_files(folder) | run_files(folder)


# ---------------------------------------------------------------------------------------------------- the run

def attempt(target: Target, data: bytes, path: Path) -> str:
    """What is wrong with how the target reads these bytes; '' if nothing is."""
    path.write_bytes(data)
    since = time.monotonic()
    try:
        signal.alarm(LONGEST)
        target.read(path)
    except (UserError, Unreadable) as error:
        return 'more than one line' if '\n' in str(error) else ''
    except BaseException as error:
        return f'{type(error).__name__}: {traceback.format_exc(limit=-3)}'
    finally:
        signal.alarm(0)
    return 'hang' if time.monotonic() - since > LONGEST else ''


def block(target: Target, seed: str, keep: Path, number: int) -> tuple[int, list[str]]:
    """Tries some inputs in a process of their own; returns how many, and what was wrong."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        os.close(ours)
        with open('/dev/null', 'w') as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
        for index in range(number):
            chance = random.Random(f'{seed}/{index}')
            data = damaged(chance.choice(target.wholes), chance)
            (keep / 'last').write_bytes(data)
            with tempfile.TemporaryDirectory() as folder:
                wrong = attempt(target, data, Path(folder, 'input'))
            os.write(theirs, (json.dumps([index, wrong[:3000]]) + '\n').encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        rows = [json.loads(line) for line in pipe if line.endswith('\n')]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wrong = [(index, what) for index, what in rows if what]
    if status:
        wrong.append((len(rows), f'crash: status {status}'))
    for index, what in wrong:
        chance = random.Random(f'{seed}/{index}')
        name = f"{zlib.crc32(f'{seed}/{index}'.encode()):08x}"
        (keep / name).write_bytes(damaged(chance.choice(target.wholes), chance))
        (keep / f'{name}.txt').write_text(f'{seed}/{index}\n{what}\n')
    return len(rows) + bool(status), [what for _, what in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=60.0)
    parser.add_argument('--inputs', type=int, default=0, help='of each reader; 0 = what fits into --seconds')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='*', default=[])
    parser.add_argument('--keep', default='fuzz-failures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    Image.init()
    keep, until = Path(args.keep), time.monotonic() + args.seconds
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: t for name, t in targets(Path(folder)).items() if name in (args.only or [name])}
        counts, failures, turn = dict.fromkeys(found, 0), {name: [] for name in found}, 0
        while (turn * BLOCK < args.inputs) if args.inputs else time.monotonic() < until:
            for name, target in found.items():
                number, wrong = block(target, f'{args.seed}/{name}/{turn}', keep, BLOCK)
                counts[name] += number
                failures[name] += wrong
                if time.monotonic() > until and not args.inputs:
                    break
            turn += 1
    (keep / 'last').unlink(missing_ok=True)
    print('| reader | inputs | failed | the first failure |\n|---|---|---|---|')
    for name in found:
        first = ' '.join(failures[name][0].split())[-160:] if failures[name] else ''
        print(f'| {name} | {counts[name]} | {len(failures[name])} | {first} |')
    print(f'{sum(counts.values())} inputs, {sum(map(len, failures.values()))} failed')
    if not any(failures.values()):
        keep.rmdir()
    return int(any(map(bool, failures.values())))


if __name__ == '__main__':
    sys.exit(main())
