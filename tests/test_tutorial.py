"""The tutorials: they run, what their text claims holds, and their notebooks are the same lessons."""

import re
import runpy
import sys
import tempfile

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import roc_auc_score
from standins import make_standin

SCRIPT, NOTEBOOK = ROOT / 'docs' / 'tutorial.py', ROOT / 'docs' / 'tutorial.ipynb'
MEDNIST = ROOT / 'docs' / 'tutorial_mednist.py'
LESSONS = pytest.mark.parametrize('script', [SCRIPT, MEDNIST], ids=lambda script: script.stem)


def run(script, tmp_path_factory, **environment):
    """The variables that a script leaves, run in its short form in a folder of its own."""
    temporary, here = tmp_path_factory.mktemp('temporary'), tmp_path_factory.mktemp('here')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {'TUTORIAL_FAST': '1', **environment}.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, 'tempdir', str(temporary))
        patch.setattr(sys, 'path', [*sys.path])
        patch.chdir(here)
        patch.setattr(plt, 'show', lambda: plt.close('all'))
        plt.switch_backend('Agg')
        names = runpy.run_path(str(script))
    assert not [*here.iterdir()]                                     # nothing is left beside the script
    return names


@pytest.fixture(scope='module')
def lesson(tmp_path_factory):
    return run(SCRIPT, tmp_path_factory)


@pytest.fixture(scope='module')
def hands(tmp_path_factory):
    """The lesson on MedNIST, with noise in place of hands and bright squares on the anomalous images."""
    data = make_standin('mednist', tmp_path_factory.mktemp('mednist'), count=100, test_count=10)
    return run(MEDNIST, tmp_path_factory, MEDNIST=str(data))


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
    assert lesson['more_probable'] > 0.8                # of 50; trainings round by the processor
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


def test_the_published_networks_are_trained_and_their_scores_are_the_published_ones(hands):
    """Learnable numbers of both (their own count), and a loss that falls."""
    for name, number in (('autoencoder', 2_291_712), ('vae', 3_340_288)):
        assert sum(p.numel() for p in hands[name].parameters()) == number
    for losses in (hands['ae_losses'], hands['vae_losses']):
        assert losses[-1, 1] < 0.8 * losses[0, 1] and np.isfinite(losses[[2, 5], 2]).all()
    # The scores by hand, from the networks: the mean of |x - y|, y not clamped, and the KL.
    x, autoencoder, vae = hands['x'], hands['autoencoder'], hands['vae']
    with torch.no_grad():
        residual = (x - autoencoder(x)['logits']).abs().mean((1, 2, 3)).numpy()
        mean, log_variance = vae.encoder(x).double().chunk(2, 1)
    kl = (-0.5 * (1 + log_variance - mean ** 2 - log_variance.exp())).mean(1).numpy()
    np.testing.assert_allclose(hands['residual_score'], residual, rtol=1e-4)
    np.testing.assert_allclose(np.corrcoef(hands['kl_score'], kl)[0, 1], 1, atol=1e-6)
    assert hands['auroc']['AE, residual'] == roc_auc_score(hands['anomalous'], hands['residual_score'])


@LESSONS
def test_the_notebook_is_the_script(script):
    script, notebook = ([(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
                        for path in (script, script.with_suffix('.ipynb')))
    assert script == notebook, 'a notebook in docs/ is not its script: run `make notebook`'


def test_the_notebook_was_run_to_its_end_and_is_small():
    code = [cell for cell in jupytext.read(NOTEBOOK).cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum(output.output_type == 'display_data' for output in outputs) >= 5
    assert not any(output.output_type == 'error' for output in outputs)
    assert NOTEBOOK.stat().st_size < 2 ** 20 and str(ROOT) not in NOTEBOOK.read_text()


@LESSONS
def test_links_of_the_tutorial_lead_somewhere(script):
    text = '\n'.join(cell.source for cell in jupytext.read(script).cells if cell.cell_type == 'markdown')
    targets = re.findall(r'\]\((?!https?:)([^)#]+)', text)
    assert targets and all((SCRIPT.parent / target).exists() for target in targets)
