"""A picture of one image: input | reconstruction | input under its anomaly map. Pixels alone, no metadata.

C channels, *S pixels, (H, W), or voxels (D, H, W), which run to the right, to the front and upwards (RAS+).
Slices of a volume follow the radiological convention: the patient's right is on the left of the picture; the
front is at the top, or on the left of a sagittal one. A sheet has all slices of one view: n of h x w pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw

SHOWN_SIZE = 256            # pixels that a small image is enlarged to, about
STRENGTH = 0.8              # how much of a pixel the color of the largest map value covers
GAP = 4                     # white pixels between the panels
TITLE_HEIGHT = 14           # pixels of a line of titles
LINE = 2                    # width of an outline, in pixels of the picture
LESION = '#39e0d0'          # outline of lesion masks
ABOVE = {'inferno': '#ffffff', 'coolwarm': '#000000'}    # outline of pixels above the threshold, by color map


# ----------------------------------------------------------------------------------------------------- slices

class View(NamedTuple):
    """Axes are those of *S; rows and columns of a picture run backwards."""
    name: str
    across: int              # the axis along which slices follow one another
    rows: int
    columns: int
    letters: str             # what is at the left, right, top and bottom


VIEWS = (View('axial', 2, 1, 0, 'RLAP'), View('coronal', 1, 2, 0, 'RLSI'), View('sagittal', 0, 2, 1, 'APSI'))


def stack(volume: np.ndarray, view: View) -> np.ndarray:
    """All slices of a volume (..., *S) as they are shown, in the order of the voxels: (..., n, h, w)."""
    axes = [axis - 3 for axis in (view.across, view.rows, view.columns)]
    return np.moveaxis(volume, axes, (-3, -2, -1))[..., ::-1, ::-1]


def cuts(volume: np.ndarray, place: Sequence[int]) -> list[np.ndarray]:
    """The slices (..., h, w) of every view through one voxel of a volume (..., *S)."""
    return [stack(volume, view)[..., place[view.across], :, :] for view in VIEWS]


def focus(anomaly_map: np.ndarray | None, size: Sequence[int]) -> tuple[int, ...]:
    """The voxel that slices go through: the maximum of a map (*S) that has one, or the middle of `size`."""
    if anomaly_map is not None:
        values = np.nan_to_num(anomaly_map.astype(np.float64), nan=-np.inf)
        if values.min() < values.max():
            return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))
    return tuple(n // 2 for n in size)


def sheet_columns(number: int) -> int:
    """How many of `number` slices are in a row of a sheet that is about square."""
    return math.ceil(math.sqrt(number))


def sheet(slices: np.ndarray) -> np.ndarray:
    """Slices (n, h, w, ...) side by side in one picture, row by row; the rest is 0."""
    number, height, width, *rest = slices.shape
    columns = sheet_columns(number)
    full = np.pad(slices, [(0, -number % columns), *[(0, 0)] * (slices.ndim - 1)])
    rows = full.reshape(-1, columns, height, width, *rest).swapaxes(1, 2)       # (rows, h, columns, w, ...)
    return rows.reshape(-1, columns * width, *rest)


# --------------------------------------------------------------------------------------------------- pictures

def overlay(case: Any, look: dict[str, Any], spacing: Sequence[float] = (1, 1, 1),
            titles: bool = False) -> Image.Image:
    """The picture of a Case (scoring.py). Lesions are outlined, and on the map what is above its threshold.
    Voxels are `spacing` apart, in any unit. With `titles` they stand above the columns of an image.

    `look` is the color scale of `map_scale`. For a volume the first channel is shown, in a row each for
    input, reconstruction and map: axial, coronal and sagittal slices through the largest value of
    the map, else through the middle.
    """
    volume, size = case.image.ndim == 4, case.image.shape[1:]
    place = focus(case.shown, size) if volume else ()
    parts = lambda x: cuts(x, place) if volume else [x]
    scale = SHOWN_SIZE / max(n * mm for n, mm in zip(size, spacing))
    times = [max(1, round(scale * mm)) for mm in spacing]                          # pixels that show a voxel
    axes = [(view.rows, view.columns) for view in VIEWS] if volume else [(0, 1)]
    enlarged = lambda row: [x.repeat(times[a], 0).repeat(times[b], 1) for x, (a, b) in zip(row, axes)]
    rows, shown = [], panels(case, look, parts)
    for panel in shown:
        rows.append(enlarged(panel.pictures))
        if panel.title == 'map' and case.above is not None:
            outline(rows[-1], enlarged(parts(case.above)), ABOVE[look['cmap']])
        if panel.outlined and case.mask is not None:
            outline(rows[-1], enlarged(parts(case.mask)), LESION)
    if volume:
        rows = [[lettered(x, view.letters) for x, view in zip(row, VIEWS)] for row in rows]
    picture = as_picture(joined([joined(row, 1) for row in rows], 0 if volume else 1))
    return titled(picture, [panel.title for panel in shown]) if titles and not volume else picture


class Panel(NamedTuple):
    """One picture of a case, or the same part of it from several sides."""
    title: str
    pictures: list[np.ndarray]           # (..., h, w, 3)
    outlined: bool                       # whether lesions are outlined: not on a reconstruction


def panels(case: Any, look: dict[str, Any], parts: Callable[[np.ndarray], list[np.ndarray]],
           channels: int = 1) -> list[Panel]:
    """The input, the reconstruction and the map over the input, as far as a case has them. `parts` are what
    is shown of an array (..., *S); of a volume the first `channels` are shown, in gray.
    """
    found = []
    for title, x in (('input', case.image), ('reconstruction', case.reconstruction)):
        if x is not None:
            images = [x] if x.ndim == 3 else np.split(x, len(x))[:channels]
            found += [Panel(title if len(images) == 1 else f'{title}, channel {number}',
                            [as_color(part) for part in parts(image)], title == 'input')
                      for number, image in enumerate(images, 1)]
    if case.shown is not None:
        found.append(Panel('map', [blend(background, part, look) for background, part in zip(
            found[0].pictures, parts(case.shown))], True))
    return found


def outline(pictures: Sequence[np.ndarray], regions: Sequence[np.ndarray], color: str) -> None:
    """Draws the outlines of regions (H, W) bool into pictures (H, W, 3)."""
    from scipy.ndimage import binary_erosion
    for picture, region in zip(pictures, regions):
        line = region & ~binary_erosion(region, iterations=LINE, border_value=1)
        picture[line] = np.array(ImageColor.getrgb(color)) / 255


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


def titled(picture: Image.Image, titles: Sequence[str]) -> Image.Image:
    """A picture under a line with the titles of its columns, which are equally wide; enlarged by a whole
    factor where a title would not fit.
    """
    draw = ImageDraw.Draw(Image.new('L', (1, 1)))
    column, widest = picture.width / len(titles), max(draw.textlength(title) for title in titles)
    times = max(1, math.ceil((widest + 2 * GAP) / column))
    large = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    out = Image.new(picture.mode, (large.width, large.height + TITLE_HEIGHT), 'white')
    out.paste(large, (0, TITLE_HEIGHT))
    for place, title in enumerate(titles):
        ImageDraw.Draw(out).text((place * column * times + 1, 1), title, 'black')
    return out


def as_picture(colors: np.ndarray) -> Image.Image:
    """Colors (H, W, 3) in [0, 1] as a picture of 8 bits."""
    return Image.fromarray((colors.clip(0, 1) * 255).round().astype(np.uint8))


def as_color(image: np.ndarray) -> np.ndarray:
    """(C, H, W) as (H, W, 3): colors if C = 3, else the first channel in gray."""
    return np.moveaxis(image, 0, -1) if len(image) == 3 else image[0][..., None].repeat(3, -1)


def blend(background: np.ndarray, anomaly_map: np.ndarray, look: dict[str, Any]) -> np.ndarray:
    """The map (..., H, W) in colors over (..., H, W, 3): the farther from 0, the less shows through."""
    colors, cover = tinted(anomaly_map, look)
    return (1 - cover) * background + cover * colors


def tinted(anomaly_map: np.ndarray, look: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The colors (..., H, W, 3) of a map (..., H, W), and how much they cover: (..., H, W, 1)."""
    import matplotlib
    low, high = look['vmin'], look['vmax']
    values = np.nan_to_num(anomaly_map.astype(np.float64), nan=high).clip(low, high)
    colors = matplotlib.colormaps[look['cmap']]((values - low) / (high - low))[..., :3]
    return colors, STRENGTH * np.abs(values / high)[..., None]


def layer(anomaly_map: np.ndarray, look: dict[str, Any]) -> Image.Image:
    """A map (H, W) alone, to be laid over its image."""
    return Image.fromarray((255 * np.concatenate(tinted(anomaly_map, look), -1)).round().astype(np.uint8))


def map_scale(maps: Sequence[np.ndarray | None]) -> dict[str, Any]:
    """One color scale for all maps: from 0, or around 0 if some are negative; the top 0.5 % is clipped."""
    values = np.concatenate([np.zeros(0), *(m[np.isfinite(m)] for m in maps if m is not None)])
    high = (float(np.percentile(np.abs(values), 99.5)) if len(values) else 0) or 1.0
    signed = bool((values < 0).any())
    return {'cmap': 'coolwarm' if signed else 'inferno', 'vmin': -high if signed else 0, 'vmax': high}
