"""Flags of the score-based family, of its levels of noise, and the description of another score model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from storage.checkpoint import read_checkpoint
from utils import UserError, flag, flags, read_flags, read_json

# Names that the flags take; tables of the same names in sde.py, unet.py and samplers.py say what they are.
SDES = ('vesde', 'vpsde', 'subvpsde')
SAMPLERS = ('pc', 'ode')
PREDICTORS = ('reverse_diffusion', 'euler_maruyama', 'ancestral_sampling', 'none')
CORRECTORS = ('langevin', 'ald', 'none')
ACTIVATIONS = ('memswish', 'swish', 'relu', 'elu', 'lrelu')
BLOCKS, EMBEDDINGS = ('biggan', 'segresnet'), ('fourier', 'positional')
SCHEDULES = ('geometric', 'linear', 'thinned')         # of the levels of MSMA
ATTENTION_GROUPS = 8                                   # of the normalization before the attention


@flags
class SamplingConfig:
    """Sampling of --model score"""
    num_scales: int = flag(2000, 'steps of the sampler', least=2, basic=True)
    sampler: str = flag('pc', 'pc = predictor-corrector; ode = probability flow', choices=SAMPLERS)
    predictor: str = flag('reverse_diffusion', 'pc: the step to less noise', choices=PREDICTORS)
    corrector: str = flag('langevin', 'pc: the step at the same noise', choices=CORRECTORS)
    snr: float = flag(0.17, 'pc: signal-to-noise ratio of the corrector', above=0)
    n_steps_each: int = flag(1, 'pc: corrector steps at each noise level', least=1)
    noise_removal: bool = flag(True, 'leave out the noise of the last step')
    probability_flow: bool = flag(False, 'pc: a predictor without noise')


@flags
class ScoreModelConfig(SamplingConfig):
    """Flags of --model score"""
    # As published; the rate is constant after the warm-up. Sampling is slow, so pictures are rare.
    defaults = {'optimizer': 'adam', 'learning_rate': 2e-4, 'learning_rate_min': 2e-4, 'warmup_epochs': 0,
                'warmup_steps': 1000, 'weight_decay': 0.0, 'grad_clip': 1.0, 'batch_size': 8,
                'ema_decay': 0.9999, 'ema_ramp': True, 'image_every': 10000}
    primary_score = 'msma_gmm'
    Sampling = SamplingConfig                            # flags that may change when a model is evaluated

    sde: str = flag('vesde', 'stochastic differential equation that turns images into noise', choices=SDES,
                    basic=True)
    sigma_min: float = flag(0.06, 'vesde: smallest standard deviation of the noise; images are on [-1, 1]',
                            above=0, basic=True, needs='sde=vesde')
    sigma_max: float = flag(545.0, 'vesde: largest; about the largest distance between two images', above=0,
                            basic=True, needs='sde=vesde')
    beta_min: float = flag(0.1, 'vpsde, subvpsde: rate of the noise at the beginning', above=0,
                           needs='sde=vpsde or sde=subvpsde')
    beta_max: float = flag(20.0, 'vpsde, subvpsde: rate at the end', above=0,
                           needs='sde=vpsde or sde=subvpsde')
    reduce_mean: bool = flag(True, 'the loss is the mean over pixels and channels, not half their sum')
    likelihood_weighting: bool = flag(False, 'weight noise levels as the likelihood does (Song et al. '
                                             '2021b), not equally')
    nf: int = flag(24, 'channels at full size; each level has twice those of the one before', least=4,
                   basic=True)
    blocks_down: tuple = flag((2, 2, 2, 2, 4), 'residual blocks of each level on the way down', type=int,
                              least=1, basic=True)
    blocks_up: tuple = flag((1, 1, 1, 1), 'the same on the way up, the coarsest first', type=int, least=0,
                            basic=True)
    resblock_type: str = flag('biggan', 'residual block', choices=BLOCKS)
    resblock_pp: bool = flag(True, 'segresnet: activation of --act, biases and dilation; without, the plain '
                                   'blocks of SegResNet', needs='resblock_type=segresnet')
    act: str = flag('memswish', 'activation; memswish is swish', choices=ACTIVATIONS)
    conv_size: int = flag(3, 'width of the convolutions, odd', least=1)
    dilation: int = flag(1, 'segresnet: dilation of the convolutions', least=1,
                         needs='resblock_type=segresnet')
    norm_num_groups: int = flag(8, 'groups of normalization at the end, and in segresnet blocks', least=1)
    self_attention: bool = flag(False, 'attention at the coarsest level')
    dropout: float = flag(0.0, 'fraction of channels dropped after the first convolution', least=0, below=1)
    init_scale: float = flag(0.0, 'scale of the first weights between blocks; 0 = the network starts at 0',
                             least=0)
    embedding_type: str = flag('fourier', 'embedding of the noise level', choices=EMBEDDINGS)
    time_embedding_sz: int = flag(64, 'frequencies of that embedding', least=1)
    fourier_scale: float = flag(2.0, 'fourier: standard deviation of the frequencies', least=0,
                                needs='embedding_type=fourier')
    learnable_embedding: bool = flag(True, 'fourier: train the frequencies', needs='embedding_type=fourier')
    scale_by_sigma: bool = flag(True, 'vesde: divide the output by the standard deviation of the noise',
                                needs='sde=vesde')
    inner_model: str = flag('', 'matryoshka: run folder or checkpoint of a score model at a lower '
                                'resolution, to which this model adds a level; or JSON, or a JSON file, with '
                                'its image_size, flags, and checkpoint (ours or published); none = no '
                                'matryoshka')
    trainable_inner_model: bool = flag(False, 'matryoshka: continue to train the inner network')

    def __post_init__(self):
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
            if not getattr(self, low) < getattr(self, high):
                raise UserError(f"--{low} {getattr(self, low)} --{high} {getattr(self, high)}: the second "
                                f"must be the larger.")
        if self.sde != 'vesde' and self.beta_max >= self.num_scales:
            raise UserError(f"--num_scales {self.num_scales} with --sde {self.sde}: it must be above "
                            f"--beta_max {self.beta_max}, or a step would add more than all noise.")
        if self.sde == 'subvpsde' and self.predictor == 'ancestral_sampling':
            raise UserError("--predictor ancestral_sampling is not for --sde subvpsde: take "
                            "reverse_diffusion or euler_maruyama.")

    def _check_network(self) -> None:
        down, up = self.blocks_down, self.blocks_up
        if not down or len(up) != len(down) - 1:
            raise UserError(f"--blocks_down {' '.join(map(str, down))} --blocks_up {' '.join(map(str, up))}: "
                            f"give one number for each level, and one fewer on the way up.")
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

    def inner(self) -> tuple[ScoreModelConfig, tuple[int, ...], str]:
        """The inner network's flags, its image size S, and the checkpoint that it starts from ('' = none)."""
        return read_network(self.inner_model)


@dataclass(frozen=True)
class Levels:
    """The n noise levels of MSMA, from time `min_timestep` to `max_timestep`.

    geometric: standard deviations log-spaced; linear: equally spaced; thinned: every (N // n)-th of N
    equally spaced times, so that the last time is left out.
    """
    number: int = 20
    min_timestep: float = 0.01
    max_timestep: float = 1.0
    schedule: str = 'geometric'

    def __post_init__(self):
        if self.number < 1 or not 0 < self.min_timestep < self.max_timestep <= 1:
            raise UserError(f"{self.number} levels from time {self.min_timestep} to {self.max_timestep}: "
                            f"give at least 1, and times above 0, rising, up to 1.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} of levels: known are {', '.join(SCHEDULES)}.")


def read_network(described: str) -> tuple[ScoreModelConfig, tuple[int, ...], str]:
    """Flags, image size S and checkpoint ('' = none) of a network that `resolve_network` has described."""
    content = json.loads(described)
    return read_flags(ScoreModelConfig, content), tuple(content['image_size']), content.get('checkpoint', '')


def resolve_network(network: str, name: str) -> str:
    """JSON that describes a score model without its weights, from the value of the flag `name`; '' from ''.

    The value is a run folder or checkpoint of ours, JSON or a JSON file. Raises UserError for anything else.
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
            raise UserError(f"--{name} {network}: not a checkpoint of one of our score models. For a "
                            f"published one give JSON with its image_size, flags and checkpoint.")
        content = {'image_size': description['shape'][1:], 'checkpoint': str(Path(network).resolve()),
                   **description['config']}
    known = {f.name for f in dataclasses.fields(ScoreModelConfig)} | {'image_size', 'checkpoint'}
    if not isinstance(content, dict) or 'image_size' not in content:
        raise UserError(f"--{name}: a JSON object with image_size, such as [96, 112, 80], is needed.")
    if unknown := sorted(content.keys() - known):
        raise UserError(f"--{name}: {', '.join(unknown)} is no flag of --model score.")
    read_flags(ScoreModelConfig, content)
    return json.dumps(content, sort_keys=True)
