"""The networks: published sizes, one layout in 2D and 3D, what each block and each noise level does."""

import dataclasses
import json
import math

import pytest
import torch
from pytest import approx
from small_score import SMALL, build

from distributions import Pixels
from families.score.config import ScoreModelConfig
from families.score.model import ScoreModel
from families.score.official import from_official, read_weights, to_official
from families.score.unet import Fourier, Positional, SelfAttention, conv, double
from model import describe
from neural_operations import activation_bytes, checkpoint_activations
from storage.checkpoint import save_checkpoint
from utils import UserError

VARIANTS = {
    'biggan': {}, 'attention': {'self_attention': True, 'nf': 16},
    'positional': {'embedding_type': 'positional'},
    'frozen_embedding': {'learnable_embedding': False}, 'plain_biggan': {'resblock_pp': False},
    'segresnet': {'resblock_type': 'segresnet', 'dilation': 2, 'act': 'elu'},
    'segresnet_plain': {'resblock_type': 'segresnet', 'resblock_pp': False}, 'vp': {'sde': 'vpsde'},
    'wide': {'conv_size': 5, 'act': 'lrelu', 'dropout': 0.5},
    'unscaled': {'scale_by_sigma': False, 'act': 'relu'},
}
INNER = json.dumps(SMALL | {'image_size': [4, 4]})


@pytest.mark.parametrize('flags, number', [
    ({'nf': 8, 'blocks_down': (1, 2, 1), 'blocks_up': (1, 1), 'norm_num_groups': 2, 'time_embedding_sz': 32,
      'resblock_pp': False, 'learnable_embedding': False}, 172_770), ({}, 43_986_722)])
def test_published_numbers_of_parameters(flags, number):
    with torch.device('meta'):
        model = ScoreModel((2, 96, 112, 80), ScoreModelConfig(**flags), Pixels())
    assert sum(p.numel() for p in model.parameters()) == number


@torch.no_grad()
@pytest.mark.parametrize('variant', VARIANTS)
def test_2d_and_3d_are_one_network(variant):
    """Same names; filters that look at the middle slice only make each slice of a volume an image."""
    flat, deep = build((2, 8, 8), **VARIANTS[variant]), build((2, 4, 8, 8), **VARIANTS[variant])
    own, theirs = flat.network.state_dict(), deep.network.state_dict()
    assert own.keys() == theirs.keys()
    for name, weight in theirs.items():
        if weight.ndim == 5:
            weight.zero_()
            # a stride of 2 keeps every second slice, and doubling brings it back: all slices are alike
            weight[:, :, weight.shape[2] // 2] = own[name]
        else:
            weight.copy_(own[name])
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.5, 7.0], dtype=torch.float64)
    volume = deep.network(x.unsqueeze(2).expand(-1, -1, 4, -1, -1), sigma)
    assert volume.shape == (2, 2, 4, 8, 8)
    torch.testing.assert_close(volume, flat.network(x, sigma).unsqueeze(2).expand_as(volume))


@torch.no_grad()
def test_scale_by_sigma_divides_the_output():
    x, sigma = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    scaled, plain = (build(scale_by_sigma=scale).network(x, sigma) for scale in (True, False))
    torch.testing.assert_close(scaled * sigma.reshape(2, 1, 1, 1), plain)
    assert not build(sde='vpsde').network.divide_by_sigma, 'there the output is the noise'


def test_untrained_networks_put_out_nearly_nothing():
    for flags in ({}, {'resblock_type': 'segresnet'}, {'self_attention': True, 'nf': 16}):
        model = ScoreModel((1, 8, 8), ScoreModelConfig(**SMALL | flags), Pixels())
        assert model.network(torch.randn(2, 1, 8, 8), torch.ones(2)).abs().max() < 1e-4
    plain = ScoreModel((1, 8, 8), ScoreModelConfig(**SMALL | VARIANTS['segresnet_plain']), Pixels())
    assert plain.network(torch.randn(2, 1, 8, 8), torch.ones(2)).abs().max() > 0.01, "torch's own weights"


def test_initial_weights_have_the_variance_of_their_fans():
    torch.manual_seed(0)
    layer = conv(3, 16, 48, 3, scale=0.5)
    assert layer.weight.var().item() == approx(0.5 / ((16 + 48) / 2 * 27), rel=0.05)
    assert (layer.bias == 0).all() and conv(2, 4, 4, 3, scale=0.0).weight.abs().max() < 1e-4


def test_fourier_features_and_positions_worked_by_hand():
    fourier = Fourier(2, 1.0, False)
    fourier.W.data = torch.tensor([0.0, 0.25])
    # log sigma = 1: angles 0 and pi / 2
    assert torch.allclose(fourier(torch.tensor([math.e])), torch.tensor([[0.0, 1.0, 1.0, 0.0]]), atol=1e-6)
    angles = torch.tensor([3.0, 3e-4])
    assert torch.allclose(Positional(2)(torch.tensor([3.0])), torch.cat([angles.sin(), angles.cos()])[None])


def test_doubling_is_linear_inside():
    ramp = torch.arange(4.0).reshape(1, 1, 4, 1).expand(1, 1, 4, 4)
    assert torch.allclose(double(ramp)[0, 0, 1:7, 0], torch.tensor([0.25, 0.75, 1.25, 1.75, 2.25, 2.75]))


@torch.no_grad()
def test_attention_is_the_softmax_of_its_formula():
    layer = SelfAttention(3, 8).double()
    x = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)                                # (B, C, P)
    weights = torch.softmax(torch.einsum('bcp,bcq->bpq', q, k) / math.sqrt(8), dim=2)
    expected = x + layer.proj(torch.einsum('bpq,bcq->bcp', weights, v).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected)


# ------------------------------------------------------------------------------------------------ matryoshka

@torch.no_grad()
@pytest.mark.parametrize('size', [(8, 12), (4, 8, 12)])
def test_the_outer_level_starts_as_a_frame_around_the_inner_one(size):
    """At the start the outer path is 0, so the inner network sees averages of 3 x 3 pixels at more noise."""
    inner_size = tuple(n // 2 + 2 for n in size)
    inner = json.dumps(SMALL | {'image_size': inner_size, 'init_scale': 1.0})
    model = ScoreModel((1, *size), ScoreModelConfig(**SMALL, inner_model=inner), Pixels()).double()
    seen = {}
    model.network.inner.register_forward_pre_hook(
        lambda module, inputs: seen.update(x=inputs[0], sigma=inputs[1]))
    x, sigma = torch.ones(1, 1, *size, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    model.network(x, sigma)
    assert seen['x'].shape[2:] == inner_size
    ratio = math.prod(inner_size) / math.prod(n // 2 for n in size)
    assert seen['sigma'].item() == approx(2 * math.sqrt(ratio)) and ratio != 1
    # 2 of 3 pixels of a window at the border are inside on each axis
    assert seen['x'].flatten()[0].item() == approx((2 / 3) ** len(size), abs=1e-4)
    assert seen['x'].flatten()[-1].item() == approx(1, abs=1e-4)


def test_a_frozen_inner_network_does_not_learn():
    for trainable in (False, True):
        model = ScoreModel((1, 8, 8), ScoreModelConfig(
            **SMALL, inner_model=INNER, trainable_inner_model=trainable), Pixels())
        model(torch.rand(4, 1, 8, 8))['loss'].mean().backward()
        assert all((p.grad is not None) == trainable for p in model.network.inner.parameters())
        assert all(p.grad is not None for name, p in model.network.named_parameters() if name[:5] != 'inner')


def test_what_an_inner_model_cannot_be():
    nested = json.dumps(SMALL | {'image_size': [4, 4], 'inner_model': INNER})
    with pytest.raises(UserError, match='itself a matryoshka'):
        ScoreModelConfig(inner_model=nested)
    with pytest.raises(UserError, match='as many axes'):
        ScoreModel((1, 4, 8, 8), ScoreModelConfig(**SMALL, inner_model=INNER), Pixels())


# ---------------------------------------------------------------------------------------- published weights

@torch.no_grad()
@pytest.mark.parametrize('averages', [True, False])
@pytest.mark.parametrize('learnable', [True, False])
def test_published_checkpoints_and_ours_are_read(learnable, averages, tmp_path):
    """Averages are a list of trained weights in the order of the published modules."""
    last, average = (build(seed=seed, learnable_embedding=learnable, self_attention=True, nf=16).float()
                     for seed in (0, 1))
    if not learnable:                                   # frequencies that are not trained have no average
        average.network.embedding.features.W.copy_(last.network.embedding.features.W)
    if averages:
        published = {f'module.{name}': value for name, value in to_official(last.network).items()}
        shadow = [p for p in average.network.parameters() if p.requires_grad]
        content = {'model': published | {'module.sigmas': torch.ones(4)}, 'step': 3, 'optimizer': {},
                   'ema': {'decay': 0.9999, 'num_updates': 3, 'shadow_params': shadow}}
    else:
        content = {'description': describe(last), 'weights': last.state_dict(), 'ema': average.state_dict()}
    save_checkpoint(tmp_path / 'c.pt', content)
    read = read_weights(tmp_path / 'c.pt', last.network)
    expected = average.network.state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[k], expected[k]) for k in read)


@pytest.mark.parametrize('variant', ['biggan', 'segresnet', 'segresnet_plain', 'attention'])
def test_weights_that_do_not_fit_are_named(variant):
    network = build(**VARIANTS[variant]).network
    good = to_official(network)
    assert from_official(network, good).keys() == network.state_dict().keys()
    for bad, told in ((good | {'extra': torch.zeros(1)}, r"1 left over \['extra'\]"),
                      (dict(list(good.items())[1:]), r"1 missing \['convInit.conv.weight'\]"),
                      (good | {'convInit.conv.weight': torch.zeros(1)}, r'has the shape \(1,\)')):
        with pytest.raises(UserError, match=told):
            from_official(network, bad)


def test_files_that_hold_something_else(tmp_path):
    network = build().network
    save_checkpoint(tmp_path / 'a.pt', {'weights': {}, 'description': {}, 'ema': None})
    save_checkpoint(tmp_path / 'b.pt', {'net': 1})
    save_checkpoint(tmp_path / 'c.pt', {'model': to_official(network), 'ema': {'shadow_params': []}})
    for file, told in (('a', 'do not fit'), ('b', r"keys are \['net'\]"), ('c', '0 averaged weights')):
        with pytest.raises(UserError, match=told):
            read_weights(tmp_path / f'{file}.pt', network)
    with pytest.raises(UserError, match='not a checkpoint of one of our score models'):
        ScoreModelConfig(inner_model=str(tmp_path / 'b.pt'))


# ---------------------------------------------------------------------------------------------------- memory

def test_recomputed_blocks_give_the_same_gradients_for_less_memory():
    model, gradients = build(blocks_down=(2, 2)), []
    for on in (False, True):
        checkpoint_activations(model, on)
        model.zero_grad()
        torch.manual_seed(0)
        model(torch.rand(3, 1, 8, 8, dtype=torch.float64))['loss'].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    deep = ScoreModel((1, 4, 8, 8), ScoreModelConfig(**SMALL | {'blocks_down': (6, 2)}), Pixels())
    plain, recomputed = (activation_bytes(deep, deep.shape, on) for on in (False, True))
    assert 0 < recomputed < plain


def test_flags_have_the_published_defaults():
    c = dataclasses.asdict(ScoreModelConfig())
    assert (c['nf'], c['blocks_down'], c['blocks_up'], c['norm_num_groups'], c['time_embedding_sz'], c['snr'],
            c['num_scales']) == (24, (2, 2, 2, 2, 4), (1, 1, 1, 1), 8, 64, 0.17, 2000)
