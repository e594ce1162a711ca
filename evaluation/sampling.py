"""Drawing images from a trained model, and batch-norm statistics that fit the images it draws."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from utils import UserError, seed_noise

READJUST_PASSES, READJUST_BATCH = 500, 16


@torch.no_grad()
def samples(model: Any, number: int, batch_size: int, temperature: float, *, seed: int, rank: int = 0,
            world: int = 1, mean: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(batch number, images (B, C, *S) in [0, 1]): `number` images in all, batch i drawn by rank i % world.

    An image depends on seed, batch number and the size of its batch alone; with `mean` it is the mean of
    p(x|z) instead of a draw from it.
    """
    for index in range(rank, -(-number // batch_size), world):
        seed_noise(seed, 'sample', index)
        yield index, model.sample(min(batch_size, number - index * batch_size), temperature, mean=mean)


@torch.no_grad()
def readjust_batch_norm(model: Any, temperature: float, *, seed: int, passes: int = READJUST_PASSES,
                        batch_size: int = READJUST_BATCH) -> None:
    """Fits the running statistics of batch norm to images drawn at this temperature (NVAE, "Batch Norm").

    In float32, with batches of 16 or more: statistics of smaller batches, or in half precision, can end
    in NaN. Layers that sampling does not reach keep theirs. Raises UserError if they end up not finite.
    """
    if batch_size < READJUST_BATCH:
        raise ValueError(f"batch_size {batch_size}: statistics need at least {READJUST_BATCH} images.")
    model.train()
    for i in range(passes):
        seed_noise(seed, 'readjust', i)
        model.sample(batch_size, temperature)
    model.eval()
    if not all(torch.isfinite(b).all() for b in model.buffers() if b.is_floating_point()):
        raise UserError(f"the batch-norm statistics at temperature {temperature} are not finite: the model "
                        f"draws images without bounds. Evaluate it without --readjust_bn.")
