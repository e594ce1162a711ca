"""What a validation measures of models without a likelihood: their objective."""

from collections.abc import Iterable
from typing import Any

import torch

import launch
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
