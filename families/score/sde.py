"""Stochastic differential equations that turn images into noise (Song et al. 2021): VE, VP and subVP.

dx = f(t) x dt + g(t) dw, t from 0 (images) to 1 (noise). Given the clean image, x_t is normal with mean
m(t) x and standard deviation std(t). N is the number of discrete steps, B images. Everything is a function
of t (B,), all factors have its shape; images here are on [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FIRST_T = 1e-5               # training draws t from (1e-5, 1]: at 0 there is no noise to find


def expand(factor: Tensor, x: Tensor) -> Tensor:
    """One factor per image (B,) in a shape that multiplies images x (B, C, *S)."""
    return factor.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class SDE:
    """What the three have in common. `num_scales` is N, the steps of a sampler."""
    num_scales: int
    end: ClassVar[float]                 # where sampling ends: below it the score is too steep

    def perturb(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The noisy image x_t (B, C, *S) of clean images x at t (B,), with standard normal noise z."""
        return expand(self.mean_factor(t), x) * x + expand(self.std(t), x) * z

    def step(self, t: Tensor) -> int | Tensor:
        """The discrete step i = floor(t (N - 1)) of t: (B,)."""
        return (t * (self.num_scales - 1)).long()

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log density of x (B, C, *S) under the noise at t = 1, nats: (B,)."""
        d = x[0].numel()
        return -0.5 * d * math.log(2 * math.pi * self.prior_std ** 2) \
            - x.flatten(1).square().sum(1) / (2 * self.prior_std ** 2)


@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: the image stays, noise grows geometrically from sigma_min to sigma_max."""
    sigma_min: float = 0.06
    sigma_max: float = 545.0
    end = 1e-5

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def mean_factor(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def t_of_std(self, std: Tensor) -> Tensor:
        return torch.log(std / self.sigma_min) / self._log_ratio

    def drift(self, t: Tensor) -> Tensor:
        """f(t)."""
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return self.std(t) * math.sqrt(2 * self._log_ratio)

    def levels(self, like: Tensor) -> Tensor:
        """The standard deviations of the discrete steps, ascending: (N,)."""
        return torch.exp(torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.num_scales,
                                        dtype=like.dtype, device=like.device))

    def neighbors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviations of the discrete step of t and of the one below it, 0 below the first: (B,)."""
        levels, i = self.levels(t), self.step(t)
        return levels[i], torch.where(i > 0, levels[(i - 1).clamp(min=0)], 0)

    def discretize(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and G of a discrete step: x_{i+1} = x_i + f x_i + G z."""
        upper, lower = self.neighbors(t)
        return torch.zeros_like(t), torch.sqrt(upper ** 2 - lower ** 2)

    def langevin_scale(self, t: Tensor) -> Tensor:
        """alpha, by which the step of a Langevin corrector is scaled."""
        return torch.ones_like(t)

    def label(self, t: Tensor) -> Tensor:
        """The noise level that the network is given."""
        return self.std(t)

    def score(self, output: Tensor, t: Tensor) -> Tensor:
        """The score from what the network puts out (B, C, *S)."""
        return output


@dataclass(frozen=True)
class VP(SDE):
    """Variance preserving: the image fades as noise grows to variance 1."""
    beta_min: float = 0.1
    beta_max: float = 20.0
    end = 1e-3
    prior_std: ClassVar[float] = 1.0

    def _log_mean(self, t: Tensor) -> Tensor:
        return -0.25 * t ** 2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _t_of_log_mean(self, log_mean: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return ((-self.beta_min + torch.sqrt(self.beta_min ** 2 - 4 * slope * log_mean)) / slope).clamp(max=1)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def mean_factor(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_mean(t))

    def std(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self._log_mean(t)))

    def t_of_std(self, std: Tensor) -> Tensor:
        return self._t_of_log_mean(0.5 * torch.log1p(-std ** 2))

    def drift(self, t: Tensor) -> Tensor:
        """f(t)."""
        return -0.5 * self._beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return torch.sqrt(self._beta(t))

    def betas(self, t: Tensor) -> Tensor:
        """Variances that the discrete step of t adds: (B,)."""
        steps = self.num_scales
        return torch.linspace(self.beta_min / steps, self.beta_max / steps, steps, dtype=t.dtype,
                              device=t.device)[self.step(t)]

    def discretize(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and G of a discrete step: x_{i+1} = x_i + f x_i + G z."""
        beta = self.betas(t)
        return torch.sqrt(1 - beta) - 1, torch.sqrt(beta)

    def langevin_scale(self, t: Tensor) -> Tensor:
        """alpha, by which the step of a Langevin corrector is scaled."""
        return 1 - self.betas(t)

    def label(self, t: Tensor) -> Tensor:
        """The noise level that the network is given."""
        return 999 * t

    def score(self, output: Tensor, t: Tensor) -> Tensor:
        """The score from what the network puts out (B, C, *S), minus which is the noise."""
        return -output / expand(self.std(t), output)


@dataclass(frozen=True)
class SubVP(VP):
    """Like VP with less noise on the way; its discrete step is that of Euler and Maruyama."""

    def std(self, t: Tensor) -> Tensor:
        return 1 - torch.exp(2 * self._log_mean(t))

    def t_of_std(self, std: Tensor) -> Tensor:
        return self._t_of_log_mean(0.5 * torch.log1p(-std))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return torch.sqrt(self._beta(t) * (1 - torch.exp(4 * self._log_mean(t))))

    def discretize(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and G of a discrete step: x_{i+1} = x_i + f x_i + G z."""
        return self.drift(t) / self.num_scales, self.diffusion(t) / math.sqrt(self.num_scales)


SDES = {'vesde': VE, 'vpsde': VP, 'subvpsde': SubVP}
