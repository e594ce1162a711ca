"""A training step: the whole of it, the plain one, and its convolutions alone, by turns.

    python -m benchmarks.train_step [nvae_mnist:16 ...] [--clock cpu] [--json FILE]

`overhead` is the step divided by its convolutions alone, forward and backward, of the same shapes; `speedup`
is the plain step of benchmarks/plain.py divided by ours; `difference` the relative one of losses and gradients.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, milliseconds, peak_memory, ratio, run
from benchmarks.plain import loss_and_gradient, plain_model, plain_step
from train import parse_args, train_step
from training.trainer import Trainer
from utils import UserError, seed_noise

RECIPES = Path(__file__).parents[1] / 'scripts' / 'recipes'
# name: recipe, images a step, further flags
CASES = {
    'nvae_mnist:16': ('nvae_mnist', 16, ''),
    'nvae_mnist:64': ('nvae_mnist', 64, ''),
    'nvae_xray:32': ('nvae_chest_xray_cpu', 32, ''),
    'nvae_cifar10:4': ('nvae_cifar10', 4, ''),
    'hvae_fashion:128': ('hvae_fashion_mnist', 128, ''),
    'score_32:1': ('score_phantom_cpu', 1, '--volume_shape 32 32 32'),
    'score_32:2': ('score_phantom_cpu', 2, '--volume_shape 32 32 32'),
}
ALIKE = 1e-4        # largest relative difference of losses, and of norms of gradients
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def flags_of(recipe: str) -> list[str]:
    """The flags that a recipe gives to train.py."""
    script = RECIPES / f'{recipe}.sh'
    printed = subprocess.run(['bash', script], capture_output=True, text=True, check=True,
                             env={**os.environ, 'PYTHON': 'echo', 'DATA': 'FOLDER', 'ROOT': 'RUNS'}).stdout
    words = next(line for line in printed.splitlines() if 'train.py' in line).split()[1:]
    for name in ('--data', '--root', '--num_process_per_node', '--num_proc_node'):
        if name in words:
            del words[(at := words.index(name)):at + 2]
    return [word for word in words if word != '--cont_training']


def trainer_of(recipe: str, batch_size: int, more: str, folder: str) -> Trainer:
    """The parts of a recipe's run, on images of noise."""
    return Trainer(parse_args([
        *flags_of(recipe), '--batch_size', str(batch_size), '--amp', 'off', '--checkpoint_activations', 'off',
        '--dry_run', '--root', folder, '--image_every', '0', *more.split()]))


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
    found, expected = (loss_and_gradient(m, images[0]) for m in (trainer.model, model))
    if not (difference := float((found / expected - 1).abs().max())) < ALIKE:
        raise UserError(f"our loss or gradient and those of the plain step differ by {difference:.1e} of them.")
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
        with tempfile.TemporaryDirectory() as folder:
            yield {'case': case, **measure(trainer_of(*CASES[case], folder), flags.rounds, flags.clock)}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
