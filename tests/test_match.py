"""Pairs of the same exposure with answers known beforehand, and what becomes of them in files and tables."""

import json

import numpy as np
import pytest
import test_compare
from test_detect import make_data, make_model, run, settings
from test_judge import rows, table

from anomaly import judge, matching
from anomaly.config import Judging, MapConfig
from anomaly.matching import Group, match, pairs

NORMAL = np.random.default_rng(0).normal(size=(60, 4)) * [1, 10, 0.1, 5]
FAR = [30, 300, 3, 150]
FEW = {'scores': ('nelbo',), 'num_draws': 1, 'num_bootstrap': 10, 'num_cases': 0, 'num_gallery': 0}


def test_the_same_exposures_are_all_matched():
    order = np.random.default_rng(1).permutation(60)
    normal, anomalous = pairs(NORMAL, NORMAL[order] + 1e-6)
    assert sorted(zip(normal, order[anomalous])) == [(i, i) for i in range(60)], "each with its own"


def test_other_exposures_are_not_matched():
    assert [len(places) for places in pairs(NORMAL, NORMAL + FAR)] == [0, 0]


def test_of_a_mixture_the_right_half_is_matched():
    mixture = NORMAL + np.outer(np.arange(60) % 2, FAR)
    normal, anomalous = pairs(NORMAL, mixture)
    assert sorted(zip(normal, anomalous)) == [(i, i) for i in range(0, 60, 2)]


def test_no_image_is_in_two_pairs_and_as_many_as_can_be_are_in_one():
    # The second anomalous image is near two normal ones, the first to one of them only: both find a partner.
    normal = np.r_[np.arange(0, 100.0, 10), 1, 2][:, None]
    first, second = pairs(normal, np.array([[2.9], [2.2], [500]]))
    assert sorted(second) == [0, 1] and len(set(first)) == 2
    first, second = pairs(NORMAL, NORMAL[[7] * 60])
    assert 1 <= len(first) < 60 and len(set(first)) == len(first) == len(set(second))


def test_pairs_are_judged_against_each_other_alone(monkeypatch):
    monkeypatch.setattr(judge, 'LEAST_PAIRS', 2)
    test = table(nelbo=[1, 2, 3, 4, 5, 3.5, 0], png_size=[4, 3, 2, 1, 0, 0.5, 0])
    bool_rows = lambda *places: np.isin(np.arange(7), places)
    matched = [Group(bool_rows(2, 3), bool_rows(4, 5), 'B'), Group(bool_rows(1), bool_rows(6), 'A')]
    found = judge.judge(test, rows(nelbo=3, png_size=9), Judging(num_bootstrap=20), MapConfig(), 0, ['B'],
                        matched)
    assert list(found.groups) == ['B', 'A', 'all', 'B (matched)'] and found.classes == ['B', 'A']
    nelbo = found.rows['nelbo']
    assert nelbo.auroc('B (matched)').value == 3 / 4 and nelbo.auroc('B').value == 7 / 8
    assert nelbo.flagged['normal like B'] == (1, 2) and nelbo.flagged['B (matched)'] == (2, 2)
    assert found.title('B (matched)') == 'Normal (2) against B (matched) (2 test images)'
    assert found.title('A') == 'Normal (4) against A (1 test images)'
    assert found.warnings == ["A: 1 of 1 test images have a normal partner of the same exposure, too few for "
                              "--match."]
    difference, = found.differences('B (matched)')
    assert difference.text.startswith(
        "B, 2 of 2 images, each with a normal one of the same exposure: the primary score nelbo (AUROC "
        "0.750; of all images 0.875) ")


@pytest.fixture
def flipped(monkeypatch):
    """COVID images have the histograms of normal ones, Others do not."""
    monkeypatch.setattr(judge, 'LEAST_PAIRS', 5)
    data = make_data()
    data.test.x[20:28] = data.test.x[:8].flip(-1)
    return data


def test_the_verdict_says_what_is_left(flipped, tmp_path):
    lines = []
    result = run(tmp_path, flipped, config=settings(match=True, **FEW), log=lines.append)
    assert result['groups'] == ['COVID', 'Other', 'all', 'COVID (matched)'] and result['match']
    assert result['scores']['histogram']['metrics']['COVID (matched)']['auroc']['value'] == 0.5
    assert result['scores']['nelbo']['flagged']['COVID (matched)'][1] == 8
    text = "COVID, 8 of 8 images, each with a normal one of the same exposure: the primary score nelbo"
    assert any(v['text'].startswith(text) and v['group'] == 'COVID (matched)' for v in result['verdict'])
    assert any(line.startswith(text) for line in lines)
    assert any('Normal (8) against COVID (matched) (8 test images)' in line for line in lines)
    assert any(line.startswith('Other: none of 8 test images') for line in lines)
    assert any(line.startswith('Matched: ') for line in lines)
    assert set(result['scores']) == set(json.loads((tmp_path / 'thresholds.json').read_text())['scores'])


def test_without_the_flag_nothing_is_matched(flipped, tmp_path):
    result = run(tmp_path, flipped, config=settings(**FEW))
    assert result['groups'] == ['COVID', 'Other', 'all']


def test_runs_are_compared_on_the_same_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, 'LEAST_PAIRS', 5)

    def data(size):
        made = test_compare.make_data(size=size)
        made.test.images[60:68] = made.test.images[40:48, :, :, ::-1]
        return made
    runs = [test_compare.run(name, make_model(), data(size)) for name, size in (('a', 4), ('b', 8))]
    result = test_compare.do(runs, tmp_path, settings(match=True, **FEW))
    assert result['groups'] == ['COVID', 'Other', 'all', 'COVID (matched)']
    for name in ('a/nelbo', 'b/nelbo', 'trivial_knn'):
        assert result['scores'][name]['flagged']['normal like COVID'][1] == 8
    assert {d['group'] for d in result['differences']} == set(result['groups'])
    assert '(matched)' in (tmp_path / 'comparison.md').read_text()


def test_a_handful_of_normal_images_has_no_partners():
    labels, classes = np.array([0] * 5 + [1] * 5), np.array(['Normal'] * 5 + ['COVID'] * 5, object)
    group, = match(np.zeros((10, 3)), labels, classes)
    assert not group.normal.any() and not group.anomalous.any() and group.of == 'COVID'
    assert matching.LEAST_PAIRS > 5
