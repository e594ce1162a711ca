"""What the report says and that it stands alone."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from test_detect import make_data, make_model, rows_of, run, settings
from test_scores import LinearGaussian
from toy_volumes import LESION, SHAPE, Mean, make_volumes

from anomaly.config import Judging
from anomaly.judge import Judgement, ScoreRow, Share, members
from anomaly.metrics import Estimate, Resamples, evaluate_score
from anomaly.report.figures import (
    curve_figure,
    figure_scores,
    keep,
    level_figure,
    levels,
    new_figure,
    precision_recall,
    read_history,
    roc,
    training_figure,
)
from anomaly.report.page import pixel_table
from anomaly.report.tables import number, percent, shade

pytestmark = pytest.mark.page


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag is closed."""
    VOID = ('meta', 'line', 'use', 'path', 'image', 'rect', 'br', 'stop', 'circle', 'polygon', 'img', 'input')

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f'</{tag}> closes another element'

    def handle_data(self, data):
        self.text.append(data)


HISTORY = '''{"step": 4, "time": 1, "train/nelbo": 9.5, "train/epoch": 1}
{"step": 4, "time": 1, "val/nelbo": 9.0, "val/neg_log_p": null}
{"step": 8, "time": 2, "train/nelbo": 7.5, "train/epoch": 2}
{"step": 8, "time": 2, "val/nelbo": 8.0, "val/neg_log_p": 7.0}
{"step": 9, "tim'''


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('report')
    config = settings(num_draws=1, num_bootstrap=30, num_cases=2, num_gallery=20)
    (out / 'eval-x').mkdir()
    (out / 'eval-x' / 'metrics.jsonl').write_text(HISTORY)
    lines = []
    result = run(out, make_data(masks=True), make_model(), config, run_folder=out / 'eval-x',
                 log=lines.append)
    source = (out / 'report.html').read_text()
    return SimpleNamespace(out=out, result=result, source=source, page=Page(source), lines=lines)


NOTHING = SimpleNamespace(labels=np.zeros(0), classes=np.zeros(0, object))


def judged(*rows, groups=('COVID', 'all'), test=NOTHING):
    """A judgement of these rows on the images of a table."""
    return Judgement({row.name: row for row in rows}, {name: members(test, name) for name in groups},
                     Judging())


def block(source):
    """The numbers in the page."""
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', source,
                                re.DOTALL)[1])


def test_page_is_well_formed_and_needs_no_network(made):
    assert made.page.open == []
    for tag, attributes in made.page.tags:
        assert tag not in ('link', 'iframe', 'object', 'base')
        assert not [name for name in attributes if name.startswith('on')]
        for name in ('src', 'href', 'xlink:href', 'action'):
            assert attributes.get(name, '#').startswith(('#', 'data:')), (tag, attributes)
    assert not re.search(r'url\((?!#)', made.source) and '@import' not in made.source
    policy = next(attributes['content'] for _, attributes in made.page.tags
                  if attributes.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = re.search(r'<script>(.*?)</script>', made.source, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert not re.search(r'https?:', script)


def test_the_block_of_numbers_equals_the_scores(made):
    found, rows = block(made.source), rows_of(made.out / 'scores.csv')
    test, validation = ([row for row in rows if row['part'] == part] for part in ('test', 'val'))
    assert found['primary'] == 'nelbo' and 'trivial_knn' in found['scores'] and len(found['scores']) <= 8
    assert found['label'] == [int(row['label']) for row in test]
    assert [found['classes'][i] for i in found['class']] == [row['class'] for row in test]
    for name, score in found['scores'].items():
        for part, some in (('test', test), ('validation', validation)):              # the file has six digits
            assert score[part] == pytest.approx([float(row[name]) for row in some], rel=1e-5)
        assert score['threshold'] == made.result['scores'][name]['threshold']


def test_every_case_has_its_pictures_and_its_outcome_without_the_script(made):
    cards = [attributes for tag, attributes in made.page.tags if attributes.get('class') == 'case card']
    assert len(cards) == 20
    rows = [row for row in rows_of(made.out / 'scores.csv') if row['part'] == 'test']
    values = [float(rows[int(card['data-place'])]['nelbo']) for card in cards]
    assert values == sorted(values, reverse=True) and values[0] == max(float(row['nelbo']) for row in rows)
    for card in cards:
        row = rows[int(card['data-place'])]
        assert card['data-class'] == row['class']
        assert card['data-outcome'] == {'11': 'tp', '10': 'fn', '01': 'fp', '00': 'tn'}[
            row['label'] + row['nelbo_flagged']]
    pictures = [attributes['alt'] for tag, attributes in made.page.tags if tag == 'img']
    for kind in ('input', 'reconstruction', 'map'):
        assert sum(alt.startswith(f'{kind} of ') for alt in pictures) == 20
    hidden = [attributes.get('id') for tag, attributes in made.page.tags if 'hidden' in attributes]
    assert hidden == ['controls', 'filters']


def test_names_from_outside_are_text_and_nothing_else(tmp_path):
    name = '</script><script>alert("&1")</script>'
    run(tmp_path, make_data(classes=(name,), masks=True), make_model(), settings(
        scores=('nelbo',), num_draws=1, num_bootstrap=5))
    source = (tmp_path / 'report.html').read_text()
    page = Page(source)
    assert page.open == [] and '<script>alert' not in source and source.count('<script') == 2
    assert name in block(source)['classes'] and name in page.text
    assert any(attributes.get('data-group') == name for _, attributes in page.tags)


def test_a_model_that_cannot_reconstruct_and_images_without_masks(tmp_path):
    class Terms(LinearGaussian):
        reconstruct = maps = property()                                # hasattr is False

    run(tmp_path, make_data(), Terms(tau2=0.01, sigma2=0.01), settings(num_draws=1, num_bootstrap=5))
    source = (tmp_path / 'report.html').read_text()
    assert Page(source).open == [] and 'alt="input of ' in source
    assert 'reconstruction of ' not in source and 'masks are outlined' not in source
    assert 'aria-label="Training curves"' not in source


def test_no_gallery_where_none_is_asked_for(tmp_path):
    run(tmp_path, make_data(), make_model(), settings(scores=('nelbo',), num_draws=1, num_bootstrap=5,
                                                         num_cases=0, num_gallery=0))
    source = (tmp_path / 'report.html').read_text()
    assert Page(source).open == [] and 'id="filters"' not in source and 'href="#cases"' not in source


def test_the_data_card(made):
    text = ' '.join(' '.join(made.page.text).split())
    assert 'seed of the split 3' in text and 'duplicates across parts 2 near, 1 exact' in text
    for row in made.result['normal_parts'].values():
        assert 0 <= row['low'] <= row['high'] <= 1
    row = made.result['normal_parts']['png_size']
    assert f"png_size {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in text


def test_page_says_the_numbers_the_command_the_data_and_the_limits(made):
    text = ' '.join(' '.join(made.page.text).split())
    for name, row in made.result['scores'].items():
        assert name in text
        assert f"{row['metrics']['all']['auroc']['value']:.3f}" in text
    assert 'evaluate.py --eval_mode anomaly <x>' in text            # escaped in the source, whole on the page
    assert '<b>line</b>' in text and '<b>' not in made.source
    assert 'Not a medical device' in text and 'trivial baselines' in text and 'optimistic' in text
    assert made.result['versions']['torch'] in text
    for verdict in made.result['verdict']:
        assert verdict['text'] in text


def test_page_adapts_to_dark_mode_phone_and_paper(made):
    assert 'prefers-color-scheme: dark' in made.source and '@media print' in made.source
    assert 'width=device-width' in made.source
    figures = made.source.split('<figure', 1)[1]
    assert 'currentColor' in figures and '#1b2430' not in figures      # the ink of the figures is the text's


def test_ids_in_the_page_are_unique(made):
    ids = [attributes['id'] for _, attributes in made.page.tags if 'id' in attributes]
    shared = {i for i in ids if ids.count(i) > 1}
    assert not {i for i in shared if not i.startswith('DejaVu')}           # equal glyphs may be defined twice


def test_figures_are_pictures_of_a_readable_size(made):
    from PIL import Image
    for name in ('roc', 'pr', 'histograms', 'levels', 'cases', 'training'):
        with Image.open(made.out / 'figures' / f'{name}.png') as picture:
            assert picture.width >= 700 and picture.height >= 400
            assert np.asarray(picture.convert('L')).std() > 10             # something is drawn


def test_text_table_is_aligned_and_has_scores_above_baselines(made):
    lines = made.lines
    start = next(i for i, line in enumerate(lines) if 'Normal (20) against COVID (8 test images)' in line)
    block = lines[start + 1:lines.index('', start)]
    assert block[0].split()[:2] == ['AUROC', '[95'] and block[0].endswith('FPR')
    names = [line.split()[0] for line in block[1:]]
    assert names.index('nelbo') < names.index('trivial') < names.index('png_size')
    full = [line for line in block if '[' in line]
    assert len({line.index('[') for line in full[1:]}) == 1 and len({len(line) for line in full}) == 1


def test_maps_have_a_table_of_their_own(made):
    lines = made.lines
    start = next(i for i, line in enumerate(lines) if line.startswith('maps against masks'))
    assert lines[start] == 'maps against masks: 16 lesions in 16 of 36 test images, 11 % of the pixels'
    row = next(line.split() for line in lines[start:] if line.startswith('  nelbo *'))
    pixels = made.result['scores']['nelbo']['pixels']
    assert row[2:6] == [f"{pixels[m]['value']:.3f}" for m in ('auroc', 'auprc', 'aupro', 'best_dice')]
    assert not any(line.startswith(('  iw', '  png_size')) for line in lines[start:])
    text = ' '.join(' '.join(made.page.text).split())
    assert 'Where: maps against lesion masks' in text
    for end in ('value', 'low', 'high'):
        assert f"{pixels['aupro'][end]:.3f}" in text
    assert number(np.nan, 3) == '-' and number(0.1239, 3) == '0.124'
    assert pixel_table(judged(ScoreRow('kl', 'model', '', 1.0))) is None


def test_figure_scores_are_fixed_beforehand_and_begin_with_the_primary_score():
    names = ('nelbo', 'kl', 'reconstruction', 'complexity', 'kl_profile', 'llr_1')
    found = figure_scores(judged(*(ScoreRow(name, 'model', '', 1.0, primary=name == 'kl') for name in names)))
    assert [row.name for row in found] == ['kl', 'reconstruction', 'complexity', 'kl_profile']


def hierarchy(classes=('COVID', 'Other')):
    """Scores of four levels, worked by hand: LLR>k of image i is 10 k + i, of anomalous images twice that."""
    names = ['Normal'] * 5 + [name for name in classes for _ in range(5)]
    label = np.array([name != 'Normal' for name in names], int)
    within = np.tile(np.arange(5.0), 1 + len(classes))
    values = {f'llr_{k}': (10 * k + within) * (1 + label) for k in (2, 10, 3, 1)}       # in no order
    values |= {f'lk_{k}': 100 + value for k, value in ((1, within), (2, within), (3, within), (10, within))}
    values['nelbo'] = within
    groups = [*classes, 'all']
    metrics = {group: {'auroc': Estimate(0.75, 0.5, 0.9)} for group in groups if classes}
    test = SimpleNamespace(values=values, labels=label, classes=np.array(names, object))
    return judged(*(ScoreRow(name, 'model', '', 1.0, metrics=metrics) for name in values), groups=groups,
                  test=test), test


def test_levels_are_in_the_order_of_their_numbers():
    found, _ = hierarchy()
    assert [(k, row.name) for k, row in levels(found, 'llr').items()] == [
        (1, 'llr_1'), (2, 'llr_2'), (3, 'llr_3'), (10, 'llr_10')]
    bounds = levels(found, 'lk', with_nelbo=True)
    assert list(bounds) == [0, 1, 2, 3, 10] and bounds[0].name == 'nelbo'
    assert 0 not in levels(found, 'lk')                                   # then it is another kind of bound
    others = ('kl', 'llr', 'llr_1+kl_knn')
    assert levels(judged(*(ScoreRow(name, 'model', '', 1.0) for name in others)), 'llr') == {}


def test_the_figure_of_levels_shows_medians_quartiles_and_intervals():
    figure = level_figure(*hierarchy(), lk_is_elbo=True)
    panels = np.array(figure.axes).reshape(3, 2)                             # LLR>k, -L>k, AUROC; two classes
    assert [panel.get_title(loc='left') for panel in panels[0]] == ['COVID', 'Other']
    normal, anomalous = panels[0, 1].get_lines()
    assert normal.get_xdata().tolist() == [1, 2, 3, 10]
    assert normal.get_ydata().tolist() == [12, 22, 32, 102] and normal.get_label() == 'normal'
    assert anomalous.get_ydata().tolist() == [24, 44, 64, 204] and anomalous.get_label() == 'Other'
    bands = [band.get_paths()[0].vertices for band in panels[0, 1].collections]
    # of 0, 1, 2, 3, 4 the quartiles are 1 and 3
    assert [(v[v[:, 0] == 1, 1].min(), v[v[:, 0] == 1, 1].max()) for v in bands] == [(11, 13), (22, 26)]
    assert panels[1, 0].get_lines()[0].get_xdata().tolist() == [0, 1, 2, 3, 10]
    low, high = panels[2, 0].collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.5, 0.9))


def test_the_figure_of_levels_of_odd_data():
    found, test = hierarchy(classes=())
    assert len(level_figure(found, test, True).axes) == 2                     # no AUROC of nothing
    test.values['llr_2'][:] = np.nan
    lines = level_figure(found, test, True).axes[0].get_lines()
    assert lines[0].get_xdata().tolist() == [1, 3, 10]
    few = judged(found.rows['nelbo'], found.rows['llr_2'], groups=['all'])
    assert level_figure(few, test, True) is None                              # one level is no curve


def test_curves_of_scores_that_are_right_and_wrong():
    names = ['Normal'] * 3 + ['COVID']
    test = SimpleNamespace(labels=np.array([0, 0, 0, 1]), classes=np.array(names, object),
                           values={'nelbo': np.array([1.0, 2, 3, 4]), 'kl': np.array([2.0, 3, 4, 1])})
    found = judged(*(ScoreRow(name, 'model', '', 1.0, primary=name == 'nelbo') for name in test.values),
                   test=test)
    right, wrong, chance = curve_figure(found, test, 'roc').axes[0].get_lines()
    assert (0, 1) in zip(*right.get_data()) and (1, 0) in zip(*wrong.get_data())
    assert list(chance.get_ydata()) == [0, 1]
    right, wrong, chance = curve_figure(found, test, 'pr').axes[0].get_lines()
    assert (1, 1) in zip(*right.get_data())
    assert max(y for x, y in zip(*wrong.get_data()) if x > 0) == 1 / 4      # the anomalous image comes last
    assert list(chance.get_ydata()) == [1 / 4] * 2                            # the share of anomalous images


def test_areas_below_the_curves_are_the_metrics():
    random = np.random.default_rng(0)
    normal, anomalous = random.integers(0, 9, 40), random.integers(3, 12, 25)              # with many ties
    found = evaluate_score(normal, anomalous, Resamples.draw(40, 25))
    for name, curve in (('auroc', roc), ('auprc', precision_recall)):
        x, y = curve(np.arange(65) >= 40, np.r_[normal, anomalous])
        assert np.trapezoid(y, x) == pytest.approx(found[name].value), name


def test_training_curves_need_both_parts(tmp_path):
    assert read_history(tmp_path) == {} and training_figure({}) is None
    (tmp_path / 'metrics.jsonl').write_text(HISTORY)
    history = read_history(tmp_path)
    assert history['train/nelbo'] == [(4, 9.5), (8, 7.5)] and history['val/neg_log_p'] == [(8, 7.0)]
    panel, = training_figure(history).axes
    assert [line.get_label() for line in panel.get_lines()] == ['training', 'validation']
    assert panel.get_lines()[1].get_ydata().tolist() == [9, 8]
    assert training_figure({'train/nelbo': [(1, 1.0)], 'val/loss': [(1, 1.0)]}) is None


def test_many_classes_share_one_table(tmp_path):
    classes, lines = ('A', 'B', 'Viral Pneumonia', 'D', 'E'), []
    result = run(tmp_path, make_data(classes=classes), make_model(), settings(
        scores=('nelbo', 'lk', 'llr'), num_draws=1, num_bootstrap=10, num_cases=0), log=lines.append)
    head = next(i for i, line in enumerate(lines) if line.startswith('AUROC of normal (20)'))
    assert re.split(r' {2,}', lines[head + 1].strip()) == [
        'A (8)', 'B (8)', 'Viral Pneumonia (8)', 'D (8)', 'E (8)', 'all (40)', 'FPR']
    row = next(line.split() for line in lines if line.startswith('  nelbo *'))
    value = lambda group: result['scores']['nelbo']['metrics'][group]['auroc']['value']
    assert row[2:8] == [f'{value(group):.3f}' for group in (*classes, 'all')]
    assert len(lines) < 40 and sum(line == '  trivial baselines' for line in lines) == 1
    page = Page((tmp_path / 'report.html').read_text())
    assert page.open == [] and sum(tag == 'summary' for tag, _ in page.tags) == len(classes) + 1 + 2
    assert 'AUROC against each class' in page.text


def test_small_things():
    assert '60%' in shade(1.0) and '60%' in shade(0.0) and ' 0%' in shade(0.5) and shade(1.0) != shade(0.0)
    assert judged().shown_groups == ['COVID']
    assert judged(groups=['A', 'B', 'all']).shown_groups == ['A', 'B', 'all']
    assert percent(Share(1, 8)) == '12.5 %' and percent(Share(0, 0)) == '-'


def test_findings_of_an_audit_and_what_few_images_can_promise_stand_in_the_report(tmp_path):
    line = 'Serious: the size of the file <alone> tells them apart.'
    run(tmp_path, make_data(), make_model(), settings(scores=('nelbo',), num_draws=1, num_bootstrap=5,
        num_cases=0, num_gallery=0, target_fpr=0.01), findings=[line])
    page = (tmp_path / 'report.html').read_text()
    assert 'with 30 validation images, no threshold promises less than 3.23' in page
    assert html.escape(line) in page and line not in page.split('</style>')[1].split('<script')[0]


@pytest.mark.figures
def test_a_report_of_volumes_starts_at_the_lesion_and_names_the_sides(tmp_path):
    run(tmp_path, make_volumes(channels=3), Mean(), settings(num_bootstrap=5, num_cases=1, num_gallery=5))
    source = (tmp_path / 'report.html').read_text()
    page, text = Page(source), ' '.join(' '.join(Page(source).text).split())
    assert page.open == [] and "radiological: the patient's right is on the left of the picture" in text
    assert 'the largest value of the map' in text and 'masks are outlined' in text
    assert 'slices are left out' not in text
    sliders = [a for tag, a in page.tags if a.get('class') == 'through']
    shown = next(a['aria-label'] for a in sliders if 'Tumour' in a['aria-label']).split(' of ')[1]
    lesion = [a for a in sliders if a['aria-label'].endswith(shown)]
    assert [a['aria-valuetext'] for a in lesion] == [
        f'{LESION[i] + 1} of {SHAPE[i]}' for i in (2, 1, 0)] and all('hidden' in a for a in sliders)
    titles = [a['alt'] for tag, a in page.tags if tag == 'img' and shown in a.get('alt', '')]
    assert len(titles) == 3 * 7 and titles[0].startswith('input, channel 1 of ')
    ids = [a['id'] for _, a in page.tags if a.get('id', '').startswith('outline-')]
    assert len(ids) == len(set(ids)) == 3 * 3 and (tmp_path / 'figures' / 'cases.png').exists()


def test_a_name_in_a_figure_is_no_formula(tmp_path):
    figure = new_figure(2, 2)
    figure.subplots().set_title('scan$_$2.png')
    assert keep({'named': figure}, tmp_path)['named'].startswith('<svg')
