"""MSMA: norms of the score at many noise levels, a measure of how unusual an image is (Mahmood et al. 2021).

B images x (B, C, *S) on [-1, 1], n levels. No noise is added: the score at a level is taken at the mean of
the noisy image, which is x itself for VE and a faded x for VP and subVP.
"""

import torch
from torch import Tensor

from families.score.config import Levels
from families.score.samplers import Diffusion, reverse_mean
from families.score.sde import SDE, expand
from utils import UserError

DENOISING_T = 0.01
PASS_VOXELS = 2 ** 19      # of a pass through the network: 16 volumes of 32 x 32 x 32


def level_times(levels: Levels, sde: SDE) -> Tensor:
    """The times of the noise levels, rising: (n,)."""
    ends = torch.tensor([levels.min_timestep, levels.max_timestep])
    if levels.schedule == 'thinned':
        every = sde.num_scales // levels.number
        if not every:
            raise UserError(f"{levels.number} levels of {sde.num_scales} scales: give at most as many.")
        return torch.linspace(*ends, sde.num_scales)[::every]
    low, high = sde.std(ends)
    stds = torch.linspace(low, high, levels.number) if levels.schedule == 'linear' \
        else torch.exp(torch.linspace(low.log(), high.log(), levels.number))
    return sde.t_of_std(stds)


def scores(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """std(t) s(mean of x_t, t) at each of these times (n,): (B, n, C, *S).

    Levels go through the network side by side: a pass of few voxels leaves a GPU idle, and one of a single
    volume takes a CPU as long as one of ten.
    """
    per_pass, found = max(1, PASS_VOXELS // x[:, 0].numel()), []
    for some in times.to(x).split(per_pass):
        t, many = some.repeat_interleave(len(x)), x.repeat(len(some), *[1] * (x.ndim - 1))
        levels = expand(d.sde.std(t), many) * d.score(expand(d.sde.mean_factor(t), many) * many, t)
        found.append(levels.unflatten(0, (len(some), len(x))))                             # (n, B, C, *S)
    return torch.cat(found).transpose(0, 1)


def score_norms(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """The Euclidean norms of the scores over channels and space: (B, n)."""
    return scores(d, x, times).flatten(2).norm(dim=2)


def score_maps(d: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """Their sums over channels, signed: (B, n, *S)."""
    return scores(d, x, times).sum(2)


def denoise(d: Diffusion, x: Tensor) -> Tensor:
    """One reverse-diffusion mean step at t = 0.01: takes the finest noise out of images."""
    return reverse_mean(d, x, x.new_full((len(x),), DENOISING_T))[0]
