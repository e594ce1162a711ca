"""Runge-Kutta method of order 5(4) for a batch of initial value problems, each with step sizes of its own."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils import UserError

TOLERANCE = 1e-5             # of the error of a step, relative and absolute
FIRST_STEP = 0.01            # as a fraction of the time in which a row would change by its own size
SHORTEST_STEP = 1e-12        # as a fraction of the whole time
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0     # of the next step size relative to the last

# Dormand and Prince 1980: the time of each stage, and the weights of the slopes before it. The last stage is
# the result, and its slope the first one of the next step.
STAGES = ((1 / 5, (1 / 5,)),
          (3 / 10, (3 / 40, 9 / 40)),
          (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
          (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
          (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
          (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)))
ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)     # order 5 less order 4


def size(values: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of each row relative to its tolerance: (B,)."""
    return (values / (TOLERANCE * (1 + scale.abs()))).square().mean(1).sqrt()


def solve(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: float, end: float) -> Tensor:
    """x (B, n) at time `end` of dx/dt = velocity(x, t), t (B,).

    Each row has step sizes of its own, so its solution does not depend on the others. Raises UserError if one
    cannot be solved.
    """
    direction, span = math.copysign(1, end - start), abs(end - start)

    def slope_at(y: Tensor, elapsed: Tensor) -> Tensor:
        return direction * velocity(y.to(x), (start + direction * elapsed).to(x)).detach().double()

    def combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
        return step[:, None] * sum(weight * slope for weight, slope in zip(weights, slopes))

    y = x.detach().double()
    elapsed = y.new_zeros(len(y))                                                            # (B,)
    slope = slope_at(y, elapsed)
    step = (FIRST_STEP * size(y, y) / size(slope, y)).nan_to_num().clamp(1e-6 * span, span)
    while (elapsed < span).any():
        remaining = span - elapsed
        step = torch.minimum(step, remaining)                        # rows that have arrived take steps of 0
        slopes = [slope]
        for time, weights in STAGES:
            result = y + combine(weights, slopes)
            slopes.append(slope_at(result, elapsed + time * step))
        error = size(combine(ERROR, slopes), torch.maximum(y.abs(), result.abs()))           # (B,)
        accepted = error <= 1
        elapsed = torch.where(accepted, torch.where(step < remaining, elapsed + step, span), elapsed)
        y = torch.where(accepted[:, None], result, y)
        slope = torch.where(accepted[:, None], slopes[-1], slope)
        factor = (SAFETY * error ** -0.2).nan_to_num(SMALLEST_FACTOR)
        step = step * factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        if (step[elapsed < span] < SHORTEST_STEP * span).any():
            raise UserError("the probability flow could not be solved: the score is not smooth enough. Take "
                            "--sampler pc.")
    return y.to(x)
