"""Networks of the recipes, on images of noise."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train import parse_args
from training.trainer import Trainer

RECIPES = Path(__file__).parents[1] / 'scripts' / 'recipes'
# name: recipe, images a step, further flags
CASES = {
    'nvae_mnist:16': ('nvae_mnist', 16, ''),
    'nvae_mnist:64': ('nvae_mnist', 64, ''),
    'nvae_xray:32': ('nvae_chest_xray_cpu', 32, ''),
    'nvae_cifar10:4': ('nvae_cifar10', 4, ''),
    'nvae_xray:4': ('nvae_chest_xray_cpu', 4, ''),
    'nvae_mnist_cpu:16': ('nvae_mnist_cpu', 16, ''),
    'hvae_fashion:16': ('hvae_fashion_mnist', 16, ''),
    'vae_mednist:16': ('vae_mednist', 16, ''),
    'hvae_fashion:128': ('hvae_fashion_mnist', 128, ''),
    'score_32:1': ('score_phantom_cpu', 1, ''),
    'score_32:2': ('score_phantom_cpu', 2, ''),
}


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


@contextmanager
def trainer_of(case: str) -> Iterator[Trainer]:
    """The parts of a recipe's run, on images of noise."""
    recipe, batch_size, more = CASES[case]
    with trainer_with([*flags_of(recipe), '--batch_size', str(batch_size), *more.split()]) as trainer:
        yield trainer


@contextmanager
def trainer_with(words: list[str]) -> Iterator[Trainer]:
    """The parts of a run with these flags of train.py, on images of noise."""
    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(parse_args([*words, '--amp', 'off', '--dry_run', '--root', folder,
                                  '--checkpoint_activations', 'off', '--image_every', '0']))
