"""Patches cut from volumes: what they hold, where they lie, whose they are, what training sees of them."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from pytest import approx

from datasets import DataConfig, load_data
from phantoms.brain import write_brain_phantoms
from scripts.cut_patches import PatchConfig, corners, make
from utils import UserError


def save(path, values, mm=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = (-7, 3, 20)
    nib.save(nib.Nifti1Image(values, affine), path)


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    """Ten people of 9 x 8 x 8 voxels, each ill in one voxel near a corner; the body are all but 4 columns."""
    tmp_path, rng = tmp_path_factory.mktemp('scans'), np.random.default_rng(0)
    for i in range(10):
        values = rng.uniform(10, 90 + 10 * i, (9, 8, 8)).astype(np.float32)
        lesion, body = np.zeros((9, 8, 8), np.uint8), np.ones((9, 8, 8), np.uint8)
        lesion[7, 1, 6] = 1
        body[:4, :4, 4:] = 0
        for name, volume in {'flair': values, 'lesions': lesion, 'body': body}.items():
            save(tmp_path / 'scans' / name / f'p{i}.nii.gz', volume)
    return PatchConfig(data=str(tmp_path / 'scans'), out=str(tmp_path / 'patches'), modalities=('flair',),
                       labels='lesions', volume_mask='body', size=4)


@pytest.fixture(scope='module')
def made(scans):
    make(scans)
    return scans


def as_trained(config, cache, **flags):
    """The data set of the patches, read as the script says."""
    return load_data(DataConfig(dataset='brain', data=config.out, modalities=config.modalities,
                                labels=config.labels, window=(0.0, 255.0), volume_shape=(config.size,) * 3,
                                cache_dir=str(cache), **flags))


def test_patches_lie_side_by_side_in_the_middle_or_overlap():
    assert [*corners((9, 8, 4), 4, 4)] == [(x, y, 0) for x in (0, 4) for y in (0, 4)]
    assert [*corners((10, 4, 4), 4, 4)] == [(1, 0, 0), (5, 0, 0)]
    assert [*corners((9, 4, 4), 4, 2)] == [(0, 0, 0), (2, 0, 0), (4, 0, 0)]


def test_a_person_is_in_one_part_and_only_who_is_tested_shows_lesions(made, tmp_path):
    """Of 8 patches of a person one has the lesion and one is outside of the body."""
    data = as_trained(made, tmp_path / 'cache', patient_pattern=r'(.+)_\d+_\d+_\d+$')
    people = {part: {e.patient for e in getattr(data, part).entries} for part in ('train', 'val', 'test')}
    assert [len(people[part]) for part in ('train', 'val', 'test')] == [6, 2, 2]
    assert len(set.union(*people.values())) == 10
    assert [len(data.train), len(data.val), len(data.test)] == [36, 12, 14]
    ill = [e for e in data.test.entries if e.label]
    assert sorted(e.id.split('_', 1)[1] for e in ill) == ['4_0_4', '4_0_4']
    mask = data.test.items([data.test.entries.index(ill[0])]).mask[0, 0]
    assert mask.sum() == 1 and mask[3, 1, 2] == 1


def test_a_patch_keeps_its_gray_levels_and_its_place(made, tmp_path):
    """Those of the whole volume, scaled by the percentiles of all of it."""
    parts = as_trained(made, tmp_path / 'cache')
    whole = load_data(DataConfig(dataset='brain', data=made.data, modalities=('flair',), labels='lesions',
                                 lesion_load=1, volume_mask='body', volume_shape=(9, 8, 8), val_fraction=0,
                                 test_fraction=0, cache_dir=str(tmp_path / 'cache')))
    x = {e.id: whole.train.items([i]).x[0] for i, e in enumerate(whole.train.entries)}       # (1, 9, 8, 8)
    for i, entry in enumerate(parts.train.entries):
        person, *corner = entry.id.removeprefix('normal/').split('_')
        first = [int(n) for n in corner]
        box = tuple(slice(n, n + 4) for n in first)
        assert (parts.train.items([i]).x[0, 0] == x[person][0][box]).all()
        assert nib.load(entry.path).affine[:3, 3] == approx(np.add((-7, 3, 20), first))


def test_a_lesion_that_resampling_blurs_away_makes_no_normal_patch(scans, tmp_path, capsys):
    """One voxel of 1 mm, between voxels of 3 mm: none of these is labelled, but it shines into the image."""
    make(replace(scans, spacing=3.0, size=2, volume_mask='', test_fraction=0.3, out=str(tmp_path / 'coarse')))
    said = capsys.readouterr().out
    assert 'train: 5 subjects, patches: 0 normal, 0 with lesion; left out: 0 lesion, ' in said
    assert said.count('3 beside a lesion') == 1 and said.count('2 beside a lesion') == 1


def test_phantoms_of_two_channels_in_class_folders(tmp_path):
    """Ill people are tested, healthy ones split."""
    folder = write_brain_phantoms(tmp_path, 4, size=32)
    config = PatchConfig(data=str(folder), out=str(tmp_path / 'patches'), modalities=('t1', 'flair'),
                         labels='lesions', volume_mask='auto', size=8, least_body=0.9, val_fraction=0.25)
    make(config)
    data = as_trained(config, tmp_path / 'cache')
    assert data.shape == (2, 8, 8, 8)
    trained = {e.id.split('/')[1].split('_')[0] for e in data.train.entries}
    ill = {e.id.split('/')[1].split('_')[0] for e in data.test.entries if e.label}
    assert len(trained) == 2 and all(name.startswith('normal-normal-') for name in trained)
    assert ill == {'hyperintensities-hyperintensities-00000', 'tumour-tumour-00000'}
    assert all(bool(batch.any()) == bool(e.label) for e, batch in zip(
        data.test.entries, data.test.items(range(len(data.test))).mask, strict=True))


@pytest.mark.parametrize('flags, words', [
    ({'out': ''}, '--out is missing'), ({'data': 'nowhere'}, "folder 'nowhere' does not exist"),
    ({'labels': 'tumours'}, 'no subject in .* has a file of it'), ({'window': (5, 5)}, '--window 5 5'),
    ({'window': (0, 90), 'percentiles': (0, 100)}, 'leave one out')])
def test_mistakes_are_one_line(flags, words, scans, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        make(replace(scans, **{'out': str(tmp_path / 'out'), **flags}))
    assert '\n' not in str(error.value)


def test_a_folder_is_not_written_into_twice_and_flags_are_checked(made):
    with pytest.raises(UserError, match='is there already'):
        make(made)
    with pytest.raises(UserError, match='--size 0: it must be at least 1'):
        replace(made, size=0)
    with pytest.raises(UserError, match='--least_body'):
        replace(made, least_body=1.5)
