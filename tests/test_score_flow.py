"""Spatial-MSMA: the flow against known densities, what it sees of an image, and the family in the loop."""

import json
import math

import pytest
import torch
from pytest import approx
from small_score import SMALL
from test_train import run

from anomaly.choice import choose_scores
from anomaly.outputs import Outputs
from distributions import Pixels
from families.spatial_msma.config import SpatialMSMAConfig
from families.spatial_msma.flow import BASES, ConditionalFlow
from families.spatial_msma.model import SpatialMSMA
from families.spatial_msma.official import BASE, from_official, official_name
from families.spatial_msma.patches import PositionCode, pool
from model import describe, load_model, place
from neural_operations import checkpoint_activations, foreground
from storage.checkpoint import read_checkpoint, save_checkpoint
from utils import UserError

FLAGS = {'msma_levels': 4, 'num_blocks': 1, 'hidden_features': 8, 'context_embedding_size': 6,
         'global_embedding_size': 8, 'global_patch_kernel': 5, 'global_patch_stride': 2,
         'patches_per_step': 20, 'patch_batch_size': 30}


def stir(module, scale=0.3):
    """No weight at its start, all in float64."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.double().eval()


def build(shape=(2, 8, 8), **flags):
    torch.manual_seed(0)
    inner = json.dumps(SMALL | {'image_size': shape[1:], 'init_scale': 1.0})
    config = SpatialMSMAConfig(**{'score_model': inner} | FLAGS | flags)
    return stir(SpatialMSMA(shape, config, Pixels()), 0.1)


def images(n=3, shape=(2, 8, 8), border=2):
    """Noise inside a dark border: 4 x 4 of 8 x 8 voxels are foreground."""
    x = torch.zeros(n, *shape, dtype=torch.float64)
    inside = (..., *[slice(border, -border)] * (len(shape) - 1))
    x[inside] = 0.1 + 0.9 * torch.rand(x[inside].shape, generator=torch.Generator().manual_seed(2)).double()
    return x


# --------------------------------------------------------------------------------------------------- the flow

@pytest.mark.parametrize('base', BASES)
@torch.no_grad()
def test_a_density_integrates_to_1(base):
    torch.manual_seed(0)
    flow = stir(ConditionalFlow(2, 3, hidden=8, num_blocks=2, base=base), 0.15)
    axis = torch.arange(-10, 10, 0.04, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    context = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64).expand(len(grid), -1)
    assert flow.log_prob(grid, context).exp().sum().item() * 0.04 ** 2 == approx(1, abs=2e-3)


def test_log_det_is_that_of_the_jacobian_and_the_way_back_leads_back():
    flow = stir(ConditionalFlow(5, 3, hidden=8, num_blocks=2, base='standard'))
    rows, contexts = (torch.randn(2, size, dtype=torch.float64) for size in (5, 3))
    z, log_det = flow.transform(contexts).call_and_ladj(rows)
    assert (z - rows).abs().max() > 0.3
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(flow.transform(contexts[i]), rows[i])
        assert log_det[i].item() == approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-9)
    assert torch.allclose(flow.transform(contexts).inv(z), rows, atol=1e-7)
    # with a standard base, the density by hand
    by_hand = -0.5 * z.square().sum(1) - 2.5 * math.log(2 * math.pi) + log_det
    torch.testing.assert_close(flow.log_prob(rows, contexts), by_hand)


@torch.no_grad()
def test_at_the_start_the_flow_only_permutes_and_scales():
    flow = ConditionalFlow(4, 3, hidden=8, num_blocks=0, base='standard')
    x = torch.randn(5, 4)
    z, log_det = flow.transform(torch.randn(5, 3)).call_and_ladj(x)
    scale = 1 / (1 + math.exp(-2)) + 1e-3
    assert torch.allclose(z, x / scale) and torch.allclose(log_det, torch.tensor(-4 * math.log(scale)))
    permuted = ConditionalFlow(4, 3, hidden=8, num_blocks=1, base='standard').layers[1]
    y, log_det = permuted(x, None)
    assert torch.allclose(y, x[:, permuted.permutation], atol=1e-6) and log_det.abs().max() < 1e-6


def test_recomputed_layers_give_the_same_gradients():
    flow = stir(ConditionalFlow(5, 3, hidden=8, num_blocks=1, base='gaussian_mixture'))
    rows, contexts = (torch.randn(6, size, dtype=torch.float64) for size in (5, 3))
    gradients, kept = [], []
    for recomputes in (False, True):
        checkpoint_activations(flow, recomputes)
        before = len(kept)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = flow.log_prob(rows, contexts).sum()
        kept[before:] = [sum(kept[before:])]
        gradients.append(torch.autograd.grad(loss, list(flow.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < kept[0] / 2


def test_training_approaches_a_known_density():
    """x1, x2 correlated around a mean that the context gives: the loss falls to their entropy."""
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.3]])
    entropy = 1 + math.log(2 * math.pi) + math.log(0.3)
    flow = ConditionalFlow(2, 1, hidden=32, num_blocks=1, base='multivariate_normal')
    optimizer, losses = torch.optim.Adam(flow.parameters(), lr=2e-2), []
    for _ in range(120):
        context = torch.randn(256, 1)
        loss = -flow.log_prob(context + torch.randn(256, 2) @ factor.T, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > entropy + 1 and sum(losses[-10:]) / 10 == approx(entropy, abs=0.15)
    drawn = flow.sample(torch.full((4000, 1), 0.5))
    assert torch.allclose(drawn.mean(0), torch.tensor([0.5, 0.5]), atol=0.2)
    # 0.15 nats allow standard deviations that are off by a third: KL is about (ratio - 1)^2.
    assert torch.allclose(drawn.T.cov(), factor @ factor.T, atol=0.4)


def published(model, **base):
    """The weights of a model under their published names, with such parameters of the base distribution."""
    layers = len(model.flow.layers)
    weights = {official_name(name, layers): value for name, value in model.state_dict().items()
               if not name.startswith(('score_model.', 'flow.base.'))}
    return weights | {prefix + name: value for name, value in base.items() for prefix in (BASE, 'flow.q0.')}


@torch.no_grad()
def test_published_flows_with_a_full_and_a_standard_normal_as_base():
    model = build(base_distribution='multivariate_normal')
    mean, diagonal = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 0.5, -1.0, 2.0])
    below = torch.arange(6.0) - 2
    weights = published(model, mean=mean, cov_diag=diagonal, cov_factor=below)
    model.load_state_dict(from_official(model, weights))
    factor = torch.diag(torch.nn.functional.softplus(diagonal.double() + 1e-5))
    for value, cell in zip(below, [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)], strict=True):
        factor[cell] = value
    base = model.flow.base()
    assert torch.allclose(base.scale_tril, factor, rtol=0, atol=1e-12)
    assert torch.equal(base.loc, mean.double())
    model = build(base_distribution='standard')
    zeros = torch.zeros(1, 4)
    changed = {name: value + 1 for name, value in published(model).items()}
    loaded = from_official(model, changed | published(model, loc=zeros, log_scale=zeros) | changed)
    assert all(torch.equal(loaded[name], value + 1) for name, value in model.state_dict().items()
               if not name.startswith('score_model.'))
    with pytest.raises(UserError, match='left over'):
        from_official(model, published(model, loc=zeros + 1, log_scale=zeros))


# ----------------------------------------------------------------------------------- what it sees of an image

def test_pooled_norms_and_codes_by_hand():
    ones = pool(torch.full((1, 1, 3, 3), 2.0), 3)[0, 0]
    assert torch.allclose(ones.square(), 4.0 * torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]))
    assert pool(torch.ones(1, 1, 3, 3, 3), 3)[0, 0, 1, 1, 1].item() == approx(math.sqrt(27))
    code = PositionCode(6, (2, 3))                           # 4 numbers an axis: frequencies 1 and 1/100
    row, column = torch.tensor([1.0, 0.01]), torch.tensor([2.0, 0.02])                         # of voxel 5
    expected = [*torch.stack([row.sin(), row.cos()], 1).flatten(),
                *torch.stack([column.sin(), column.cos()], 1).flatten()]
    assert torch.allclose(code(torch.tensor([5]))[0], torch.stack(expected)[:6])


def test_foreground():
    x = images(1)
    assert foreground(x).sum() == 16 and foreground(x)[0, 0, 2:6, 2:6].all()
    x[0, 1, 0, 0] = 0.5
    assert foreground(x)[0, 0, 0, 0], 'in any channel'
    assert foreground(torch.ones(2, 1, 4, 4)).all(), 'of an even image, all'


@torch.no_grad()
@pytest.mark.parametrize('shape', [(2, 8, 8), (1, 8, 4, 8)])
def test_heat_maps(shape):
    """Images alone, in a batch, in chunks: the same; outside the foreground the least of the inside."""
    border = 1 if len(shape) == 4 else 2
    model, x = build(shape), images(3, shape, border)
    heat, inside = model.voxel_nll(x), model.foreground(x)
    assert heat.shape == (3, 1, *shape[1:]) and 0 < inside.sum() < inside.numel()
    assert torch.allclose(model.voxel_nll(x[1:2]), heat[1:2])
    assert torch.allclose(build(shape, patch_batch_size=10 ** 6).voxel_nll(x), heat)
    for image, within in zip(heat, inside):
        assert (image[~within] == image[within].min()).all() and image[within].unique().numel() > 10
    changed = x.clone()
    changed[0] *= 0.5
    assert not torch.allclose(model.voxel_nll(changed)[0], heat[0])
    # The loss at temperature 0, and that of random voxels if these are all: means over the foreground.
    means = torch.stack([image[within].mean() for image, within in zip(heat, inside)])
    assert torch.allclose(model(x, temperature=0)['loss'], means)
    everything = build(shape, patches_per_step=10 ** 6)
    assert torch.allclose(everything(x)['loss'], means)
    assert not torch.allclose(build(shape, patches_per_step=3)(x)['loss'], means)


@torch.no_grad()
def test_kept_maps_are_the_same_and_are_kept_once(monkeypatch):
    model, plain, x = build(), build(cache_maps=False), images()
    passes = []
    score_maps = model.score_model.score_maps
    monkeypatch.setattr(model.score_model, 'score_maps',
                        lambda x, **levels: passes.append(1) or score_maps(x, **levels))
    heat = model.voxel_nll(x)
    assert torch.equal(heat, plain.voxel_nll(x)) and len(passes) == 3
    # Kernels may sum the rows of a batch in an order that depends on their place.
    torch.testing.assert_close(model.voxel_nll(x.flip(0)).flip(0), heat)
    assert len(passes) == 3
    # 4 maps of 8 x 8 in float64 are 2 kB; one image fits into the memory
    assert model.cache.used == 3 * 4 * 64 * 8
    model.cache.clear()
    model.cache.limit = 3000
    assert torch.equal(model.voxel_nll(x), heat) and len(passes) == 6
    assert torch.equal(model.voxel_nll(x), heat) and len(passes) == 8
    model.score_model.load_state_dict(model.score_model.state_dict())
    assert not model.cache.memory, 'other weights may have come'


@torch.no_grad()
def test_scores():
    """voxel_nll: the mean of the highest 1 %, at least one voxel; norms are those of the score model."""
    model, x = build(), images(2)
    scores, _ = choose_scores(('all',), model)
    names = [s.name for s in scores]
    assert names[0] == 'msma_gmm' and names[-2:] == ['voxel_nll', 'voxel_nll_mean']
    outputs = Outputs(model, x)
    heat, inside = model.voxel_nll(x).float(), model.foreground(x)
    top, mean = (score.image(outputs) for score in scores[-2:])
    for i in range(2):
        assert top[i].item() == approx(heat[i].max().item(), rel=1e-6)
        assert mean[i].item() == approx(heat[i][inside[i]].mean().item(), rel=1e-6)
    assert torch.equal(scores[-2].map(outputs).float(), heat) and scores[-1].map is None
    assert torch.equal(model.score_norms(x, number=3), model.score_model.score_norms(x, number=3))
    assert torch.equal(model.score_maps(x, number=3), model.score_model.score_maps(x, number=3))
    # One level alone and three side by side are batches of other sizes, which kernels sum in other orders.
    torch.testing.assert_close(model.score_norm(x, 1, number=3), model.score_norms(x, number=3)[:, 1])


# ------------------------------------------------------------------------------------------------ in the loop

@pytest.mark.parametrize('flags, told', [
    ({'score_model': ''}, 'needs --score_model'), ({'score_model': '{}'}, '--score_model: a JSON object'),
    ({'msma_levels': 1}, 'at least 2'), ({'local_patch_kernel': 4}, 'odd'),
    ({'global_embedding_size': 12}, 'multiple of 8'), ({'base_distribution': 'gamma'}, 'choose one of'),
    ({'msma_max_timestep': 2.0}, 'at most 1 and above 0')])
def test_wrong_flags_are_said_in_one_line(flags, told):
    with pytest.raises(UserError, match=told) as error:
        build(**flags)
    assert '\n' not in str(error.value)


def test_a_score_model_of_another_size_is_refused():
    with pytest.raises(UserError, match='images of 16 x 16, and a --score_model of 8 x 8'):
        SpatialMSMA((2, 16, 16), build().config)


@torch.no_grad()
def test_standard_features_change_the_scale_alone():
    """Of mean 0 and variance 1 in the foreground of the first batch; densities are those of the features."""
    plain, model, x = build(), build(standardize=True), images()
    model.initialize(x)
    features, inside = model.features(x), foreground(x)[:, 0]
    rows = features.movedim(1, -1)[inside]
    torch.testing.assert_close(model.feature_mean, rows.mean(0))
    torch.testing.assert_close(model.feature_std, rows.std(0, correction=0))
    voxels, code = torch.arange(20, 40), model.image_code(x)
    standard = (features - rows.mean(0)[:, None, None]) / rows.std(0, correction=0)[:, None, None]
    torch.testing.assert_close(model.log_prob(features, code, voxels) + model.feature_std.log().sum(),
                               plain.log_prob(standard, code, voxels))
    assert model.state_dict().keys() - plain.state_dict().keys() == {'feature_mean', 'feature_std'}


def test_training_stands_on_a_frozen_run_and_resumes_to_the_bit(train_flags, tmp_path, same_weights):
    """With the averaged weights of the score model; --init_from reads a run."""
    from families.score.config import ScoreModelConfig
    from families.score.model import ScoreModel
    torch.manual_seed(3)
    score = ScoreModel((1, 16, 16), ScoreModelConfig(**SMALL, init_scale=1.0), Pixels())
    other = ScoreModel((1, 16, 16), score.config, Pixels())
    save_checkpoint(tmp_path / 'score' / 'checkpoint.pt', {
        'description': describe(score), 'weights': other.state_dict(), 'ema': score.state_dict(), 'args': {}})
    flags = ['--model', 'spatial_msma', '--score_model', str(tmp_path / 'score'),
             *(word for name, value in FLAGS.items() for word in (f'--{name}', str(value))),
             *train_flags[train_flags.index('--dataset'):], '--warmup_epochs', '0']
    whole = run(flags, tmp_path, 'whole')
    run(flags, tmp_path, 'parts', '--max_steps', '3')
    parts = run(flags, tmp_path, 'parts', '--cont_training')
    assert same_weights(whole / 'checkpoint.pt', parts / 'checkpoint.pt')
    (tmp_path / 'score' / 'checkpoint.pt').unlink()
    model, x = load_model(whole), torch.rand(2, 1, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.score_model.state_dict().values(),
                                                 score.state_dict().values()))
    assert not any(p.requires_grad for p in model.score_model.parameters())
    assert not model.train().score_model.training and model.flow.training
    saved = read_checkpoint(whole)
    assert saved['ema_count'] == 9 and any(
        not torch.equal(saved['ema'][name], value) for name, value in saved['weights'].items())
    order = 'flow.layers.1.permutation'
    assert torch.equal(saved['ema'][order], saved['weights'][order]), 'copied, not averaged'

    fresh = place(SpatialMSMA((1, 16, 16), model.config), 'cpu')
    fresh.load_weights(whole)
    assert torch.equal(fresh.eval().voxel_nll(x), model.eval().voxel_nll(x))
