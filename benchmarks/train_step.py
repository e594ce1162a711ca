"""A training step: the whole of it, the plain one, and its convolutions alone, by turns.

    python -m benchmarks.train_step [nvae_mnist:16 ...] [--clock cpu] [--json FILE]

`overhead` is the step divided by its convolutions alone, forward and backward, of the same shapes; `speedup`
is the plain step of benchmarks/plain.py divided by ours; `difference` that of losses and gradients.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.measure import alternate, milliseconds, peak_memory, ratio, run
from benchmarks.plain import loss_and_gradient, plain_model, plain_step
from benchmarks.recipes import trainer_of
from families.nvae.layers import DepthwiseConvolution
from train import train_step
from training.trainer import Trainer
from utils import UserError, seed_noise

STEPS = ('nvae_mnist:16', 'nvae_mnist:64', 'nvae_xray:32', 'nvae_cifar10:4', 'hvae_fashion:128', 'score_32:1',
         'score_32:2')
ALIKE = 1e-6        # largest relative difference of losses, and of norms of gradients
CONVOLUTIONS = (F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d)


class Convolutions(TorchFunctionMode):
    """Within the block, keeps of every convolution what was called, with what, and the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[Callable, tuple, dict, int]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           options: dict[str, Any] | None = None) -> Any:
        y = function(*args, **(options or {}))
        if function in CONVOLUTIONS:
            self.met.append((function, args, options or {}, y.numel()))
        return y


def convolutions_of(model: Any, x: Tensor) -> Callable[[], None]:
    """The convolutions of model(x), forward and backward, on noise of the same shapes and memory format."""
    with torch.no_grad(), Convolutions() as found:
        model(x)
    # Inputs of one shape are one tensor, as only the time counts.
    shapes = {(args[0].shape, args[0].stride()) for _, args, _, _ in found.met}
    noise = {how: torch.empty_strided(*how, device=x.device).normal_().requires_grad_() for how in shapes}
    calls = [(convolution(function, args), noise[args[0].shape, args[0].stride()],
              args[1].detach().requires_grad_(), args[3:], options)
             for function, args, options, _ in found.met]

    def convolve() -> None:
        for function, images, weight, more, options in calls:
            y = function(images, weight, None, *more, **options)
            torch.autograd.grad(y, (images, weight), y.detach())
    return convolve


def convolution(function: Callable, args: tuple) -> Callable:
    """What takes the arguments of a convolution in training: depthwise ones of a CPU are our own."""
    images, weight, _, *more = args
    depthwise = more[3:] == [len(weight)] == [images.shape[1]] and weight.shape[1] == 1
    if function is F.conv2d and depthwise and images.device.type == 'cpu':
        return lambda images, weight, _, stride, padding, *__: DepthwiseConvolution.apply(
            images, weight, stride[0], padding[0])
    return function


def measure(trainer: Trainer, rounds: int, clock: str) -> dict[str, Any]:
    """The columns of a case's row."""
    images = next(trainer.steps(0, 0))
    trainer.start_step(images)
    model = plain_model(trainer.model)
    # In float64: the gradient of an HVAE at its start multiplies the rounding of float32.
    found, expected = (loss_and_gradient(copy.deepcopy(m).double(), images[0].double())
                       for m in (trainer.model, model))
    if not (difference := float((found / expected - 1).abs().max())) < ALIKE:
        raise UserError(f"our loss or gradient differs from the plain one by {difference:.1e} of it.")
    baseline = plain_step(model, trainer.optimization.optimizer, progress=0.0)

    def plain() -> Tensor:
        seed_noise(trainer.run.seed, 'train', 0, 0)
        return baseline(images[0])

    def ours() -> Tensor:
        return train_step(trainer, images)['train/loss_iter']

    steps = {'step': ours, 'plain': plain}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    steps['convolutions'] = convolutions_of(trainer.model, images[0])
    seconds = alternate(steps, rounds, clock)
    return {**milliseconds(seconds), 'speedup': ratio(seconds['plain'], seconds['step']),
            'overhead': ratio(seconds['step'], seconds['convolutions']), 'MB': memory['step'],
            'plain MB': memory['plain'], 'difference': difference}


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with trainer_of(case) as trainer:
            yield {'case': case, **measure(trainer, flags.rounds, flags.clock)}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, STEPS))
