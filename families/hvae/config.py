"""Flags of HVAE, LVAE and BIVA, and the network configuration that two of them hold.

A configuration is a list with one entry for each stage, the stage nearest the image first: a list of blocks
in the order of inference, or a latent.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

from utils import UserError, flag, flags, read_json

# Names that the flags and a configuration take; tables of the same names in layers.py and likelihoods.py hold
# what they stand for.
ACTIVATIONS = ('Identity', 'ReLU', 'LeakyReLU', 'SELU', 'ELU', 'SoftPlus', 'Tanh', 'Swish', 'PSwish')
RESAMPLING = ('convolutional', 'nearest', 'bilinear')
LIKELIHOODS = ('auto', 'BernoulliLikelihoodConv2d', 'BernoulliLikelihoodDense', 'BernoulliLikelihoodIdentity',
               'GaussianLikelihoodConv2d', 'GaussianLikelihoodDense', 'BetaLikelihoodConv2d',
               'DiscretizedLogisticLikelihoodConv2d', 'DiscretizedLogisticMixLikelihoodConv2d',
               'DiscretizedLogisticMixLikelihoodDense')


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

@flags
class HVAEConfig:
    """Flags of --model hvae, lvae and biva"""
    only_images = True                         # S is (H, W)
    # The published run: Adam at a constant rate, no weight decay.
    defaults = {'optimizer': 'adam', 'learning_rate': 3e-4, 'learning_rate_min': 3e-4, 'warmup_epochs': 0,
                'weight_decay': 0.0, 'batch_size': 128, 'epochs': 1000}

    config_deterministic: str = flag('mnist', 'blocks: JSON, a JSON file, or a published network, mnist '
                                              '(also FashionMNIST) or cifar10 (also SVHN); one list of '
                                              'blocks for each stage, the stage nearest the image first',
                                     basic=True)
    config_stochastic: str = flag('mnist', 'latents: the same, with one latent for each stage', basic=True)
    activation: str = flag('ReLU', 'activation of all blocks', choices=ACTIVATIONS)
    q_dropout: float = flag(0.0, 'dropout rate of the blocks of inference', least=0, most=0.99)
    p_dropout: float = flag(0.0, 'dropout rate of the blocks of generation', least=0, most=0.99)
    skip_stochastic: bool = flag(True, 'skip connections past the latents')
    padded_shape: tuple = flag((), 'height and width to which images are padded with zeros for the network; '
                                   'the likelihood leaves the padding out; none = no padding', type=int)
    likelihood_module: str = flag('auto', "p(x|z) of a pixel; auto = Bernoulli for binary pixels, else a "
                                          "mixture of 10 logistics over the data's gray levels",
                                  choices=LIKELIHOODS)
    learn_prior: bool = flag(False, "learn the top stage's prior; else it is a standard normal")
    kl_anneal_portion: float = flag(0.2, 'fraction of the training in which the KL weight rises; 0 = it is 1 '
                                         'from the start', least=0, most=1, basic=True)
    free_nats: float = flag(2.0, 'free nats of KL for each dense latent and for each position of a '
                                 'convolutional one', least=0, basic=True)
    free_nats_portion: float = flag(0.4, 'fraction of the training after which no nats are free; they fade '
                                         'out in its second half; 0 = free to the end', least=0, most=1,
                                    needs='free_nats')
    train_samples: int = flag(1, 'draws of the latents for each image in training', least=1, basic=True)
    train_importance_weighted: bool = flag(False, 'train on the importance-weighted bound of these draws')
    compat_official: bool = flag(False, 'the published networks with their faults: skip connections of equal '
                                        'shape do nothing, so that an LVAE is no ladder')

    def __post_init__(self):
        if len(self.padded_shape) not in (0, 2):
            raise UserError(f"--padded_shape {' '.join(map(str, self.padded_shape))}: give two numbers, the "
                            f"height and the width.")
        if self.train_importance_weighted and self.train_samples == 1:
            raise UserError("--train_importance_weighted with --train_samples 1 is the plain bound: give 2 "
                            "or more.")
        # Files may change: their content is kept, so that a checkpoint can build its own network.
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
