"""TFRecords, and the scripts that make LMDBs in the published layouts."""

import os
import runpy
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pytest import approx
from standins import celeba_files, example, image, message, tfrecord, varint, write_tfrecords
from standins import crc32c as crc32c_by_the_book

from datasets import DataConfig, load_data
from readers.lmdb.file import Lmdb, make_lmdb, unfinished
from scripts.convert_tfrecord_to_lmdb import crc32c, features, read_records
from utils import UserError


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script(name, *flags) runs a script in another folder: (status, what it printed, its errors)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'scripts' / f'{name}.py'), run_name='__main__')
        out, err = capsys.readouterr()
        return end.value.code, out, err
    return run


def records(path):
    lmdb = Lmdb(path)
    return [lmdb.get(str(i).encode()) for i in range(len(lmdb))]


def fails(done, words):
    status, _, err = done
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith('error: ') and words in last and 'Traceback' not in err


# --------------------------------------------------------------------------------------------------- TFRecord

def test_crc32c_has_its_published_values():
    assert crc32c(b'123456789') == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b'\xff' * 32) == 0x62A8AB43       # RFC 3720, B.4
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(b'') == 0


@pytest.mark.parametrize('length', [1, 4, 15, 16, 17, 1023, 1024, 1025, 3072, 5000])
def test_crc32c_of_any_length_is_that_of_the_book(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == crc32c_by_the_book(data)


def test_records_and_features_of_a_file(tmp_path):
    write_tfrecords(tmp_path, 'train', 32, 3, shards=1)
    (path,) = (tmp_path / 'train').iterdir()
    found = [features(r) for r in read_records(path)]
    assert [f['shape'] for f in found] == [[32, 32, 3]] * 3 and found[0]['label'] == [0]
    assert [f['data'] for f in found] == [[image(i, 32, 32).tobytes()] for i in range(3)]


def test_an_example_by_hand():
    # {'a': [5, 300, -1]} packed and not, {'b': [1.0]}: field 1 of the float list is left out
    def one(name, feature):
        return message(1, message(1, message(1, name) + message(2, feature)))

    negative = varint(2 ** 64 - 1)
    packed = message(3, message(1, b'\x05\xac\x02' + negative))
    single = message(3, b'\x08\x05\x08\xac\x02\x08' + negative)
    assert features(one(b'a', packed)) == features(one(b'a', single)) == {'a': [5, 300, -1]}
    assert features(one(b'b', message(2, message(1, struct.pack('<f', 1))))) == {}
    pixels = image(0, 4, 4)
    assert features(example(pixels, packed=False)) == features(example(pixels))
    for broken in (b'\x0a', b'\x0a\x05abc', b'\x0b', b'\xff' * 11):
        with pytest.raises(ValueError):
            features(broken)


@pytest.mark.parametrize('damage, words', [
    (lambda data: data[:-3], 'record 2 at byte {two} is cut off: 25 of 28 bytes are there'),
    (lambda data: data[:-35], 'record 2 at byte {two} is cut off in its header'),
    (lambda data: data[:60] + b'#' + data[61:], 'record 1 at byte 40 has data with a wrong checksum'),
    (lambda data: data[:41] + b'#' + data[42:], 'record 1 at byte 40 has a header with a wrong checksum'),
    (lambda data: b'PK' + data, 'record 0 at byte 0 has a header'),
])
def test_a_damaged_record_is_named_with_its_byte(tmp_path, damage, words):
    whole = b''.join(tfrecord(bytes([i]) * 24) for i in range(3))                # 8 + 4 + 24 + 4 bytes each
    (tmp_path / 'a.tfrecords').write_bytes(damage(whole))
    with pytest.raises(UserError, match=words.format(two=80)) as error:
        list(read_records(tmp_path / 'a.tfrecords'))
    assert 'a.tfrecords' in str(error.value) and '\n' not in str(error.value)


# -------------------------------------------------------------------------------------------------- growing

def test_a_stopped_run_goes_on_where_it_was(tmp_path, capsys):
    path, asked = tmp_path / 'train.lmdb', []

    def values(first, stop=None, prefix=b'x'):
        for i in range(first, 700):
            asked.append(i)
            if i == stop:
                raise KeyboardInterrupt
            yield prefix + b'%d' % i

    with pytest.raises(KeyboardInterrupt):
        make_lmdb(path, partial(values, stop=600), 700)
    assert 'holds 512 records; the same command goes on there' in capsys.readouterr().err
    assert not path.exists() and unfinished(path).exists()
    with pytest.raises(UserError, match='holds other images than these'):
        make_lmdb(path, partial(values, prefix=b'y'), 700)
    with pytest.raises(UserError, match='has 700 records, expected 800'):
        make_lmdb(path, values, 800)
    assert not path.exists() and min(asked[601:]) == 511             # all but the last is not made again
    assert make_lmdb(path, values, 700) == 700 and not unfinished(path).exists()
    assert records(path) == [b'x%d' % i for i in range(700)]
    del asked[:]
    assert make_lmdb(path, values, 700) == 700 and not asked
    assert 'nothing to do' in capsys.readouterr().out


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / 'a.lmdb').write_text('mine')
    with pytest.raises(UserError, match='is there and is not an LMDB'):
        make_lmdb(tmp_path / 'a.lmdb', lambda first: iter(()), 1)
    assert (tmp_path / 'a.lmdb').read_text() == 'mine'
    with pytest.raises(UserError, match='0 records, expected some'):
        make_lmdb(tmp_path / 'b.lmdb', lambda first: iter(()))


# ---------------------------------------------------------------------------------------------------- CelebA

def test_celeba_script_makes_what_the_reader_takes(script, tmp_path):
    source, target = celeba_files(tmp_path / 'in', 12, 5), tmp_path / 'out'
    for split, name, number in (('train', 'train', 12), ('valid', 'validation', 5), ('test', 'test', 5)):
        status, out, _ = script('create_celeba64_lmdb', '--img_path', source, '--lmdb_path', target,
                                '--split', split)
        assert status == 0 and f'{name}.lmdb: {number} records' in out
    files, made = (load_data(DataConfig(dataset='celeba_64', data=str(folder)))
                   for folder in (source, target))
    for part in ('train', 'test'):
        a, b = getattr(files, part), getattr(made, part)
        assert len(a) == len(b) and torch.equal(a.items(range(len(a))).x, b.items(range(len(b))).x)
    name = files.train.entries[0].id.split('/')[1]
    file = source / 'celeba' / 'img_align_celeba' / name
    assert records(target / 'train.lmdb')[0] == file.read_bytes()                   # the file as it is


def test_celeba_script_names_what_is_missing_or_damaged(script, tmp_path):
    def make(source=tmp_path, target='out'):
        return script('create_celeba64_lmdb', '--img_path', source, '--lmdb_path', target)

    fails(make('none'), 'list_eval_partition.txt')
    celeba_files(tmp_path, 12, 5)
    listed = tmp_path / 'celeba' / 'list_eval_partition.txt'
    name = next(line.split()[0] for line in listed.read_text().splitlines() if line.endswith(' 0'))
    path = tmp_path / 'celeba' / 'img_align_celeba' / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    fails(make(), f"record '{name}' cannot be decoded")
    assert not (tmp_path / 'out' / 'train.lmdb').exists()
    path.unlink()
    fails(make(), f'{name} cannot be opened (No such file or directory)')
    path.write_bytes(whole)
    assert make()[0] == 0
    listed.write_text('000001.jpg 0\nwhat is this\n')
    fails(make(target='two'), "'what is this'")


# ------------------------------------------------------------------------------------------------------ FFHQ

@pytest.fixture
def faces(tmp_path):
    """20 images in two folders, number k grey level 10 k, larger than 256."""
    for k in range(20):
        path = tmp_path / 'images' / f'{k // 10 * 1000:05d}' / f'{k:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((300, 300, 3), 10 * k, np.uint8)).save(path)
    return tmp_path / 'images'


def ffhq_flags(faces, split='train', seed=0, out='out'):
    return '--ffhq_img_path', faces, '--ffhq_lmdb_path', out, '--split', split, '--seed', seed


def test_ffhq_script_splits_by_a_seed_and_resizes(script, faces, tmp_path):
    levels = {}
    for seed in (0, 1):
        for split, number in (('train', 18), ('validation', 2)):
            out = f'out{seed}'
            assert script('create_ffhq_lmdb', *ffhq_flags(faces, split, seed, out))[0] == 0
            made = records(tmp_path / out / f'{split}.lmdb')
            assert len(made) == number and {len(r) for r in made} == {256 * 256 * 3}
            levels[seed, split] = [r[0] for r in made]
            assert all(set(r) == {r[0]} for r in made)
    assert sorted(levels[0, 'train'] + levels[0, 'validation']) == [10 * k for k in range(20)]
    assert levels[0, 'train'] != levels[1, 'train'] and levels[0, 'train'] != sorted(levels[0, 'train'])
    config = DataConfig(dataset='ffhq', data=str(tmp_path / 'out0'), cache_dir=str(tmp_path / 'cache'))
    x = load_data(config).train.items([3]).x
    assert x.shape == (1, 3, 256, 256) and x.mean().item() * 255 == approx(levels[0, 'train'][3])


def test_ffhq_script_takes_parts_that_are_there(script, faces, tmp_path):
    indices = {'train': torch.arange(2, 20).flip(0), 'test': torch.tensor([1, 0])}
    torch.save(indices, faces / 'train_test_ind.pt')
    status, out, _ = script('create_ffhq_lmdb', *ffhq_flags(faces, 'validation'))
    assert status == 0 and 'parts as in' in out
    assert [r[0] for r in records(tmp_path / 'out' / 'validation.lmdb')] == [10, 0]
    (faces / '00000' / '00003.png').unlink()
    fails(script('create_ffhq_lmdb', *ffhq_flags(faces)), 'does not name each of the 19 images')
    (faces / 'train_test_ind.pt').write_bytes(b'what is this')
    fails(script('create_ffhq_lmdb', *ffhq_flags(faces)), 'cannot be used')
    fails(script('create_ffhq_lmdb', *ffhq_flags(tmp_path / 'none')), 'holds 0 images')


def test_ffhq_script_names_a_damaged_image(script, faces):
    path = faces / '01000' / '00012.png'
    path.write_bytes(path.read_bytes()[:90])
    for split in ('train', 'validation'):
        done = script('create_ffhq_lmdb', *ffhq_flags(faces, split))
        if done[0]:
            fails(done, '00012.png cannot be decoded')
            return
    pytest.fail('nobody met the damaged image')


# -------------------------------------------------------------------------------------------------- TFRecords

@pytest.mark.parametrize('name, dataset, side', [('imagenet-oord_32', 'imagenet_32', 32),
                                                 ('imagenet-oord_64', 'imagenet_32', 64),
                                                 ('celeba', 'celeba_256', 256)])
def test_tfrecord_script_makes_what_the_reader_takes(script, name, dataset, side, tmp_path):
    for split, number, first in (('train', 5, 0), ('validation', 3, 100)):
        write_tfrecords(tmp_path / 'tfr', split, side, number, shards=2, first=first)
        status, out, _ = script('convert_tfrecord_to_lmdb', '--dataset', name, '--tfr_path', 'tfr',
                                '--lmdb_path', 'out', '--split', split)
        assert status == 0 and f'{number} records' in out
    assert records(tmp_path / 'out' / 'train.lmdb') == [image(i, side, side).tobytes() for i in range(5)]
    config = DataConfig(dataset=dataset, data=str(tmp_path / 'out'), image_size=side)
    assert len(load_data(replace(config, cache_dir=str(tmp_path / 'cache'))).test) == 3


def test_tfrecord_script_names_what_is_wrong(script, tmp_path):
    def convert(name='imagenet-oord_32'):
        return script('convert_tfrecord_to_lmdb', '--dataset', name, '--tfr_path', 'tfr',
                      '--lmdb_path', 'out')

    fails(convert(), 'has no train-r05-s-*-of-*.tfrecords')
    write_tfrecords(tmp_path / 'tfr', 'train', 32, 6, shards=3)
    second = tmp_path / 'tfr' / 'train' / 'train-r05-s-0001-of-0003.tfrecords'
    whole = second.read_bytes()
    second.unlink()
    fails(convert(), '2 of the 3 files')
    second.write_bytes(whole[:-10])
    fails(convert(), 'train-r05-s-0001-of-0003.tfrecords: record 1 at byte')
    second.write_bytes(tfrecord(b'abc'))
    fails(convert(), 'record 0 is not an example')
    second.write_bytes(tfrecord(example(image(0, 64, 64))))
    fails(convert(), 'record 0 has the shape (64, 64, 3) and 12,288 bytes, expected 32 x 32 x 3')
    second.write_bytes(whole)
    assert convert()[0] == 0 and len(Lmdb(tmp_path / 'out' / 'train.lmdb')) == 6


def test_a_script_runs_from_any_folder_and_goes_on_after_a_kill(tmp_path):
    folder = tmp_path / 'tfr' / 'train'
    folder.mkdir(parents=True)
    one = tfrecord(example(image(0, 32, 32)))
    (folder / 'all.tfrecords').write_bytes(one * 12_000)
    words = [sys.executable, str(ROOT / 'scripts' / 'convert_tfrecord_to_lmdb.py'), '--tfr_path', 'tfr',
             '--lmdb_path', 'out']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    growing = tmp_path / 'out' / 'train.lmdb.unfinished' / 'data.mdb'
    killed = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (growing.exists() and growing.stat().st_size > 2 ** 20):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and '12,000 records' in done.stdout, done.stderr
    assert len(Lmdb(tmp_path / 'out' / 'train.lmdb')) == 12_000
