"""What a validation measures besides a likelihood: the objective, and what a family shows of itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distributed import launch
from utils import seed_noise


@torch.no_grad()
def mean_objective(model: Any, batches: Iterable[tuple[int, Any]], seed: int, device: torch.device) -> float:
    """The model's loss at the end of all schedules, mean over all images of `batches` and all ranks.

    Noise follows from seed and batch number, as in `evaluate_likelihood`.
    """
    model.eval()
    rows = []
    for index, batch in batches:
        seed_noise(seed, 'objective', index)
        loss, _ = model.objective(model(batch.x.to(device, non_blocking=True)), progress=1.0)
        rows.append((index, float(loss), len(batch.x)))
    rows = sorted(launch.gather(rows))
    return sum(loss * number for _, loss, number in rows) / sum(number for *_, number in rows)


@torch.no_grad()
def diagnose(model: Any, batches: Iterable[tuple[int, Any]], seed: int,
             device: torch.device) -> dict[str, Tensor]:
    """What `model.diagnose(x)` gives of each image, over all images of `batches` and all ranks: each (N,)."""
    model.eval()
    rows = []
    for index, batch in batches:
        seed_noise(seed, 'diagnose', index)
        values = model.diagnose(batch.x.to(device, non_blocking=True))
        rows.append((index, {name: value.float().cpu() for name, value in values.items()}))
    rows = [values for _, values in sorted(launch.gather(rows), key=lambda row: row[0])]
    return {name: torch.cat([values[name] for values in rows]) for name in rows[0]}
