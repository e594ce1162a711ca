"""Drawing images from a trained model, and batch-norm statistics that fit its use."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from distributed import launch
from evaluation.config import Samples, Sampling
from evaluation.pictures import NUM_SHOWN, image_grid, save_png
from evaluation.run import Evaluation
from model import describe
from storage.checkpoint import save_checkpoint
from utils import UserError, finite, seed_noise, write_npz

READJUST_PASSES, READJUST_BATCH = 500, 16
SAMPLE_BATCH = 100                                # images drawn at a time
DEFAULT_TEMPERATURE = 0.7                         # of families that do not state theirs


@torch.no_grad()
def samples(model: Any, number: int, batch_size: int, temperature: float, *, seed: int,
            mean: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(batch number, images (B, C, *S) in [0, 1]): `number` images in all, batch i drawn by rank i % world.

    An image depends on seed, batch number and the size of its batch alone; with `mean` it is the mean of
    p(x|z) instead of a draw from it.
    """
    for index in range(launch.rank(), -(-number // batch_size), launch.world()):
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


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor], seed: int) -> None:
    """Sets the batch-norm statistics to the means over these batches (B, C, *S), and over all processes.

    An average of weights has never seen its own activations: the average of the statistics is not the
    statistics of the average (Izmailov et al. 2018).
    """
    def with_noise() -> Iterator[Tensor]:
        for index, x in enumerate(batches):
            seed_noise(seed, 'recalibrate', index, launch.rank())
            yield x

    update_bn(with_noise(), model)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(launch.mean_over_ranks(statistic))
    model.eval()


def temperature(run: Evaluation, wanted: float | None) -> float:
    """The temperature of the command, or else the one that the family is published with."""
    if wanted is not None:
        return wanted
    return getattr(run.model, 'temperatures', (DEFAULT_TEMPERATURE,))[0]


def prepare(run: Evaluation, config: Sampling) -> float:
    """Gives the model the sampling flags of its family, and batch norms for the temperature if the command
    asks for it. Returns the temperature.
    """
    family, at = getattr(run.model.Config, 'Sampling', None), temperature(run, config.temp)
    if family and (given := {name: value for name, value in vars(run.args).items()
                             if name in family.__dataclass_fields__}):
        run.model.change_sampling(**given)
    if config.readjust_bn:
        readjust_batch_norm(run.model, at, seed=config.seed)
    if config.save_bn:
        path = run.out / 'checkpoint.pt'
        if launch.is_main():
            save_checkpoint(path, {'description': describe(run.model), 'weights': run.model.state_dict(),
                                   'ema': None, 'args': finite(run.opened[1]), 'readjusted_to': at})
        run.say(f'readjusted to temperature {at}: {path}')
    return at


def sample(run: Evaluation) -> None:
    """The mode `sample`: samples_<batch>.npz, and a grid of the first images as samples.png."""
    config = run.flags(Samples)
    number, batch_size, at = config.num_samples, config.batch_size or SAMPLE_BATCH, prepare(run, config)
    names = {f'samples_{index}.npz' for index in range(-(-number // batch_size))}
    if launch.is_main():
        for path in run.out.glob('samples_*.npz'):                  # of an earlier, larger call
            if path.stem.removeprefix('samples_').isdigit() and path.name not in names:
                path.unlink()
    for index, images in samples(run.model, number, batch_size, at, seed=config.seed):
        write_npz(run.out / f'samples_{index}.npz', samples=images.cpu().numpy())
        if index == 0:
            save_png(run.out / 'samples.png', image_grid(images[:NUM_SHOWN]),
                     [f'samples, temperature {at:g}'])
    run.write_metrics('sample', {'num_samples': number, 'temperature': at, 'readjust_bn': config.readjust_bn,
                                 'seed': config.seed})
    run.say(f"{number} images at temperature {at}: {run.out / 'samples.png'}")
