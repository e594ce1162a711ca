"""Known answers of the published NVAE, where they are at hand: see PARITY."""

import math
import os
from pathlib import Path

import pytest
import torch
from pytest import approx

from families.nvae.model import balance_coefficients, balanced_kl
from families.nvae.regularizers import SpectralRegularizer, batch_norm_regularizer
from model import load_model, restore
from storage.checkpoint import read_checkpoint

PARITY = Path(os.environ.get('PARITY_DIR', Path(__file__).parents[2] / 'shared' / 'parity'))
NAMES = ['nvae_binary', 'nvae_rgb_flow']
pytestmark = pytest.mark.skipif(
    not (PARITY / 'nvae_binary.checkpoint.pt').exists(),
    reason=f'no known answers in {PARITY}: set PARITY_DIR',
)


def model_and_answers(name):
    answers = torch.load(PARITY / f'{name}.expected.pt', weights_only=True)
    return load_model(PARITY / f'{name}.checkpoint.pt'), answers


def agrees(value, expected):
    """The largest difference is at most 1e-4 of the largest magnitude."""
    return ((value - expected).abs().max() / expected.abs().max()).item() <= 1e-4


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', NAMES)
def test_every_term(name, mode):
    model, answers = model_and_answers(name)
    model.train(mode == 'train')
    expected = answers[mode]
    with torch.no_grad():
        terms = model(answers['x'], temperature=0.0)
        kl, gamma = balanced_kl(terms['kl'], model.alpha, 0.5)
    for ours, theirs in (
        ('logits', 'logits'),
        ('log_q', 'log_q'),
        ('log_p', 'log_p'),
        ('recon', 'recon'),
        ('kl', 'kl_per_group'),
    ):
        assert agrees(terms[ours], expected[theirs]), theirs
    assert agrees(kl, expected['balanced_kl_at_half'])
    assert agrees(gamma, expected['kl_coeff_at_half'])
    assert agrees(-terms['recon'] - terms['log_q'] + terms['log_p'], expected['log_iw'])
    assert agrees(balance_coefficients(model.config), answers['alpha_square'])


@pytest.mark.parametrize('name', NAMES)
def test_prior_mean(name):
    model, answers = model_and_answers(name)
    with torch.no_grad():
        assert agrees(model.prior_logits(2, temperature=0.0), answers['prior_mean_logits'])


@pytest.mark.parametrize('name', NAMES)
def test_regularizer(name):
    model, answers = model_and_answers(name)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    applied = [c.effective_weight() if hasattr(c, 'effective_weight') else c.weight for c in convs]
    exact = sum(torch.linalg.svdvals(w.detach().flatten(1).double())[0].item() for w in applied)
    expected = answers['regulariser']
    assert len(convs) == expected['num_conv']
    assert exact == approx(expected['sum_of_top_singular_values_exact'], rel=1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        assert SpectralRegularizer(convs)().item() == approx(exact, rel=1e-3)
    assert batch_norm_regularizer(model).item() == approx(expected['sum_of_max_abs_bn_scale'], rel=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_stochastic_bound(name):
    model, answers = model_and_answers(name)
    expected = answers['nelbo_256']
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [model(expected['x']) for _ in range(8)]
    mean = sum((t['recon'] + t['kl'].sum(1)).mean().item() for t in draws) / 8
    # Both means are over 8 draws, each with this spread.
    assert abs(mean - expected['mean']) <= 3 * expected['draw_std_of_mean'] * math.sqrt(2 / 8)


def test_training_flags_are_read_from_the_checkpoint():
    model, args = restore(read_checkpoint(PARITY / 'nvae_binary.checkpoint.pt'))
    assert args['dataset'] == 'mnist' and args['batch_size'] == 32
    assert model.shape == (1, 32, 32) and model.pixels.padding == 2 and not model.training
