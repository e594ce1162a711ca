"""Images side by side, for people to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anomaly.maps.overlays import titled
from storage.run_log import RunLog
from utils import seed_noise, write_atomically

NUM_SHOWN = 64                              # images in a grid
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)         # of samples that training shows, unless the family states others


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tiles images (N, C, H, W) in [0, 1] to one (C, rows * (H + 1), columns * (W + 1)), nearly square.

    Volumes (N, C, D, H, W) show their middle slice. Channels are shown side by side, in gray, unless there
    are 1 or 3.
    """
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.shape[1] not in (1, 3):
        images = torch.cat(images.split(1, dim=1), dim=3)
    n, c, h, w = images.shape
    columns = columns or int(n ** 0.5 + 0.999)
    rows = -(-n // columns)
    grid = images.new_ones(c, rows * (h + 1), columns * (w + 1))
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        grid[:, top:top + h, left:left + w] = image
    return grid


def as_picture(image: Tensor) -> Image.Image:
    """An image (1 or 3, H, W) in [0, 1] with 8 bits."""
    values = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()        # (C, H, W)
    return Image.fromarray(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1))


def save_png(path: str | Path, image: Tensor, titles: Sequence[str]) -> None:
    """Writes an image (1 or 3, H, W) in [0, 1] as an 8-bit PNG, under the titles of its columns."""
    picture = titled(as_picture(image), titles)
    write_atomically(path, lambda temporary: picture.save(temporary, format='PNG'))


def save_gif(path: str | Path, frames: Sequence[Tensor], milliseconds: int = 120) -> None:
    """Writes images (1 or 3, H, W) in [0, 1] as a GIF that plays to the end and back, for ever."""
    pictures = [as_picture(frame) for frame in frames]
    pictures += pictures[-2:0:-1]
    write_atomically(path, lambda temporary: pictures[0].save(
        temporary, format='GIF', save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0))


@torch.no_grad()
def show_images(model: Any, x: Tensor, log: RunLog, step: int, seed: int) -> None:
    """Shows reconstructions of x (B, C, *S) and samples in TensorBoard; training does not see their noise."""
    model.eval()
    number = getattr(model, 'num_shown', NUM_SHOWN)
    if hasattr(model, 'reconstruct'):
        x = x[:number // 2]
        pairs = torch.stack([x, model.reconstruct(x)], dim=1).flatten(0, 1)    # input, output, input, ...
        log.image(step, 'reconstruction', image_grid(pairs))
    for temperature in getattr(model, 'temperatures', TEMPERATURES) if hasattr(model, 'sample') else ():
        seed_noise(seed, 'show', step)
        log.image(step, f'generated_{temperature}', image_grid(model.sample(number, temperature)))
