"""Batches of a part: shuffled for training, in order for evaluation, prepared here or in worker processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, default_convert

from distributed import launch
from readers.parts import Batch, Part
from readers.split import count
from utils import UserError, mix_seed


def steps_per_epoch(part: Part, batch_size: int, world: int = 1) -> int:
    """Joint batches, of batch_size images on each of `world` ranks, in an epoch; it drops what is left over.

    Raises UserError if there is not one.
    """
    if len(part) < batch_size * world:
        fits = len(part) // world
        todo = f'--batch_size that fits is {fits}' if fits else f'number of processes is {len(part)}'
        raise UserError(f"{count(len(part), 'image')} cannot fill a batch of {batch_size} on each of "
                        f"{world} process{'es' if world > 1 else ''}: the largest {todo}.")
    return len(part) // (batch_size * world)


def train_batches(part: Part, batch_size: int, *, seed: int, accumulate: int = 1, first_step: int = 0,
                  workers: int = 0) -> Iterator[Batch]:
    """Shuffled batches of this process for ever, `accumulate` of them a step, from step `first_step` on.

    A batch depends on (seed, step, rank, world) alone, so a run resumes at any step. The batches of all
    ranks, one after the other, are the batch of one process with batch_size * world; and `accumulate` of
    them on one rank are those of as many ranks.
    """
    rank, world = launch.rank(), launch.world()
    joint = batch_size * world * accumulate
    steps = steps_per_epoch(part, batch_size, world * accumulate)
    mine = slice(rank * accumulate, (rank + 1) * accumulate)

    def keys() -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(first_step, steps)
        while True:
            generator = torch.Generator().manual_seed(mix_seed(seed, 'order', epoch))
            order = torch.randperm(len(part), generator=generator)[:steps * joint]
            order = order.view(steps, world * accumulate, batch_size)
            draw = mix_seed(seed, 'draw', epoch)
            for indices in order[first:, mine].flatten(0, 1).numpy():    # one list of all would be 0.1 GB
                yield [(draw, index) for index in indices.tolist()]
            epoch, first = epoch + 1, 0

    return _load(part, keys(), workers)


def eval_batches(part: Part, batch_size: int, *, workers: int = 0) -> Iterator[tuple[int, Batch]]:
    """(number, batch) of this process: images in order, batch i for rank i % world, the last may be short."""
    numbers = range(launch.rank(), -(-len(part) // batch_size), launch.world())

    keys = ([(0, index) for index in range(i * batch_size, min((i + 1) * batch_size, len(part)))]
            for i in numbers)
    return zip(numbers, _load(part, keys, workers), strict=True)


def _load(part: Part, keys: Iterator[list[tuple[int, int]]], workers: int) -> Iterator[Batch]:
    """The batches of these keys, by as many worker processes. Raises UserError if one of these is killed."""
    if workers == 0:
        yield from map(part.__getitems__, keys)
        return
    try:
        yield from DataLoader(part, batch_sampler=keys, num_workers=workers, collate_fn=default_convert)
    except UserError as error:                       # from a worker, with the traceback there before it
        raise UserError(str(error).strip().rpartition(f'{UserError.__name__}: ')[2]) from None
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        reason = str(error).split('. ')[0]
        raise UserError(f"a process that prepares batches has ended ({reason}): often memory has run out. "
                        f"Lower --num_workers; training goes on with --cont_training.") from None
