"""Configurations of HVAE, LVAE and BIVA: read, refused with a reason, and the published ones."""

import json
from dataclasses import replace

import pytest
import torch
from small_hvae import BINARY, BLOCKS, GREY, LATENTS, UNEQUAL, block, build, config, dense

from distributions import Pixels
from families.hvae.config import HVAEConfig
from families.hvae.model import BIVA, HVAE, LVAE
from utils import UserError


@pytest.mark.parametrize('blocks, latents, told', [
    ([[block(), block() | {'strid': 1}]], [dense(2)],
     r"stage 1, block 2 \(ResBlockConv2d\): unknown key 'strid'"),
    ([[block()], [{'block': 'ResBlockConv2d', 'kernel_size': 3}]], [dense(2)] * 2,
     r"stage 2, block 1 \(ResBlockConv2d\): the key 'out_channels' is missing"),
    ([[block(channels=4.0)]], [dense(2)], "'out_channels' is 4.0; expected a whole number"),
    ([[block(channels=True)]], [dense(2)], "'out_channels' is true; expected a whole number"),
    ([[block(gated=1)]], [dense(2)], "'gated' is 1; expected true or false"),
    ([[block(stride=0)]], [dense(2)], "'stride' is 0; it must be at least 1"),
    ([[block(upsampling_mode='cubic')]], [dense(2)], "'upsampling_mode' is 'cubic'; known are convolutional"),
    ([[block() | {'block': 'Conv2d'}]], [dense(2)],
     "stage 1, block 1: 'block' is \"Conv2d\"; known are ResBlock"),
    ([[block()]], [dense(2) | {'block': 'Laplace'}],
     'config_stochastic, stage 1: .*"Laplace"; known are Gaussian'),
    ([[block()]], [{'block': 'GaussianDense'}],
     r"stage 1 \(GaussianDense\): the key 'latent_features' is missing"),
    ([[block()]], [dense(2, kernel_size=3)], "unknown key 'kernel_size'"),
    ([[block()], [block()]], [dense(2)], 'config_deterministic has 2 stages and --config_stochastic 1'),
    ([[]], [dense(2)], 'stage 1 is .*expected a list with at least one entry'),
    ({'a': 1}, [dense(2)], '--config_deterministic is .*expected a list'),
    ([['ResBlockConv2d']], [dense(2)], "stage 1, block 1 is .*expected an object"),
])
def test_a_wrong_configuration_is_named(blocks, latents, told):
    with pytest.raises(UserError, match=told) as error:
        config(blocks, latents)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('options, told', [
    ({'blocks': [[block(stride=2)], [block(stride=2)], [block(stride=2)], [block(stride=2)]],
      'latents': [dense(2)] * 4}, 'stage 4, block 1: its stride 2 does not divide features of 1 x 1'),
    ({'blocks': [[block(kernel=1, stride=2)]], 'latents': [dense(2)]},
     'stride 2 is larger than its kernel_size 1'),
    (UNEQUAL['channels'] | {'compat_official': True}, r'shape \(4, 4, 4\) and is handed \(3, 4, 4\)'),
    ({'shape': (1, 8, 8, 8)}, r'reads images \(C, H, W\)'),
])
def test_impossible_networks_are_explained(options, told):
    with pytest.raises(UserError, match=told):
        build(initialized=False, **options)


@pytest.mark.parametrize('flags, told', [
    ({'config_deterministic': '[[{'}, 'is not JSON'), ({'config_deterministic': 'lost.json'}, 'no such file'),
    ({'config_stochastic': 'x' * 5000}, 'no such file'),
    ({'activation': 'GELU'}, 'choose one of Identity'),
    ({'likelihood_module': 'Poisson'}, 'choose one of auto'),
    ({'q_dropout': 1.0}, 'at most 0.99'), ({'free_nats': -1.0}, 'at least 0'),
    ({'padded_shape': (8,)}, 'two numbers'), ({'train_samples': 0}, 'at least 1'),
    ({'train_importance_weighted': True}, 'give 2 or more'),
])
def test_wrong_flags(flags, told):
    with pytest.raises(UserError, match=told):
        HVAEConfig(**flags)


def test_configurations_come_as_text_in_a_file_or_by_name(tmp_path):
    path = tmp_path / 'blocks.json'
    path.write_text(json.dumps(BLOCKS, indent=2))
    from_file = HVAEConfig(str(path), json.dumps(LATENTS))
    path.unlink()
    assert from_file == config() and replace(from_file, free_nats=1.0).stages() == config().stages()
    blocks, latents = HVAEConfig().stages()
    assert [[(b.out_channels, b.kernel_size, b.stride) for b in stage] for stage in blocks] == [
        [(64, 5, 1), (64, 5, 1), (64, 5, 2)], [(64, 3, 1), (64, 3, 1), (64, 3, 2)], [(64, 3, 1)] * 3]
    assert [(type(z).__name__, z.latent_features) for z in latents] == [
        ('ConvLatent', 8), ('DenseLatent', 16), ('DenseLatent', 8)]


@pytest.mark.parametrize('recipe, shape, pixels, numbers', [
    ('mnist', (1, 28, 28), BINARY, (2620258, 2917730, 4383842)),
    ('mnist', (1, 32, 32), Pixels('bernoulli', 1, padding=2), (2620258, 2917730, 4383842)),
    ('cifar10', (3, 32, 32), GREY, (37013064, 43250248, 65533768)),
])
def test_published_numbers_of_parameters(recipe, shape, pixels, numbers):
    flags = HVAEConfig(recipe, recipe, compat_official=True)
    with torch.device('meta'):
        models = [family(shape, flags, pixels) for family in (HVAE, LVAE, BIVA)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == numbers
