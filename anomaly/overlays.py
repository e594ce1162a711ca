"""A picture of one image: input | reconstruction | input under its anomaly map. Pixels alone, no metadata.

Pixels of the map above the threshold of pixels are outlined.

C channels, H x W pixels.
"""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageColor
from scipy import ndimage

from anomaly.figures import CALLED

SHOWN_SIZE = 256            # pixels that a small image is enlarged to, about
STRENGTH = 0.8              # how much of a pixel the colour of the largest map value covers
GAP = 4                     # white pixels between the panels
LINE = 2                    # width of an outline, in pixels of the picture


def overlay(image: np.ndarray, reconstruction: np.ndarray | None, anomaly_map: np.ndarray | None,
            look: dict[str, Any], threshold: float = math.inf) -> Image.Image:
    """`image` and `reconstruction` (C, H, W) in [0, 1], `anomaly_map` (H, W); the latter two may be None.

    `look` is the colour scale: the name of the colours, and the values of its ends.
    """
    times = max(1, round(SHOWN_SIZE / max(image.shape[-2:])))
    enlarged = lambda x: x.repeat(times, 0).repeat(times, 1)
    panels = [enlarged(as_colour(x)) for x in (image, reconstruction) if x is not None]
    if anomaly_map is not None:
        coloured = enlarged(blend(as_colour(image), anomaly_map, look))
        above = enlarged(anomaly_map > threshold)
        line = above & ~ndimage.binary_erosion(above, iterations=LINE, border_value=1)
        coloured[line] = np.array(ImageColor.getrgb(CALLED[look['cmap']])) / 255
        panels.append(coloured)
    gap = np.ones((panels[0].shape[0], GAP, 3))
    row = [part for panel in panels for part in (gap, panel)][1:]
    return Image.fromarray((np.concatenate(row, 1).clip(0, 1) * 255).round().astype(np.uint8))


def as_colour(image: np.ndarray) -> np.ndarray:
    """(C, H, W) as (H, W, 3): colours if C = 3, else the first channel in grey."""
    return np.moveaxis(image if len(image) == 3 else image[:1].repeat(3, 0), 0, -1)


def blend(background: np.ndarray, anomaly_map: np.ndarray, look: dict[str, Any]) -> np.ndarray:
    """The map (H, W) in colours over (H, W, 3): the farther a value from 0, the less shows through."""
    import matplotlib
    values = np.nan_to_num(anomaly_map.astype(np.float64), nan=look['vmax'], posinf=look['vmax'],
                           neginf=look['vmin']).clip(look['vmin'], look['vmax'])
    colours = matplotlib.colormaps[look['cmap']](
        (values - look['vmin']) / (look['vmax'] - look['vmin']))[..., :3]
    cover = STRENGTH * np.abs(values / look['vmax'])[..., None]
    return (1 - cover) * background + cover * colours
