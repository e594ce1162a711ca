"""train.py in float64, with noise that belongs to an image of the joint batch and not to a process.

    python tests/equal_noise.py FLAGS OF TRAIN.PY

So several processes must end with the weights of one process on the joint batch, up to rounding. All else is
the real training path. To be started by any launcher.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.overrides import TorchFunctionMode

import evaluation.likelihood
import readers.batches
import train
import training.trainer
from distributions import RowNoise
from utils import mix_seed, run_program

drawing = {'key': (), 'share': 0, 'draw': 0}


def seed_noise(*parts):
    """Notes what noise is for: (seed, 'train', step) of one share of the joint batch, or anything else."""
    shared = parts[1] in ('train', 'initialize')
    drawing.update(key=parts[:-1] if shared else parts, share=parts[-1] if shared else 0, draw=0)
    torch.manual_seed(mix_seed(*parts))


class JointNoise(TorchFunctionMode):
    """`randn_like` and `rand_like` give the rows of the joint batch's noise that belong to this share."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in RowNoise.FILL or args[0].is_meta:
            return function(*args, **(kwargs or {}))
        generator = torch.Generator().manual_seed(mix_seed(*drawing['key'], 'draw', drawing['draw']))
        drawing['draw'] += 1
        rows = len(args[0])
        first = drawing['share'] * rows
        noise = torch.empty(first + rows, *args[0].shape[1:])
        return RowNoise.FILL[function](noise, generator=generator)[first:]


def in_double(batches):
    def made(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            number, images = batch if isinstance(batch[0], int) else (None, batch)
            images = images._replace(x=images.x.double())
            yield images if number is None else (number, images)
    return made


# At import, so that processes that train.py spawns do the same.
torch.set_default_dtype(torch.float64)
JointNoise().__enter__()
for module in (train, training.trainer, evaluation.likelihood):
    module.seed_noise = seed_noise
training.trainer.train_batches = in_double(readers.batches.train_batches)
training.trainer.eval_batches = in_double(readers.batches.eval_batches)

if __name__ == '__main__':
    run_program(train.main)
