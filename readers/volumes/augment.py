"""Random changes of training volumes, as published for 3D score models (SADE): each with a chance of 1 in 10.

x (C, D, H, W) in [0, 1]. Published they come before percentile scaling, which takes shift and scale back;
here they come after it. The changes are those of MONAI's transforms for such purposes, in a few lines of
torch each: so they are a function of (epoch, id), whatever the process or the batch, and need nothing more.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHANCE = 0.1
INTENSITY = 0.05                   # largest shift, in standard deviations, and relative scale
POINTS = (3, 5)                    # control points of a histogram shift
ROTATION, TRANSLATION = 0.05, 5.0  # rad about each axis; voxels along it
NOISE = 0.01                       # largest standard deviation of Rician noise
GIBBS = 0.1                        # largest share of spatial frequencies that is lost
SPIKE = (0.95, 1.10)               # log magnitude of a spike, relative to the mean of all


def augmented(x: Tensor, seed: int) -> Tensor:
    """A volume with those changes that `seed` draws, within [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    for change in CHANGES:
        if uniform(random, 0, 1) < CHANCE:
            x = change(x, random)
    return x.clamp(0, 1)


def uniform(random: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=random).item()


def shift(x: Tensor, random: torch.Generator) -> Tensor:
    return x + uniform(random, -INTENSITY, INTENSITY) * x.std()


def scale(x: Tensor, random: torch.Generator) -> Tensor:
    return x * (1 + uniform(random, -INTENSITY, INTENSITY))


def shift_histogram(x: Tensor, random: torch.Generator) -> Tensor:
    """Intensities mapped by a rising broken line whose inner points are moved between their neighbors."""
    number = int(torch.randint(POINTS[0], POINTS[1] + 1, (), generator=random))
    old = torch.linspace(0, 1, number)
    new = old.clone()
    for i in range(1, number - 1):
        new[i] = uniform(random, new[i - 1].item(), new[i + 1].item())
    piece = (x * (number - 1)).floor().clamp(0, number - 2).long()
    return new[piece] + (x * (number - 1) - piece) * (new[piece + 1] - new[piece])


def move(x: Tensor, random: torch.Generator) -> Tensor:
    """Rotated about the center and translated, linear between voxels, zeros from outside."""
    turn = torch.eye(3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        angle = uniform(random, -ROTATION, ROTATION)
        about = torch.eye(3)
        about[a, a] = about[b, b] = math.cos(angle)
        about[a, b], about[b, a] = -math.sin(angle), math.sin(angle)
        turn = turn @ about
    by = torch.tensor([uniform(random, -TRANSLATION, TRANSLATION) for _ in range(3)])
    half = torch.tensor(x.shape[1:]) / 2                             # voxels in a unit of grid_sample
    turn, by = turn * half / half[:, None], by / half
    matrix = torch.cat([turn.flip(0, 1), by.flip(0)[:, None]], 1)    # (3, 4), in grid_sample's order W, H, D
    grid = F.affine_grid(matrix[None], [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


def spike(x: Tensor, random: torch.Generator) -> Tensor:
    """One spatial frequency gets another magnitude: stripes, as of a spark in the scanner."""
    waves = torch.fft.fftn(x, dim=(1, 2, 3))
    size = waves.abs().clamp(min=1e-10)
    place = (slice(None), *(int(torch.randint(n, (), generator=random)) for n in x.shape[1:]))
    wanted = torch.exp(size.log().mean(dim=(1, 2, 3)) * uniform(random, *SPIKE))         # (C,)
    waves[place] = torch.polar(wanted, waves[place].angle())
    return torch.fft.ifftn(waves, dim=(1, 2, 3)).real


def add_noise(x: Tensor, random: torch.Generator) -> Tensor:
    """Rician: the magnitude of a complex signal with noise in both parts."""
    std = uniform(random, 0, NOISE)
    real, imaginary = (std * torch.randn(x.shape, generator=random) for _ in range(2))
    return torch.hypot(x + real, imaginary)


def ring(x: Tensor, random: torch.Generator) -> Tensor:
    """Gibbs ringing: the highest spatial frequencies are lost."""
    radius = (1 - uniform(random, 0, GIBBS)) * max(x.shape[1:]) * math.sqrt(2) / 2
    axes = torch.meshgrid(*(torch.fft.fftfreq(n) * n for n in x.shape[1:]), indexing='ij')
    kept = sum(axis ** 2 for axis in axes) <= radius ** 2
    return torch.fft.ifftn(torch.fft.fftn(x, dim=(1, 2, 3)) * kept, dim=(1, 2, 3)).real


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    shift, scale, shift_histogram, move, spike, add_noise, ring)
