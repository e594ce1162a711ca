"""A dry run: the first steps of a run in this process, and from them what the whole run would need."""

import math
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from datasets import DATASETS
from distributed import launch
from neural_operations import activation_bytes
from training.trainer import MEMORY_MARGIN, Trainer, free_memory

COPIES = 4                   # of every weight: itself, its gradient, two moments of Adamax
MOST_STEPS, LONG_ENOUGH = 3, 20             # steps at most; seconds after which no more are taken
OUT_OF_MEMORY = ('out of memory', 'tried to allocate')      # on a GPU, on the CPU
GB = 2 ** 30


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs: once, and for each image, with and without recomputed activations."""
    fixed: int
    image: int
    image_recomputed: int

    def need(self, batch_size: int, recomputed: bool) -> float:
        return self.fixed + batch_size * MEMORY_MARGIN * (self.image_recomputed if recomputed else self.image)

    def largest_batch(self, free: float, recomputed: bool) -> int:
        return max(0, int((free - self.fixed) / (self.need(1, recomputed) - self.fixed)))


def report(train_step: Callable[..., object], processes: int, args: Namespace) -> int:
    """Takes the first steps of a run here, and prints what it would need with this many processes.

    Returns 0, or 1 if a step does not fit into the memory there is.
    """
    trainer = Trainer(args)
    config, model, data, recomputed = trainer.config, trainer.model, trainer.data, trainer.recomputes
    images, device = config.batch_size * config.accumulate, launch.device()
    num_images = (0 if args.data else DATASETS[args.dataset].num_train) or len(data.train)
    number = sum(p.numel() for p in model.parameters())
    print(f'parameters     {number / 1e6:.2f} M ({number:,})')
    print(f'latent groups  {getattr(model, "num_groups", "none")}')
    print(f'images         {" x ".join(map(str, data.shape))}, {data.pixels.likelihood}, {num_images:,} to '
          f'train on', flush=True)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = COPIES + (trainer.optimization.average is not None)
    memory = Memory(weights * copies, *(activation_bytes(model, data.shape, on) for on in (False, True)))
    free = free_memory() + weights                               # these are there already
    need = memory.need(config.batch_size, recomputed)
    # The CPU's memory must not be tried out: the system would end the process, or others.
    seconds = seconds_of_step(trainer, train_step) if device.type == 'cuda' or need < free else None
    print(f'memory         {peak_memory() / GB:.1f} GB at most of {free / GB:.1f} GB free on {device.type}; '
          f'estimate {need / GB:.1f} GB for {config.batch_size} images a batch'
          f'{", activations recomputed" if recomputed else ""}')
    if seconds is None:
        print('does not fit. Change one of:',
              *advice(memory, free, config.batch_size, config.accumulate, recomputed), sep='\n  ')
        return 1
    print(f'largest batch  about {memory.largest_batch(free, False)} images a process, '
          f'{memory.largest_batch(free, True)} with --checkpoint_activations on')
    print(f'speed          {images / seconds:.2f} images/s a process, {seconds:.2f} s a step')
    steps = max(1, num_images // (images * processes)) * config.epochs
    steps = min(steps, config.max_steps or steps)
    print(f'time           {timedelta(seconds=round(steps * seconds))} for {steps:,} steps of '
          f'{images * processes} images on {processes} process{"es" if processes > 1 else ""} like this one, '
          f'without validation')
    return 0


def advice(memory: Memory, free: float, batch_size: int, accumulate: int, recomputed: bool) -> list[str]:
    """What to change so that a step fits into `free` bytes, the least costly first."""
    on, lines = '--checkpoint_activations on', []
    if not recomputed and memory.need(batch_size, True) < free:
        lines.append(f'{on}: the same numbers, about a third slower')
    for recompute, flag in [(True, '')] if recomputed else [(False, ''), (True, f' {on}')]:
        fits = memory.largest_batch(free, recompute)
        if 0 < fits < batch_size:
            batches = math.ceil(batch_size * accumulate / fits)
            lines.append(f'--batch_size {fits} --accumulate {batches}{flag}: the joint batch stays as it is')
    return lines or ['fewer --num_channels_enc and --num_channels_dec, fewer groups, or a smaller image']


def seconds_of_step(trainer: Trainer, train_step: Callable[..., object]) -> float | None:
    """The last of several short steps; None if memory ran out."""
    try:
        for _, images in zip(range(MOST_STEPS), trainer.steps(0, trainer.run.seed)):
            start = time.perf_counter()
            train_step(trainer, images)
            if launch.device().type == 'cuda':
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if seconds > LONG_ENOUGH:
                break
        return seconds
    except RuntimeError as error:                                       # torch.OutOfMemoryError is one
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return None
        raise


def peak_memory() -> int:
    """Bytes: the most memory that this process has had so far."""
    if launch.device().type == 'cuda':
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == 'darwin' else 1024                      # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
