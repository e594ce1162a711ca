"""What is drawn and computed with a score: predictor-corrector, probability flow and its likelihood,
inpainting, restoration (Song et al. 2021, SADE).

B images x (B, C, *S) on [-1, 1], t (B,) in [0, 1]; N discrete steps. A predictor or corrector returns
(x, x_mean): x_mean is x before its noise is added.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from families.score.ode import solve
from families.score.sde import SDE, VE, SubVP, expand
from utils import UserError

Step = tuple[Tensor, Tensor]
END_OF_REPAIR = 1e-3         # inpainting and restoration end here
REPAIRS = 10                 # draws that inpainting and restoration average over


@dataclass(frozen=True)
class Diffusion:
    """An SDE, the score s(x, t) of its noisy images, and where noise comes from.

    `score` takes x (B, C, *S) and t (B,); `noise` returns standard normal noise like its argument.
    """
    sde: SDE
    score: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[Tensor], Tensor] = torch.randn_like

    def prior(self, like: Tensor) -> Tensor:
        """Noise at t = 1."""
        return self.sde.prior_std * self.noise(like)


def times(like: Tensor, end: float, steps: int) -> Tensor:
    """The times of a run, from 1 down to `end`: (steps,)."""
    return torch.linspace(1, end, steps, dtype=like.dtype, device=like.device)


# ------------------------------------------------------------------------------------------------ predictors

def reverse_mean(d: Diffusion, x: Tensor, t: Tensor, flow: bool = False) -> Step:
    """The mean of the discrete reverse step, and G, the standard deviation of its noise."""
    f, G = (expand(factor, x) for factor in d.sde.discretize(t))
    return x - f * x + (0.5 if flow else 1.0) * G ** 2 * d.score(x, t), G


def reverse_diffusion(d: Diffusion, x: Tensor, t: Tensor, flow: bool = False) -> Step:
    """The discrete reverse step; `flow` is that of the probability flow, without noise."""
    x_mean, G = reverse_mean(d, x, t, flow)
    return (x_mean if flow else x_mean + G * d.noise(x)), x_mean


def euler_maruyama(d: Diffusion, x: Tensor, t: Tensor, flow: bool = False) -> Step:
    """A step of length 1/N of the reverse SDE."""
    f, g = expand(d.sde.drift(t), x), expand(d.sde.diffusion(t), x)
    x_mean = x - (f * x - (0.5 if flow else 1.0) * g ** 2 * d.score(x, t)) / d.sde.num_scales
    return (x_mean if flow else x_mean + g * d.noise(x) / math.sqrt(d.sde.num_scales)), x_mean


def ancestral_sampling(d: Diffusion, x: Tensor, t: Tensor, flow: bool = False) -> Step:
    """The posterior of the discrete step before; of VE and VP. Raises UserError for subVP and for `flow`."""
    if isinstance(d.sde, SubVP) or flow:
        raise UserError("ancestral_sampling is for vesde and vpsde, and knows no probability flow: take "
                        "another predictor, or no probability flow.")
    if isinstance(d.sde, VE):
        upper, lower = (expand(level, x) for level in d.sde.neighbors(t))
        gap = upper ** 2 - lower ** 2
        x_mean, std = x + gap * d.score(x, t), torch.sqrt(lower ** 2 * gap / upper ** 2)
    else:
        beta = expand(d.sde.betas(t), x)
        x_mean, std = (x + beta * d.score(x, t)) / torch.sqrt(1 - beta), torch.sqrt(beta)
    return x_mean + std * d.noise(x), x_mean


def no_step(d: Diffusion, x: Tensor, t: Tensor, *_: object) -> Step:
    return x, x


# ------------------------------------------------------------------------------------------------ correctors

def _langevin(d: Diffusion, x: Tensor, t: Tensor, steps: int,
              size: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """`steps` Langevin steps; `size` gives their length (B,) or () for a score and the noise."""
    x_mean = x
    for _ in range(steps):
        score, z = d.score(x, t), d.noise(x)
        length = expand(2 * d.sde.langevin_scale(t) * size(score, z) ** 2, x)
        x_mean = x + length * score
        x = x_mean + torch.sqrt(2 * length) * z
    return x, x_mean


def langevin(d: Diffusion, x: Tensor, t: Tensor, snr: float, steps: int, per_image: bool = False) -> Step:
    """Langevin dynamics; a step makes the noise 1/snr times as long as the score.

    As published, their lengths are means over the batch; with `per_image` they are those of the image, which
    then does not depend on its batch. In many dimensions the two agree.
    """
    length = lambda values: values.flatten(1).norm(dim=1)                                    # (B,)
    average = (lambda lengths: lengths) if per_image else torch.mean
    return _langevin(d, x, t, steps, lambda score, z: snr * average(length(z)) / average(length(score)))


def ald(d: Diffusion, x: Tensor, t: Tensor, snr: float, steps: int, *_: object) -> Step:
    """Annealed Langevin dynamics (Song and Ermon 2019): the step size follows from the noise level."""
    return _langevin(d, x, t, steps, lambda score, z: snr * d.sde.std(t))


PREDICTORS = {'reverse_diffusion': reverse_diffusion, 'euler_maruyama': euler_maruyama,
              'ancestral_sampling': ancestral_sampling, 'none': no_step}
CORRECTORS = {'langevin': langevin, 'ald': ald, 'none': no_step}


# -------------------------------------------------------------------------------------------------- samplers

@dataclass(frozen=True)
class PC:
    """Predictor-corrector: at each of N times the corrector, then the predictor.

    With `per_image` no image depends on the others of its batch, see `langevin`.
    """
    predictor: str = 'reverse_diffusion'
    corrector: str = 'langevin'
    snr: float = 0.17
    n_steps_each: int = 1
    probability_flow: bool = False
    per_image: bool = False

    def correct(self, d: Diffusion, x: Tensor, t: Tensor) -> Step:
        return CORRECTORS[self.corrector](d, x, t, self.snr, self.n_steps_each, self.per_image)

    def predict(self, d: Diffusion, x: Tensor, t: Tensor) -> Step:
        return PREDICTORS[self.predictor](d, x, t, self.probability_flow)

    def run(self, d: Diffusion, x: Tensor, moments: Iterable[Tensor]) -> Step:
        """From x (B, C, *S) at the first of these times (scalars, falling) to the last."""
        x_mean = x
        for moment in moments:
            t = moment.expand(len(x))
            x, _ = self.correct(d, x, t)
            x, x_mean = self.predict(d, x, t)
        return x, x_mean

    def sample(self, d: Diffusion, like: Tensor, noise_removal: bool = True) -> Tensor:
        """Draws images in the shape of `like` (B, C, *S), on [-1, 1] but not clipped to it."""
        x, x_mean = self.run(d, d.prior(like), times(like, d.sde.end, d.sde.num_scales))
        return x_mean if noise_removal else x


def flow_velocity(d: Diffusion, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the probability flow, which carries the same densities as the SDE, without noise."""
    return expand(d.sde.drift(t), x) * x - 0.5 * expand(d.sde.diffusion(t), x) ** 2 * d.score(x, t)


def sample_ode(d: Diffusion, like: Tensor, noise_removal: bool = True) -> Tensor:
    """Draws images by the probability flow; `noise_removal` adds a reverse-diffusion mean step."""
    x = d.prior(like)
    velocity = lambda flat, t: flow_velocity(d, flat.reshape(x.shape), t).flatten(1)
    x = solve(velocity, x.flatten(1), 1.0, d.sde.end).reshape(x.shape)
    return reverse_mean(d, x, x.new_full((len(x),), d.sde.end))[0] if noise_removal else x


def ode_log_likelihood(d: Diffusion, x: Tensor) -> Tensor:
    """log density of images x (B, C, *S) by the probability flow, nats: (B,).

    Song et al. 2021, section 4.3, with the divergence as v' J v for one random v of -1 and 1 per image
    (Hutchinson), which is exact where the Jacobian J of the score is diagonal. Needs the score's gradient.
    """
    v = torch.where(d.noise(x) < 0, -1.0, 1.0).to(x)

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            y = state[:, :-1].reshape(x.shape).requires_grad_()
            change = flow_velocity(d, y, t)
            gradient, = torch.autograd.grad((change * v).sum(), y)
        return torch.cat([change.flatten(1), (gradient * v).flatten(1).sum(1, keepdim=True)], dim=1)

    state = solve(velocity, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1), d.sde.end, 1.0)
    return d.sde.prior_log_prob(state[:, :-1].reshape(x.shape)) + state[:, -1]


# --------------------------------------------------------------------------------- inpainting, restoration

def inpaint(d: Diffusion, pc: PC, x: Tensor, known: Tensor, end: float = END_OF_REPAIR) -> Tensor:
    """Images x (B, C, *S) where `known` (0 or 1, broadcastable) is 1, and elsewhere what goes with that.

    The unknown part is drawn, the known one comes back as it is. Every second of the N steps is taken.
    """
    def keep(drawn: Tensor, t: Tensor) -> Tensor:
        return drawn * (1 - known) + d.sde.perturb(x, t, d.noise(x)) * known

    y = x * known + d.prior(x) * (1 - known)
    for moment in times(x, end, d.sde.num_scales)[::2]:
        t = moment.expand(len(x))
        y = keep(pc.correct(d, y, t)[0], t)
        y = keep(pc.predict(d, y, t)[0], t)
    return y * (1 - known) + x * known


def blocks(size: tuple[int, ...], block: int = 3, as_published: bool = False) -> Tensor:
    """A checkerboard of 0 and 1 over the axes S, its fields `block` wide, the first 0: S.

    As published, fields alternate in the order of memory, which makes stripes of an even number of them.
    """
    grid = torch.meshgrid(*[torch.arange(n) // block for n in size], indexing='ij')
    number = grid[0]
    for n, index in zip(size[1:], grid[1:]):
        number = number * (-(-n // block) if as_published else 1) + index
    return (number % 2).float()


def inpainting_error(d: Diffusion, pc: PC, x: Tensor, inside: Tensor, rounds: int = REPAIRS,
                     block: int = 3) -> Tensor:
    """Error of inpainting each half of a checkerboard from the other: (B, 1, *S).

    The sum over channels of |mean - x|. In turn the two halves are unknown, and so is everything that is not
    `inside` (0 or 1, broadcastable). The mean of a voxel is over the rounds in which it was unknown;
    published was the mean over all, which halves the error.
    """
    board = blocks(tuple(x.shape[2:]), block).to(x)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(rounds):
        known = (inside * (board if i % 2 == 0 else 1 - board)).expand_as(x)
        total += inpaint(d, pc, x, known) * (1 - known)
        count += 1 - known
    mean = torch.where(count > 0, total / count.clamp(min=1), x)
    return (mean - x).abs().sum(1, keepdim=True)


def restore(d: Diffusion, pc: PC, x: Tensor, steps: int | None = None, end: float = END_OF_REPAIR) -> Tensor:
    """Images x (B, C, *S), noised and denoised over the last `steps` of N (a quarter): as AnoDDPM does."""
    moments = times(x, end, d.sde.num_scales)
    moments = moments[len(moments) - (steps or max(1, len(moments) // 4)):]
    noisy = d.sde.perturb(x, moments[0].expand(len(x)), d.noise(x))
    return pc.run(d, noisy, moments)[1]


def restoration_error(d: Diffusion, pc: PC, x: Tensor, rounds: int = REPAIRS) -> Tensor:
    """Sum over channels of |mean of `rounds` restorations - x|: (B, 1, *S)."""
    mean = sum(restore(d, pc, x) for _ in range(rounds)) / rounds
    return (mean - x).abs().sum(1, keepdim=True)
