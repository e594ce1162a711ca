"""Small HVAEs, LVAEs and BIVAs, and their configurations, for the tests."""

import json

import torch

from distributions import Pixels
from families.hvae.config import HVAEConfig
from families.hvae.model import BIVA, HVAE, LVAE

FAMILIES = {'hvae': HVAE, 'lvae': LVAE, 'biva': BIVA}
BINARY, GREY = Pixels('bernoulli', 1), Pixels()


def block(channels=4, kernel=3, stride=1, **more):
    return {'block': 'ResBlockConv2d', 'out_channels': channels, 'kernel_size': kernel, 'stride': stride,
            'gated': False, **more}


def conv(n, **more):
    return {'block': 'GaussianConv2d', 'latent_features': n, **more}


def dense(n, **more):
    return {'block': 'GaussianDense', 'latent_features': n, **more}


BLOCKS = [[block(kernel=5), block(kernel=5, stride=2)], [block(), block(stride=2)], [block(), block()]]
LATENTS = [conv(2), dense(3), dense(2)]


def config(blocks=BLOCKS, latents=LATENTS, **more):
    return HVAEConfig(json.dumps(blocks), json.dumps(latents), **more)


def build(family=HVAE, shape=(1, 8, 8), pixels=BINARY, initialized=True, **more):
    torch.manual_seed(0)
    model = family(shape, config(**more), pixels)
    if initialized:
        model.initialize(images(model, 16))
    return model.eval()


def images(model, n=3, seed=1):
    x = torch.rand(n, *model.shape, generator=torch.Generator().manual_seed(seed))
    levels = 2 ** model.pixels.bits - 1
    return (x * levels).round() / levels


def gated(blocks=BLOCKS, **more):
    return [[entry | {'gated': True, **more} for entry in stage] for stage in blocks]


VARIANTS = {
    'plain': {},
    'gated': {'blocks': gated(), 'activation': 'Swish'},
    'slopes': {'activation': 'PSwish'},
    'no_skips': {'skip_stochastic': False},
    'no_weightnorm': {'blocks': gated(weightnorm=False),
                      'latents': [conv(2, weightnorm=False), *LATENTS[1:]]},
    'nearest': {'blocks': gated(upsampling_mode='nearest', downsampling_mode='nearest')},
    'bilinear': {'blocks': gated(upsampling_mode='bilinear', downsampling_mode='bilinear')},
    'padded': {'padded_shape': (12, 16)},
    'framed': {'pixels': Pixels('bernoulli', 1, padding=2), 'shape': (1, 12, 12)},
    'conv_top': {'latents': [conv(2), conv(3, kernel_size=1), conv(2)], 'learn_prior': True},
    'one_stage': {'blocks': BLOCKS[:1], 'latents': [dense(2, learn_prior=True)]},
    'two_stages': {'blocks': BLOCKS[:2], 'latents': LATENTS[:2]},
    'stride_first': {'blocks': [[block(stride=2), block()], [block(stride=2), block()]],
                     'latents': LATENTS[:2]},
    'dropout': {'q_dropout': 0.3, 'p_dropout': 0.2},
    'oblong': {'shape': (1, 8, 12)},
    'colour': {'shape': (3, 8, 8), 'pixels': GREY},
    'grey': {'pixels': Pixels(bits=5)},
    'two_channels': {'shape': (2, 8, 8), 'pixels': GREY},
    'draws': {'train_samples': 3},
    'weighted': {'train_samples': 3, 'train_importance_weighted': True},
    'official': {'compat_official': True},
    'official_slopes': {'compat_official': True, 'activation': 'PSwish', 'blocks': gated()},
}
UNEQUAL = {   # works, but not as the published networks
    'unequal_blocks': {'blocks': [[*BLOCKS[0], block()], [block(stride=2)], BLOCKS[2]]},
    'channels': {'blocks': [[block(6), block(4, stride=2)], [block(3), block(5, stride=2)],
                            [block(2), block(7)]]},
}
