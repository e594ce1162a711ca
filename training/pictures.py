"""Pictures of a run for TensorBoard."""

from typing import Any

import torch
from torch import Tensor

from evaluation.pictures import image_grid
from utils import RunLog, seed_noise

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)         # of samples, where a family says nothing else
NUM_SHOWN = 64                              # images in a grid, likewise


@torch.no_grad()
def show_images(model: Any, x: Tensor, log: RunLog, step: int, seed: int) -> None:
    """Reconstructions of x (B, C, *S) and samples; draws noise that training does not see."""
    model.eval()
    number = getattr(model, 'num_shown', NUM_SHOWN)
    if hasattr(model, 'reconstruct'):
        x = x[:number // 2]
        pairs = torch.stack([x, model.reconstruct(x)], dim=1).flatten(0, 1)    # input, output, input, ...
        log.image(step, 'reconstruction', image_grid(pairs))
    for temperature in getattr(model, 'temperatures', TEMPERATURES) if hasattr(model, 'sample') else ():
        seed_noise(seed, 'show', step)
        log.image(step, f'generated_{temperature}', image_grid(model.sample(number, temperature)))
