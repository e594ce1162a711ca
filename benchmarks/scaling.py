"""How a training step of NVAE grows with depth, width, image size and batch, beside its arithmetic.

    python -m benchmarks.scaling [groups width size batch] [--clock cpu] [--json FILE] [--figure FILE]

`GMAC` are the multiplications of the convolutions in a forward pass, 10^9. `ms / GMAC` falls, or stays, where
no other term of the step grows faster than this work.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, milliseconds, ratio, run
from benchmarks.recipes import trainer_with
from benchmarks.train_step import Convolutions, convolutions_of
from train import train_step

BASE = {'num_groups_per_scale': 10, 'num_channels': 16, 'image_size': 64, 'batch_size': 4}
SWEEPS = {   # case: what changes, its values
    'groups': ('num_groups_per_scale', (5, 10, 20, 40)),
    'width': ('num_channels', (8, 16, 32, 64)),
    'size': ('image_size', (32, 64, 128, 256)),
    'batch': ('batch_size', (1, 4, 16, 64))}
NETWORK = '''--dataset covid --arch_instance res_mbconv --use_se --res_dist --weight_decay_norm 1e-2
    --num_latent_scales 1 --num_latent_per_group 8 --num_preprocess_blocks 1 --num_preprocess_cells 1
    --num_postprocess_blocks 1 --num_postprocess_cells 1 --fast_adamax'''


def flags_of(values: dict[str, int]) -> list[str]:
    channels = values['num_channels']
    given = {**values, 'num_channels_enc': channels, 'num_channels_dec': channels}
    del given['num_channels']
    return [*NETWORK.split(), *(word for name, value in given.items() for word in (f'--{name}', str(value)))]


def multiplications(model: nn.Module, x: Tensor) -> int:
    """Of the convolutions of model(x)."""
    with torch.no_grad(), Convolutions() as found:
        model(x)
    return sum(size * math.prod(args[1].shape[1:]) for _, args, _, size in found.met)


def rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in flags.cases:
        name, values = SWEEPS[case]
        for value in values:
            with trainer_with(flags_of(BASE | {name: value})) as trainer:
                images = next(trainer.steps(0, 0))
                trainer.start_step(images)
                work = multiplications(trainer.model, images[0]) / 1e9
                seconds = alternate({'step': partial(train_step, trainer, images),
                                     'convolutions': convolutions_of(trainer.model, images[0])},
                                    flags.rounds, flags.clock)
            row = {'case': f'{case} {value}', **milliseconds(seconds), 'GMAC': work,
                   'overhead': ratio(seconds['step'], seconds['convolutions'])}
            yield row | {'ms / GMAC': row['step ms'] / work}


def draw(found: Sequence[dict[str, Any]], file: str) -> None:
    """Time against arithmetic, both axes logarithmic, a line a sweep: a slope of 1 grows as the work does."""
    from matplotlib.figure import Figure
    figure = Figure((6.4, 4.8), layout='constrained')
    axes = figure.subplots()
    for case in dict.fromkeys(row['case'].split()[0] for row in found):
        mine = [row for row in found if row['case'].split()[0] == case]
        work = [row['GMAC'] for row in mine]
        line, = axes.loglog(work, [row['step ms'] for row in mine], 'o-', label=f'{case}: step')
        axes.loglog(work, [row['convolutions ms'] for row in mine], '--', color=line.get_color(),
                    label=f'{case}: its convolutions alone')
    axes.set(xlabel='multiplications of a forward pass, 10^9', ylabel='time of a training step, ms')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.savefig(file)


if __name__ == '__main__':
    sys.exit(run(rows, __doc__, SWEEPS, draw=draw))
