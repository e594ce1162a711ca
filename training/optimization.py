"""The update of the weights: learning rate, steps that are not finite, batch norms of averaged weights."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from distributed import launch

DROP_EVERY, DROP = 0.4, 0.3          # the 'step' schedule of SADE: share of the steps, factor


def cosine(step: int, steps: int, epochs: int, warmup_epochs: int) -> float:
    """From 1 to 0 along a cosine, the same within an epoch."""
    last = epochs - warmup_epochs - 1
    done = min((step // steps - warmup_epochs) / last, 1.0) if last > 0 else 0.0
    return (1 + math.cos(math.pi * done)) / 2


# share of the way from the lowest to the highest rate, after the warm-up
SCHEDULES = {'cosine': cosine,
             'step': lambda step, steps, epochs, _: DROP ** int(step / (DROP_EVERY * steps * epochs)),
             'constant': lambda *_: 1.0}


def learning_rate(step: int, steps: int, *, epochs: int, warmup_epochs: int, highest: float,
                  lowest: float, warmup_steps: int = 0, schedule: str = 'cosine') -> float:
    """Linear warm-up per step, then a schedule from the highest rate towards the lowest.

    `steps` are those of an epoch. The warm-up takes `warmup_epochs`, and `warmup_steps` if that is longer.
    """
    warm_up = max(warmup_epochs * steps, warmup_steps)
    if step < warm_up:
        return highest * step / warm_up
    return lowest + (highest - lowest) * SCHEDULES[schedule](step, steps, epochs, warmup_epochs)


def steady(decay: float) -> Callable[[int], float]:
    """What the n-th update of an average keeps of it: nothing at first, then always `decay`."""
    return lambda n: decay if n > 1 else 0.0


def ramped(decay: float) -> Callable[[int], float]:
    """The same, less at first, so that the average soon forgets where it began."""
    return lambda n: min(decay, (1 + n) / (10 + n))


def by_half_life(half_life: float, ramp: float, images: int) -> Callable[[int], float]:
    """The same, so that half is kept over `half_life` images, but at most over `ramp` times those seen.

    `images` are those between updates; a `ramp` of 0 is none (Karras et al. 2022, appendix F.1).
    """
    return lambda n: 0.5 ** (images / min(half_life, ramp * images * n or half_life))


def average_of(model: nn.Module, kept: Callable[[int], float], use_buffers: bool = True) -> AveragedModel:
    """An exponential average of the model's weights, beginning at them as they are.

    Its n-th update keeps the share `kept(n)` of it, n from 1. Whole numbers are copied.
    """
    def update(averages: list[Tensor], values: list[Tensor], n: Tensor) -> None:
        share = kept(int(n)) if averages[0].is_floating_point() else 0.0
        get_ema_multi_avg_fn(share)(averages, values, n)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=use_buffers)
    average.n_averaged.fill_(1)                 # of 0 updates torch takes the first one whole
    return average


class SafeBuffers:
    """A copy of the model's floating-point buffers as they were after the last good step."""

    def __init__(self, model: nn.Module):
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.copies = [b.clone() for b in self.buffers]

    def keep(self) -> None:
        self._copy(self.copies, self.buffers)

    def restore(self) -> None:
        self._copy(self.buffers, self.copies)

    def _copy(self, to: list[Tensor], values: list[Tensor]) -> None:
        if values:                                    # one operation, not one each
            torch._foreach_copy_(to, values)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, safe: SafeBuffers,
                   grad_clip: float) -> tuple[bool, Tensor]:
    """Updates the weights from their gradients. Returns whether it did, and the gradient norm before
    clipping.

    A gradient that is not finite changes nothing: neither weights nor running statistics. Gradients are
    averaged over ranks, so all ranks come to the same verdict.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizer.step()
        safe.keep()
    else:
        safe.restore()
    return finite, norm


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the batch-norm statistics to the means over these batches (B, C, *S), and over all ranks.

    An average of weights has never seen its own activations: the average of the statistics is not the
    statistics of the average (Izmailov et al. 2018).
    """
    update_bn(batches, model)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(launch.mean_over_ranks(statistic))
    model.eval()
