"""Sampling: images drawn by the model, and by the plain one.

    python -m benchmarks.sampling [nvae_mnist_cpu:16 ...] [--clock cpu] [--json FILE]
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import compared, run
from benchmarks.plain import OrderedNoise, plain_model
from benchmarks.recipes import trainer_of
from utils import seed_noise

CASES = ('nvae_mnist_cpu:16', 'nvae_xray:32', 'hvae_fashion:16')


@torch.no_grad()
def means(model: Any, number: int) -> Tensor:
    seed_noise(0)
    with OrderedNoise():
        return model.sample(number, mean=True)


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with trainer_of(case) as trainer:
            number, model = trainer.schedule.batch_size, trainer.model.eval()
            plain = plain_model(model)
            yield {'case': case, **compared({'ours': partial(means, model, number),
                                             'plain': partial(means, plain, number)}, flags)}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
