"""Volumes: NIfTI files written here with known affines, as a model sees them and back on their own grid."""

import gzip
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from pytest import approx

from datasets import DataConfig, load_data, stand_in
from readers.batches import train_batches
from readers.volumes.nifti import Grid, entry_grids, read_nifti, to_input_grid
from readers.volumes.subjects import owner
from utils import UserError


def save(path, values, affine=None, placed=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(values), np.eye(4) if affine is None else affine)
    if not placed:
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    nib.save(image, path)
    return path


def noise(shape=(6, 7, 8), seed=0):
    return np.random.default_rng(seed).uniform(1, 100, shape).astype(np.float32)


FLAT = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])     # a volume without thickness


def linear(grid):
    """A function of the place in mm, at each voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing='ij'))
    place = np.tensordot(grid.affine[:3, :3], index, 1) + grid.affine[:3, 3, None, None, None]
    return (200 + 1.0 * place[0] - 2.0 * place[1] + 0.5 * place[2]).astype(np.float32)


def oriented(codes, shape=(4, 5, 6), mm=(1.0, 2.0, 3.0)):
    """An affine whose axes run as the letters say."""
    turn = nib.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (to, sign) in enumerate(turn):
        affine[int(to), axis] = sign * mm[axis]
    affine[:, 3] = (10, -20, 30, 1)
    return affine


@pytest.fixture
def config(tmp_path):
    return DataConfig(dataset='brain', data=str(tmp_path / 'data'), cache_dir=str(tmp_path / 'cache'),
                      val_fraction=0, test_fraction=0, pad_multiple=1, percentiles=(0.0, 100.0),
                      num_x_bits=16)


def fails(config, words):
    with pytest.raises(UserError, match=words) as error:
        load_data(config() if callable(config) else config)
    assert '\n' not in str(error.value)


def said(data, words):
    return any(words in line for line in data.report)


# ------------------------------------------------------------------------------------------------------ grids

@pytest.mark.parametrize('codes', ['RAS', 'LPS', 'ASL'])
@pytest.mark.parametrize('shape', [(), (3, 9, 6), (8, 4, 12)])
def test_what_the_model_sees_returns_to_the_grid_of_the_file(codes, shape, config, tmp_path):
    """Turned, cut and padded and back: every voxel that the model saw has its own value again, others 0."""
    values = noise((4, 5, 6))
    path = save(tmp_path / 'data' / 'a.nii.gz', values, oriented(codes, mm=(2.0, 2.0, 2.0)))
    data = load_data(replace(config, volume_shape=shape))
    entry, x = data.train.entries[0], data.train.items([0]).x[0, 0]
    image = to_input_grid(x, *entry_grids(entry))
    nib.save(image, tmp_path / 'map.nii.gz')
    back, file = nib.load(tmp_path / 'map.nii.gz'), nib.load(path)
    assert back.shape == file.shape and back.affine == approx(file.affine)
    seen = back.get_fdata() > 1e-6
    inside = [min(a, b) for a, b in zip(shape or (9, 9, 9), read_nifti(path).grid.shape, strict=True)]
    assert seen.sum() == approx(np.prod(inside), abs=1)                     # the darkest voxel is 0 itself
    low, high = (f(values) for f in (np.min, np.max)) if np.prod(inside) == values.size else \
        (f(values[seen]) for f in (np.min, np.max))
    if np.prod(inside) == values.size:
        np.testing.assert_allclose(back.get_fdata(), (values - low) / (high - low), atol=1e-4)
    else:
        assert np.corrcoef(back.get_fdata()[seen], values[seen])[0, 1] == approx(1, abs=1e-3)


def test_a_map_at_another_spacing_keeps_its_place(config, tmp_path):
    grid = Grid((13, 13, 13), oriented('RAS', mm=(1.0, 1.0, 1.0)))
    save(tmp_path / 'data' / 'a.nii', linear(grid), grid.affine)
    data = load_data(replace(config, spacing=2.0))
    model, own = entry_grids(data.train.entries[0])
    assert data.shape == (1, 7, 7, 7) and model.spacing == approx(2) and own.spacing == approx(1)
    back = to_input_grid(linear(model), model, own).get_fdata()
    np.testing.assert_allclose(back, linear(own), atol=1e-3)


# ---------------------------------------------------------------------------------------------------- pixels

def test_percentiles_become_black_and_white(config, tmp_path):
    values = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10).astype(np.float32)
    save(tmp_path / 'data' / 'a.nii.gz', values)
    x = load_data(replace(config, percentiles=(10.0, 90.0))).train.items([0]).x[0, 0].numpy()
    # of 0 to 999 the percentiles lie at 99.9 and 899.1
    np.testing.assert_allclose(x, np.clip((values - 99.9) / 799.2, 0, 1), atol=1 / 65535)
    eight = load_data(replace(config, percentiles=(10.0, 90.0), num_x_bits=8)).train.items([0]).x[0, 0]
    assert len(eight.unique()) <= 256 and np.abs(eight.numpy() - x).max() <= 0.5 / 255 + 1e-4


def test_air_is_the_darkest_value_not_zero(config, tmp_path):
    values = noise((4, 4, 4)) - 1000
    save(tmp_path / 'data' / 'ct.nii', values)
    x = load_data(replace(config, volume_shape=(6, 6, 6))).train.items([0]).x[0, 0]
    assert (x[0] == 0).all() and x.max() == 1 and (x == 0).sum() == 216 - 64 + 1


def test_voxels_that_are_not_finite_become_zero_and_are_said(config, tmp_path):
    values = noise()
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    save(tmp_path / 'data' / 'a.nii.gz', values)
    data = load_data(config)
    x = data.train.items([0]).x[0, 0]
    assert x[0, 0, 0] == x[1, 1, 1] == 0 and x.isfinite().all() and (x == 0).sum() == 2
    assert said(data, '1 subject had voxels that were not finite: they are 0: a')


def test_mirror_images_are_mirrored_left_to_right(config, tmp_path):
    for i in range(4):
        save(tmp_path / 'data' / f'{i}.nii', noise(seed=i))
    part = load_data(replace(config, flip='on')).train
    plain = part.items(range(4)).x
    mirrored = [torch.equal(part.items(range(4), draw).x[i], plain[i].flip(1))
                for draw in range(1, 6) for i in range(4)]
    same = [torch.equal(part.items(range(4), draw).x[i], plain[i]) for draw in range(1, 6) for i in range(4)]
    assert 0 < sum(mirrored) < 20 and sum(mirrored) + sum(same) == 20


def test_augmented_batches_are_a_function_of_epoch_and_id_and_evaluation_is_not_augmented(config, tmp_path):
    for i in range(4):
        save(tmp_path / 'data' / f'{i}.nii', noise(seed=i))
    plain, part = load_data(config).train, load_data(replace(config, augment=True)).train
    assert torch.equal(part.items(range(4)).x, plain.items(range(4)).x)
    many = torch.cat([part.items(range(4), draw).x for draw in range(1, 9)])
    changed = (many != plain.items(range(4)).x.repeat(8, 1, 1, 1, 1)).flatten(1).any(1)
    assert 4 < changed.sum() < 32 and many.min() >= 0 and many.max() <= 1       # 1 - .9^7 = .52 of them
    assert torch.equal(part.items([2, 0], 5).x, part.items(range(4), 5).x[[2, 0]])


# ---------------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize('path, found', [
    ('s1.nii.gz', ('s1', '')), ('t1/s1.nii.gz', ('s1', 't1')), ('s1/T1.nii', ('s1', 't1')),
    ('s1/s1_t1.nii.gz', ('s1/s1', 't1')), ('ill/t1/s1.nii.gz', ('ill/s1', 't1')),
    ('sub-01/anat/sub-01_FLAIR.nii.gz', ('sub-01/anat/sub-01', 'flair')),
    ('s1_t1ce.nii', ('s1_t1ce', '')), ('t1_labels/s1.nii', ('t1_labels/s1', ''))])
def test_whose_file_it_is(path, found):
    assert owner(path, ['t1', 'flair']) == found


def test_channels_come_from_different_grids_to_that_of_the_first(config, tmp_path):
    first = Grid((8, 9, 10), oriented('RAS', mm=(2.0, 2.0, 2.0)))
    second = Grid((40, 40, 50), oriented('LPS', mm=(1.0, 1.0, 1.0)))
    second.affine[:3, 3] = (30, 0, 20)
    save(tmp_path / 'data' / 't1' / 's.nii.gz', linear(first), first.affine)
    save(tmp_path / 'data' / 'flair' / 's.nii.gz', linear(second), second.affine)
    save(tmp_path / 'data' / 'other' / 'x.nii.gz', noise())
    data = load_data(replace(config, modalities=('t1', 'flair')))
    assert data.shape == (2, 8, 9, 10) and [e.id for e in data.train.entries] == ['s']
    t1, flair = data.train.items([0]).x[0]
    inner = (slice(1, -1),) * 3
    assert np.corrcoef(t1[inner].ravel(), flair[inner].ravel())[0, 1] == approx(1, abs=1e-4)


def test_a_label_on_a_grid_of_its_own_marks_the_same_place(config, tmp_path):
    first = oriented('RAS', mm=(2.0, 2.0, 2.0))
    own = oriented('LPS', mm=(1.0, 1.0, 1.0))
    label = np.zeros((40, 40, 40), np.uint8)
    place = first @ [3, 4, 5, 1]                                 # the voxel of the first file to be marked
    i, j, k = np.rint(np.linalg.solve(own, place)[:3] + [20, 20, 20]).astype(int)
    own[:3, 3] += own[:3, :3] @ [-20, -20, -20]
    label[i, j, k] = 1
    save(tmp_path / 'data' / 's.nii', noise((8, 9, 10)), first)
    save(tmp_path / 'data' / 's_label.nii', label, own)
    save(tmp_path / 'data' / 'n.nii', noise((8, 9, 10), seed=1), first)
    mask = load_data(config).test.items([0]).mask[0, 0]
    assert mask.sum() == 1 and mask[3, 4, 5]


def test_channels_along_a_further_axis(config, tmp_path):
    values = noise((4, 5, 6, 1, 2))
    save(tmp_path / 'data' / 'both.nii.gz', values)
    x = load_data(replace(config, modalities=('T1', 'T2'))).train.items([0]).x[0]
    for channel in range(2):
        own = values[..., 0, channel]
        np.testing.assert_allclose(x[channel], (own - own.min()) / (own.max() - own.min()), atol=1e-4)
    fails(config, 'both has 2 channels, 1 expected: as many as --modalities names')


def test_a_further_axis_of_one_is_nothing(config, tmp_path):
    values = noise((4, 5, 6))
    save(tmp_path / 'data' / 'a.nii.gz', values[..., None])
    save(tmp_path / 'data' / 'b.nii.gz', values * 2)
    x = load_data(config).train.items([0, 1]).x
    assert x.shape == (2, 1, 4, 5, 6) and torch.allclose(x[0], x[1], atol=1e-4)


def test_class_folders_labels_and_masks(config, tmp_path):
    for i in range(3):
        save(tmp_path / 'data' / 'Normal' / f'n{i}.nii.gz', noise(seed=i))
    label = np.zeros((6, 7, 8), np.uint8)
    label[1, 2, 3] = 4
    save(tmp_path / 'data' / 'tumour' / 't.nii.gz', noise(seed=9))
    save(tmp_path / 'data' / 'tumour' / 't_label.nii.gz', label)
    save(tmp_path / 'data' / 'stroke' / 's.nii.gz', noise(seed=10))
    data = load_data(config)
    assert (data.normal_classes, data.anomalous_classes) == (('Normal',), ('stroke', 'tumour'))
    assert [e.id for e in data.test.entries] == ['stroke/s', 'tumour/t'] and len(data.train) == 3
    assert [e.has_mask for e in data.test.entries] == [False, True]
    mask = data.test.items([0, 1]).mask
    assert mask.sum() == 1 and mask[1, 0, 1, 2, 3]
    data = load_data(replace(config, anomalous_classes=('stroke',)))
    assert [e.id for e in data.test.entries] == ['stroke/s']


def test_without_class_folders_the_labelled_lesion_decides(config, tmp_path):
    for i, voxels in enumerate((0, 1, 5, 30)):
        label = np.zeros(6 * 7 * 8, np.uint8)
        label[:voxels] = 1
        save(tmp_path / 'data' / 't1' / f's{i}.nii.gz', noise(seed=i), np.diag([10, 10, 10, 1]))
        save(tmp_path / 'data' / 'wmh' / f's{i}.nii.gz', label.reshape(6, 7, 8), np.diag([10, 10, 10, 1]))
    save(tmp_path / 'data' / 't1' / 's9.nii.gz', noise(seed=9), np.diag([10, 10, 10, 1]))
    config = replace(config, modalities=('t1',), labels='wmh')
    data = load_data(config)
    assert [e.id for e in data.train.entries] == ['s0', 's9'] and data.anomalous_classes == ('lesion',)
    assert said(data, '1 subject without a file of wmh count as without lesion: s9')
    data = load_data(replace(config, lesion_load=5.0))                       # a voxel is 1 ml
    assert [e.id for e in data.train.entries] == ['s0', 's1', 's2', 's9']
    assert [e.id for e in data.test.entries] == ['s3'] and data.test.items([0]).mask.sum() == 30
    assert data.train.items(range(4)).mask.flatten(1).sum(1).tolist() == [0, 1, 5, 0]    # they stay known
    fails(replace(config, labels='nothing'), '--labels nothing: no subject')


def test_key_files_name_parts_and_classes(config, tmp_path):
    for i in range(8):
        save(tmp_path / 'data' / f's{i}.nii.gz', noise(seed=i))
    keys = tmp_path / 'keys'
    keys.mkdir()
    files = {'ABCD-train': 's0\ns1.nii.gz\n\n', 'ABCD-val': 's2', 'test': 's3\n', 'tumour': 's4\ns5'}
    for name, lines in files.items():
        (keys / f'{name}_keys.txt').write_text(lines)
    config = replace(config, key_files=str(keys), val_fraction=-1.0, test_fraction=-1.0)
    data = load_data(config)
    parts = {part: [e.id for e in getattr(data, part).entries] for part in ('train', 'val', 'test')}
    assert parts == {'train': ['s0', 's1'], 'val': ['s2'], 'test': ['s3', 's4', 's5']}
    assert data.test.labels.tolist() == [0, 1, 1] and data.anomalous_classes == ('tumour',)
    assert said(data, 'left out: 2 subjects that no key file')
    again = load_data(config, data.split)
    assert [e.id for e in again.val.entries] == ['s2']
    (keys / 'tumour_keys.txt').write_text('s4\ns0')
    fails(config, "tumour_keys.txt names 's0', and so does .*ABCD-train_keys.txt")
    (keys / 'tumour_keys.txt').write_text('s77')
    fails(config, "tumour_keys.txt names 's77', which no subject has")


def test_a_class_that_a_key_file_names_stays_and_labels_decide_of_the_others(config, tmp_path):
    for i in range(5):
        label = np.zeros((6, 7, 8), np.uint8)
        label[0, 0, 0] = i >= 2
        save(tmp_path / 'data' / f's{i}.nii', noise(seed=i))
        save(tmp_path / 'data' / f's{i}_label.nii', label)
    (tmp_path / 'data' / 'all-train_keys.txt').write_text('s0\ns1\ns2\n')
    (tmp_path / 'data' / 'tumour_keys.txt').write_text('s3\ns4\n')
    data = load_data(config)
    assert [e.id for e in data.train.entries] == ['s0', 's1']
    assert {e.id: e.class_name for e in data.test.entries} == {'s2': 'lesion', 's3': 'tumour', 's4': 'tumour'}


def test_scans_of_one_patient_stay_together(config, tmp_path):
    for i in range(12):
        save(tmp_path / 'data' / f'p{i // 3}_{i % 3}.nii', noise(seed=i))
    data = load_data(replace(config, patient_pattern=r'^(p\d)_', val_fraction=0.25, test_fraction=0.25))
    parts = {f['id']: f['part'] for f in data.split['files']}
    assert len({(i[:2], part) for i, part in parts.items()}) == 4
    assert sorted(parts.values()) == ['test'] * 3 + ['train'] * 6 + ['val'] * 3


# ------------------------------------------------------------------------------------------------ body masks

def test_a_body_mask_blackens_and_cuts_off_what_is_outside(config, tmp_path):
    values, mask = noise((9, 9, 9)), np.zeros((9, 9, 9), np.uint8)
    mask[2:6, 3:8, 1:4] = 3
    mask[3, 4, 2] = 0
    save(tmp_path / 'data' / 't1' / 's.nii.gz', values)
    save(tmp_path / 'data' / 'brain' / 's.nii.gz', mask)
    x = load_data(replace(config, modalities=('t1',), volume_mask='brain')).train.items([0]).x[0, 0]
    assert x.shape == (4, 5, 3) and x[1, 1, 1] == 0
    kept = np.where(mask, values, values.min())[2:6, 3:8, 1:4]
    np.testing.assert_allclose(x, (kept - kept.min()) / (kept.max() - kept.min()), atol=1e-4)
    save(tmp_path / 'data' / 'brain' / 's.nii.gz', mask * 0)
    fails(replace(config, modalities=('t1',), volume_mask='brain'), 's has an empty body mask')
    fails(replace(config, modalities=('t1',), volume_mask='other'),
          'no subject in .*: s has no file of other')


# ----------------------------------------------------------------------------------------------------- errors

def damaged(path, kind):
    save(path, noise((4, 5, 6)))
    whole = path.read_bytes()
    path.write_bytes({'cut': whole[:-60], 'empty': b'', 'other': b'\x89PNG' + bytes(600),
                      'crc': whole[:-8] + bytes(4) + whole[-4:],
                      'cut inside': gzip.compress(gzip.decompress(whole)[:-100])}[kind])


@pytest.mark.parametrize('kind, words', [
    ('cut', 'is cut off or damaged'), ('empty', 'is empty'), ('other', 'is not a NIfTI file'),
    ('crc', 'is cut off or damaged'), ('cut inside', 'cannot be decoded')])
def test_a_damaged_file_is_named_and_can_be_left_out(kind, words, config, tmp_path):
    for i in range(3):
        save(tmp_path / 'data' / f's{i}.nii.gz', noise((4, 5, 6), seed=i))
    damaged(tmp_path / 'data' / 'bad.nii.gz', kind)
    fails(config, rf'1 subject of 4 cannot be used: bad has a file bad.nii.gz that {words}')
    data = load_data(replace(config, skip_corrupt=True))
    assert len(data.train) == 3 and said(data, 'left out: bad')


@pytest.mark.parametrize('values, affine, words', [
    (noise((4, 5)), None, r'has the shape \(4, 5\)'), (noise((4, 5, 6, 2, 2)), None, 'expected'),
    (noise((4, 5, 6)), FLAT, 'singular affine'), (np.ones((4, 5, 6), 'f4'), None, 'the same value'),
    (noise((4, 5, 6)).astype(np.complex64), None, 'voxels of type complex64')])
def test_volumes_that_make_no_sense(values, affine, words, config, tmp_path):
    save(tmp_path / 'data' / 'bad.nii.gz', values, affine)
    fails(config, words)


def test_a_file_without_a_place_is_said_and_takes_that_of_its_first_channel(config, tmp_path):
    values, affine = noise(), oriented('LPS')
    save(tmp_path / 'data' / 't1' / 's.nii.gz', values, affine)
    save(tmp_path / 'data' / 't2' / 's.nii.gz', values, affine, placed=False)
    data = load_data(replace(config, modalities=('t1', 't2')))
    x = data.train.items([0]).x[0]
    assert torch.equal(x[0], x[1]) and not said(data, 'without a place')
    save(tmp_path / 'data' / 't1' / 's.nii.gz', values, placed=False)
    data = load_data(replace(config, modalities=('t1', 't2')))
    assert said(data, '1 subject without a place in mm (neither sform nor qform)')


def test_sizes_and_spacings_that_differ(config, tmp_path):
    save(tmp_path / 'data' / 'a.nii.gz', noise((6, 7, 8)))
    save(tmp_path / 'data' / 'b.nii.gz', noise((5, 9, 8)))
    data = load_data(replace(config, pad_multiple=4))
    assert data.shape == (1, 8, 12, 8) and said(data, '8 x 12 x 8 voxels')
    x = data.train.items([0]).x[0, 0]                            # 6 x 7 x 8 in the middle
    assert (x[0] == 0).all() and (x[7] == 0).all() and (x[:, :2] == 0).all() and (x[:, 10:] == 0).all()
    assert x[1:7, 3:10].flatten(1).any(1).all()
    data = load_data(replace(config, volume_shape=(6, 6, 8)))
    assert data.shape == (1, 6, 6, 8)
    assert said(data, '2 subjects larger than the model sees lose their ends: a; b')
    assert load_data(replace(config, image_size=8)).shape == (1, 8, 8, 8)
    save(tmp_path / 'data' / 'c.nii.gz', noise(), np.diag([2, 1, 1, 1]))
    fails(config, r'different sizes in mm \(a 1 x 1 x 1, c 2 x 1 x 1\): give one with --spacing')
    assert load_data(replace(config, spacing=1.0)).shape == (1, 11, 9, 8)


def test_cropping(config, tmp_path):
    values = noise((6, 7, 8))
    save(tmp_path / 'data' / 'a.nii.gz', values[::-1], np.diag([-1, 1, 1, 1]))
    x = load_data(replace(config, crop=(1, 2, 3, 5, 7, 99))).train.items([0]).x[0, 0].numpy()
    kept = values[1:5, 2:7, 3:]
    np.testing.assert_allclose(x, (kept - kept.min()) / (kept.max() - kept.min()), atol=1e-4)
    fails(replace(config, crop=(6, 0, 0, 9, 9, 9)), 'none of them in --crop')


@pytest.mark.parametrize('flags, words', [
    ({'percentiles': (5.0, 5.0)}, '--percentiles 5.0 5.0'), ({'pad_multiple': 0}, '--pad_multiple'),
    ({'spacing': -1.0}, '--spacing -1.0: it must be at least 0'), ({'spacing': float('nan')}, '--spacing'),
    ({'volume_shape': (4, 4, 4), 'image_size': 4}, 'both say how large'),
    ({'crop': (0, 0, 5, 4, 4, 4)}, '--crop'), ({'num_phantoms': 9}, '--num_phantoms: it does nothing'),
    ({'channels': 1}, '--channels: it does nothing'), ({'fit': 'crop'}, '--fit: it does nothing'),
    ({'data': ''}, '--data is missing. Expected NIfTI'), ({'data': '/nowhere'}, 'does not exist'),
    ({'dataset': 'folder', 'spacing': 2.0}, '--spacing: it does nothing for --dataset folder'),
    ({'modalities': ('flair',)}, 'no .nii, .* file of flair: found t1'),
    ({'modalities': ('flair', 't2')}, 't1/a lies in'),
    ({'key_files': '/nowhere', 'modalities': ('t1',)}, '--key_files /nowhere: there is no file')])
def test_flags_that_make_no_sense(flags, words, config, tmp_path):
    save(tmp_path / 'data' / 't1' / 'a.nii.gz', noise())
    fails(lambda: replace(config, **flags), words)


def test_folders_that_are_no_classes_ask_for_modalities(config, tmp_path):
    for folder in ('t1', 'flair'):
        save(tmp_path / 'data' / folder / 'a.nii.gz', noise())
    fails(config, 'flair/a lies in a folder of a channel or a subject: name the channels with --modalities')
    (tmp_path / 'empty').mkdir()
    fails(replace(config, data=str(tmp_path / 'empty')), 'holds no .nii, .* file of a volume')
    save(tmp_path / 'data' / 't1' / 'b.nii.gz', noise())
    fails(replace(config, modalities=('t1', 'flair')), 'b has no file of flair')


def test_without_nibabel_one_line_says_what_to_install(config, tmp_path, monkeypatch):
    save(tmp_path / 'data' / 'a.nii.gz', noise())
    monkeypatch.setitem(sys.modules, 'nibabel', None)
    fails(config, 'pip install -r requirements-medical.txt')


# ----------------------------------------------------------------------------------------------- as elsewhere

def test_the_cache_gives_the_same_and_batches_have_their_shape(config, tmp_path):
    for i in range(5):
        save(tmp_path / 'data' / f'{i}.nii.gz', noise(seed=i))
    first, again = load_data(config), load_data(config)
    assert first.train.entries[3].grids and [list(g) for g in first.train.entries[3].grids] == \
        [list(g) for g in again.train.entries[3].grids]
    assert torch.equal(first.train.items(range(5)).x, again.train.items(range(5)).x)
    batch = next(train_batches(again.train, 5, seed=0))
    assert batch.x.shape == (5, 1, 6, 7, 8) and batch.x.dtype == torch.float32
    inverted = load_data(replace(config, invert=True)).train.items([1]).x
    assert torch.allclose(inverted, 1 - first.train.items([1]).x)


def test_equal_volumes_are_found_across_parts(config, tmp_path):
    for i in range(4):
        save(tmp_path / 'data' / f'{i}.nii.gz', noise((20, 20, 20), seed=i))
    save(tmp_path / 'data' / 'twin.nii.gz', noise((20, 20, 20)) * 3 + 1)
    data = load_data(replace(config, test_fraction=0.4))
    found = [(d['kind'], *sorted(d['ids'])) for d in data.split['duplicates']]
    assert found in ([], [('near', '0', 'twin')])
    parts = {f['id']: f['part'] for f in data.split['files']}
    assert bool(found) == (parts['0'] != parts['twin'])


def test_a_dry_run_needs_a_shape(tmp_path):
    config = DataConfig(dataset='brain', volume_shape=(16, 24, 8), modalities=('t1', 't2'))
    assert stand_in(config, 2).train.items([0, 1]).x.shape == (2, 2, 16, 24, 8)
    assert stand_in(DataConfig(dataset='brain_phantom'), 1).shape == (2, 64, 64, 64)
    with pytest.raises(UserError, match='--volume_shape'):
        stand_in(DataConfig(dataset='brain'), 2)
