"""Which test images are shown, and that their pictures are what they should be."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from anomaly.figures import map_scale
from anomaly.gallery import (
    LARGEST,
    case_figure,
    choose_cases,
    gallery,
    outcome,
    outline_path,
    picture_source,
    short_number,
    shorten,
)
from anomaly.scorer import Case


def test_cases_are_extremes_mistakes_and_every_so_many_th_by_rank():
    # 100 images in rising order of score: even places normal, odd ones anomalous
    scores, labels = np.arange(100.0), np.arange(100) % 2
    chosen = choose_cases(scores, labels, 0, 15)
    assert chosen == sorted(chosen, reverse=True) and len(chosen) == 15
    assert {99, 98, 97} <= {*chosen} and {0, 1, 2} <= {*chosen}            # a fifth of 15 at either end
    assert {98, 96, 94} <= {*chosen} and {1, 3, 5} <= {*chosen}      # highest normal, lowest anomalous images
    others = sorted({*chosen} - {99, 98, 97, 96, 94, 0, 1, 2, 3, 5})
    assert len(others) == 5 and all(15 <= gap <= 20 for gap in np.diff(others))
    assert choose_cases(scores, labels, 2, 0) == [99, 98, 1, 0]
    assert choose_cases(scores, labels, 0, 0) == []
    assert {*range(6), *range(94, 100)} <= {*choose_cases(scores, labels, 6, 15)}


def test_few_images_odd_scores_and_one_class():
    assert choose_cases(np.array([1.0, 3, 2]), np.zeros(3, int), 6, 60) == [1, 2, 0]
    assert choose_cases(np.array([1.0, np.nan, 2, -np.inf]), np.array([0, 0, 1, 1]), 1, 0) == [1, 0]
    assert choose_cases(np.array([5.0, 5, 5, 5]), np.array([0, 1, 0, 1]), 1, 0) == [0, 3]     # in order


def test_outcomes_and_numbers():
    assert [outcome(y, called) for y in (1, 0) for called in (True, False)] == ['tp', 'fn', 'fp', 'tn']
    assert [short_number(v) for v in (0.0123456, 18954.69, 1234567.8, np.nan)] == [
        '0.012346', '18955', '1234568', 'not finite']
    assert shorten('Normal/images/Normal-1.png') == 'Normal-1' and len(shorten('x' * 60)) <= 23


def decoded(source):
    kind, data = source.split(',')
    assert kind == 'data:image/webp;base64'
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize('shape', [(64, 64, 3), (64, 128, 3)])
def test_small_pictures_are_exact_and_large_ones_are_reduced(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = decoded(picture_source(values / 255))
    assert np.array_equal(np.asarray(picture.convert('RGB')), values)
    assert not picture.info.get('exif') and not picture.info.get('xmp')
    assert max(decoded(picture_source(np.kron(values, np.ones((8, 8, 1))) / 255)).size) == LARGEST


def test_map_scale():
    assert map_scale([np.array([[0.0, 2]])])['vmin'] == 0
    signed = map_scale([np.array([[-3.0, 2]])])
    assert signed['vmin'] == -signed['vmax'] and signed['vmax'] == pytest.approx(3, abs=0.1)
    assert map_scale([]) and map_scale([np.zeros((2, 2))])['vmax'] > 0


def test_the_outline_runs_between_lesion_and_other_pixels():
    mask = np.zeros((4, 5), bool)
    mask[1, 2:4] = True                                              # two pixels wide, one high
    edges = set(re.findall(r'M(\d+) (\d+)([hv])1', outline_path(mask)))
    assert edges == {('2', '1', 'h'), ('3', '1', 'h'), ('2', '2', 'h'), ('3', '2', 'h'),
                     ('2', '1', 'v'), ('4', '1', 'v')}
    assert outline_path(np.zeros((3, 3), bool)) == ''
    assert len(re.findall('M', outline_path(np.ones((3, 3), bool)))) == 12         # the border of the image


def scored(number, reconstruction=True, maps=True, masks=True):
    """Images of scores 0, 1, ..., the second half anomalous; all of them are cases."""
    entries = [SimpleNamespace(id=f'a/{i}.png', class_name='odd' if i >= number // 2 else 'normal',
                               label=int(i >= number // 2)) for i in range(number)]
    picture = np.full((1, 8, 8), 0.5, np.float32)
    cases = [Case(i, picture, picture if reconstruction else None, picture[0] if maps else None,
                  picture[0] > i if masks else None) for i in reversed(range(number))]
    return SimpleNamespace(entries=entries, cases=cases, values={'nelbo': np.arange(float(number))})


def test_cards_say_score_percentile_and_outcome_at_the_threshold():
    test = scored(6)
    test.values['nelbo'][4] = np.nan
    found = gallery({'primary_score': 'nelbo'}, scored(4), test, threshold=1.0)
    assert [(c['score'], c['percentile'], c['outcome']) for c in found['cards']] == [
        ('5', '100', 'tp'), ('not finite', '100', 'tp'), ('3', '88', 'tp'), ('2', '62', 'fp'),
        ('1', '38', 'tn'), ('0', '12', 'tn')]
    assert [p['title'] for p in found['cards'][0]['pictures']] == ['input', 'reconstruction', 'map']
    assert found['classes'] == ['normal', 'odd'] and found['scale']['low'] == '0'
    assert found['cards'][-1]['outline'] and not found['cards'][0]['outline']


def test_models_without_reconstructions_and_maps_have_cards_with_what_they_have():
    found = gallery({'primary_score': 'nelbo'}, scored(4), scored(4, False, False, False), threshold=1.0)
    assert [p['title'] for p in found['cards'][0]['pictures']] == ['input'] and found['scale'] is None
    result = {'primary_score': 'nelbo', 'scores': {'nelbo': {}}}
    figure = case_figure(result, scored(4), scored(4, False, False, False), 1.0, 2)
    assert len(figure.axes) == 4                                     # two most, two least, one picture each
    assert 'called' in figure.texts[1].get_text() and 'called' not in figure.texts[-1].get_text()
