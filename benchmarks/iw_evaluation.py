"""Importance weighting: 100 draws of a batch as an evaluation takes them, and a pass of the plain model each.

    python -m benchmarks.iw_evaluation [nvae_mnist_cpu:16 ...] [--clock cpu] [--json FILE]

`difference` is that of the importance-weighted bounds in nats, under the same noise.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anomaly.outputs import log_weight, passes
from benchmarks.measure import compared, run
from benchmarks.plain import OrderedNoise, plain_model
from benchmarks.recipes import trainer_of
from distributions import log_mean_exp

DRAWS = 100
CASES = ('nvae_mnist_cpu:16', 'nvae_xray:4', 'hvae_fashion:16', 'vae_mednist:16')


@torch.no_grad()
def bound(model: Any, x: Tensor, most: int = 0) -> Tensor:
    """The importance-weighted bound of images x (B, C, H, W), nats: (B,)."""
    seeds = [[draw] for draw in range(DRAWS)]
    with OrderedNoise():
        return log_mean_exp(torch.stack([log_weight(terms) for terms in passes(model, x, seeds, most)]))


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        with trainer_of(case) as trainer:
            x, model = next(trainer.steps(0, 0))[0], trainer.model.eval()
            plain = plain_model(model)
            yield {'case': case, **compared({'ours': partial(bound, model, x),
                                             'plain': partial(bound, plain, x, len(x))}, flags)}


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, CASES))
