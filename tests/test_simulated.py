"""Lesions that are put into images: known shapes, their masks, and their way into the test part by --ood."""

from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from anomaly.out_of_distribution import with_ood
from datasets import load_data
from readers.lesions import RADII, add_lesions, deform
from utils import UserError


def distance(shape):
    """From the middle, voxels: (*S)."""
    return np.sqrt(sum((axis - (n - 1) / 2) ** 2 for axis, n in zip(np.indices(shape), shape)))


@pytest.mark.parametrize('shape', [(40, 36), (24, 20, 22)])
def test_lesions_are_in_the_body_and_nowhere_else(shape):
    body = distance(shape) < 9
    x = np.stack([np.where(body, level, 0.0) for level in (0.3, 0.9)])
    nothing, sizes = np.zeros(shape, bool), []
    for seed in range(12):
        y, mask = add_lesions(x, nothing, np.ones(len(shape)), np.random.default_rng(seed))
        changed = (y != x).any(0)
        assert mask.any() and not (mask & ~body).any() and not (changed & ~body).any()
        assert changed[mask].all() and (changed & ~mask).sum() < 3 * mask.sum()          # the soft edge
        assert (np.abs(y - x)[:, mask].mean(1) > 0.1).all() and y.min() >= 0 and y.max() <= 1
        again = add_lesions(x, nothing, np.ones(len(shape)), np.random.default_rng(seed))
        assert np.array_equal(again[0], y) and np.array_equal(again[1], mask)
        sizes.append(mask.sum() / body.sum())
    assert len(set(sizes)) > 6 and max(sizes) < 4 * (1.4 * 1.6 * RADII[1]) ** len(shape)
    assert not nothing.any(), "what is given stays as it is"


def test_a_deformation_of_one_centre_pushes_everything_outwards_by_half_its_strength():
    shape, spacing = (31, 31, 31), np.full(3, 2.0)
    r, nothing = distance(shape), np.zeros(shape, bool)

    def one_centre():
        given = iter([np.zeros((2, 3)), 12.0])                 # both in the middle; 12 mm
        return SimpleNamespace(uniform=lambda *args: next(given))

    x = np.stack([np.exp(-(r - 6) ** 2 / 4) + (r < 14)]) / 2   # a shell in a ball
    moved, mask = deform(x, nothing, spacing, one_centre())
    along = moved[0, 15, 15, 15:]                              # from the middle to the right
    # the shell was at 6 voxels, so now at 6 + 6 mm / 2 mm; the ball ended at 14
    assert np.argmax(along) == 9 and along[15] > 0.4
    assert np.array_equal(mask[r != 9], (r < 9)[r != 9]), "1.5 times as far as before: up to 18 mm"
    assert moved.max() == pytest.approx(np.percentile(x, 99.9), abs=1e-6)
    _, mask = deform(x, (r > 10.5) & (r < 11.5), spacing, one_centre())
    assert np.flatnonzero(mask[15, 15, 25:]).tolist() == [14 - 10], "old lesions move too"


# ---------------------------------------------------------------------------------------------- in a data set

@pytest.fixture
def brains(config):
    return load_data(config('brain', image_size=16))


def of(data, name):
    return data.test.items([i for i, c in enumerate(data.test.class_names) if c == name])


def test_volumes_get_lesions_with_masks(brains):
    sets = ['sim=test:lesion', 'pushed=test:tumour', 'bright=test:enhanced', 'turned=test:flip']
    data = with_ood(brains, sets)
    normal, known = of(data, 'normal'), of(data, 'tumour')
    sim, pushed, bright, turned = (of(data, text.split('=')[0]) for text in sets)
    assert torch.equal(turned.x, normal.x.flip(2)), "the first axis runs from left to right"
    assert sim.id == [f'sim/{i}' for i in normal.id] and bright.id == [f'bright/{i}' for i in known.id]
    for batch in (sim, pushed):
        assert batch.mask.flatten(1).any(1).all()
        assert ((batch.x - normal.x).abs().amax(1, keepdim=True) > 0.1)[batch.mask].float().mean() > 0.3
    assert 0.5 < (sim.x == normal.x).float().mean() < 1, "the soft edges are narrow"
    assert torch.equal(bright.mask, known.mask)
    expected = torch.where(known.mask, (1.5 * known.x).clamp(max=1), known.x)
    assert torch.allclose(bright.x, expected, atol=1 / 255)
    has_mask = {e.class_name: e.has_mask for e in data.test.entries}
    assert has_mask == {'normal': True, 'tumour': True, 'sim': True, 'pushed': True, 'bright': True,
                        'turned': False}
    again = with_ood(brains, sets[:1], seed=1)
    assert torch.equal(of(with_ood(brains, sets[:1]), 'sim').x, sim.x) and not torch.equal(
        of(again, 'sim').x, sim.x)
    both = of(with_ood(brains, ['sim=test:lesion:flip']), 'sim')
    assert torch.equal(both.x, sim.x.flip(2)) and torch.equal(both.mask, sim.mask.flip(2))


def test_images_get_lesions_too(config):
    run = load_data(config('folder', image_size=32))
    data = with_ood(run, ['sim=test:lesion', 'pushed=test:tumour', 'bright=test:enhanced'])
    for name in ('sim', 'pushed', 'bright'):
        assert of(data, name).mask.flatten(1).any(1).all(), name
    assert all(e.has_mask and e.file_bytes for e in data.test.entries)


def test_volumes_of_another_folder_are_read_as_the_runs_are(brains, tmp_path):
    for name, values, mm in (('a', 1, 3), ('b', 2, 3), ('c', 1, 2)):
        folder = tmp_path / ('far' if name < 'c' else 'fine')
        (folder / 'label').mkdir(parents=True, exist_ok=True)
        volume = np.random.default_rng(values).uniform(0, 1, (12, 14, 16)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([mm, mm, mm, 1])), folder / f'{name}.nii.gz')
    label = np.zeros((12, 14, 16), np.uint8)
    label[4:7, 4:7, 4:7] = 1
    nibabel.save(nibabel.Nifti1Image(label, np.diag([3, 3, 3, 1])), tmp_path / 'far' / 'label' / 'a.nii.gz')
    far = of(with_ood(brains, [f'far={tmp_path / "far"}']), 'far')
    assert far.id == ['far/a', 'far/b'] and far.x.shape == (2, *brains.shape)
    assert far.mask.flatten(1).sum(1).tolist() == [27, 0]
    for sets, words in ((f'fine={tmp_path / "fine"}', 'voxels of 2 x 2 x 2 mm.*--spacing'),
                        (f'fine={tmp_path / "nowhere"}', '--ood fine: .*does not exist')):
        with pytest.raises(UserError, match=words) as error:
            with_ood(brains, [sets])
        assert '\n' not in str(error.value)


def test_what_cannot_be_is_one_clear_line(brains, config):
    flat = load_data(replace(brains.config, image_size=0, volume_shape=(16, 12, 16)))
    assert len(of(with_ood(flat, ['a=test:rot180']), 'a').x)
    for data, text, words in (
            (flat, 'a=test:rot90', 'rot90 makes another shape of volumes of 16 x 12 x 16'),
            (brains, 'a=/b:enhanced', 'NAME=test:enhanced'),
            (load_data(config('svhn', anomalous_classes=('3',))), 'a=test:enhanced', 'no image in test')):
        with pytest.raises(UserError, match=words) as error:
            with_ood(data, [text])
        assert '\n' not in str(error.value)
    assert len(of(with_ood(brains, ['a=test:rot90']), 'a').x)
