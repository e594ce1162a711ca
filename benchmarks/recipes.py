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
NETWORKS = {                # of a case NETWORK:BATCH_SIZE -> recipe
    'nvae_mnist': 'nvae_mnist', 'nvae_mnist_cpu': 'nvae_mnist_cpu', 'nvae_cifar10': 'nvae_cifar10',
    'nvae_xray': 'nvae_chest_xray_cpu', 'hvae_fashion': 'hvae_fashion_mnist', 'vae_mednist': 'vae_mednist',
    'score_32': 'score_phantom_cpu'}


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
    """The parts of a recipe's run, on images of noise; `case` is NETWORK:BATCH_SIZE."""
    network, batch_size = case.split(':')
    with trainer_with([*flags_of(NETWORKS[network]), '--batch_size', batch_size]) as trainer:
        yield trainer


@contextmanager
def trainer_with(words: list[str]) -> Iterator[Trainer]:
    """The parts of a run with these flags of train.py, on images of noise."""
    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(parse_args([*words, '--amp', 'off', '--dry_run', '--root', folder,
                                  '--checkpoint_activations', 'off', '--image_every', '0']))
