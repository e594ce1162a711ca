"""What a report says of its model, and its first screen."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_detect import make_data, make_model, run, settings
from test_report import HISTORY, Page

from anomaly.metrics import Resamples
from anomaly.report.figures import BAND_RESAMPLES, figure_scores, keep, new_figure, roc, roc_band
from anomaly.report.provenance import about_run, code_and_date
from utils import write_json


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A report of a run that has flags and a history, with a serious finding and another one."""
    out = tmp_path_factory.mktemp('report')
    folder = out / 'eval-mine'
    folder.mkdir()
    write_json(folder / 'args.json', {'model': 'nvae', 'epochs': 7, 'learning_rate': 0.01, 'data': '/secret'})
    (folder / 'metrics.jsonl').write_text(HISTORY)
    lines = []
    result = run(out, make_data(masks=True), make_model(), settings(
        scores=('nelbo',), num_draws=1, num_bootstrap=20, num_cases=0, num_gallery=4), run_folder=folder,
        findings=['Serious: the file size.', 'Fine: the rest.'], log=lines.append)
    return SimpleNamespace(out=out, result=result, source=(out / 'report.html').read_text(), lines=lines)


def test_a_run_is_described_by_its_folder_or_a_checkpoint_in_it(made):
    model = torch.nn.Linear(3, 2)
    for path in ('eval-mine', 'eval-mine/checkpoint.pt'):
        facts = about_run(model, made.out / path)
        assert facts == {'run': 'mine', 'parameters': 8, 'epochs': 7, 'steps': 8,
                         'flags': {'model': 'nvae', 'epochs': 7, 'learning_rate': 0.01}}
    assert about_run(object(), made.out / 'nowhere' / 'x.pt') == {'run': 'nowhere'}


def test_the_date_is_a_date_and_a_folder_without_git_has_no_commit(monkeypatch):
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', code_and_date()['date'])
    monkeypatch.setenv('PATH', '')
    assert code_and_date()['commit'] == ''


def test_the_first_screen_names_model_findings_baseline_and_numbers(made):
    page = Page(made.source)
    text = ' '.join(' '.join(page.text).split())
    first = text[:text.index('Scores and trivial baselines')]
    assert 'run mine' in first and '7 epochs' in first and '8 steps' in first and made.result['date'] in first
    assert 'Serious: the file size.' in first and 'Fine: the rest.' not in first
    assert first.index('Serious') < first.index('AUROC, ')
    for verdict in made.result['verdict']:
        name, value = re.search(r'best trivial baseline, (.*?) \((.*?)\)', verdict['text']).groups()
        assert f'Best trivial baseline: {name}, {value}.' in first
    assert 'Sensitivity at the threshold: ' in first
    assert str(sum(made.result['counts']['test'].values())) in first
    assert page.open == [] and '/secret' not in made.source and 'learning_rate' in text


def test_notes_of_the_program_stand_below(made):
    text = ' '.join(Page(made.source).text)
    for line in made.result['notes']:
        assert text.index('How this was made') < text.index(line)
    assert any(line.startswith('scoring took') for line in made.lines)


def test_figures_are_vectors_too_and_show_the_best_baseline(made):
    for name in ('roc', 'pr', 'histograms'):
        assert (made.out / 'figures' / f'{name}.svg').read_text().lstrip().startswith('<?xml')
    judged = {name: SimpleNamespace(name=name, primary=name == 'nelbo', kind='baseline')
              for name in ('nelbo', 'bands', 'file_size', 'pca', 'trivial_knn')}
    best = SimpleNamespace(rows=judged, primaries=[judged['nelbo']], shown_groups=['COVID'],
                           best_baseline=lambda group: judged['bands'])
    assert [row.name for row in figure_scores(best)] == ['nelbo', 'bands', 'trivial_knn', 'file_size', 'pca']


def test_a_figure_is_drawn_once_for_each_file(tmp_path, monkeypatch):
    figure, draws = new_figure(3, 2), []
    figure.subplots().plot([0, 1])
    draw = figure.draw
    monkeypatch.setattr(figure, 'draw', lambda renderer: draws.append(renderer) or draw(renderer))
    page = keep({'curve': figure}, tmp_path)['curve']
    assert len(draws) == 2 and 'fill: #ffffff' not in page            # the page's has no background
    assert Image.open(tmp_path / 'figures' / 'curve.png').size == (450, 300)
    assert Image.open(tmp_path / 'figures' / 'curve.png').convert('RGB').getpixel((0, 0)) == (255, 255, 255)


def test_the_band_holds_the_curve_and_has_no_width_where_classes_are_apart():
    random = np.random.default_rng(0)
    normal, anomalous = random.normal(size=80), random.normal(1, 1, size=60)
    grid, low, high = roc_band(normal, anomalous)
    curve = np.interp(grid, *roc(np.arange(140) >= 80, np.r_[normal, anomalous]))
    assert (low <= curve + 1e-9).mean() > 0.95 and (curve <= high + 1e-9).mean() > 0.95
    some = Resamples.draw(80, 60, BAND_RESAMPLES, seed=0)
    tpr = [np.interp(grid, *roc(np.r_[np.zeros(80), np.ones(60)].repeat(np.r_[a, b]),
                                np.r_[normal, anomalous].repeat(np.r_[a, b])))
           for a, b in zip(some.normal[1:], some.anomalous[1:])]
    assert np.percentile(tpr, [2.5, 97.5], axis=0) == pytest.approx(np.stack([low, high]))
    _, low, high = roc_band(normal, anomalous + 100)
    assert low[1:] == pytest.approx(1) and high == pytest.approx(1)
