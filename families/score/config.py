"""Flags of the score-based family; what the inner network of a matryoshka is."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from families.score.samplers import CORRECTORS, PREDICTORS, SAMPLERS
from families.score.sde import SDE, SDES
from families.score.unet import ACTIVATIONS, ATTENTION_GROUPS
from utils import UserError, flag, read_checkpoint, read_flags, read_json

BLOCKS, EMBEDDINGS = ('biggan', 'segresnet'), ('fourier', 'positional')
LEAST = {'num_scales': 2, 'nf': 4, 'norm_num_groups': 1, 'time_embedding_sz': 1, 'conv_size': 1,
         'dilation': 1, 'dropout': 0, 'init_scale': 0, 'fourier_scale': 0, 'n_steps_each': 1}
CHOICES = {'sde': SDES, 'act': ACTIVATIONS, 'resblock_type': BLOCKS, 'embedding_type': EMBEDDINGS,
           'sampler': SAMPLERS, 'predictor': PREDICTORS, 'corrector': CORRECTORS}


def choice(name: str, default: str, help: str) -> str:
    return flag(default, help, choices=tuple(CHOICES[name]))


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of --model score"""
    num_scales: int = flag(2000, 'steps of a sampler')
    sampler: str = choice('sampler', 'pc', 'pc = predictor and corrector; ode = probability flow')
    predictor: str = choice('predictor', 'reverse_diffusion', 'pc: the step to less noise')
    corrector: str = choice('corrector', 'langevin', 'pc: the step at the same noise')
    snr: float = flag(0.17, 'pc: signal-to-noise ratio of the corrector')
    n_steps_each: int = flag(1, 'pc: corrector steps at each level')
    noise_removal: bool = flag(True, 'leave out the noise of the last step')
    probability_flow: bool = flag(False, 'pc: a predictor without noise')


@dataclass(frozen=True)
class ScoreModelConfig(SamplingConfig):
    """Flags of --model score"""
    sde: str = choice('sde', 'vesde', 'how images turn into noise')
    sigma_min: float = flag(0.06, 'vesde: least standard deviation of the noise; images are on [-1, 1]')
    sigma_max: float = flag(545.0, 'vesde: largest; about the largest distance between two images')
    beta_min: float = flag(0.1, 'vpsde, subvpsde: rate of the noise at the beginning')
    beta_max: float = flag(20.0, 'vpsde, subvpsde: rate at the end')
    reduce_mean: bool = flag(True, 'loss is the mean over pixels and channels, not half their sum')
    likelihood_weighting: bool = flag(False, 'weigh levels of noise as the likelihood does (Song et al. '
                                             '2021b), not equally')
    nf: int = flag(24, 'channels at full size; each level has twice those of the one before')
    blocks_down: tuple = flag((2, 2, 2, 2, 4), 'residual blocks of each level on the way down', type=int)
    blocks_up: tuple = flag((1, 1, 1, 1), 'the same on the way up, the coarsest first', type=int)
    resblock_type: str = choice('resblock_type', 'biggan', 'residual block')
    resblock_pp: bool = flag(True, 'segresnet: activation of --act, biases and dilation; without, the '
                                   'plain blocks of SegResNet')
    act: str = choice('act', 'memswish', 'activation; memswish is swish')
    conv_size: int = flag(3, 'width of the convolutions, odd')
    dilation: int = flag(1, 'segresnet: dilation of the convolutions')
    norm_num_groups: int = flag(8, 'groups of normalization at the end, and in segresnet blocks')
    self_attention: bool = flag(False, 'attention at the coarsest level')
    dropout: float = flag(0.0, 'share of channels dropped after the first convolution')
    init_scale: float = flag(0.0, 'scale of the first weights between blocks; 0 = the network starts at 0')
    embedding_type: str = choice('embedding_type', 'fourier', 'how the network is told the noise')
    time_embedding_sz: int = flag(64, 'frequencies of that embedding')
    fourier_scale: float = flag(2.0, 'fourier: standard deviation of the frequencies')
    learnable_embedding: bool = flag(True, 'fourier: train the frequencies')
    scale_by_sigma: bool = flag(True, 'vesde: divide the output by the standard deviation of the noise')
    inner_model: str = flag('', 'matryoshka: run folder or checkpoint of a score at a lower resolution, '
                                'around which this model is one more level; or JSON, or a file of JSON, with '
                                'its image_size, flags, and checkpoint (ours or published); none = no '
                                'matryoshka')
    trainable_inner_model: bool = flag(False, 'matryoshka: go on training the inner network')

    def __post_init__(self):
        for name, table in CHOICES.items():
            if getattr(self, name) not in table:
                raise UserError(f"--{name} {getattr(self, name)}: known are {', '.join(table)}.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}.")
        self._check_noise()
        self._check_network()
        object.__setattr__(self, 'inner_model', resolve_network(self.inner_model, 'inner_model'))
        if self.inner_model and self.sde != 'vesde':
            raise UserError(f"--inner_model with --sde {self.sde}: a matryoshka is for vesde.")
        if self.inner_model and self.inner()[0].inner_model:
            raise UserError("--inner_model is itself a matryoshka: one level is supported.")
        if self.trainable_inner_model and not self.inner_model:
            raise UserError("--trainable_inner_model: there is none; name one with --inner_model.")

    def _check_noise(self) -> None:
        for low, high in (('sigma_min', 'sigma_max'), ('beta_min', 'beta_max')):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise UserError(f"--{low} {getattr(self, low)} --{high} {getattr(self, high)}: both must be "
                                f"above 0, the second the larger.")
        if self.sde != 'vesde' and self.beta_max >= self.num_scales:
            raise UserError(f"--num_scales {self.num_scales} with --sde {self.sde}: it must be above "
                            f"--beta_max {self.beta_max}, or a step would add more than all noise.")
        if not 0 <= self.dropout < 1 or not self.snr > 0:
            raise UserError(f"--dropout {self.dropout} --snr {self.snr}: give a share below 1, and a ratio "
                            f"above 0.")
        if self.sde == 'subvpsde' and self.predictor == 'ancestral_sampling':
            raise UserError("--predictor ancestral_sampling is not for --sde subvpsde: take "
                            "reverse_diffusion or euler_maruyama.")

    def _check_network(self) -> None:
        down, up = self.blocks_down, self.blocks_up
        if not down or min(down) < 1 or min(up, default=0) < 0 or len(up) != len(down) - 1:
            raise UserError(f"--blocks_down {' '.join(map(str, down))} --blocks_up {' '.join(map(str, up))}: "
                            f"give one number a level, at least 1, and one fewer on the way up.")
        if self.conv_size % 2 == 0:
            raise UserError(f"--conv_size {self.conv_size}: give an odd number.")
        widths = [self.nf * 2 ** i for i in range(len(down))]
        normed = widths if self.resblock_type == 'segresnet' else widths[:1]
        if wrong := [n for n in normed if n % self.norm_num_groups]:
            raise UserError(f"--norm_num_groups {self.norm_num_groups} does not divide {wrong[0]} channels: "
                            f"change it or --nf.")
        if self.resblock_type == 'biggan' and (wrong := [n for n in widths if n % min(n // 4, 32)]):
            raise UserError(f"--nf {self.nf}: a level of {wrong[0]} channels cannot be normalized in "
                            f"{min(wrong[0] // 4, 32)} groups. Give a multiple of 4, above 128 of 32.")
        if self.self_attention and widths[-1] % ATTENTION_GROUPS:
            raise UserError(f"--self_attention with {widths[-1]} channels at the coarsest level: --nf must "
                            f"make them a multiple of {ATTENTION_GROUPS}.")

    def make_sde(self) -> SDE:
        return read_flags(SDES[self.sde], vars(self))

    def inner(self) -> tuple['ScoreModelConfig', tuple[int, ...], str]:
        """The inner network's flags, its image size S, and the checkpoint that it starts from ('' = none)."""
        return read_network(self.inner_model)


def read_network(described: str) -> tuple[ScoreModelConfig, tuple[int, ...], str]:
    """Flags, image size S and checkpoint ('' = none) of a network that `resolve_network` has described."""
    content = json.loads(described)
    return read_flags(ScoreModelConfig, content), tuple(content['image_size']), content.get('checkpoint', '')


def resolve_network(network: str, name: str) -> str:
    """JSON that says all of a score but its weights, from what the flag `name` takes; '' of ''.

    A run folder or checkpoint of ours, JSON or a file of JSON. Raises UserError for anything else.
    """
    if not network:
        return ''
    if network.lstrip().startswith('{'):
        try:
            content = json.loads(network)
        except json.JSONDecodeError as error:
            raise UserError(f"--{name} is not JSON ({error}).") from None
    elif network.endswith('.json'):
        content = read_json(network)
    else:
        description = read_checkpoint(network).get('description')
        if not isinstance(description, dict) or description.get('model') != 'score':
            raise UserError(f"--{name} {network}: not a checkpoint of a score of ours. For a published "
                            f"one give JSON with its image_size, flags and checkpoint.")
        content = {'image_size': description['shape'][1:], 'checkpoint': str(Path(network).resolve()),
                   **description['config']}
    known = {f.name for f in dataclasses.fields(ScoreModelConfig)} | {'image_size', 'checkpoint'}
    if not isinstance(content, dict) or 'image_size' not in content:
        raise UserError(f"--{name}: a JSON object with image_size, such as [96, 112, 80], is needed.")
    if unknown := sorted(content.keys() - known):
        raise UserError(f"--{name}: {', '.join(unknown)} is no flag of score.")
    read_flags(ScoreModelConfig, content)
    return json.dumps(content, sort_keys=True)
