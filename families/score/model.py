"""Denoising score matching in 2D and 3D: a network learns the score of noisy images at all levels of noise.

Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations"; network and
training as in SADE (Mahmood et al. 2024). B images, C channels, S two or three spatial axes, n levels of
noise. Images are in [0, 1] outside and on [-1, 1] inside: sigma, scores and norms are those of the inside.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distributions import EIGHT_BITS, Pixels, Terms, full_precision
from families.score.config import Levels, ScoreModelConfig
from families.score.msma import denoise, level_times, score_maps, score_norms
from families.score.official import read_weights
from families.score.samplers import (
    PC,
    Diffusion,
    inpainting_error,
    ode_log_likelihood,
    restoration_error,
    sample_ode,
)
from families.score.sde import FIRST_T, SDES, expand
from families.score.unet import CONV, Matryoshka, NCSNpp
from neural_operations import foreground
from utils import UserError, read_flags

WATCHED_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)          # of u, where validations look


class ScoreModel(nn.Module):
    """The contract's model. Its only term is the loss of an image; it has no likelihood terms."""

    Config, primary_score = ScoreModelConfig, ScoreModelConfig.primary_score
    temperatures, num_shown = (1.0,), 8                  # of the samples that training shows

    def __init__(self, shape: tuple[int, ...], config: ScoreModelConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, H, W) or (C, D, H, W). Raises UserError for a size that cannot be halved as asked."""
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        channels, *size = self.shape
        if len(size) not in CONV:
            raise UserError(f"score reads images (C, H, W) or (C, D, H, W), not shape {self.shape}.")
        self.change_sampling()
        self.network = self._matryoshka(channels, size) if config.inner_model else \
            self._unet(channels, size, config, config.scale_by_sigma and config.sde == 'vesde')

    def change_sampling(self, **flags: Any) -> None:
        """Takes other flags of Sampling than the model was built with. Raises UserError for wrong ones."""
        self.config = replace(self.config, **flags)
        self.sde = read_flags(SDES[self.config.sde], vars(self.config))
        sigmas = self.sde.std(torch.linspace(FIRST_T, 1, self.config.num_scales))          # (N,), ascending
        self.register_buffer('sigmas', sigmas.to(getattr(self, 'sigmas', sigmas)))

    def _unet(self, channels: int, size: Any, config: ScoreModelConfig, divide_by_sigma: bool) -> NCSNpp:
        times = len(config.blocks_down) - 1
        if any(n % 2 ** times for n in size):
            raise UserError(f"size {' x '.join(map(str, size))} cannot be halved {times} times: "
                            f"{times + 1} levels need multiples of {2 ** times}. Change --image_size, "
                            f"or give fewer numbers to --blocks_down and --blocks_up.")
        return NCSNpp(channels, len(size), config, divide_by_sigma)

    def _matryoshka(self, channels: int, size: Any) -> Matryoshka:
        config, (inner, inner_size, _) = self.config, self.config.inner()
        if len(inner_size) != len(size) or any(n % 2 for n in size):
            raise UserError(f"size {' x '.join(map(str, size))} around an inner model of "
                            f"{' x '.join(map(str, inner_size))}: give as many axes, of even size.")
        # Published: a frozen inner network does not divide by its sigma.
        network = self._unet(channels, inner_size, inner,
                             inner.scale_by_sigma and config.trainable_inner_model)
        network.requires_grad_(config.trainable_inner_model)
        if config.trainable_inner_model and inner.embedding_type == 'fourier':
            network.embedding.features.requires_grad_(inner.learnable_embedding)
        return Matryoshka(channels, size, config, network, inner_size)

    def initialize(self, x: Tensor) -> None:
        """Fills the inner network of a matryoshka from its checkpoint, once before training."""
        path = self.config.inner()[2] if self.config.inner_model else ''
        if path:
            self.network.inner.load_state_dict(read_weights(path, self.network.inner))

    def load_weights(self, path: str) -> None:
        """Fills the network from a run folder or checkpoint, ours or published: the averaged weights."""
        self.network.load_state_dict(read_weights(path, self.network))

    # -------------------------------------------------------------------------------------------------- score

    def _score(self, x: Tensor, t: Tensor) -> Tensor:
        """Score of noisy images x (B, C, *S) on [-1, 1] at t (B,), in float32."""
        return self.sde.score(full_precision(self.network(x, self.sde.label(t))), t)

    @property
    def diffusion(self) -> Diffusion:
        """What samplers and scores work with."""
        return Diffusion(self.sde, self._score)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gradient of the log density of noisy images, (B, C, *S), on [-1, 1].

        x (B, C, *S) are clean or noisy images in the units of the outside, [0, 1]; sigma (B,) or a number is
        the standard deviation of the noise, in those of the inside, between the first and last of `sigmas`.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self._score(2 * x - 1, self.sde.t_of_std(sigma))

    def _loss(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B,) of images x on [-1, 1] at t with noise z, and the norm of std times the score: (B,)."""
        std = self.sde.std(t)
        score = self._score(self.sde.perturb(x, t, z), t)
        return denoising_loss(score, std, self.sde.diffusion(t), z, self.config.reduce_mean,
                              self.config.likelihood_weighting), std * score.flatten(1).norm(dim=1)

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms:
        """The loss (B,) of images x (B, C, *S) in [0, 1], each at a level of noise drawn for it.

        `temperature` scales the noise and the spread of the levels: 0 is no noise, at the middle level. There
        are no groups to skip: UserError for `skip`.
        """
        if skip:
            raise UserError(f"skip {skip}: score has no latent groups, give 0.")
        u = 0.5 + temperature * (torch.rand_like(x.flatten(1)[:, 0]) - 0.5)
        z = temperature * torch.randn_like(x)
        return {'loss': self._loss(2 * x - 1, times_of(u), z)[0]}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize (scalar): the mean over images. There are no schedules."""
        return terms['loss'].mean(), {}

    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Losses and norms of std times the score at five times, each (B,), for images x in [0, 1]."""
        values = {}
        for u in WATCHED_TIMES:
            loss, norm = self._loss(2 * x - 1, times_of(x.new_full((len(x),), u)), torch.randn_like(x))
            values |= {f'loss_at/t_{u}': loss, f'score_norm_at/t_{u}': norm}
        return values

    # ------------------------------------------------------------------------------------------- capabilities

    @property
    def pc(self) -> PC:
        c = self.config
        return PC(c.predictor, c.corrector, c.snr, c.n_steps_each, c.probability_flow)

    @property
    def scoring_pc(self) -> PC:
        """The sampler of anomaly maps, in which no image depends on the others of its batch."""
        return replace(self.pc, per_image=True)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, mean: bool = False) -> Tensor:
        """Draws n images (n, C, *S) in [0, 1] with --sampler; `mean` leaves out the noise of the last step.

        `temperature` scales all noise of the sampler. It takes about 2 N passes of the network.
        """
        scaled = Diffusion(self.sde, self._score, lambda x: temperature * torch.randn_like(x))
        like, clean = self.sigmas.new_empty(n, *self.shape), mean or self.config.noise_removal
        x = self.pc.sample(scaled, like, clean) if self.config.sampler == 'pc' \
            else sample_ode(scaled, like, clean)
        return ((x + 1) / 2).clamp(0, 1)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log density of images x (B, C, *S) in [0, 1] by the probability flow, nats: (B,)."""
        return ode_log_likelihood(self.diffusion, 2 * x - 1) + x[0].numel() * math.log(2)

    @torch.no_grad()
    def score_norms(self, x: Tensor, denoised: bool = False, **levels: Any) -> Tensor:
        """MSMA features of images x (B, C, *S) in [0, 1]: the norms of std times the score, (B, n).

        `levels` are number, min_timestep, max_timestep and schedule of Levels. With `denoised`,
        the finest noise is first taken out of x.
        """
        x = denoise(self.diffusion, 2 * x - 1) if denoised else 2 * x - 1
        return score_norms(self.diffusion, x, level_times(Levels(**levels), self.sde))

    def statistics(self, x: Tensor) -> Tensor:
        """Logarithms of the norms of the score at 20 levels of noise: (B, 20)."""
        return self.score_norms(x).log()

    def score_norm(self, x: Tensor, level: int, denoised: bool = False, **levels: Any) -> Tensor:
        """Feature `level` of score_norms alone, from 0, differentiable: (B,)."""
        x = denoise(self.diffusion, 2 * x - 1) if denoised else 2 * x - 1
        return score_norms(self.diffusion, x, level_times(Levels(**levels), self.sde)[level:level + 1])[:, 0]

    @property
    def last_block(self) -> nn.Module:
        """The last block at full size, which heat-maps of activations look at."""
        return self.network.last_block

    @torch.no_grad()
    def score_maps(self, x: Tensor, denoised: bool = False, **levels: Any) -> Tensor:
        """The same per voxel, summed over channels, signed: (B, n, *S)."""
        x = denoise(self.diffusion, 2 * x - 1) if denoised else 2 * x - 1
        return score_maps(self.diffusion, x, level_times(Levels(**levels), self.sde))

    @torch.no_grad()
    def inpainting_map(self, x: Tensor) -> Tensor:
        """Error of inpainting each half of a checkerboard from the other, of images in [0, 1]: (B, 1, *S)."""
        return inpainting_error(self.diffusion, self.scoring_pc, 2 * x - 1, foreground(x).to(x))

    @torch.no_grad()
    def restoration_map(self, x: Tensor) -> Tensor:
        """Change of images in [0, 1] by adding noise and removing it again: (B, 1, *S)."""
        return restoration_error(self.diffusion, self.scoring_pc, 2 * x - 1)


def times_of(u: Tensor) -> Tensor:
    """Times in (1e-5, 1] of numbers in [0, 1]."""
    return u * (1 - FIRST_T) + FIRST_T


def denoising_loss(score: Tensor, std: Tensor, g: Tensor, z: Tensor, reduce_mean: bool,
                   likelihood_weighting: bool) -> Tensor:
    """Loss of denoising score matching (Vincent 2011), one per image: (B,).

    `score` and the noise `z` that was added are (B, C, *S), its standard deviation and the diffusion `g`
    (B,). Mean over channels and voxels or half their sum, of (std s + z)^2 or of g^2 (s + z / std)^2.
    """
    if likelihood_weighting:
        error = expand(g, z) * (score + z / expand(std, z))
    else:
        error = expand(std, z) * score + z
    error = error.flatten(1).square()
    return error.mean(1) if reduce_mean else 0.5 * error.sum(1)
