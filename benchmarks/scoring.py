"""Scoring: all scores of a batch that a model has, and those of the plain model, one pass a draw.

    python -m benchmarks.scoring [nvae_mnist_cpu:16 ...] [--clock cpu] [--json FILE]
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anomaly.choice import choose_scores
from anomaly.outputs import Outputs
from benchmarks.measure import compared, run
from benchmarks.plain import OrderedNoise, plain_model
from benchmarks.recipes import trainer_of

CASES = {   # name: scores
    'nvae_mnist_cpu:16': 'all', 'nvae_xray:4': 'all', 'hvae_fashion:16': 'all', 'score_32:1': 'msma_gmm',
    'score_32:2': 'msma_gmm'}


def scores(model: Any, x: Tensor, names: str) -> Tensor:
    """All scores of images x and the features of densities, side by side: (B, n)."""
    chosen, _ = choose_scores(names.split(), model)
    outputs = Outputs(model, x)
    with OrderedNoise():
        columns = [(score.image or score.features)(outputs) for score in chosen if score.needs]
    return torch.cat([column.double().reshape(len(x), -1) for column in columns], dim=1)


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with trainer_of(case) as trainer:
            x, model, names = next(trainer.steps(0, 0))[0], trainer.model.eval(), CASES[case]
            plain = plain_model(model)
            yield {'case': case, **compared({'ours': partial(scores, model, x, names),
                                             'plain': partial(scores, plain, x, names)}, flags)}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
