"""MSMA: norms of the score at many levels of noise, which say how unusual an image is (Mahmood et al. 2021).

B images x (B, C, *S) on [-1, 1], n levels. No noise is added: the score at a level is taken at the mean of
the noisy image, which is x itself for VE and a faded x for VP and subVP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from families.score3d_samplers import Diffusion, reverse_mean
from families.score3d_sde import SDE, expand
from utils import UserError

SCHEDULES = ('geometric', 'linear', 'thinned')
DENOISING_T = 0.01


@dataclass(frozen=True)
class Levels:
    """Which n levels of noise, from time `min_timestep` to `max_timestep`.

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

    def times(self, sde: SDE) -> Tensor:
        """Their times, rising: (n,)."""
        ends = torch.tensor([self.min_timestep, self.max_timestep])
        if self.schedule == 'thinned':
            every = sde.num_scales // self.number
            if not every:
                raise UserError(f"{self.number} levels of {sde.num_scales} scales: give at most as many.")
            return torch.linspace(*ends, sde.num_scales)[::every]
        low, high = sde.std(ends)
        stds = torch.linspace(low, high, self.number) if self.schedule == 'linear' \
            else torch.exp(torch.linspace(low.log(), high.log(), self.number))
        return sde.t_of_std(stds)


def scores(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """std(t) s(mean of x_t, t) at each of these times (n,): (B, n, C, *S)."""
    per_level = []
    for moment in times.to(x):
        t = moment.expand(len(x))
        per_level.append(expand(d.sde.std(t), x) * d.score(expand(d.sde.mean_factor(t), x) * x, t))
    return torch.stack(per_level, dim=1)


def score_norms(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """The Euclidean norms of the scores over channels and space: (B, n)."""
    return scores(d, x, times).flatten(2).norm(dim=2)


def score_maps(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """Their sums over channels, signed: (B, n, *S)."""
    return scores(d, x, times).sum(2)


def denoise(d: Diffusion, x: Tensor) -> Tensor:
    """One reverse-diffusion mean step at t = 0.01: takes the finest noise out of images."""
    return reverse_mean(d, x, x.new_full((len(x),), DENOISING_T))[0]
