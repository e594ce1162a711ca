"""Layers and likelihoods of HVAE, LVAE and BIVA, against answers worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from small_hvae import BINARY, GREY, block, build, dense, images

from distributions import DiscretizedLogisticMixture, Pixels
from families.hvae.config import Block, HVAEConfig
from families.hvae.layers import Conv, Dense, ResBlock, UpConv, same_padding, skip_layer
from families.hvae.likelihoods import (
    LIKELIHOODS,
    DiscretizedLogistic,
    PixelBeta,
    PixelNormal,
    PublishedMixture,
)
from families.hvae.model import BIVA
from families.hvae.official import to_official
from utils import UserError


def test_same_padding_worked_by_hand():
    x = torch.tensor([[[[1.0, 2, 3, 4]]]]).expand(1, 1, 4, 4)
    row = same_padding(x, kernel=3, stride=2)[0, 0, 1]
    assert row.tolist() == [1, 2, 3, 4, 0]                  # one zero in all: right, none left
    assert same_padding(x, kernel=4)[0, 0, 2].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert same_padding(x, kernel=2, stride=2).shape == same_padding(x, kernel=1, stride=2).shape == x.shape
    layer = Conv(1, 1, 3, stride=2, weightnorm=False)
    torch.nn.init.ones_(layer.w)
    assert layer(x)[0, 0].tolist() == [[18, 21], [12, 14]]    # 3 (1 + 2 + 3), 3 (3 + 4); below, 2 rows


@pytest.mark.parametrize('kernel', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('weightnorm', [True, False])
def test_convolutions_of_stride_1_agree_with_torch(kernel, weightnorm):
    torch.manual_seed(0)
    layer, x = Conv(2, 3, kernel, weightnorm=weightnorm), torch.randn(2, 2, 5, 6)
    before = (kernel - 1) // 2
    padded = F.pad(x, (before, kernel - 1 - before) * 2)       # what torch calls 'same'
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.weight(), layer.bias))


def test_transposed_convolution_worked_by_hand():
    layer = UpConv(1, 1, 3, stride=2, weightnorm=False)
    layer.w.data[0, 0] = torch.outer(torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 10, 100]))
    # 1 x (1, 10, 100), and two further 2 x the same: 1 10 102 20 200, of which one is cut off on the right
    assert layer(torch.tensor([[[[1.0, 2]]]]))[0, 0].tolist() == [[1, 10, 102, 20], [0, 0, 0, 0]]
    five = UpConv(1, 1, 5, stride=2, weightnorm=False)
    five.w.data[0, 0] = torch.outer(torch.tensor([0.0, 1, 0, 0, 0]), torch.arange(5.0))
    assert five(torch.ones(1, 1, 1, 1))[0, 0].tolist() == [[1, 2], [0, 0]]         # 1 left, 2 right cut off


@pytest.mark.parametrize('layer, axis', [(Conv(3, 4, 3), 0), (UpConv(3, 4, 3, 2), 1),
                                         (Dense((3, 5, 5), (4,)), 0)])
def test_weight_normalization(layer, axis):
    layer.g.data = torch.arange(1.0, 5).view_as(layer.g)
    norms = layer.weight().transpose(0, axis).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.arange(1.0, 5))
    layer.v.data *= 7
    torch.testing.assert_close(layer.weight().transpose(0, axis).flatten(1).norm(dim=1), norms)


@pytest.mark.parametrize('layer', [Conv(3, 4, 3, 2), UpConv(3, 4, 5, 2), Dense((3, 6, 6), (4, 1, 1)),
                                   Conv(3, 4, 3, mode='nearest', scale=2)])
def test_data_dependent_initialization_gives_mean_0_and_variance_1(layer):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(8, 3, 6, 6)
    layer.initializing = True
    layer(x)
    y = layer.apply_weight(x, layer.weight(), layer.bias).transpose(0, 1).flatten(1)   # uncropped
    torch.testing.assert_close(y.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1), torch.ones(4), atol=1e-4, rtol=0)


def test_initialization_happens_once_and_never_in_an_evaluation():
    model = build(initialized=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model(images(model)), model.sample(2), model.reconstruct(images(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.initialize(images(model, 16))
    after = {k: v.clone() for k, v in model.state_dict().items()}
    assert after['data_initialized'] and sum(not torch.equal(v, before[k]) for k, v in after.items()) > 20
    loaded = build(initialized=False)
    loaded.load_state_dict(after)
    for again in (model, loaded):
        again.initialize(images(model, 16, seed=2))
        assert all(torch.equal(v, after[k]) for k, v in again.state_dict().items())


def test_layers_are_initialized_on_what_the_initialized_layers_below_give():
    """Afterwards not only the first convolution has outputs of mean 0 and variance 1."""
    model = build(initialized=False, compat_official=True)
    x, seen = images(model, 32), {}
    hooks = [(name, module) for name, module in model.named_modules() if type(module) is Conv]
    model.initialize(x)
    for name, module in hooks:
        module.register_forward_hook(lambda _, __, y, name=name: seen.setdefault(name, y))
    with torch.no_grad():
        model(x)
    first = seen['stages.0.encode.1.conv1'].transpose(0, 1).flatten(1)
    torch.testing.assert_close(first.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(first.var(1), torch.ones(4), atol=1e-3, rtol=0)


def test_a_single_image_leaves_dense_layers_as_they_are():
    model = build(initialized=False)
    model.initialize(images(model, 1))
    assert all(p.isfinite().all() for p in model.parameters())
    assert (model.stages[2].latent.to_posterior.g == 1).all()


def resblock(shape, channels=2, stride=1, gate=False, **more):
    torch.manual_seed(0)
    return ResBlock(shape, Block(channels, 3, stride, gated=gate), HVAEConfig(), **more)


def test_residual_block_worked_by_hand():
    x = torch.arange(1.0, 9).view(1, 2, 2, 2)
    for shape, channels, wanted in (((2, 2, 2), 2, x), ((2, 2, 2), 1, x[:, :1]),
                                    ((2, 2, 2), 3, torch.cat([x, torch.zeros(1, 1, 2, 2)], 1))):
        layer = resblock(shape, channels)
        layer.conv2.g.data.zero_()                          # leaves the shortcut
        torch.testing.assert_close(layer(x), wanted)
        layer.conv2.bias.data.fill_(2)
        torch.testing.assert_close(layer(x), wanted + 2)
    pooled = resblock((2, 2, 2), 2, stride=2)
    pooled.conv2.g.data.zero_()
    assert pooled(x).flatten().tolist() == approx([10 / 9, 26 / 9])       # zeros of the padding count
    bare = resblock((2, 2, 2), 2, residual=False)
    bare.conv2.g.data.zero_()
    assert (bare(x) == 0).all()
    grown = resblock((2, 2, 2), 2, stride=2, up=True)
    grown.conv2.g.data.zero_()
    assert grown(x).shape == (1, 2, 4, 4) and (grown(x) == 0).all()       # no shortcut
    gate = resblock((2, 2, 2), 2, gate=True, residual=False)
    gate.conv2.g.data.zero_()
    gate.conv2.bias.data = torch.tensor([3.0, 4, 0, math.log(3)])
    assert gate(x)[0, :, 0, 0].tolist() == approx([3 * 0.5, 4 * 0.75])


@pytest.mark.parametrize('skip, kind, kernel, stride', [
    ((4, 8, 8), Conv, 3, 2), ((4, 2, 2), UpConv, 3, 2), ((5, 4, 4), Conv, 1, 1), ((4, 4, 4), None, 0, 0)])
def test_skip_layers(skip, kind, kernel, stride):
    layer = skip_layer(skip, (4, 4, 4), 3, 'convolutional', revives=False)
    assert layer is None if kind is None else type(layer) is kind
    if layer is not None:
        assert layer.v.shape[-1] == kernel and layer.stride == stride
        assert layer(torch.zeros(1, *skip)).shape == (1, 4, 4, 4)
    assert skip_layer((4, 4, 4), (4, 4, 4), 3, 'convolutional', revives=True).v.shape == (4, 4, 1, 1)


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for recomputes in (False, True):
        model = build(BIVA, q_dropout=0.2).train()
        for module in model.modules():
            if hasattr(module, 'recomputes'):
                module.recomputes = recomputes
        torch.manual_seed(1)
        model.objective(model(images(model)), 1.0)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ likelihoods

@pytest.mark.parametrize('name', [name for name in LIKELIHOODS if name != 'auto'])
@pytest.mark.parametrize('compat', [False, True])
def test_every_likelihood(name, compat):
    kind = LIKELIHOODS[name]
    pixels = BINARY if kind.pixels == 'bernoulli' else GREY
    blocks = [[block(3), block(3, stride=2)]]
    model = build(shape=(3, 8, 8), pixels=pixels, likelihood_module=name, blocks=blocks, latents=[dense(3)],
                  compat_official=compat)
    x = images(model).clamp(1 / 255, 254 / 255) if name.startswith('Beta') else images(model)
    with torch.no_grad():
        terms, drawn = model(x), model.sample(2)
    assert terms['recon'].isfinite().all()
    assert drawn.shape == (2, 3, 8, 8) and 0 <= drawn.min() <= drawn.max() <= 1
    layer = {'identity': None, 'dense': 'linear', 'pointwise': 'linear'}.get(kind.layer, 'conv')
    wanted = {f'likelihood.parameter_net.{layer}.{leaf}' for leaf in ('bias', 'weight_v', 'weight_g')}
    assert {n for n in to_official(model) if n.startswith('likelihood')} == (wanted if layer else set())


def all_levels():
    return torch.arange(256.0).view(256, 1, 1, 1) / 255


def test_discretized_logistic():
    torch.manual_seed(0)
    likelihood, logits = DiscretizedLogistic(1), torch.tensor([0.1, -1.5]).view(1, 2, 1, 1)
    p = likelihood.log_prob(logits.expand(256, -1, -1, -1), all_levels()).exp().flatten()
    assert p.sum().item() == approx(1 + 256e-7, rel=1e-5)
    s = math.exp(-2.5)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    mass = sigmoid((101 / 256 - 0.6) / s) - sigmoid((100 / 256 - 0.6) / s)
    assert p[100].item() == approx(mass + 1e-7, rel=1e-4)
    assert p[0].item() == approx(sigmoid((1 / 256 - 0.6) / s) + 1e-7, rel=1e-3)
    mean = likelihood.sample(logits.expand(20000, -1, -1, -1)).mean().item()
    assert mean == approx((p * torch.arange(256) / 255).sum().item(), abs=0.01)


def test_published_mixture_is_the_exact_one_on_the_grid_where_levels_hold_enough():
    torch.manual_seed(0)
    logits = 0.5 * torch.randn(256, 100, 1, 1)
    x = torch.cat([all_levels(), all_levels().flip(0), (all_levels() * 255 * 7 % 256) / 255], dim=1)
    exact = DiscretizedLogisticMixture(3, 8, 10).log_prob(logits, x)
    torch.testing.assert_close(PublishedMixture(3).log_prob(logits, x), exact, rtol=1e-3, atol=1e-3)
    # Off the grid the bin is centred on x: a single wide logistic has nearly its density times the width.
    wide = torch.zeros(1, 100, 1, 1)
    for channel in range(3):
        wide[:, 10 + 30 * channel + 10:10 + 30 * channel + 20] = -1.0                    # log-scales
    value = PublishedMixture(3).log_prob(wide, torch.full((1, 3, 1, 1), 0.5003)).item()
    assert value == approx(3 * (1.0 - math.log(4) - math.log(127.5)), abs=1e-4)


def test_densities_agree_with_torch():
    torch.manual_seed(0)
    logits, x = torch.randn(4, 2, 3, 3), 0.1 + 0.8 * torch.rand(4, 1, 3, 3)
    normal = torch.distributions.Normal(logits[:, :1], torch.log1p(2 ** logits[:, 1:]) / math.log(2))
    torch.testing.assert_close(PixelNormal(1).log_prob(logits, x), normal.log_prob(x))
    beta = torch.distributions.Beta(F.softplus(logits[:, :1]), F.softplus(logits[:, 1:]))
    torch.testing.assert_close(PixelBeta(1, None).log_prob(logits, x), beta.log_prob(x))
    ends = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert PixelBeta(1, 8).log_prob(torch.zeros(2, 2, 1, 1), ends).isfinite().all()


@pytest.mark.parametrize('options, told', [
    ({'likelihood_module': 'BernoulliLikelihoodConv2d', 'pixels': GREY}, 'bernoulli, these have discretized'),
    ({'likelihood_module': 'GaussianLikelihoodConv2d'}, 'discretized, these have bernoulli'),
    ({'likelihood_module': 'DiscretizedLogisticMixLikelihoodConv2d', 'pixels': GREY},
     'channels 3, these have 1'),
    ({'compat_official': True, 'pixels': Pixels(bits=5)}, 'bits a pixel 8, these have 5'),
    ({'likelihood_module': 'BernoulliLikelihoodIdentity'}, 'they have 4 channels, the image 1'),
])
def test_a_likelihood_that_does_not_suit_is_refused(options, told):
    with pytest.raises(UserError, match=told):
        build(initialized=False, **options)
