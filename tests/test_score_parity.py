"""Known answers of the published SADE, where they are at hand: see PARITY."""

import json
import os
from pathlib import Path

import pytest
import torch

from distributions import Pixels
from families.score.config import Levels, ScoreModelConfig
from families.score.model import ScoreModel, denoising_loss, times_of
from families.score.msma import denoise, level_times, score_maps, score_norms
from families.score.official import from_official, to_official
from families.score.samplers import (
    PC,
    Diffusion,
    ald,
    ancestral_sampling,
    blocks,
    euler_maruyama,
    inpaint,
    langevin,
    restore,
    reverse_diffusion,
)
from families.score.sde import VE, VP, SubVP, expand
from training.config import Schedule, TrainConfig
from training.optimization import average_of
from utils import read_flags

PARITY = Path(os.environ.get('PARITY_DIR', Path(__file__).parents[2] / 'shared' / 'parity'))
pytestmark = pytest.mark.skipif(not (PARITY / 'score3d_formulas.pt').exists(),
                                reason=f'no known answers in {PARITY}: set PARITY_DIR')
NETWORKS = ('biggan', 'biggan_attention', 'segresnet', 'segresnet_plain')


def agrees(value, expected):
    """The largest difference is at most 1e-4 of the largest magnitude."""
    assert value.shape == expected.shape
    largest = expected.abs().max()
    return ((value - expected).abs().max() <= 1e-4 * largest) if largest else bool((value == 0).all())


def answers(name):
    return torch.load(PARITY / f'score3d_{name}.pt', weights_only=True)


def flags(published):
    """Our flags of a published configuration."""
    model = {name: value for name, value in published['model'].items()
             if name not in ('name', 'jit', 'ema_rate')}
    return model | {name: tuple(model[name]) for name in ('blocks_down', 'blocks_up') if name in model}


def network(expected, **changes):
    config, shape = expected['config'], expected['x'].shape[1:]
    inner = config.get('inner_model')
    if inner:
        changes['inner_model'] = json.dumps(flags(inner) | {'image_size': list(inner['data']['image_size'])})
    model = ScoreModel(tuple(shape), read_flags(ScoreModelConfig, flags(config) | changes), Pixels()).eval()
    model.network.load_state_dict(from_official(model.network, expected['state_dict']))
    return model


@torch.no_grad()
@pytest.mark.parametrize('name', NETWORKS)
def test_scores_of_the_published_networks(name):
    expected = answers(name)
    model = network(expected)
    for sigma, score in zip(expected['sigmas'], expected['score']):
        assert agrees(model.network(expected['x'], sigma), score)
        assert agrees(model.score((expected['x'] + 1) / 2, sigma), score), 'sigma to t and back'


@torch.no_grad()
@pytest.mark.parametrize('trainable, key', [(False, 'score'), (True, 'score_trainable_inner')])
def test_scores_of_the_published_matryoshka(trainable, key):
    expected = answers('matryoshka')
    model = network(expected, trainable_inner_model=trainable)
    for sigma, score in zip(expected['sigmas'], expected[key]):
        assert agrees(model.network(expected['x'], sigma), score)


@pytest.mark.parametrize('name', [*NETWORKS, 'matryoshka'])
def test_published_names_and_their_order(name):
    expected = answers(name)
    ours = list(to_official(network(expected).network))
    assert ours == [key for key in expected['state_dict'] if key.split('.')[-1] != 'sigmas']


# -------------------------------------------------------------------------------------------------- formulas

@pytest.fixture(scope='module')
def formulas():
    return answers('formulas')


@pytest.mark.parametrize('name, family', [('ve', VE), ('ve_highres', VE), ('vp', VP), ('subvp', SubVP)])
def test_sdes(formulas, name, family):
    f = formulas[f'sde_{name}']
    sde, t, x = read_flags(family, f | {'num_scales': f['N']}), f['t'], f['x']
    drift, G = sde.discretize(t)
    pairs = {'mean': sde.perturb(x, t, torch.zeros_like(x)), 'std': sde.std(t), 'g': sde.diffusion(t),
             'drift': expand(sde.drift(t), x) * x, 'discrete_drift': expand(drift, x) * x, 'discrete_G': G,
             'label': sde.label(t), 'score': sde.score(f['network_output'], t)}
    if 't_of_std' in f:
        pairs['t_of_std'] = sde.t_of_std(f['std'])
    if 'discrete_sigmas' in f:
        pairs['discrete_sigmas'] = sde.levels(t)
    if 'discrete_betas' in f:
        pairs['discrete_betas'] = sde.betas(torch.arange(sde.num_scales) / (sde.num_scales - 1) + 1e-7)
    assert [key for key, value in pairs.items() if not agrees(value, f[key])] == []
    assert sde.end == f['sampling_eps']


@pytest.mark.parametrize('name, family', [('ve', VE), ('vp', VP), ('subvp', SubVP)])
def test_losses(formulas, name, family):
    f = formulas['loss']
    sde, t = read_flags(family, f | {'num_scales': 1000}), times_of(f['u'])
    assert agrees(t, f['t']) and agrees(sde.label(t), f[f'{name}_label'])
    assert agrees(sde.perturb(f['x'], t, f['z']), f[f'{name}_noisy'])
    score = sde.score(f['network_output'], t)
    for reduction in ('mean', 'sum'):
        for weighting in ('', '_likelihood'):
            loss = denoising_loss(score, sde.std(t), sde.diffusion(t), f['z'], reduction == 'mean',
                                  bool(weighting))
            assert agrees(loss.mean(), f[f'{name}_{reduction}{weighting}'])


def diffusion(f, noise=()):
    """The score of the known answers, and noise in the order in which it was drawn."""
    sde, noise = VE(f['N'], f['sigma_min'], f['sigma_max']), iter(noise)
    return Diffusion(sde, lambda x, t: -(x - 0.3) / (0.25 + expand(sde.std(t), x) ** 2),
                     lambda x: next(noise))


def test_msma_features(formulas):
    f = formulas['msma']
    d = diffusion(f)
    numbers = f['n_timesteps'], f['min_timestep'], f['max_timestep']
    levels = {name: level_times(Levels(*numbers, schedule), d.sde)
              for name, schedule in (('geometric', 'geometric'), ('linear', 'linear'), ('other', 'thinned'))}
    for name, times in levels.items():
        assert agrees(times, f[f't_{name}']) and agrees(d.sde.std(times), f[f'sigma_{name}'])
    times = levels['geometric']
    assert agrees(score_norms(d, f['x'], times), f['norms'])
    assert agrees(score_maps(d, f['x'], times), f['maps'])
    assert agrees(score_norms(d, denoise(d, f['x']), times), f['norms_denoised'])


STEPS = {'reverse_diffusion': reverse_diffusion,
         'reverse_diffusion_flow': lambda d, x, t: reverse_diffusion(d, x, t, flow=True),
         'euler_maruyama': euler_maruyama, 'ancestral_first_image': ancestral_sampling,
         'langevin': lambda d, x, t: langevin(d, x, t, 0.17, 1),
         'langevin_2_steps': lambda d, x, t: langevin(d, x, t, 0.17, 2),
         'ald_first_image': lambda d, x, t: ald(d, x, t, 0.17, 1)}


@pytest.mark.parametrize('name', STEPS)
def test_sampler_steps(formulas, name):
    f, expected = formulas['steps'], formulas['steps'][name]
    number = len(expected['x'])
    assert f['snr'] == 0.17
    x, x_mean = STEPS[name](diffusion(f, expected['noise']), f['x'][:number], f['t'][:number])
    assert agrees(x, expected['x']) and agrees(x_mean, expected['x_mean'])


def test_whole_runs_of_the_samplers(formulas):
    f = formulas['sampler']
    assert agrees(PC(snr=f['snr']).sample(diffusion(f, f['noise']), f['sample']), f['sample'])
    f = formulas['inpaint']
    assert agrees(inpaint(diffusion(f, f['noise']), PC(snr=f['snr']), f['x'], f['mask'], f['eps']),
                  f['result'])
    assert torch.equal(blocks((12, 9, 6), f['block'], as_published=True), f['checkerboard_12_9_6'])
    f = formulas['restore']
    assert agrees(restore(diffusion(f, f['noise']), PC(snr=f['snr']), f['x'], f['steps'], f['eps']),
                  f['result'])


def test_average_of_weights_and_learning_rate(formulas):
    f = formulas['ema']
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(f['weights'][0])
    average = average_of(model, TrainConfig(ema_decay=f['decay'], ema_ramp=True))
    for weight, expected in zip(f['weights'][1:], f['averages'][1:]):
        model.weight.data.fill_(weight)
        average.update_parameters(model)
        assert agrees(average.module.weight.detach().squeeze(), expected)
    f = formulas['learning_rate']
    config = TrainConfig(epochs=60, warmup_epochs=0, warmup_steps=f['warmup'], learning_rate=f['lr'],
                         learning_rate_min=f['lr'])
    for step, value in zip(f['step'], f['value']):
        assert abs(Schedule(config, 100).learning_rate(step) - value) <= 1e-4 * f['lr']
