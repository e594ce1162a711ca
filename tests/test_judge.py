"""Judging with answers known on paper, and scores that are not finite from the model to the report."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_detect import make_data, run, settings
from test_scores import LinearGaussian

from anomaly.config import Judging, MapConfig
from anomaly.judge import ScoreRow, Share, join, judge, validation_warnings
from anomaly.report.tables import Column, ReportTable, as_markdown, as_text, save_csv
from anomaly.scoring import Table


def table(**scores):
    """Four normal images, then two of class B and one of class A."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    classes = np.array(['Normal'] * 4 + ['B', 'B', 'A'], object)
    return SimpleNamespace(labels=labels, classes=classes, maps=None,
                           entries=[SimpleNamespace(id=f'{i}.png') for i in range(7)],
                           values={name: np.array(values, float) for name, values in scores.items()})


def rows(**thresholds):
    return [ScoreRow(name, 'baseline' if name.startswith('png') else 'model', '', threshold,
                     primary=name == 'nelbo') for name, threshold in thresholds.items()]


def judged(test, *, order=(), **thresholds):
    return judge(test, rows(**thresholds), Judging(num_bootstrap=50), MapConfig(), seed=0, class_order=order)


TEST = table(nelbo=[1, 2, 3, 4, 5, 3.5, 0], png_size=[4, 3, 2, 1, 0, 0.5, 0])


def test_calls_and_aurocs_by_hand():
    found = judged(TEST, nelbo=3, png_size=9, order=['B', 'A'])
    assert list(found.groups) == ['B', 'A', 'all'] == found.shown_groups and found.classes == ['B', 'A']
    nelbo = found.rows['nelbo']
    assert nelbo.flagged == {'normal': Share(1, 4), 'B': Share(2, 2), 'A': Share(0, 1), 'all': Share(2, 3)}
    assert [nelbo.auroc(group).value for group in found.groups] == pytest.approx([7 / 8, 0, 7 / 12])
    assert found.rows['png_size'].flagged['all'] == (0, 3)
    assert list(judged(TEST, nelbo=3).groups) == ['A', 'B', 'all'], 'unknown classes in the order of names'


def test_a_baseline_below_chance_is_negated_in_the_difference():
    difference, = judged(TEST, nelbo=3, png_size=9).differences('B')
    assert difference.turned and difference.rival == 'png_size negated'
    assert difference.estimate.value == 7 / 8 - 1 and difference.outcome in ('worse', 'undecided')
    assert 'png_size negated (1.000)' in difference.text
    assert difference.as_json()['second'] == 'png_size'


def test_runs_are_joined_under_their_names_and_stay_paired():
    one = judged(TEST, nelbo=3, png_size=9)
    other = judged(TEST, nelbo=3)
    found = join({'a': one, 'b': other})
    assert list(found.rows) == ['a/nelbo', 'b/nelbo', 'png_size']
    assert [row.run for row in found.primaries] == ['a', 'b']
    same, *_ = found.differences('all')
    assert same.estimate.as_json() == {'value': 0, 'low': 0, 'high': 0} and same.outcome == 'undecided'


def test_no_metrics_without_anomalous_images():
    test = table(nelbo=[1, 2, 3, 4, 5, 6, 7])
    test.labels[:] = 0
    found = judged(test, nelbo=5)
    assert not found.has_metrics and found.differences('all') == [] and found.shown_groups == ['all']
    assert found.rows['nelbo'].flagged == {'normal': (2, 7), 'all': (0, 0)}
    assert 'lacks normal or anomalous images' in found.warnings[0]


def test_infinite_thresholds_and_values_are_null_in_json():
    test = table(nelbo=[1, np.nan, 3, 4, 5, 6, np.inf])
    found = judged(test, nelbo=np.inf)
    assert found.rows['nelbo'].flagged['all'] == (1, 3), "what is not finite is flagged at any threshold"
    assert found.as_json()['scores']['nelbo']['threshold'] is None
    assert found.warnings == ["nelbo: 2 test images have a score that is not finite, which counts as the "
                              "most anomalous: 1.png and others."]


def test_too_few_validation_images():
    line, = validation_warnings(table(nelbo=range(7)), 0.05)
    assert '7 normal validation images' in line and 'at least 19' in line and '12.5 %' in line
    assert validation_warnings(table(nelbo=range(7)), 0.2) == []


class NotFinite(LinearGaussian):
    """Gives NaN, or an infinity, for all images of some parts; those of validation carry a bright pixel."""

    def __init__(self, value, parts):
        super().__init__(tau2=0.01, sigma2=0.01)
        self.value, self.parts = value, parts

    def forward(self, x, skip=0, temperature=1.0, prior_temperature=1.0):
        terms = super().forward(x, skip, temperature)
        marked = x[:, 0, 0, 3] > 0.9                                # the validation images
        bad = torch.zeros_like(marked)
        bad |= marked if 'val' in self.parts else False
        bad |= ~marked if 'test' in self.parts else False
        return {**terms, 'recon': torch.where(bad, self.value, terms['recon'])}


@pytest.mark.figures
@pytest.mark.parametrize('value, parts', [
    (-torch.inf, ('val',)), (torch.inf, ('test',)), (torch.nan, ('val', 'test'))])
def test_a_score_that_is_not_finite_for_every_image_ends_in_a_report(tmp_path, value, parts):
    data, lines = make_data(masks=True), []
    data.val.x[:, 0, 0, 3], data.test.x[:, 0, 0, 3] = 0.95, 0.5
    result = run(tmp_path, data, NotFinite(value, parts), settings(
        scores=('nelbo', 'llr', 'lk', 'kl'), num_draws=1, num_bootstrap=5, num_cases=1, num_gallery=5),
        log=lines.append)
    page = (tmp_path / 'report.html').read_text()
    assert 'not finite' in page and (tmp_path / 'figures' / 'histograms.png').exists()
    for part, count in (('validation', 30), ('test', 36)):
        named = any(f'nelbo: {count} {part} images have a score that is not finite' in line for line in lines)
        assert named == (part[:3] in [p[:3] for p in parts])
    row = result['scores']['nelbo']
    if 'test' in parts:
        assert row['metrics']['all']['auroc'] == {'value': 0.5, 'low': 0.5, 'high': 0.5}
        assert row['flagged']['normal'] == [20, 20] and row['flagged']['all'] == [16, 16]
    if 'val' in parts:
        assert row['threshold'] is None
    assert 'NaN' not in (tmp_path / 'metrics.json').read_text()


# --------------------------------------------------------------------------------------------------- tables

def test_a_table_is_the_same_as_text_markdown_and_csv(tmp_path):
    found = judged(TEST, nelbo=3, png_size=9)
    shown = ReportTable('scores', [
        Column('', lambda row: row.name), Column('AUROC', lambda row: row.auroc('B'), interval=True),
        Column('FPR', lambda row: row.flagged['normal']), Column('run', lambda row: row.run or None)],
        list(found.rows.values()), lambda row: row.kind)
    low, high = found.rows['nelbo'].auroc('B').low, found.rows['nelbo'].auroc('B').high
    text = as_text(shown)
    assert text[0] == 'scores' and text[3] == '  baseline', "the first section needs no heading"
    assert text[2].split() == ['nelbo', '0.875', f'[{low:.3f},', f'{high:.3f}]', '25.0', '%', '-']
    assert len({len(line) for line in text[1:3]}) == 1
    assert f'| nelbo | 0.875 [{low:.3f}, {high:.3f}] | 25.0 % | - |' in as_markdown(shown)
    save_csv(tmp_path / 'a.csv', [{'row': row.name, **row.metrics['B']} for row in shown.rows])
    header, first, _ = (tmp_path / 'a.csv').read_text().splitlines()
    assert header.startswith('row,auroc,auroc_low,auroc_high,auprc,') and first.startswith('nelbo,0.875,')


def test_a_class_may_have_the_name_of_a_group():
    """Leukemia is ALL: a folder `all` beside others is a class of its own."""
    entries = [SimpleNamespace(id=str(i), class_name=name, label=int(i > 1))
               for i, name in enumerate(['normal', 'normal', 'all', 'other'])]
    found = judged(Table(entries, {'nelbo': np.array([1.0, 2, 3, 0])}), nelbo=2.5, order=['all'])
    assert found.rows['nelbo'].flagged == {'normal': (0, 2), '"all"': (1, 1), 'other': (0, 1), 'all': (1, 2)}
    assert found.classes == ['"all"', 'other']
