"""The self-describing LMDB: the same data set as from its files; what is damaged is named; a kill costs
nothing. Every image is made here, a few pixels large.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from standins import lead_astray, make_standin

import scripts.create_lmdb as program_file
from anomaly.config import Judging, MapConfig
from anomaly.detect import preparation_of
from anomaly.normal import Normal
from anomaly.scores import Scoring
from datasets import DATASETS, DataConfig, load_data
from readers.batches import train_batches
from readers.images.decode import FIRST_PAGE
from readers.lmdb.format import seal
from readers.lmdb.packed import Packed, Sealed, is_packed
from readers.source import Unreadable
from scripts.create_lmdb import FolderConfig, pack, plan, verify
from utils import UserError

PAGE = 4096
NORMAL = Normal('nelbo', Scoring(), MapConfig(), Judging(), {}, {}, {})


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (24, 24)).astype(np.uint8)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """22 files of all kinds: in subfolders, 8 and 16 bits, grey and colour, not square; 3 of 5 ill ones have
    masks.
    """
    root = tmp_path_factory.mktemp('packed') / 'data'
    for i in range(12):
        save(root / 'normal' / f'site {i % 2}' / f'p{i // 2}_{i}.png', noise(i))
    save(root / 'normal' / 'wide.jpg', noise(20, 20, 30, 3), quality=90)
    save(root / 'normal' / 'deep.png', noise(21).astype(np.uint16) * 257 + 3)
    save(root / 'normal' / 'deep.tiff', noise(22).astype(np.uint16) * 200)
    save(root / 'normal' / 'again.bmp', noise(0))                       # near-duplicate of p0_0.png
    for i in range(5):
        save(root / 'ill' / 'images' / f'ill{i}.png', noise(100 + i))
        if i < 3:
            save(root / 'ill' / 'masks' / f'ill{i}.png', np.repeat(np.uint8([[255, 0]]), 24, 0).repeat(12, 1))
    save(root / 'flu' / 'f.png', noise(200))
    return root


def make(data, out, **flags):
    """Packs a data set; returns the path of the LMDB."""
    config = FolderConfig(data=str(data), cache_dir=str(Path(out).parent / 'cache'), **flags)
    pack(plan(config), Path(out), 2, config.skip_corrupt)
    return Path(out)


@pytest.fixture(scope='session')
def packed(folder, tmp_path_factory):
    return make(folder, tmp_path_factory.mktemp('lmdb') / 'all.lmdb')


def load(data, tmp_path, **flags):
    return load_data(DataConfig(**{'dataset': 'folder', 'data': str(data), 'image_size': 8,
                                   'cache_dir': str(tmp_path / 'cache')} | flags))


def assert_same(a, b, draw=0):
    """Two data sets agree bit for bit: split, labels, images, masks, what is known of each file."""
    assert a.split | {'made_of': ''} == b.split | {'made_of': ''}
    assert a.shape == b.shape and a.pixels == b.pixels
    for x, y in zip((a.train, a.val, a.test), (b.train, b.val, b.test), strict=True):
        keys = ('id', 'class_name', 'sha256', 'file_bytes', 'mask_row', 'part', 'patient', 'label')
        assert [[getattr(e, k) for k in keys] for e in x.entries] == \
            [[getattr(e, k) for k in keys] for e in y.entries]
        if len(x):
            for p, q in zip(x.items(range(len(x)), draw), y.items(range(len(y)), draw), strict=True):
                assert torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q


def records_of(path):
    """All keys and values of an LMDB."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as e, e.begin() as t:
        return dict(t.cursor())


def write_lmdb(path, records):
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as e, e.begin(write=True) as t:
        for key, value in records.items():
            t.put(key, value)
    return path


# ------------------------------------------------------------------------------------------------- same data

@pytest.mark.parametrize('flags', [
    {}, {'num_x_bits': 16}, {'channels': 3, 'fit': 'crop', 'image_size': 12}, {'dataset': 'covid'},
    {'normal_classes': ('ill',), 'anomalous_classes': ('normal',)}, {'anomalous_classes': ('ILL',)},
    {'patient_pattern': r'p(\d+)_'}, {'likelihood': 'bernoulli'},
], ids=str)
def test_a_data_set_is_the_same_from_its_folder_and_from_its_lmdb(folder, packed, tmp_path, flags):
    a, b = load(folder, tmp_path, **flags), load(packed, tmp_path, **flags)
    assert_same(a, b, draw=3)
    assert [line for line in a.report if not line.startswith('passed over')] == b.report
    x, y = (list(itertools.islice(train_batches(d.train, 2, seed=1), 3)) for d in (a, b))
    assert all(torch.equal(p.x, q.x) and p.id == q.id for p, q in zip(x, y, strict=True))


def test_near_duplicates_and_masks_are_among_what_is_the_same(folder, packed, tmp_path):
    flags = {'split_seed': 3, 'test_fraction': 0.5}
    a, b = load(folder, tmp_path, **flags), load(packed, tmp_path, **flags)
    assert a.split['duplicates'] and a.split['duplicates'] == b.split['duplicates']
    assert sum(e.mask_row >= 0 for e in b.test.entries) == 3
    assert b.test.items(range(len(b.test))).mask[:, :, :, :4].sum() == 3 * 4 * 8


def test_resized_arrays_give_the_same_images_and_the_same_split(folder, tmp_path):
    for flags in ({'image_size': 8}, {'image_size': 8, 'num_x_bits': 12, 'channels': 3, 'fit': 'stretch'}):
        small = make(folder, tmp_path / f'{len(flags)}.lmdb', **flags)
        assert_same(load(folder, tmp_path, **flags), load(small, tmp_path, **flags))
        assert any('have 8 x 8 pixels' in line for line in load(small, tmp_path, image_size=12).report)
        for fit in ('pad', 'stretch'):
            told = any('made with --fit' in line for line in load(small, tmp_path, fit=fit).report)
            assert told == (fit != flags.get('fit', 'pad')), "new files have to be like them"
            data = load(small, tmp_path, fit=fit)
            normal = replace(NORMAL, preparation=preparation_of(data))
            assert normal.data_flags(DataConfig(fit=fit)).fit == data.config.fit == flags.get('fit', 'pad')
        with Packed(small) as records:
            info = records.info(0)
        assert info['encoding'] == 'raw' and info['shape'] == ([8, 8] if len(flags) == 1 else [8, 8, 3])
        assert info['dtype'] == ('uint8' if len(flags) == 1 else 'uint16')


@pytest.mark.parametrize('name', [name for name, row in DATASETS.items() if row.dims == 2])
def test_every_data_set_is_the_same_from_an_lmdb(name, tmp_path):
    data = make_standin(name, tmp_path / 'data', count=12, test_count=4)
    few = {'num_phantoms': 8} if DATASETS[name].phantoms else {}
    out = make(data, tmp_path / 'all.lmdb', dataset=name, **few)
    flags = {'dataset': name, 'image_size': 0, **few}
    a, b = load(data, tmp_path, **flags), load(out, tmp_path, **flags)
    if 'records' in a.split:              # large sets are counted, not hashed, in their published form
        for split in (a.split, b.split):
            for name in ('records', 'files', 'duplicates', 'made_of'):
                split.pop(name, None)
        for x, y in zip((a.train, a.val, a.test), (b.train, b.val, b.test), strict=True):
            assert len(x) == len(y)
            if len(x):
                x, y = x.items(range(len(x))), y.items(range(len(y)))
                assert x.id == y.id and torch.equal(x.x, y.x)
        assert a.split == b.split and a.pixels == b.pixels
    else:
        assert_same(a, b, draw=5)


def test_digits_with_anomalies_and_another_border(tmp_path):
    data = make_standin('mnist', tmp_path / 'data', count=40, test_count=20)
    out = make(data, tmp_path / 'digits.lmdb', dataset='mnist')
    for flags in ({'image_size': 28}, {'image_size': 36, 'anomalous_classes': ('3',)},
                  {'normal_classes': ('0', '1', '2'), 'anomalous_classes': ('7',), 'image_size': 0}):
        a, b = (load(place, tmp_path, dataset='mnist', **flags) for place in (data, out))
        assert_same(a, b)


def test_batches_come_from_worker_processes_too(packed, tmp_path):
    data = load(packed, tmp_path)
    alone = next(train_batches(data.train, 4, seed=1))
    helped = next(train_batches(data.train, 4, seed=1, workers=2))
    assert torch.equal(alone.x, helped.x) and alone.id == helped.id
    sent = pickle.loads(pickle.dumps(data.train))                 # as to a worker that is spawned
    assert torch.equal(sent.items(range(4)).x, data.train.items(range(4)).x)


# ---------------------------------------------------------------------------------------------------- format

def test_other_files_are_not_taken_for_one(folder, packed, tmp_path):
    other = write_lmdb(tmp_path / 'other.lmdb', {b'0': b'x', b'meta': b'y'})
    (tmp_path / 'text.lmdb').write_text('text')
    assert is_packed(packed)
    assert not any(map(is_packed, [other, folder, '', tmp_path / 'text.lmdb', tmp_path / 'nowhere']))


# ---------------------------------------------------------------------------------------------------- damage

def changed(path, target, edit):
    """The LMDB `path` as `target` with its records edited."""
    records = records_of(path)
    edit(records)
    return write_lmdb(target, records)


def edit_meta(**values):
    def edit(records):
        records[b'meta'] = seal(b'meta', json.loads(records[b'meta'][9:]) | values)
    return edit


def flip(key, place=-3):
    def edit(records):
        value = bytearray(records[key])
        value[place] ^= 1
        records[key] = bytes(value)
    return edit


@pytest.mark.parametrize('edit, words, status', [
    (flip(b'data/00000004'), r'ill3.png is damaged \(record data/00000004 does not have its SHA-256', 1),
    (flip(b'mask/00000001'), r'ill0.png is damaged \(record mask/00000001 does not have its SHA-256', 1),
    (flip(b'info/00000007'), r'image 7 of .* is damaged \(record info/00000007 does not have its CRC-32', 1),
    (lambda r: r.pop(b'data/00000002'), r'ill1.png is damaged \(record data/00000002 is missing', 1),
    (lambda r: r.pop(b'info/00000003'), r'image 3 of .* \(record info/00000003 is missing', 1),
    (lambda r: r.update({b'info/00000005': r[b'info/00000006']}), r'info/00000005 does not have its CRC', 1),
    (flip(b'meta'), r'broken.lmdb is damaged \(record meta does not have its CRC-32', 2),
    (lambda r: r.pop(b'meta'), r'broken.lmdb is damaged \(record meta is missing', 2),
    (edit_meta(complete=False), r'is not finished \(22 images so far\): give the scripts/create_lmdb.py', 2),
    (edit_meta(count=10 ** 12), r'does not hold the 1,000,000,000,000 images that it counts', 2),
    (edit_meta(count=-1), r'does not hold the -1 images that it counts', 2),
    (edit_meta(version=2), r'is anomaly-lmdb version 2, this program reads anomaly-lmdb version 1', 2),
])
def test_what_is_damaged_or_unfinished_is_one_clear_line(packed, tmp_path, capsys, edit, words, status):
    path = changed(packed, tmp_path / 'broken.lmdb', edit)
    with pytest.raises(UserError, match=words) as error:
        load(path, tmp_path)
    assert '\n' not in str(error.value)
    if status == 2:
        with pytest.raises(UserError, match=words):
            verify(path, 1)
    else:
        assert verify(path, 1) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and lines[0].startswith('damaged: ') and lines[1].endswith('1 damage')
        data = load(path, tmp_path, skip_corrupt=True)
        assert len(data.split['files']) == 21 and any(line.startswith('left out: ') for line in data.report)


def test_a_page_that_ends_liblmdb_is_damage_and_not_the_end_of_the_program(packed, tmp_path, capsys):
    path = tmp_path / 'wild.lmdb'
    path.write_bytes(lead_astray(packed.read_bytes()))
    assert is_packed(path)
    with pytest.raises(UserError, match=r'wild.lmdb is damaged \(record meta cannot be read \(') as error:
        load(path, tmp_path)
    assert '\n' not in str(error.value)


def test_one_damaged_byte_anywhere_is_named_or_harmless(packed, tmp_path, capsys):
    """In payloads, records, pages of the tree, unused space: what is read was written so, or it is named."""
    def read(path):
        found = {}
        with Packed(path) as records:
            for i in range(len(records)):
                try:
                    info = records.info(i)
                    found[i] = info, [records.payload(kind, i, facts) for kind, facts in
                                      {'data': info, 'mask': info.get('mask')}.items() if facts]
                except Unreadable:
                    found[i] = None
        return found

    whole, data, rng = read(packed), packed.read_bytes(), random.Random(0)
    outcomes = {'refused': 0, 'named': 0, 'harmless': 0}
    for trial in range(80):
        path = tmp_path / f'{trial}.lmdb'
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(broken)
        try:
            found, status = read(path), verify(path, 1)
        except UserError as error:
            assert '\n' not in str(error)
            outcomes['refused'] += 1
            continue
        assert all(found[i] in (whole[i], None) for i in whole) and len(found) == len(whole)
        assert status == 1 or found == whole
        outcomes['named' if status else 'harmless'] += 1
    assert all(outcomes.values()), outcomes


def test_a_truncated_file_is_named(packed, tmp_path):
    for part in (0, 100, PAGE, len(packed.read_bytes()) // 2):
        path = tmp_path / f'{part}.lmdb'
        path.write_bytes(packed.read_bytes()[:part])
        with pytest.raises(UserError) as error:
            load(path, tmp_path)
        assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------- making

def test_a_killed_command_goes_on_to_the_same_lmdb(folder, packed, tmp_path, monkeypatch, capsys):
    """kill -9 in the middle, whatever the place."""
    monkeypatch.setattr(program_file, 'MOST_ROWS', 8)
    out = tmp_path / 'killed.lmdb'

    def dying(number_of_death):
        job = plan(FolderConfig(data=str(folder)))

        def load(number):
            if number == number_of_death:
                os.kill(os.getpid(), signal.SIGKILL)
            return job.load(number)
        pack(replace(job, load=load), out, 1, False)

    for death in (0, 9, 10, 19):
        child = multiprocessing.get_context('fork').Process(target=dying, args=(death,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if death:
            with pytest.raises(UserError, match='is not finished'):
                load(out, tmp_path)
    with Sealed(out) as records:
        assert 0 < len(records) < len(records_of(packed))
    make(folder, out)
    assert records_of(out) == records_of(packed)
    assert 'there already: 22 images' not in capsys.readouterr().out
    make(folder, out)
    assert 'there already: 22 images' in capsys.readouterr().out


def test_nothing_of_something_else_is_overwritten(folder, packed, tmp_path, monkeypatch):
    out = Path(shutil.copy(packed, tmp_path / 'all.lmdb'))
    before = out.read_bytes()
    other = tmp_path / 'other'
    shutil.copytree(folder, other)
    save(other / 'normal' / 'zz.png', noise(77))
    for data, flags in ((other, {}), (folder, {'image_size': 8}), (folder, {'dataset': 'covid'})):
        with pytest.raises(UserError, match=r"finished with other images or flags \(22 images from 'data'\)"):
            make(data, out, **flags)
    for name in ('text', 'folder', 'lmdb'):
        path = tmp_path / name
        {'text': lambda p: p.write_text('text'), 'folder': lambda p: p.mkdir(),
         'lmdb': lambda p: write_lmdb(p, {b'0': b'x'})}[name](path)
        with pytest.raises(UserError, match='choose another name'):
            make(folder, path)
    with pytest.raises(UserError, match='is such an LMDB already'):
        make(out, tmp_path / 'twice.lmdb')
    assert out.read_bytes() == before and (tmp_path / 'text').read_text() == 'text'


@pytest.mark.parametrize('origin', [None, [1], {}, {'done': 'x'}], ids=str)
def test_an_lmdb_of_another_program_does_not_go_on(folder, packed, tmp_path, origin):
    path = changed(packed, tmp_path / 'other.lmdb', edit_meta(origin=origin))
    with pytest.raises(UserError, match=r'other\.lmdb was finished with other images or flags'):
        make(folder, path)


def test_unreadable_files_are_all_named_and_replaced_ones_go_in(folder, packed, tmp_path, capsys):
    root, out = tmp_path / 'data', tmp_path / 'all.lmdb'
    shutil.copytree(folder, root)
    broken = {'normal/deep.png': b'', 'normal/wide.jpg': b'text', 'ill/images/ill4.png': b'\x89PNG'}
    for name, data in broken.items():
        (root / name).write_bytes(data)
    with pytest.raises(UserError, match=r'3 files of 22 cannot be used: .* --skip_corrupt'):
        make(root, out)
    told = capsys.readouterr().err
    assert all(f'unreadable: {name} ' in told for name in broken)
    for name in broken:
        shutil.copy(folder / name, root / name)
    make(root, out)
    mine, theirs = records_of(out), records_of(packed)
    assert mine.pop(b'meta') != theirs.pop(b'meta') and mine == theirs      # times of change differ

    for name in broken:
        (root / name).write_bytes(b'')
    make(root, tmp_path / 'some.lmdb', skip_corrupt=True)
    assert 'left out: normal/deep.png is empty (0 bytes)' in capsys.readouterr().out
    data = load(tmp_path / 'some.lmdb', tmp_path)
    assert len(data.split['files']) == 19 and any('3 files had been left out' in line for line in data.report)
    assert verify(tmp_path / 'some.lmdb', 1) == 0
    assert_same(data, load(root, tmp_path, skip_corrupt=True))


@pytest.mark.parametrize('flags, words', [
    ({'data': ''}, '--data is missing'), ({'data': 'nowhere'}, "the folder 'nowhere' does not exist"),
    ({'fit': 'crop'}, '--fit would change images that are stored as they are'),
    ({'dataset': 'mnist', 'image_size': 64}, 'stored without border, 28 x 28'),
    ({'dataset': 'mnist', 'patient_pattern': '(.)'}, '--patient_pattern: it does nothing for'),
])
def test_a_mistake_is_one_clear_line(folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as error:
        make(**{'data': folder} | flags, out=tmp_path / 'x.lmdb')
    assert '\n' not in str(error.value) and not (tmp_path / 'x.lmdb').exists()


def test_classes_that_the_row_does_not_know_are_told(packed, tmp_path):
    data = make_standin('cifar10', tmp_path / 'data', count=12)
    out = make(data, tmp_path / 'c.lmdb', dataset='cifar10')
    with pytest.raises(UserError, match=r'LMDB of --dataset cifar10\) has no class of normal images named '
                                        r'normal or good: found airplane, .* with --normal_classes'):
        load(out, tmp_path)
    assert load(out, tmp_path, normal_classes=('cat', 'dog')).anomalous_classes[0] == 'airplane'


def test_the_program_from_any_folder(folder, tmp_path):
    """Made, used, checked, damaged: as a user does it."""
    def run(*words):
        return subprocess.run([sys.executable, ROOT / 'scripts' / 'create_lmdb.py', *map(str, words)],
                              cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = run('--data', folder, '--out', 'made/all.lmdb', '--verify', '--patient_pattern', r'p(\d+)_')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'OK: 22 records'
    assert os.listdir(tmp_path / 'made') == ['all.lmdb']
    path = tmp_path / 'made' / 'all.lmdb'
    assert_same(load(folder, tmp_path, patient_pattern=r'p(\d+)_'), load(path, tmp_path))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"class":"flu"', b'"class":"fly"'))
    done = run('--verify', path)
    assert done.returncode == 1 and 'record info/00000000 does not have its CRC-32' in done.stdout


def test_a_file_of_several_pages_is_said(tmp_path):
    for i in range(8):
        save(tmp_path / 'data' / 'normal' / f'{i}.png', noise(i))
    pages = [Image.fromarray(noise(i)) for i in range(2)]
    pages[0].save(tmp_path / 'data' / 'normal' / 'a.tif', save_all=True, append_images=pages[1:])
    save(tmp_path / 'data' / 'ill' / '0.png', noise(9))
    report = load(make(tmp_path / 'data', tmp_path / 'a.lmdb'), tmp_path).report
    assert any(FIRST_PAGE in line and 'normal/a.tif' in line for line in report)
