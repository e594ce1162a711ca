"""A dry run: one step of a run in this process, and from it what the whole run would need."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from distributed import launch
from neural_operations import activation_bytes

MEMORY_MARGIN = 1.3          # gradients and work space, beside what is kept for the backward pass
COPIES = 4                   # of every weight: itself, its gradient, two moments of Adamax
LONG_ENOUGH = 20             # seconds: a step that takes less is repeated, up to MOST_STEPS times
MOST_STEPS = 3
OUT_OF_MEMORY = ('out of memory', "can't allocate memory", 'not enough memory')
GB = 2 ** 30


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs: once, and for each image; with and without recomputed activations."""
    fixed: int
    image: int
    image_recomputed: int

    def need(self, batch_size: int, recomputed: bool) -> float:
        return self.fixed + batch_size * MEMORY_MARGIN * (self.image_recomputed if recomputed else self.image)

    def largest_batch(self, free: float, recomputed: bool) -> int:
        image = self.image_recomputed if recomputed else self.image
        return max(0, int((free - self.fixed) / (MEMORY_MARGIN * image)))


def estimate_memory(model: torch.nn.Module, shape: tuple[int, ...], averaged: bool) -> Memory:
    """What a step of this model needs, before it is taken."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory(weights * (COPIES + averaged), *activation_bytes(model, shape))


def advice(memory: Memory, free: float, batch_size: int, accumulate: int, recomputed: bool) -> list[str]:
    """What to change so that a step fits into `free` bytes, the least costly first."""
    lines = []
    if not recomputed and memory.need(batch_size, True) < free:
        lines.append('--checkpoint_activations on: the same numbers, about a third slower')
    for again in [True] if recomputed else [False, True]:
        fits = memory.largest_batch(free, again)
        if 0 < fits < batch_size:
            shares = -(-batch_size * accumulate // fits)
            flag = ' --checkpoint_activations on' if again and not recomputed else ''
            lines.append(f'--batch_size {fits} --accumulate {shares}{flag}: the joint batch stays as it is')
    if not lines:
        lines.append('fewer --num_channels_enc and --num_channels_dec, fewer groups, or a smaller image')
    return lines


def rehearse(trainer: Any, num_images: int, world: int) -> int:
    """Takes a step of `trainer` and prints what a run on `num_images` with `world` processes would need.

    Returns 0, or 1 if a step does not fit into the memory there is.
    """
    config, model, batch_size = trainer.config, trainer.model, trainer.config.batch_size
    number = sum(p.numel() for p in model.parameters())
    print(f'parameters     {number / 1e6:.2f} M ({number:,})')
    if hasattr(model, 'num_groups'):
        print(f'latent groups  {model.num_groups}')
    print(f'images         {" x ".join(map(str, trainer.data.shape))}, {trainer.data.pixels.likelihood}, '
          f'{num_images:,} to train on', flush=True)

    recomputed = trainer.recomputes
    free = launch.free_memory() + number * 4                            # the weights are there already
    memory = estimate_memory(model, trainer.data.shape, trainer.ema is not None)
    need = memory.need(batch_size, recomputed)
    seconds = None
    # The CPU's memory must not be tried out: the system would end the process, or others.
    if trainer.device.type == 'cuda' or need < free:
        seconds = _time_steps(trainer)
    print(f'memory         {_peak(trainer.device)} of {free / GB:.1f} GB free on {trainer.device.type}; '
          f'estimate {need / GB:.1f} GB for {batch_size} images a batch'
          f'{", activations recomputed" if recomputed else ""}')
    if seconds is None:
        print('does not fit. Change one of:')
        for line in advice(memory, free, batch_size, config.accumulate, recomputed):
            print(f'  {line}')
        return 1
    joint = batch_size * config.accumulate * world
    steps = max(1, num_images // joint) * config.epochs
    steps = min(steps, config.max_steps or steps)
    print(f'largest batch  about {memory.largest_batch(free, recomputed)} images a process'
          f'{"" if recomputed else f", {memory.largest_batch(free, True)} with --checkpoint_activations on"}')
    print(f'speed          {batch_size * config.accumulate / seconds:.2f} images/s a process, '
          f'{seconds:.2f} s a step')
    print(f'time           {_duration(steps * seconds)} for {steps:,} steps of {joint} images on {world} '
          f'{"processes" if world > 1 else "process"} like this one, without validation'
          f'{" and without waiting for each other" if world > 1 else ""}')
    return 0


def _time_steps(trainer: Any) -> float | None:
    """Seconds of a step, the last of several short ones; None if memory ran out."""
    try:
        for _ in range(MOST_STEPS):
            start = time.perf_counter()
            trainer.take_step()
            if trainer.device.type == 'cuda':
                torch.cuda.synchronize(trainer.device)
            seconds = time.perf_counter() - start
            if seconds > LONG_ENOUGH:
                break
        return seconds
    except RuntimeError as error:                                       # torch.OutOfMemoryError is one
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return None
        raise


def _peak(device: torch.device) -> str:
    """The most memory that this process has had so far."""
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / GB:.1f} GB at most'
    unit = 1 if sys.platform == 'darwin' else 1024                      # of ru_maxrss
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB:.1f} GB at most'


def _duration(seconds: float) -> str:
    for unit, length in (('days', 86400), ('h', 3600), ('min', 60)):
        if seconds >= length:
            return f'{seconds / length:.1f} {unit}'
    return f'{seconds:.0f} s'
