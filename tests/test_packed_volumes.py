"""Volumes from an LMDB are those of the files: the same split, voxels, masks and grids."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from nibabel import Nifti1Image
from nibabel import save as write_nifti
from test_packed import assert_same, records_of, write_lmdb

from datasets import DataConfig, load_data
from readers.config import volume_flags
from readers.lmdb.format import seal
from scripts.create_lmdb import FolderConfig, pack, plan, verify
from utils import UserError

FLAGS = {'modalities': ('t1', 'flair'), 'labels': 'lesions', 'volume_mask': 'brain', 'spacing': 2.0,
         'pad_multiple': 4}


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    """Eight people, two of them with lesions and one of unknown place; key files give two parts."""
    root = tmp_path_factory.mktemp('scans') / 'data'
    rng, affine = np.random.default_rng(0), np.diag([-1, 1, 1, 1.0])
    for i in range(8):
        brain = np.zeros((9 + i, 10, 8), np.uint8)
        brain[1:-1, 1:-1, 1:-1] = 1
        files = {name: rng.uniform(0, 90, brain.shape).astype(np.float32) for name in ('t1', 'flair')}
        files |= {'brain': brain, **({'lesions': brain * (files['flair'] > 80)} if i < 2 else {})}
        for name, values in files.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            write_nifti(Nifti1Image(values, affine), root / name / f'p{i}.nii.gz')
    (root / 'site-train_keys.txt').write_text('p2\np3\np4\n')
    (root / 'site-val_keys.txt').write_text('p5\n')
    (root / 'others_keys.txt').write_text('p6\n')
    (root / 'site-test_keys.txt').write_text('p0\np1\np7\n')
    return root


def make(data, out, **flags):
    config = FolderConfig(dataset='brain', data=str(data), cache_dir=str(Path(out).parent / 'cache'), **flags)
    pack(plan(config), Path(out), 2, config.skip_corrupt)
    return Path(out)


@pytest.fixture(scope='module')
def packed(scans, tmp_path_factory):
    return make(scans, tmp_path_factory.mktemp('lmdb') / 'brain.lmdb', **FLAGS)


def load(data, tmp_path, **flags):
    flags = {'dataset': 'brain', 'data': str(data), 'cache_dir': str(tmp_path)} | flags
    return load_data(DataConfig(**flags))


@pytest.mark.parametrize('flags', [
    {}, {'anomalous_classes': ('others',)}, {'patient_pattern': r'p(\d)'}], ids=str)
def test_a_data_set_is_the_same_from_its_files_and_from_its_lmdb(scans, packed, tmp_path, flags):
    """Whether the flags are given again or not."""
    files = load(scans, tmp_path, **FLAGS, **flags)
    with_lesions = 'anomalous_classes' not in flags
    assert files.val.entries[0].part == 'val'
    assert any(e.mask_row >= 0 for e in files.test.entries) == with_lesions
    for given in ({}, FLAGS):
        lmdb = load(packed, tmp_path, **given, **flags)
        assert_same(files, lmdb)
        for part in ('train', 'val', 'test'):
            grids = [[e.grids for e in getattr(data, part).entries] for data in (files, lmdb)]
            assert grids[0] == grids[1] and all(grids[0])
        assert all(line in lmdb.report for line in files.report)
        assert volume_flags(lmdb.config) == volume_flags(files.config), "a prediction prepares new files so"


def test_sixteen_bits_stay(scans, tmp_path, capsys):
    out = make(scans, tmp_path / 'deep.lmdb', num_x_bits=16, **FLAGS)
    assert_same(load(scans, tmp_path, num_x_bits=16, **FLAGS), load(out, tmp_path, num_x_bits=16))
    with pytest.raises(UserError, match='holds uint16, 8 bits are wanted'):
        load(out, tmp_path)
    assert verify(out, 2) == 0 and 'OK: 8 records' in capsys.readouterr().out


@pytest.mark.parametrize('flags, words', [
    ({'spacing': 3.0}, r'--spacing 3.0: .* was made with 2.0'), ({'image_size': 8}, '--image_size 8'),
    ({'dataset': 'folder'}, 'is an LMDB of volumes, --dataset says images: take --dataset brain'),
    ({'normal_classes': ('healthy',)}, 'healthy')])
def test_what_it_does_not_hold_is_said(packed, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as error:
        load(packed, tmp_path, **flags)
    assert '\n' not in str(error.value)


def test_a_damaged_volume_is_named(packed, tmp_path):
    """One byte of a volume: whoever verifies finds it, whoever reads leaves it out."""
    out = tmp_path / 'damaged.lmdb'
    content = bytearray(packed.read_bytes())
    whole = load(packed, tmp_path)
    voxels = np.asarray(whole.train.images[np.array([whole.train.entries[0].row])])[0].tobytes()
    content[content.index(voxels[:64]) + 5] ^= 1
    out.write_bytes(content)
    with pytest.raises(UserError, match=r'p\d is damaged \(record data/0000000\d does not have its SHA-256'):
        load(out, tmp_path)
    assert len(load(out, tmp_path, skip_corrupt=True).train) == len(whole.train) - 1
    assert verify(out, 1) == 1


@pytest.mark.parametrize('record, change, words', [
    ('meta', {'volumes': {'flags': {}}}, r'does not hold what docs/lmdb.md says \(KeyError\)'),
    ('meta', {'left_out': [], 'dtypes': None}, r'does not hold what docs/lmdb.md says \(TypeError\)'),
    ('info/00000000', {'grids': [[[1, 2, 3], 'here']]}, r"info/00000000 has no 'grids' of its 'shape'"),
    ('info/00000001', {'shape': [math.inf, 4, 4, 4]}, r"info/00000001 has no 'grids' of its 'shape'"),
    ('info/00000001', {'shape': [2, 4, 4, 4]}, r"info/00000001 has no 'grids' of its 'shape'")], ids=str)
def test_facts_of_another_kind_are_one_line(packed, tmp_path, record, change, words):
    records = records_of(packed)
    facts = json.loads(records[record.encode()][9:]) | change
    records[record.encode()] = seal(record.encode(), facts)
    with pytest.raises(UserError, match=words):
        load(write_lmdb(tmp_path / 'odd.lmdb', records), tmp_path)
