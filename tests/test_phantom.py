"""The synthetic chest phantom: repeatable, with true masks, and without a short cut that separates its
classes.
"""

import io

import numpy as np
import pytest
from PIL import Image
from pytest import approx
from sklearn.metrics import roc_auc_score

from datasets import DataConfig, load_data
from phantoms.chest import MASK_THRESHOLD, NORMAL, OPACITY, render, write_phantoms
from utils import UserError

COUNT = 80          # of each class: the standard error of an AUROC of 0.5 is 0.046


@pytest.fixture(scope='module')
def phantoms():
    """{class: images (COUNT, 128, 128)} and the masks of the ill ones."""
    drawn = {c: [render(0, c, i) for i in range(COUNT)] for c in (NORMAL, OPACITY)}
    images = {c: np.stack([image for image, _ in d]) for c, d in drawn.items()}
    return images, np.stack([mask for _, mask in drawn[OPACITY]])


def png_bytes(image):
    file = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(file, 'PNG')
    return file.tell()


def border(image):
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).mean()


def auroc(feature, images):
    values = [feature(x) for c in (NORMAL, OPACITY) for x in images[c]]
    return roc_auc_score([0] * COUNT + [1] * COUNT, values)


@pytest.mark.parametrize('feature', [np.mean, np.std, np.median, png_bytes, border], ids=lambda f: f.__name__)
def test_no_trivial_feature_separates_the_classes(phantoms, feature):
    assert 0.25 < auroc(feature, phantoms[0]) < 0.75


def test_file_size_and_border_are_the_same_for_both_classes(phantoms):
    for feature in (png_bytes, border):
        assert auroc(feature, phantoms[0]) == approx(0.5, abs=0.15)


def test_an_opacity_brightens_where_its_mask_is_and_little_elsewhere():
    for i in range(5):
        ill, mask = render(0, OPACITY, i)
        healthy, nothing = render(0, OPACITY, i, opacity=False)
        added = ill - healthy
        assert not nothing.any() and mask.any()
        assert added[mask].mean() > MASK_THRESHOLD
        assert added[~mask].max() < MASK_THRESHOLD + 0.02      # noise is a little weaker where it is brighter
        assert added[~mask].mean() < MASK_THRESHOLD / 4


def test_opacities_are_in_both_lungs_and_mostly_low(phantoms):
    where = phantoms[1].mean(0)                                 # (128, 128)
    left, right = where[:, :64].sum(), where[:, 64:].sum()
    assert 0.6 < left / right < 1.7
    assert where[64:].sum() > where[:64].sum()
    assert (phantoms[1][:, :, :64].any((1, 2)) & phantoms[1][:, :, 64:].any((1, 2))).mean() > 0.9


def test_a_phantom_is_a_function_of_seed_class_and_index():
    again = render(0, NORMAL, 3)[0]
    assert np.array_equal(render(0, NORMAL, 3)[0], again)
    for other in ((1, NORMAL, 3), (0, NORMAL, 4), (0, OPACITY, 3)):
        assert not np.array_equal(render(*other)[0], again)


def test_a_killed_generation_goes_on_and_a_finished_one_is_kept(tmp_path):
    root = write_phantoms(tmp_path, 3, 2)
    before = {p: p.read_bytes() for p in root.rglob('*.png')}
    assert len(before) == 3 + 2 + 2
    assert 'SYNTHETIC' in (root / 'README.txt').read_text()
    (root / 'finished.json').unlink()
    (root / NORMAL / 'images' / 'Normal-00002.png').unlink()
    kept = root / NORMAL / 'images' / 'Normal-00000.png'
    changed = kept.stat().st_mtime_ns
    assert write_phantoms(tmp_path, 3, 2) == root
    assert {p: p.read_bytes() for p in root.rglob('*.png')} == before
    assert kept.stat().st_mtime_ns == changed
    assert write_phantoms(tmp_path, 4, 2) != root


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='name another folder with --data'):
        write_phantoms(tmp_path / 'file', 2)


def test_the_demo_walks_the_reader_of_real_data(tmp_path):
    data = load_data(DataConfig(dataset='phantom', data=str(tmp_path / 'p'), num_phantoms=12,
                                cache_dir=str(tmp_path / 'c')))
    assert data.shape == (1, 64, 64)
    assert (data.normal_classes, data.anomalous_classes) == ((NORMAL,), (OPACITY,))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 2 + 3)
    batch = data.test.items(range(5))
    assert (batch.mask.flatten(1).any(1) == batch.y.bool()).all()
    assert data.split['duplicates'] == []
