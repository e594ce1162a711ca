"""Flags of HVAE, LVAE and BIVA, and the shapes of the network that their configuration describes.

L stages, stage 1 nearest the image; shapes are (C, H, W). Of stage i: h_i are the features that inference
leads to, u_i what it hands to stage i + 1, z_i the latents, d_i the features that generation leads to. A
configuration is a list with one entry a stage, stage 1 first: blocks in the order of inference, or a latent.
"""

import dataclasses
import json
import math
import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from families.hvae.layers import ACTIVATIONS, RESAMPLING, Shape
from families.hvae.likelihoods import LIKELIHOODS
from utils import UserError, flag, read_json


@dataclass(frozen=True)
class Block:
    """A residual block, ResBlockConv2d; of a gated one half of the channels open and close the other half."""
    out_channels: int = field(metadata={'least': 1})
    kernel_size: int = field(metadata={'least': 1})
    stride: int = field(default=1, metadata={'least': 1})
    weightnorm: bool = True
    gated: bool = True
    downsampling_mode: str = field(default=RESAMPLING[0], metadata={'choices': RESAMPLING})
    upsampling_mode: str = field(default=RESAMPLING[0], metadata={'choices': RESAMPLING})


@dataclass(frozen=True)
class ConvLatent:
    """Normal latents at every position, GaussianConv2d."""
    latent_features: int = field(metadata={'least': 1})
    kernel_size: int = field(default=3, metadata={'least': 1})
    weightnorm: bool = True
    learn_prior: bool = False           # of the top stage; elsewhere it means nothing


@dataclass(frozen=True)
class DenseLatent:
    """Normal latents without a position, GaussianDense."""
    latent_features: int = field(metadata={'least': 1})
    weightnorm: bool = True
    learn_prior: bool = False


BLOCKS = {'ResBlockConv2d': Block}
LATENTS = {'GaussianConv2d': ConvLatent, 'GaussianDense': DenseLatent}
Latent = ConvLatent | DenseLatent


def _published(channels: int, top_stride: int, *latents: tuple[str, int]) -> tuple[list, list]:
    """Three stages of three blocks each, of which the last one halves the resolution."""
    block = {'block': 'ResBlockConv2d', 'out_channels': channels, 'weightnorm': True, 'gated': False}
    stages = [[block | {'kernel_size': kernel, 'stride': stride} for stride in (1, 1, last)]
              for kernel, last in ((5, 2), (3, 2), (3, top_stride))]
    return stages, [{'block': name, 'latent_features': n, 'weightnorm': True} for name, n in latents]


RECIPES = {   # the published networks of Havtorn et al. 2021, under names that the two flags take
    'mnist': _published(64, 1, ('GaussianConv2d', 8), ('GaussianDense', 16), ('GaussianDense', 8)),
    'cifar10': _published(256, 2, ('GaussianConv2d', 128), ('GaussianConv2d', 64), ('GaussianDense', 32)),
}

_RANGES = {'q_dropout': (0, 0.99), 'p_dropout': (0, 0.99), 'kl_anneal_portion': (0, 1),
           'free_nats': (0, math.inf), 'free_nats_portion': (0, 1), 'train_samples': (1, math.inf)}


@dataclass(frozen=True)
class HVAEConfig:
    """Flags of --model hvae, lvae and biva"""
    config_deterministic: str = flag('mnist', "blocks: JSON, a file of JSON, or a published network: "
                                              "mnist (and FashionMNIST) or cifar10 (and SVHN); a list of "
                                              "blocks a stage, the stage nearest the image first")
    config_stochastic: str = flag('mnist', 'latents: the same, with one latent a stage')
    activation: str = flag('ReLU', 'activation of all blocks', choices=tuple(ACTIVATIONS))
    q_dropout: float = flag(0.0, 'share of features dropped in each block of inference')
    p_dropout: float = flag(0.0, 'share of features dropped in each block of generation')
    skip_stochastic: bool = flag(True, 'connections that lead past the latents')
    padded_shape: tuple = flag((), 'height and width to which images are padded for the network, by zeros '
                                   'that the likelihood leaves out; none = as they are', type=int)
    likelihood_module: str = flag('auto', "p(x|z) of a pixel; auto = Bernoulli for binary pixels, else a "
                                          "mixture of 10 logistics over the data's grey levels",
                                  choices=tuple(LIKELIHOODS))
    learn_prior: bool = flag(False, "learn the top stage's prior; else it is a standard normal")
    kl_anneal_portion: float = flag(0.2, 'share of the run in which the KL weight rises; 0 = it is 1')
    free_nats: float = flag(2.0, 'nats of KL that are free: of each dense latent, of each position of others')
    free_nats_portion: float = flag(0.4, 'share of the run after which none are free; they fade in its '
                                         'second half; 0 = free to the end')
    train_samples: int = flag(1, 'draws of the latents an image in training')
    train_importance_weighted: bool = flag(False, 'train on the importance-weighted bound of these draws')
    compat_official: bool = flag(False, 'the published networks with their faults: skip connections of equal '
                                        'shape do nothing, so that an LVAE is no ladder')

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                wanted = f'at least {least}' if most == math.inf else f'from {least} to {most}'
                raise UserError(f"--{name} {value}: it must be {wanted}.")
        for name, table in (('activation', ACTIVATIONS), ('likelihood_module', LIKELIHOODS)):
            if getattr(self, name) not in table:
                raise UserError(f"--{name} {getattr(self, name)}: known are {', '.join(table)}.")
        if len(self.padded_shape) not in (0, 2):
            raise UserError(f"--padded_shape {' '.join(map(str, self.padded_shape))}: give two numbers, the "
                            f"height and the width.")
        if self.train_importance_weighted and self.train_samples == 1:
            raise UserError("--train_importance_weighted with --train_samples 1 is the plain bound: give 2 "
                            "or more.")
        # Files may change: what they hold is kept, so that a checkpoint builds its own network.
        for name, part in (('config_deterministic', 0), ('config_stochastic', 1)):
            value = getattr(self, name)
            content = RECIPES[value][part] if value in RECIPES else _read(name, value)
            object.__setattr__(self, name, json.dumps(content))
        self.stages()

    def stages(self) -> tuple[list[list[Block]], list[Latent]]:
        """Blocks and latent of each stage, stage 1 first. Raises UserError naming stage, block and key."""
        deterministic, stochastic = json.loads(self.config_deterministic), json.loads(self.config_stochastic)
        blocks = []
        for i, entries in enumerate(_list('--config_deterministic', deterministic)):
            place = f'--config_deterministic, stage {i + 1}'
            blocks.append([_read_entry(entry, BLOCKS, f'{place}, block {j + 1}')
                           for j, entry in enumerate(_list(place, entries))])
        latents = [_read_entry(entry, LATENTS, f'--config_stochastic, stage {i + 1}')
                   for i, entry in enumerate(_list('--config_stochastic', stochastic))]
        if len(blocks) != len(latents):
            raise UserError(f"--config_deterministic has {len(blocks)} stages and --config_stochastic "
                            f"{len(latents)}: give both as many.")
        return blocks, latents


def _read(name: str, value: str) -> Any:
    """What the JSON text, or the file of that name, holds."""
    if not value.lstrip().startswith(('[', '{')):
        if os.path.isfile(value):
            return read_json(value)
        raise UserError(f"--{name} {value}: there is no such file; give JSON, a file of JSON, or one of "
                        f"{', '.join(RECIPES)}.")
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"--{name} is not JSON ({error}): put it in single quotes, or in a file.") from None


def _list(place: str, value: Any) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place} is {json.dumps(value)[:60]}: expected a list with at least one entry.")
    return value


def _read_entry(entry: Any, table: dict[str, type], place: str) -> Any:
    """The row of `table` that `entry` names, with its options."""
    if not isinstance(entry, dict):
        raise UserError(f"{place} is {json.dumps(entry)[:60]}: expected an object with the key 'block'.")
    if entry.get('block') not in table:
        raise UserError(f"{place}: 'block' is {json.dumps(entry.get('block'))}; known are "
                        f"{', '.join(table)}.")
    options = {key: value for key, value in entry.items() if key != 'block'}
    known = {f.name: f for f in dataclasses.fields(table[entry['block']])}
    place = f"{place} ({entry['block']})"
    if unknown := options.keys() - known.keys():
        raise UserError(f"{place}: unknown key '{min(unknown)}'; known are {', '.join(known)}.")
    for key, f in known.items():
        if key not in options:
            if f.default is dataclasses.MISSING:
                raise UserError(f"{place}: the key '{key}' is missing.")
            continue
        value = options[key]
        if type(value) is not f.type:
            raise UserError(f"{place}: '{key}' is {json.dumps(value)}; expected {_KINDS[f.type]}.")
        if value not in f.metadata.get('choices', [value]):
            raise UserError(f"{place}: '{key}' is '{value}'; known are {', '.join(f.metadata['choices'])}.")
        if f.type is int and value < f.metadata['least']:
            raise UserError(f"{place}: '{key}' is {value}; it must be at least {f.metadata['least']}.")
    return table[entry['block']](**options)


_KINDS = {int: 'a whole number', bool: 'true or false', str: 'a word'}


# ----------------------------------------------------------------------------------------------------- shapes

@dataclass(frozen=True)
class Level:
    """A stage in numbers: its blocks and latent, and every shape that it meets."""
    blocks: list[Block]                 # in the order of inference
    generative: list[Block]             # in the order of generation
    latent: Latent
    first: bool
    top: bool
    below: Shape                        # h_{i-1}; the image, for stage 1
    handed_up: Shape                    # u_{i-1}, which inference starts from
    shape: Shape                        # h_i
    painted: Shape                      # of z_i as features, which generation starts from
    above: Shape | None                 # d_{i+1}; none at the top
    skips: list[Shape | None]           # what a generative block is handed past the latents; None at the top


def plan(image: Shape, blocks: list[list[Block]], latents: list[Latent], *, ladder: bool, twins: bool,
         reverses: bool) -> list[Level]:
    """The stages of a network for images of this shape, stage 1 first.

    A `ladder` hands features to the next stage, not latents; stages below the top hold `twins`, two latents;
    a stage that `reverses` generates with its list of blocks turned round. Raises UserError for a size that a
    stride does not divide.
    """
    shapes = [image]
    for i, stage in enumerate(blocks):
        shapes.append(_encoded(shapes[-1], stage, i + 1))
    number, levels, above, queue = len(blocks), [], None, deque()
    for i in reversed(range(number)):
        top, latent, shape = i == number - 1, latents[i], shapes[i + 1]
        count = 2 if twins and not top else 1
        painted = _painted(latent, shape, count)
        generative = blocks[i][::-1] if reverses else blocks[i]
        skips, (_, height, width) = [], painted
        for block in generative:
            # A queue: each block takes the oldest entry and leaves its own output; the top only leaves.
            skips.append(None if top else queue.popleft())
            height, width = height * block.stride, width * block.stride
            queue.append((block.out_channels, height, width))
        handed_up = shapes[i] if ladder or i == 0 else _painted(latents[i - 1], shapes[i], 1)
        levels.append(Level(blocks[i], generative, latent, i == 0, top, shapes[i], handed_up, shape, painted,
                            above, skips))
        above = queue[-1]
    return levels[::-1]


def _encoded(shape: Shape, blocks: list[Block], stage: int) -> Shape:
    """The shape that a stage's inference leads to."""
    for j, block in enumerate(blocks):
        _, height, width = shape
        place = f"--config_deterministic, stage {stage}, block {j + 1}"
        if height % block.stride or width % block.stride:
            raise UserError(f"{place}: its stride {block.stride} does not divide features of {height} x "
                            f"{width}. Change the stride or the size of the images, or pad them with "
                            f"--padded_shape.")
        if block.kernel_size < block.stride:
            raise UserError(f"{place}: its stride {block.stride} is larger than its kernel_size "
                            f"{block.kernel_size}, so pixels would be left out. Raise the kernel_size.")
        shape = (block.out_channels, height // block.stride, width // block.stride)
    return shape


def _painted(latent: Latent, shape: Shape, count: int) -> Shape:
    """Latents as features: dense ones fill the stage's own shape."""
    return shape if isinstance(latent, DenseLatent) else (count * latent.latent_features, *shape[1:])
