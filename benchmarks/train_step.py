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
from torch import Tensor, nn

from benchmarks.measure import alternate, milliseconds, peak_memory, ratio, run
from benchmarks.plain import loss_and_gradient, plain_model, plain_step
from benchmarks.recipes import trainer_of
from train import train_step
from training.trainer import Trainer
from utils import UserError, seed_noise

STEPS = ('nvae_mnist:16', 'nvae_mnist:64', 'nvae_xray:32', 'nvae_cifar10:4', 'hvae_fashion:128', 'score_32:1',
         'score_32:2')
ALIKE = 1e-6        # largest relative difference of losses, and of norms of gradients
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convolutions_of(model: Any, x: Tensor) -> Callable[[], None]:
    """The convolutions of model(x), forward and backward, on noise of the same shapes and memory format."""
    met: list[tuple[nn.Module, tuple]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        met.append((module, (inputs[0].shape, inputs[0].stride())))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    # Inputs of one shape are one tensor, as only the time counts.
    noise = {how: torch.empty_strided(*how, device=x.device).normal_().requires_grad_() for _, how in met}

    def convolve() -> None:
        for module, how in met:
            transposed = isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d))
            y = module(noise[how]) if transposed else module._conv_forward(noise[how], module.weight, None)
            torch.autograd.grad(y, (noise[how], module.weight), y.detach())
    return convolve


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
