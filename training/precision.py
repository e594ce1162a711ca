"""Whether a network trains faster in bfloat16 here: it depends on the processor and on the network."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from distributed import launch

ROUNDS = 3               # measurements of each precision, by turns, after one that does not count


def multiplies_bf16() -> bool:
    """Whether all processors of the run have instructions for bfloat16; without, it is many times slower."""
    capabilities = torch.cpu.get_capabilities().items()
    return not launch.any_rank(not any(has for name, has in capabilities if name.endswith('bf16')))


def choose_bf16(model: Any, x: Tensor) -> tuple[bool, str]:
    """Whether forward and backward passes of a training batch x (B, C, *S) on a CPU are faster in bfloat16,
    and a line that says so. Gradients are left behind, buffers stay as they are. All processes decide alike.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for number in range(ROUNDS + 1):
        for bf16, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
                loss, _ = model.objective(model(x), 0.0)
            loss.backward()
            times += [time.perf_counter() - start] if number else []
    for buffer, before in buffers:
        buffer.copy_(before)
    exact, half = (statistics.median(times) for times in seconds.values())
    faster = not launch.any_rank(half >= exact)
    return faster, (f'--amp auto: {"bfloat16" if faster else "float32"}, as a step takes {exact:.2f} s in '
                    f'float32 and {half:.2f} s in bfloat16')
