"""Images side by side, for people to look at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import write_atomically


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tiles images (N, C, H, W) in [0, 1] to one (C, rows * (H + 1), columns * (W + 1)), nearly square."""
    n, c, h, w = images.shape
    columns = columns or int(n ** 0.5 + 0.999)
    rows = -(-n // columns)
    grid = images.new_ones(c, rows * (h + 1), columns * (w + 1))
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        grid[:, top:top + h, left:left + w] = image
    return grid


def save_png(path: str | Path, image: Tensor) -> None:
    """Writes an image (1 or 3, H, W) in [0, 1] as an 8-bit PNG."""
    values = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()        # (C, H, W)
    picture = Image.fromarray(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1))
    write_atomically(path, lambda temporary: picture.save(temporary, format='PNG'))
