"""A picture of one image: input | reconstruction | input under its anomaly map. Pixels alone, no metadata.

Pixels of the map above the threshold of pixels are outlined.

C channels, S pixels, (H, W) or (D, H, W).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from anomaly.maps.slices import VIEWS, cuts, focus
from anomaly.report.figures import CALLED

SHOWN_SIZE = 256            # pixels that a small image is enlarged to, about
STRENGTH = 0.8              # how much of a pixel the colour of the largest map value covers
GAP = 4                     # white pixels between the panels
LINE = 2                    # width of an outline, in pixels of the picture


def overlay(image: np.ndarray, reconstruction: np.ndarray | None, anomaly_map: np.ndarray | None,
            look: dict[str, Any], threshold: float = math.inf,
            spacing: Sequence[float] = (1, 1, 1)) -> Image.Image:
    """`image` and `reconstruction` (C, *S) in [0, 1], `anomaly_map` (*S); the latter two may be None; voxels
    are `spacing` apart, in any unit.

    `look` is the colour scale: the name of the colours, and the values of its ends. Of a volume the first
    channel is shown, in a row each for input, reconstruction and map: axial, coronal and sagittal slices
    (slices.py) through the largest value of the map, else through the middle.
    """
    volume, size = image.ndim == 4, image.shape[1:]
    place = focus(anomaly_map, size) if volume else ()
    parts = lambda x: cuts(x, place) if volume else [x]
    scale = SHOWN_SIZE / max(n * mm for n, mm in zip(size, spacing))
    times = [max(1, round(scale * mm)) for mm in spacing]                          # pixels that show a voxel
    axes = [(view.rows, view.columns) for view in VIEWS] if volume else [(0, 1)]
    enlarged = lambda row: [x.repeat(times[a], 0).repeat(times[b], 1) for x, (a, b) in zip(row, axes)]
    shown = [parts(x[:1] if volume else x) for x in (image, reconstruction) if x is not None]
    rows = [enlarged([as_colour(x) for x in row]) for row in shown]
    if anomaly_map is not None:
        maps = parts(anomaly_map)
        colours = enlarged([blend(as_colour(x), values, look) for x, values in zip(shown[0], maps)])
        above = enlarged([values > threshold for values in maps])
        rows.append([coloured(x, here, look) for x, here in zip(colours, above)])
    if volume:
        rows = [[lettered(x, view.letters) for x, view in zip(row, VIEWS)] for row in rows]
    return as_picture(joined([joined(row, 1) for row in rows], 0 if volume else 1))


def coloured(picture: np.ndarray, above: np.ndarray, look: dict[str, Any]) -> np.ndarray:
    """The picture (H, W, 3) with the outline of (H, W) bool drawn into it."""
    line = above & ~ndimage.binary_erosion(above, iterations=LINE, border_value=1)
    picture[line] = np.array(ImageColor.getrgb(CALLED[look['cmap']])) / 255
    return picture


def lettered(picture: np.ndarray, letters: str) -> np.ndarray:
    """The picture (H, W, 3) with what is at its left, right, top and bottom written into it."""
    image = as_picture(picture)
    draw, (width, height) = ImageDraw.Draw(image), image.size
    places = ((4, height / 2), (width - 4, height / 2), (width / 2, 4), (width / 2, height - 4))
    for letter, place, anchor in zip(letters, places, ('lm', 'rm', 'mt', 'mb')):
        draw.text(place, letter, 'white', anchor=anchor, stroke_width=1, stroke_fill='black')
    return np.asarray(image) / 255


def joined(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures (H, W, 3) one below (axis 0) or beside (1) another, white between and after smaller ones."""
    most = max(picture.shape[1 - axis] for picture in pictures)
    gap = np.ones((GAP, most, 3) if axis == 0 else (most, GAP, 3))
    filled = []
    for picture in pictures:
        room = [(0, 0)] * 3
        room[1 - axis] = (0, most - picture.shape[1 - axis])
        filled += [gap, np.pad(picture, room, constant_values=1)]
    return np.concatenate(filled[1:], axis)


def as_picture(colours: np.ndarray) -> Image.Image:
    """Colours (H, W, 3) in [0, 1] as a picture of 8 bits."""
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def as_grey(values: np.ndarray) -> np.ndarray:
    """(..., H, W) as colours (..., H, W, 3)."""
    return values[..., None].repeat(3, -1)


def as_colour(image: np.ndarray) -> np.ndarray:
    """(C, H, W) as (H, W, 3): colours if C = 3, else the first channel in grey."""
    return np.moveaxis(image, 0, -1) if len(image) == 3 else as_grey(image[0])


def blend(background: np.ndarray, anomaly_map: np.ndarray, look: dict[str, Any]) -> np.ndarray:
    """The map (..., H, W) in colours over (..., H, W, 3): the farther from 0, the less shows through."""
    import matplotlib
    values = np.nan_to_num(anomaly_map.astype(np.float64), nan=look['vmax'], posinf=look['vmax'],
                           neginf=look['vmin']).clip(look['vmin'], look['vmax'])
    colours = matplotlib.colormaps[look['cmap']](
        (values - look['vmin']) / (look['vmax'] - look['vmin']))[..., :3]
    cover = STRENGTH * np.abs(values / look['vmax'])[..., None]
    return (1 - cover) * background + cover * colours
