"""The synthetic chest phantom: repeatable, with true masks, and without a short cut that separates its
classes.
"""

import csv
import io

import numpy as np
import pytest
from PIL import Image
from pytest import approx
from sklearn.metrics import roc_auc_score

from datasets import DataConfig, load_data
from phantoms.chest import (
    CLASSES,
    CONFOUNDS,
    FAINT,
    LEAST_RISE,
    MARKED,
    NORMAL,
    VISIBILITIES,
    half_maximum,
    render,
    write_phantoms,
)
from phantoms.files import write_set
from readers.config import ConfoundConfig
from utils import UserError

COUNT = 78          # normal ones, and a third of each class with lesions: the standard error of an AUROC of
                    # 0.5 is 0.046


@pytest.fixture(scope='module')
def phantoms():
    """Images (COUNT, 128, 128) of normal phantoms, images of ones with lesions, and the masks of these."""
    normal = [render(0, NORMAL, i) for i in range(COUNT)]
    ill = [render(0, name, i) for name in VISIBILITIES for i in range(COUNT // 3)]
    return tuple(map(np.stack, ([p.image for p in normal], [p.image for p in ill], [p.mask for p in ill])))


def png_bytes(image):
    file = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(file, 'PNG')
    return file.tell()


def border(image):
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).mean()


def auroc(feature, phantoms):
    values = [feature(x) for images in phantoms[:2] for x in images]
    return roc_auc_score([0] * COUNT + [1] * COUNT, values)


@pytest.mark.parametrize('feature', [np.mean, np.std, np.median, png_bytes, border], ids=lambda f: f.__name__)
def test_no_trivial_feature_separates_the_classes(phantoms, feature):
    assert 0.25 < auroc(feature, phantoms) < 0.75


def test_file_size_and_border_are_the_same_for_all_classes(phantoms):
    for feature in (png_bytes, border):
        assert auroc(feature, phantoms) == approx(0.5, abs=0.15)


def test_masks_are_above_half_the_maximum_of_each_lesion():
    """Two cones, of heights 0.4 and 0.1 and radii 10 and 5, have masks of half their radii; a third of less
    than LEAST_RISE is no lesion.
    """
    y, x = np.mgrid[:60, :60]
    far = lambda row, column: np.hypot(y - row, x - column)
    cones = [(15, 15, 0.4, 10), (40, 40, 0.1, 5), (15, 45, 0.9 * LEAST_RISE, 8)]
    rise = np.max([height * np.clip(1 - far(r, c) / radius, 0, 1) for r, c, height, radius in cones], 0)
    assert np.array_equal(half_maximum(rise), (far(15, 15) < 5) | (far(40, 40) < 2.5))
    assert not half_maximum(np.zeros((4, 4))).any()


@pytest.mark.parametrize('name', VISIBILITIES)
def test_lesions_are_as_visible_as_their_class_says(name):
    for i in range(4):
        ill, healthy = render(0, name, i), render(0, name, i, lesions=False)
        low, high = VISIBILITIES[name]
        assert low <= ill.mean_rise <= high and not healthy.mask.any() and not healthy.rise.any()
        added = ill.image - healthy.image                # noise is a little weaker where it is brighter
        assert added[ill.mask].mean() == approx(ill.mean_rise, abs=0.005)
        assert np.abs(added - ill.rise).max() < 0.04 and added[~ill.mask].mean() < low / 3


def test_opacities_are_in_both_lungs_and_mostly_low(phantoms):
    masks = phantoms[2]
    where = masks.mean(0)                                          # (128, 128)
    left, right = where[:, :64].sum(), where[:, 64:].sum()
    assert 0.6 < left / right < 1.7
    assert where[64:].sum() > where[:64].sum()
    assert (masks[:, :, :64].any((1, 2)) & masks[:, :, 64:].any((1, 2))).mean() > 0.9


def test_a_phantom_is_a_function_of_seed_class_and_index():
    again = render(0, NORMAL, 3).image
    assert np.array_equal(render(0, NORMAL, 3).image, again)
    for other in ((1, NORMAL, 3), (0, NORMAL, 4), (0, FAINT, 3)):
        assert not np.array_equal(render(*other).image, again)


def test_a_confound_changes_only_what_it_says():
    """Normal phantoms are the same; others are brighter, or noisier, and else alike."""
    assert set(CONFOUNDS) == {'none', 'exposure', 'noise'}
    for confound in CONFOUNDS:
        ConfoundConfig(phantom_confound=confound)                  # the flag knows it
        assert np.array_equal(render(0, NORMAL, 0, confound=confound).image, render(0, NORMAL, 0).image)
    as_it_is, exposed, noisy = (render(0, MARKED, 0, lesions=False, confound=c).image for c in CONFOUNDS)
    grain = lambda image: np.diff(image, 2).std()
    assert (exposed - as_it_is).min() > -0.02 and 0.05 < np.mean(exposed - as_it_is) < 0.12
    assert grain(exposed) < 1.2 * grain(as_it_is) < grain(noisy)
    assert noisy.mean() == approx(as_it_is.mean(), abs=0.002)
    assert np.array_equal(render(0, MARKED, 0, confound='noise').mask, render(0, MARKED, 0).mask)


def test_a_killed_generation_goes_on_and_a_finished_one_is_kept(tmp_path):
    root = write_phantoms(tmp_path, 3, 1)
    before = {p: p.read_bytes() for p in (*root.rglob('*.png'), root / 'lesions.csv')}
    assert len(before) == 3 + 3 + 3 + 1
    assert 'SYNTHETIC' in (root / 'README.txt').read_text()
    for name in ('finished.json', 'lesions.csv', 'Normal/images/Normal-00002.png'):
        (root / name).unlink()
    kept = root / NORMAL / 'images' / 'Normal-00000.png'
    changed = kept.stat().st_mtime_ns
    assert write_phantoms(tmp_path, 3, 1) == root
    assert {p: p.read_bytes() for p in before} == before
    assert kept.stat().st_mtime_ns == changed
    assert len({root, write_phantoms(tmp_path, 1, 1), write_phantoms(tmp_path, 3, 1, confound='noise')}) == 3


def test_programs_that_start_together_share_the_drawing(tmp_path, monkeypatch):
    drawn = {1: [], 2: []}

    def write_as(program, stop):
        monkeypatch.setattr('os.getpid', lambda: program)

        def write(path):
            if len(drawn[program]) == stop:
                raise OSError('stopped')
            drawn[program].append(path.name)
            path.write_text(path.name)
        return write_set(tmp_path / 'set', {}, '', dict.fromkeys('abcdefgh', write))

    with pytest.raises(UserError, match='stopped'):
        write_as(1, stop=3)
    write_as(2, stop=None)
    assert sorted(drawn[1] + drawn[2]) == list('abcdefgh') and len(drawn[1]) == 3
    assert drawn[1] + drawn[2] != sorted(drawn[1]) + sorted(drawn[2])           # orders of their own


def test_the_table_holds_the_visibility_of_each_image(tmp_path):
    root = write_phantoms(tmp_path, 1, 2)
    with (root / 'lesions.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['visibility'] for row in rows] == ['faint'] * 2 + ['moderate'] * 2 + ['marked'] * 2
    for row in rows:
        class_name, image = row['file'].split('/')[0], root / row['file']
        mask = np.asarray(Image.open(image.parents[1] / 'masks' / image.name)) > 0
        low, high = VISIBILITIES[class_name]
        assert image.exists() and low <= float(row['mean_rise']) <= high and int(row['area']) == mask.sum()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='name another folder with --data'):
        write_phantoms(tmp_path / 'file', 2)


def test_the_demo_walks_the_reader_of_real_data(tmp_path):
    data = load_data(DataConfig(dataset='phantom', data=str(tmp_path / 'p'), num_phantoms=12,
                                cache_dir=str(tmp_path / 'c')))
    assert data.shape == (1, 64, 64) and not any(line.startswith('passed over') for line in data.report)
    assert {*data.normal_classes, *data.anomalous_classes} == set(CLASSES)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 2 + 3)
    batch = data.test.items(range(5))
    assert (batch.mask.flatten(1).any(1) == batch.y.bool()).all()
    assert data.split['duplicates'] == []
