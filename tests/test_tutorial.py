"""The tutorial: it runs, what its text claims holds, and its notebook is the same lesson."""

import re
import runpy
import sys
import tempfile

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT

SCRIPT, NOTEBOOK = ROOT / 'docs' / 'tutorial.py', ROOT / 'docs' / 'tutorial.ipynb'


@pytest.fixture(scope='module')
def lesson(tmp_path_factory):
    """The variables that the script leaves, run in its short form in a folder of its own."""
    temporary, here = tmp_path_factory.mktemp('temporary'), tmp_path_factory.mktemp('here')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TUTORIAL_FAST', '1')
        patch.setattr(tempfile, 'tempdir', str(temporary))
        patch.setattr(sys, 'path', [*sys.path])
        patch.chdir(here)
        patch.setattr(plt, 'show', lambda: plt.close('all'))
        plt.switch_backend('Agg')
        names = runpy.run_path(str(SCRIPT))
    assert not [*here.iterdir()]                                     # nothing is left beside the script
    return names


def test_masks_mark_the_abnormal_images_alone(lesson):
    mask, ill = lesson['mask'], lesson['ill']
    assert mask[ill].flatten(1).any(1).all() and not mask[~ill].any()
    shown_normal, shown_ill = (ill[lesson[name]:][:5] for name in ('first_normal', 'first_ill'))
    assert shown_ill.all() and not shown_normal.any()


def test_both_models_have_learned_something(lesson):
    """Better than the mean normal image, which is what an untrained decoder could learn at once."""
    x, ill = lesson['x'][~lesson['ill']], lesson['ill']
    of_mean = (x - x.mean(0, keepdim=True)).abs().mean()
    assert lesson['residual'][~ill].mean() < 0.9 * of_mean
    uniform = x[0].numel() * np.log(256)               # nats of an image whose grey levels are all as likely
    assert np.median(lesson['of_images'](lesson['nelbo'], lesson['normal'])) < 0.9 * uniform


def test_a_blur_ranks_images_much_as_the_residual_does(lesson):
    assert lesson['likeness'] > 0.2
    assert abs(lesson['auroc']['blur'] - lesson['auroc']['reconstruction']) < 0.25


def test_the_residual_is_larger_inside_the_lesions_and_a_linear_fit_does_as_well(lesson):
    assert lesson['inside'] > 1.3 * lesson['outside']
    assert lesson['auroc']['pca'] > lesson['auroc']['reconstruction'] - 0.05


def test_the_phantom_has_no_serious_confound(lesson):
    assert not [f for f in lesson['audited']['findings'] if f['severity'] == 'serious']
    assert 0.3 < lesson['auroc']['file_size'] < 0.7


def test_blurred_images_are_more_probable_than_normal_ones(lesson):
    assert lesson['more_probable'] > 0.9
    caught = lesson['caught']
    assert caught['nelbo'] < 0.3 and caught['complexity'] > caught['nelbo'] + 0.2


def test_there_is_a_ratio_for_every_group_but_the_top_and_a_cost_for_each(lesson):
    assert [score.name for score in lesson['ratios']] == ['llr_1', 'llr_2']
    assert [score.name for score in lesson['costs']] == ['kl', 'kl_1', 'kl_2', 'kl_3']
    assert all(0 <= value <= 1 for value in lesson['auroc'].values())


def test_the_threshold_is_that_of_validation_images_and_the_interval_holds_the_value(lesson):
    assert (lesson['validation'] > lesson['limit']).mean() <= 0.05
    assert lesson['flagged'].tolist() == (lesson['values'] > lesson['limit']).tolist()
    interval = lesson['interval']
    assert interval.low <= interval.value <= interval.high
    assert interval.value == pytest.approx(lesson['auroc']['llr_1'])


def test_the_notebook_is_the_script():
    script, notebook = ([(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
                        for path in (SCRIPT, NOTEBOOK))
    assert script == notebook, 'docs/tutorial.ipynb is not docs/tutorial.py: run `make notebook`'


def test_the_notebook_was_run_to_its_end_and_is_small():
    code = [cell for cell in jupytext.read(NOTEBOOK).cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum(output.output_type == 'display_data' for output in outputs) >= 5
    assert not any(output.output_type == 'error' for output in outputs)
    assert NOTEBOOK.stat().st_size < 2 ** 20 and str(ROOT) not in NOTEBOOK.read_text()


def test_links_of_the_tutorial_lead_somewhere():
    text = '\n'.join(cell.source for cell in jupytext.read(SCRIPT).cells if cell.cell_type == 'markdown')
    targets = re.findall(r'\]\((?!https?:)([^)#]+)', text)
    assert targets and all((SCRIPT.parent / target).exists() for target in targets)
