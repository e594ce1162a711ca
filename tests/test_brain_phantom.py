"""The synthetic brains: repeatable, with exact masks, and read by the reader of real volumes."""

import numpy as np
import pytest
from pytest import approx
from scipy.ndimage import binary_dilation, label

from datasets import DataConfig, load_data
from phantoms.brain import (
    HYPERINTENSITIES,
    NORMAL,
    TUMOUR,
    WIDTH,
    draw_head,
    pushed,
    render,
    write_brain_phantoms,
)
from utils import UserError

SIZE = 32
T1, FLAIR = 0, 1


def place(n=SIZE):
    """p (3, N, N, N): the coordinates of a head that is neither turned nor warped."""
    axis = (np.arange(n, dtype=np.float32) + 0.5) * np.float32(WIDTH / n) - np.float32(WIDTH / 2)
    return np.stack(np.meshgrid(axis, axis, axis, indexing='ij'))


@pytest.fixture(scope='module')
def ill():
    """{class: three phantoms as (with lesion (2, N, N, N), without, mask)}."""
    return {c: [(*render(0, c, i, SIZE)[:1], render(0, c, i, SIZE, lesion=False)[0], render(0, c, i, SIZE)[1])
                for i in range(3)] for c in (HYPERINTENSITIES, TUMOUR)}


def test_a_phantom_is_a_function_of_seed_class_and_index():
    again, mask = render(0, NORMAL, 3, SIZE)
    assert np.array_equal(render(0, NORMAL, 3, SIZE)[0], again) and not mask.any()
    assert again.shape == (2, SIZE, SIZE, SIZE) and again.dtype == np.float32
    assert again.min() >= 0 and again.max() <= 1
    for other in ((1, NORMAL, 3), (0, NORMAL, 4), (0, TUMOUR, 3)):
        assert not np.array_equal(render(*other, SIZE)[0], again)


def test_a_head_has_its_tissues_where_they_belong():
    shares = draw_head(place(), np.random.default_rng(0))
    total = sum(shares.values())
    assert total.min() >= 0 and total.max() == approx(1, abs=1e-5)
    assert total[:2].max() == 0                                              # air at the side
    at = lambda x, y, z: tuple(int((v + WIDTH / 2) / WIDTH * SIZE) for v in (x, y, z))
    for tissue, where in {'white': (32, -20, 25), 'nuclei': (26, 3, 2), 'fluid': (31, 70, -26)}.items():
        assert shares[tissue][at(*where)] > 0.5, tissue
    volume = {name: share.sum() * (WIDTH / SIZE) ** 3 / 1000 for name, share in shares.items()}      # ml
    assert 300 < volume['grey'] < 1000 and 300 < volume['white'] < 900
    assert shares['lesion'].sum() == shares['core'].sum() == shares['oedema'].sum() == 0


@pytest.mark.parametrize('kind', [HYPERINTENSITIES, TUMOUR])
def test_lesions_are_bright_in_flair_and_dark_in_t1(ill, kind):
    for image, healthy, mask in ill[kind]:
        change = image - healthy
        assert 0 < mask.mean() < 0.1
        assert change[FLAIR][mask].mean() > 0.08 > 0 > change[T1][mask].mean()


def test_hyperintensities_change_nothing_but_their_spots(ill):
    for image, healthy, mask in ill[HYPERINTENSITIES]:
        beyond = ~binary_dilation(mask, iterations=4)            # a soft edge and blur reach the neighbours
        change = np.abs(image - healthy)
        assert change[:, mask].mean() > 20 * change[:, beyond].mean()


def test_a_tumour_is_one_piece_and_pushes_its_surroundings_aside(ill):
    for image, healthy, mask in ill[TUMOUR]:
        assert np.bincount(label(mask)[0].ravel())[1:].max() > 0.9 * mask.sum()
        change, near = np.abs(image - healthy)[T1], binary_dilation(mask, iterations=3)
        beside = near & ~binary_dilation(mask)                   # not in the mask, and yet it moved
        assert change[beside].mean() > max(0.002, 10 * change[~near].mean())


def test_a_mass_keeps_the_volume_of_what_it_pushes():
    """A shell of tissue between r and r' before lies where r^3 + g^3 is afterwards, g the radius grown."""
    p, centre, radius = place(64), np.array([20, 0, 10], np.float32), 12.0
    moved = pushed(p, centre, radius)
    before, after = (np.sqrt(((q - centre[:, None, None, None]) ** 2).sum(0)) for q in (moved, p))
    deep = (after > 0.85 * radius + 1) & (after < 25)            # where the effect does not fade yet
    np.testing.assert_allclose((before ** 3 + (0.85 * radius) ** 3)[deep], (after ** 3)[deep], rtol=0.35)
    assert np.abs(moved - p)[:, 0].max() == 0                    # the skull stays


def test_no_trivial_feature_of_a_modality_separates_the_classes():
    """Means of 12 and 12 volumes: 1.5 standard deviations apart would be 3.7 standard errors."""
    normal = [render(0, NORMAL, i, 24)[0] for i in range(12)]
    small = [render(0, HYPERINTENSITIES, i, 24)[0] for i in range(12)]
    for feature in (np.mean, np.std, np.median):
        a, b = (np.array([feature(x[T1]) for x in images]) for images in (normal, small))
        assert abs(a.mean() - b.mean()) < 1.5 * np.sqrt((a.var() + b.var()) / 2)


def test_a_written_set_walks_the_reader_of_real_volumes(tmp_path):
    root = write_brain_phantoms(tmp_path / 'data', 6, size=SIZE)
    before = {p: p.read_bytes() for p in root.rglob('*.nii.gz')}
    assert len(before) == 6 * 2 + 2 * 3 and 'SYNTHETIC' in (root / 'README.txt').read_text()
    (root / 'finished.json').unlink()
    (root / NORMAL / 't1' / 'normal-00002.nii.gz').unlink()
    assert write_brain_phantoms(tmp_path / 'data', 6, size=SIZE) == root
    assert {p: p.read_bytes() for p in root.rglob('*.nii.gz')} == before
    data = load_data(DataConfig(dataset='brain', data=str(root), modalities=('t1', 'flair'), labels='lesions',
                                cache_dir=str(tmp_path / 'c')))
    assert data.shape == (2, 32, 32, 32)
    assert (data.normal_classes, data.anomalous_classes) == ((NORMAL,), (HYPERINTENSITIES, TUMOUR))
    assert (len(data.train), len(data.val), len(data.test)) == (4, 1, 1 + 2)
    batch = data.test.items(range(3))
    assert (batch.mask.flatten(1).any(1) == batch.y.bool()).all()
    assert data.split['duplicates'] == []


def test_a_number_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match='--num_phantoms 0: expected 1 or more'):
        write_brain_phantoms(tmp_path, 0)
