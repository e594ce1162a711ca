"""SDEs, the loss and MSMA features against closed forms, and what the family promises."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import score_of_mixture
import torch
from pytest import approx
from small_score import SMALL, build, gaussian, make_sde
from test_train import run

import evaluate
from anomaly.choice import choose_scores
from anomaly.outputs import Outputs
from anomaly.scores import SCORES, Scoring
from distributions import Pixels
from evaluation.pictures import image_grid
from families.score import msma as score_msma
from families.score.config import Levels, ScoreModelConfig
from families.score.model import ScoreModel, denoising_loss
from families.score.msma import PASS_VOXELS, denoise, level_times, score_maps, score_norms
from families.score.samplers import Diffusion
from families.score.sde import SDES, expand
from model import describe, load_model
from storage.checkpoint import read_checkpoint, save_checkpoint
from utils import UserError

T = torch.linspace(0.001, 1, 50, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ SDEs

@pytest.mark.parametrize('name', SDES)
def test_moments_solve_the_equations_of_the_sde(name):
    """d mean / dt = f mean, d variance / dt = 2 f variance + g^2 (Saerkka and Solin 2019, 5.50 and 5.51).

    The spread of VE begins at sigma_min, of the others at 0.
    """
    sde, t = make_sde(name), T.clone().requires_grad_()
    slope_of_mean, = torch.autograd.grad((sde.mean_factor(t) + 0 * t).sum(), t)
    slope_of_variance, = torch.autograd.grad((sde.std(t) ** 2).sum(), t)
    f, g = sde.drift(t), sde.diffusion(t)
    torch.testing.assert_close(slope_of_mean, f * sde.mean_factor(t))
    torch.testing.assert_close(slope_of_variance, 2 * f * sde.std(t) ** 2 + g ** 2)
    start = torch.zeros(1, dtype=torch.float64)
    assert sde.mean_factor(start).item() == 1
    assert sde.std(start).item() == (sde.sigma_min if name == 'vesde' else 0)


@pytest.mark.parametrize('name', SDES)
def test_discrete_steps_lead_to_the_same_noise(name):
    """N steps x + f x + G z from a fixed x: the moments at the end are those of the SDE, up to O(1/N)."""
    sde = make_sde(name)
    t = torch.arange(sde.num_scales, dtype=torch.float64) / (sde.num_scales - 1) + 1e-9
    mean, variance = torch.ones(()), torch.zeros(())
    for f, G in zip(*sde.discretize(t)):
        mean, variance = (1 + f) * mean, (1 + f) ** 2 * variance + G ** 2
    end = torch.ones(1, dtype=torch.float64)
    assert mean.item() == approx(sde.mean_factor(end).item(), abs=1e-3)
    assert variance.sqrt().item() == approx(sde.std(end).item(), rel=5e-3)
    assert sde.std(end).item() == approx(sde.prior_std, rel=1e-3)


@pytest.mark.parametrize('name', SDES)
def test_time_of_a_standard_deviation(name):
    sde = make_sde(name)
    torch.testing.assert_close(sde.t_of_std(sde.std(T[:-1])), T[:-1], rtol=1e-5, atol=1e-6)


def test_prior_density():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 20.0)
    torch.testing.assert_close(make_sde('vesde').prior_log_prob(x), normal.log_prob(x).flatten(1).sum(1))


# ------------------------------------------------------------------------------------------------------ loss

@pytest.mark.parametrize('name', SDES)
@pytest.mark.parametrize('weighting', [False, True])
def test_the_score_of_the_kernel_has_no_loss(name, weighting):
    """Data at a single point: the score of the noisy image is -z / std, and the loss 0."""
    sde, t = make_sde(name), T[::10]
    x, z = torch.zeros(5, 1, 2, 3, dtype=torch.float64), torch.randn(5, 1, 2, 3, dtype=torch.float64)
    score = -(sde.perturb(x, t, z) - expand(sde.mean_factor(t), x) * x) / expand(sde.std(t) ** 2, x)
    for reduce_mean in (False, True):
        loss = denoising_loss(score, sde.std(t), sde.diffusion(t), z, reduce_mean, weighting)
        assert loss.abs().max() < 1e-18


@pytest.mark.parametrize('name', SDES)
def test_least_loss_of_gaussian_data(name):
    """E |std s + z|^2 at the true score is the part of z that the noisy image does not tell:

    with variance v = m^2 w + std^2 of the noisy image, z given it has the variance 1 - std^2 / v.
    """
    data, sde, n = gaussian(), make_sde(name), 40000
    torch.manual_seed(0)
    x = data.sample(n)
    z, t = torch.randn_like(x), torch.full((n,), 0.3, dtype=torch.float64)
    m, std = sde.mean_factor(t)[0], sde.std(t)[0]
    left = 1 - std ** 2 / (m ** 2 * data.variance + std ** 2)                                     # (C, *S)
    score = data.noisy(sde, sde.perturb(x, t, z), t)[1]
    for reduce_mean, expected in ((True, left.mean()), (False, 0.5 * left.sum())):
        loss = denoising_loss(score, sde.std(t), sde.diffusion(t), z, reduce_mean, False).mean()
        assert loss.item() == approx(expected.item(), rel=0.02)
    weighted = denoising_loss(score, sde.std(t), sde.diffusion(t), z, True, True).mean()
    assert weighted.item() == approx((left.mean() * (sde.diffusion(t)[0] / std) ** 2).item(), rel=0.02)


def test_a_network_of_zeros_loses_the_square_of_the_noise():
    """As it starts: init_scale 0 makes the output 0, and the loss z^2, 1 a pixel."""
    torch.manual_seed(0)
    model = ScoreModel((1, 16, 16), ScoreModelConfig(**SMALL), Pixels())
    losses = torch.cat([model(torch.rand(50, 1, 16, 16))['loss'] for _ in range(4)])
    assert losses.mean().item() == approx(1, abs=0.02) and losses.std().item() == approx(
        math.sqrt(2 / 256), rel=0.2)
    summed = ScoreModel((1, 16, 16), ScoreModelConfig(**SMALL, reduce_mean=False), Pixels())
    assert summed(torch.rand(50, 1, 16, 16))['loss'].mean().item() == approx(128, rel=0.05)


# ------------------------------------------------------------------------------------------------------ MSMA

@pytest.mark.parametrize('most', [1, 70, PASS_VOXELS])
@pytest.mark.parametrize('name', SDES)
def test_features_of_gaussian_data(name, most, monkeypatch):
    """sigma |s| at the mean m x of the noisy image: s = m (mu - x) / (m^2 w + sigma^2).

    7 levels of 5 images of 3 voxels: one at a time, 4 at a time, and all at once.
    """
    monkeypatch.setattr(score_msma, 'PASS_VOXELS', most)
    data, sde = gaussian(), make_sde(name)
    times = level_times(Levels(number=7, min_timestep=0.05, max_timestep=0.9), sde).double()
    x = data.sample(5)
    m, sigma = (factor.reshape(7, 1, 1, 1, 1) for factor in (sde.mean_factor(times), sde.std(times)))
    expected = sigma * m * (data.means - x) / (m ** 2 * data.variance + sigma ** 2)         # (n, B, C, *S)
    d = data.diffusion(sde)
    torch.testing.assert_close(score_norms(d, x, times), expected.flatten(2).norm(dim=2).T)
    torch.testing.assert_close(score_maps(d, x, times), expected.sum(2).transpose(0, 1))


def test_levels_are_spaced_as_they_say():
    for name in SDES:
        sde = make_sde(name)
        for schedule, spaced in (('geometric', torch.log), ('linear', lambda std: std)):
            stds = sde.std(level_times(Levels(9, 0.1, 0.7, schedule), sde))
            gaps = spaced(stds).diff()
            assert torch.allclose(gaps, gaps.mean(), rtol=1e-3) and len(stds) == 9
            assert torch.allclose(stds[[0, -1]], sde.std(torch.tensor([0.1, 0.7])), rtol=1e-4)
    thinned = level_times(Levels(4, 0.1, 0.7, 'thinned'), make_sde('vesde', 13))
    assert torch.allclose(thinned, torch.linspace(0.1, 0.7, 13)[::3])
    for wrong in ({'number': 0}, {'min_timestep': 0.9, 'max_timestep': 0.5}, {'schedule': 'square'}):
        with pytest.raises(UserError):
            Levels(**wrong)


def test_denoising_moves_a_pixel_towards_its_mean():
    """x + G^2 s with G^2 = s_i^2 - s_{i-1}^2, worked for data at the single point 0: s = -x / std^2."""
    sde = make_sde('vesde', 101)
    d = Diffusion(sde, lambda x, t: -x / expand(sde.std(t) ** 2, x))
    upper, lower = (0.01 * (20 / 0.01) ** (i / 100) for i in (1, 0))
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert denoise(d, x).flatten()[0].item() == approx(1 - (upper ** 2 - lower ** 2) / upper ** 2, rel=1e-6)


def test_scores_on_the_norms_and_on_the_likelihood():
    """msma_knn: distance to the 5th nearest normal image; ode_nll of a normal: its negative log density."""
    model, data = build((1, 2, 2)), gaussian((1, 2, 2))
    model._score = data.diffusion(model.sde).score
    normal, new = (torch.rand(n, 1, 2, 2, dtype=torch.float64) for n in (20, 4))
    gmm, knn, *_ = SCORES['msma'](0)
    value = lambda score, x: torch.from_numpy(score.density.score(score.features(Outputs(model, x)).numpy()))
    for score in (gmm, knn):
        score.density.fit(score.features(Outputs(model, normal)).numpy())
    distances = torch.cdist(model.score_norms(new), model.score_norms(normal)).sort(1).values
    torch.testing.assert_close(value(knn, new), distances[:, 4])
    assert value(gmm, 5 + new).min() > value(gmm, new).max(), 'far from all of them'
    torch.testing.assert_close(Outputs(model, new).statistics(), model.score_norms(new).log())
    ode, = SCORES['ode_nll'](0)
    torch.testing.assert_close(ode.image(Outputs(model, new)), -model.log_likelihood(new))
    chosen, left_out = choose_scores(['all'], model)
    assert [score.name for score in chosen] == [
        'dose', 'dose_mahalanobis', 'msma_gmm', 'msma_knn', 'msma_kde', 'msma_pca_gmm', 'msma_flow']
    assert left_out
    with pytest.raises(UserError, match='likelihood terms'):
        choose_scores(['nelbo'], model)
    with pytest.raises(UserError, match='the first must be below'):
        Scoring(msma_min_timestep=0.9, msma_max_timestep=0.5)


@pytest.mark.parametrize('kind', ['inpainting', 'restoration'])
def test_what_repair_changes_counts_in_the_body_and_follows_from_the_seed(kind):
    one, = SCORES[kind](0)
    x = torch.tensor([[[0.1, 0.1], [0.5, 0.2]], [[0.1, 0.3], [0.1, 0.1]]]).reshape(1, 2, 2, 2)
    known = SimpleNamespace(**{f'{kind}_map': lambda x: torch.tensor([5.0, 1, 2, 6]).reshape(1, 1, 2, 2)})
    outputs = Outputs(known, x)
    assert one.image(outputs).item() == approx((1 + 2 + 6) / 3)
    assert one.map(outputs).flatten().tolist() == [5, 1, 2, 6]
    assert one.image(Outputs(known, torch.ones(1, 1, 2, 2))).item() == 3.5, 'of a uniform image, everywhere'
    model, x = build().float(), torch.rand(2, 1, 8, 8)
    first, again, other = (one.image(Outputs(model, x, Scoring(seed=seed))) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


# ---------------------------------------------------------------------------------------------------- family

@torch.no_grad()
@pytest.mark.parametrize('name', SDES)
def test_score_takes_a_standard_deviation(name):
    """The same as the network at the time of that noise, on [-1, 1]; a number or one an image."""
    model, x = build(sde=name), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    t = torch.full((3,), 0.4, dtype=torch.float64)
    std = model.sde.std(t)
    expected = model.sde.score(model.network(2 * x - 1, model.sde.label(t)), t)
    for sigma in (std, std[0], float(std[0])):
        torch.testing.assert_close(model.score(x, sigma), expected, rtol=1e-6, atol=1e-9)
    assert (model.sigmas.diff() > 0).all() and model.sigmas[0] < std[0] < model.sigmas[-1]


@torch.no_grad()
def test_features_of_the_family_are_those_of_its_score():
    model, x = build(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    sigmas = model.sde.std(level_times(Levels(number=5), model.sde)).double()
    scores = torch.stack([sigma * model.score(x, sigma) for sigma in sigmas], dim=1)
    assert torch.allclose(model.score_norms(x, number=5), scores.flatten(2).norm(dim=2), rtol=1e-4)
    assert torch.allclose(model.score_maps(x, number=5), scores.sum(2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.score_norms(x, True, number=5), model.score_norms(x, number=5))
    for slow in (model.inpainting_map(x), model.restoration_map(x)):
        assert slow.shape == (3, 1, 8, 8) and (slow >= 0).all() and slow.max() > 0


@torch.no_grad()
def test_what_validations_see():
    """Of a network of zeros: |z|^2 and no score."""
    torch.manual_seed(0)
    model = ScoreModel((1, 16, 16), ScoreModelConfig(**SMALL), Pixels())
    values = model.diagnose(torch.rand(20, 1, 16, 16))
    assert list(values)[:2] == ['loss_at/t_0.0', 'score_norm_at/t_0.0'] and len(values) == 10
    assert all(value.shape == (20,) for value in values.values())
    assert values['loss_at/t_0.5'].mean().item() == approx(1, abs=0.1)
    assert values['score_norm_at/t_0.5'].max() < 1e-3


def test_skip_is_refused_and_shapes_are_checked():
    with pytest.raises(UserError, match='no latent groups'):
        build()(torch.rand(1, 1, 8, 8), skip=1)
    for shape, told in (((1, 9, 8), 'multiples of 2'), ((1, 8), 'not shape')):
        with pytest.raises(UserError, match=told):
            build(shape)


@pytest.mark.parametrize('flags, told', [
    ({'sde': 'vesd'}, '--sde vesd: choose one of'), ({'nf': 0}, '--nf 0: it must be at least 4'),
    ({'sigma_min': 2.0, 'sigma_max': 1.0}, 'second must be the larger'),
    ({'dropout': 1.0}, '--dropout 1.0: it must be at least 0 and below 1'),
    ({'sde': 'vpsde'}, 'above --beta_max 20'),
    ({'sde': 'subvpsde', 'predictor': 'ancestral_sampling', 'num_scales': 99}, 'not for --sde subvpsde'),
    ({'blocks_up': (1, 1)}, 'one fewer on the way up'), ({'blocks_down': (1, 0)}, 'at least 1'),
    ({'conv_size': 2}, 'odd'), ({'norm_num_groups': 3}, '3 does not divide 8'),
    ({'nf': 9, 'norm_num_groups': 3}, 'a level of 9 channels cannot'),
    ({'self_attention': True, 'nf': 6}, 'multiple of 8'), ({'trainable_inner_model': True}, 'there is none'),
    ({'inner_model': '{'}, 'not JSON'), ({'inner_model': '{}'}, 'image_size'),
    ({'inner_model': '{"image_size": [4, 4], "depth": 2}'}, 'depth is no flag of --model score'),
    ({'inner_model': '{"image_size": [4, 4]}', 'sde': 'vpsde', 'num_scales': 99}, 'for vesde'),
])
def test_a_wrong_flag_is_said_in_one_line(flags, told):
    with pytest.raises(UserError, match=told) as error:
        ScoreModelConfig(**SMALL | flags)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', SDES)
def test_training_approaches_a_known_score(name):
    """Untrained, the error is 1. The slow proof, score_of_mixture.py, goes on to a few per cent."""
    error, = score_of_mixture.errors(score_of_mixture.train(name, steps=60), times=(0.6,), points=2000)
    assert error < 0.35


# ------------------------------------------------------------------------------------------------ in the loop

FLAGS = '''--model score --nf 8 --blocks_down 1 1 --blocks_up 1 --norm_num_groups 2 --time_embedding_sz 4
    --num_scales 4 --warmup_steps 2'''.split()


@pytest.fixture
def score_flags(train_flags):
    return [*FLAGS, *train_flags[train_flags.index('--dataset'):], '--warmup_epochs', '0']


def test_training_resumes_to_the_bit_and_says_what_it_sees(score_flags, tmp_path, same_weights, monkeypatch):
    whole = run(score_flags, tmp_path, 'whole', '--image_every', '4')
    run(score_flags, tmp_path, 'parts', '--max_steps', '3')
    parts = run(score_flags, tmp_path, 'parts', '--cont_training')
    assert same_weights(whole / 'checkpoint.pt', parts / 'checkpoint.pt')
    saved = read_checkpoint(whole)
    assert saved['args']['ema_ramp'] and saved['ema_count'] == 9, 'one, and the 8 updates'
    lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    assert [line['train/lr'] for line in lines if 'train/lr' in line][:3] == [0, 1e-4, 2e-4]
    validation = next(line for line in lines if 'val/loss' in line)
    assert {f'val/loss_at/t_{u}' for u in (0.0, 0.25, 0.5, 0.75, 1.0)} <= validation.keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(whole))
    events.Reload()
    assert 'val/score_norm_at/t_0.5' in events.Tags()['histograms']
    assert 'generated_1.0' in events.Tags()['images']

    assert evaluate.work(evaluate.parse_args([
        '--checkpoint', str(whole), '--eval_mode', 'anomaly', '--num_bootstrap', '10', '--num_cases', '1',
        '--msma_levels', '3', '--msma_map', 'gradient', '--device', 'cpu', '--scores', 'msma_gmm', 'msma_knn',
        'inpainting', 'restoration'])) == 0
    result = json.loads((whole / 'anomaly' / 'metrics.json').read_text())['anomaly']
    assert result['primary_score'] == 'msma_gmm' and result['msma_levels'] == 3
    for name in ('msma_gmm', 'msma_knn', 'inpainting', 'restoration'):
        assert result['scores'][name]['metrics']['all']['auroc']
        assert result['scores'][name]['pixel_threshold'] > 0, 'maps of densities come after their fit'

    # drawn by the steps of another sampler, at the temperature of the family
    sample = ['--checkpoint', str(whole), '--eval_mode', 'sample', '--num_samples', '2', '--device', 'cpu']
    passes, score = [], ScoreModel._score
    monkeypatch.setattr(ScoreModel, '_score', lambda *args: passes.append(1) or score(*args))
    other = ['--num_scales', '6', '--corrector', 'none']
    for name, flags, number in (('own', [], 2 * 4), ('other', other, 6)):
        passes.clear()
        assert evaluate.work(evaluate.parse_args([*sample, '--save', str(tmp_path / name), *flags])) == 0
        assert len(passes) == number
        assert json.loads((tmp_path / name / 'metrics.json').read_text())['sample']['temperature'] == 1
    for words in ([*sample[:2], '--eval_mode', 'anomaly'], ['--compare', str(whole), str(parts)]):
        with pytest.raises(UserError, match='--snr is a flag of --eval_mode evaluate_fid, sample, not of'):
            evaluate.work(evaluate.parse_args([*words, '--snr', '1']))

    # new images are scored as the test images were: at the same levels, by the same densities
    images = score_flags[score_flags.index('--data') + 1]
    assert evaluate.work(evaluate.parse_args([
        '--checkpoint', str(whole), '--eval_mode', 'predict', '--data', images, '--num_overlays', '1',
        '--scores', 'msma_gmm', 'msma_knn', '--device', 'cpu'])) == 0
    tested, new = ({row['id']: row for row in csv.DictReader((whole / mode / 'scores.csv').open())
                    if row.get('part') != 'val'} for mode in ('anomaly', 'predict'))
    assert set(tested) <= set(new)
    for name in ('msma_gmm', 'msma_knn'):
        assert [float(new[i][name]) for i in tested] == approx([float(tested[i][name]) for i in tested], 1e-4)


def test_pictures_of_volumes_are_their_middle_slices():
    volumes = torch.rand(2, 2, 5, 3, 4)
    grid = image_grid(volumes)
    assert grid.shape == (1, 4, 2 * 9) and torch.equal(grid[0, :3, 4:8], volumes[0, 1, 2])


def test_finetuning_by_reptile(score_flags, tmp_path):
    """Of 3 x 2 steps: every second one, slow <- d slow + (1 - d) fast, and fast goes on from there.

    d = (1 + 1) / (10 + 1) at first: the slow weights have moved 9 / 11 of the way after the first two.
    """
    start = build((1, 16, 16), seed=5).float()
    save_checkpoint(tmp_path / 'start' / 'checkpoint.pt', {
        'description': describe(start), 'weights': start.state_dict(), 'ema': None, 'args': {}})
    flags = [*score_flags, '--init_from', str(tmp_path / 'start'), '--ema_decay', '0.9', '--beta1', '0',
             '--warmup_steps', '0']
    plain = read_checkpoint(run(flags, tmp_path, 'plain', '--max_steps', '2'))
    reptile = read_checkpoint(run(flags, tmp_path, 'reptile', '--max_steps', '2', '--reptile_steps', '2'))
    for name, parameter in start.named_parameters():
        fast, slow = plain['weights'][name], reptile['weights'][name]
        torch.testing.assert_close(slow, 2 / 11 * parameter.detach() + 9 / 11 * fast, rtol=1e-4, atol=1e-6)
        assert torch.equal(slow, reptile['ema'][name])
    with pytest.raises(UserError, match='--reptile_steps does nothing without --ema_decay'):
        run(flags, tmp_path, 'none', '--reptile_steps', '2', '--ema_decay', '0')
    with pytest.raises(UserError, match='do not fit the flags'):
        run(flags, tmp_path, 'other', '--nf', '16')


def test_a_matryoshka_starts_from_its_inner_model(score_flags, tmp_path):
    """The averaged weights of a run at half the size; frozen, they stay; the outer path starts at 0."""
    inner = build((1, 8, 8), seed=3).float()
    save_checkpoint(tmp_path / 'inner' / 'checkpoint.pt', {
        'description': describe(inner), 'weights': build((1, 8, 8)).float().state_dict(),
        'ema': inner.state_dict(), 'args': {}})
    for trainable in (False, True):
        more = ['--trainable_inner_model', '--amp', 'bf16'] if trainable else []
        folder = run([*score_flags, '--inner_model', str(tmp_path / 'inner'), *more], tmp_path,
                     f'outer{trainable}', '--max_steps', '2', '--learning_rate', '0.1', '--warmup_steps', '0')
        model = load_model(folder)
        same = [torch.equal(a, b) for a, b in zip(model.network.inner.state_dict().values(),
                                                  inner.network.state_dict().values())]
        assert all(same) if not trainable else sum(same) < len(same) / 2
        assert model.network.inner.divide_by_sigma == trainable
