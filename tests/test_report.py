"""What the report says and that it stands alone."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from test_detect import make_data, make_model, run

from anomaly.report import figure_scores, map_scale, share, shorten, shown_groups, text_tables
from anomaly.scores import ScoreConfig


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag is closed."""
    VOID = ('meta', 'line', 'use', 'path', 'image', 'rect', 'br', 'stop', 'circle', 'polygon')

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


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('report')
    config = ScoreConfig(num_draws=1, num_bootstrap=30, num_cases=2)
    result = run(out, make_data(masks=True), make_model(), config)
    source = (out / 'report.html').read_text()
    return SimpleNamespace(out=out, result=result, source=source, page=Page(source))


def test_page_is_well_formed_and_needs_no_network(made):
    assert made.page.open == []
    for tag, attributes in made.page.tags:
        assert tag not in ('script', 'link', 'iframe')
        for name in ('src', 'href', 'xlink:href'):
            assert attributes.get(name, '#').startswith(('#', 'data:')), (tag, attributes)
    assert not re.search(r'url\((?!#)', made.source) and '@import' not in made.source


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
    for name in ('roc', 'histograms', 'cases'):
        with Image.open(made.out / 'figures' / f'{name}.png') as picture:
            assert picture.width >= 800 and picture.height >= 400
            assert np.asarray(picture.convert('L')).std() > 10             # something is drawn


def test_text_table_is_aligned_and_has_scores_above_baselines(made):
    lines = text_tables(made.result)
    start = next(i for i, line in enumerate(lines) if 'normal (20) against COVID (8 test images)' in line)
    block = lines[start + 1:lines.index('', start)]
    assert block[0].split()[:2] == ['AUROC', '[95'] and block[0].endswith('FPR')
    names = [line.split()[0] for line in block[1:]]
    assert names.index('nelbo') < names.index('trivial') < names.index('png_size')
    full = [line for line in block if '[' in line]
    assert len({line.index('[') for line in full[1:]}) == 1 and len({len(line) for line in full}) == 1


def test_figure_scores_are_fixed_beforehand_and_begin_with_the_primary_score():
    table = dict.fromkeys(('nelbo', 'kl', 'reconstruction', 'complexity', 'kl_profile', 'llr_1'))
    found = figure_scores({'scores': table, 'primary_score': 'kl'})
    assert found == ['kl', 'reconstruction', 'complexity', 'kl_profile']


def test_small_things():
    assert shown_groups({'groups': ['COVID', 'all']}) == ['COVID']
    assert shown_groups({'groups': ['A', 'B', 'all']}) == ['A', 'B', 'all']
    assert share([1, 8]) == '12.5 %' and share([0, 0]) == '-'
    assert shorten('Normal/images/Normal-1.png') == 'Normal-1' and len(shorten('x' * 60)) <= 23
    assert map_scale([np.array([[0.0, 2]])])['vmin'] == 0
    signed = map_scale([np.array([[-3.0, 2]])])
    assert signed['vmin'] == -signed['vmax'] and signed['vmax'] == pytest.approx(3, abs=0.1)
    assert map_scale([]) and map_scale([np.zeros((2, 2))])['vmax'] > 0
