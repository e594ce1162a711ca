"""The cases that a reader looks at: which test images, and their pictures, on the page and as a figure.

C channels, S pixels, (H, W) or (D, H, W); N test images, in whose order places are counted. `validation` and
`test` are tables of scores.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly.judge import ScoreRow
from anomaly.maps import overlays
from anomaly.maps.overlays import View, as_color, as_picture, blend, map_scale, sheet, sheet_columns
from anomaly.metrics import flagged, make_finite, percentile
from anomaly.report.figures import FAINT, INK, new_figure
from anomaly.scoring import Case
from readers.images.decode import decode, to_channels, to_size
from readers.paths import file_content
from readers.source import Unreadable
from readers.volumes.nifti import spacing

LOSSLESS = 128          # pixels of the longer side up to which pictures on the page are exact
FINER = 1.3             # times the pixels along a side: files worth showing in their own resolution
LARGEST_ORIGINAL = 768  # pixels along their side: more would make a page of 60 cases too large
LARGEST = 256           # and to which larger ones are reduced: 60 cases are then below 10 MB
QUALITY = 90            # of WebP, where pictures are not exact
METHOD = 1              # of WebP: 36 % of the time of its default, 4, for pictures that are 5 % larger
MOST_VOLUMES = 20       # cases, where images are volumes: all slices of each are in the page
MOST_BYTES = 12e6       # of them together: with more, slices are left out
MOST_SLICES = 128       # of a direction: browsers keep four bytes a voxel of what they show
OUTCOMES = {'tp': 'true positive', 'fp': 'false positive', 'tn': 'true negative', 'fn': 'false negative'}


def choose_cases(scores: np.ndarray, labels: np.ndarray, num_cases: int, num_gallery: int) -> list[int]:
    """Places of the test images that are shown, by falling score; scores and labels (N,), 1 anomalous.

    A fifth each, and at least `num_cases`, are the most and the least anomalous of all; a fifth each the most
    anomalous normal and the least anomalous abnormal images, which are wrong at most thresholds; the others,
    up to `num_gallery`, are evenly spaced by rank. Scores that are not finite count as the largest.
    """
    order = np.argsort(-make_finite(scores), kind='stable')
    normal, anomalous = order[labels[order] == 0], order[labels[order] == 1]
    share = num_gallery // 5
    ends = max(num_cases, share)
    chosen = {*order[:ends], *order[::-1][:ends], *normal[:share], *anomalous[::-1][:share]}
    rest = [place for place in order if place not in chosen]
    more = min(len(rest), max(0, num_gallery - len(chosen)))
    chosen |= {rest[i * len(rest) // more] for i in range(more)}
    return [int(place) for place in order if place in chosen]


def outcome(label: int, flagged: bool) -> str:
    return {(1, True): 'tp', (0, True): 'fp', (0, False): 'tn', (1, False): 'fn'}[int(label), bool(flagged)]


def short_number(value: float) -> str:
    """Five digits, or all before the point."""
    if not np.isfinite(value):
        return 'not finite'
    return f'{value:.5g}' if abs(value) < 99999.5 else f'{value:.0f}'


# ------------------------------------------------------------------------------------------------ on the page

def gallery(row: ScoreRow, validation: Any, test: Any) -> dict[str, Any]:
    """What the page shows of each case by the score of `row`, and the colors of the maps. A card has
    `pictures`, or for a volume `views`: sheets with all slices of a direction, which the page's script moves.
    """
    values, look = test.values[row.name], map_scale([case.shown for case in test.cases])
    percentiles, classes, cards = percentile(values, validation.values[row.name]), test.classes, []
    for case in test.cases:
        entry, value = test.entries[case.place], float(values[case.place])
        cards.append({**case_pictures(case, look, spacing(entry), MOST_BYTES / len(test.cases)),
                      'place': case.place, 'id': entry.id, 'class': classes[case.place],
                      'score': short_number(value), 'percentile': f'{percentiles[case.place]:.0f}',
                      'outcome': outcome(entry.label, flagged(value, row.threshold))})
    return about_cards(cards, look)


def about_cards(cards: list[dict[str, Any]], look: dict[str, Any]) -> dict[str, Any]:
    """What the page says of all cards together."""
    return {'cards': cards, 'classes': sorted({card['class'] for card in cards}),
            'volumes': any('views' in card for card in cards),
            'scale': scale_bar(look) if any(card['mapped'] for card in cards) else None}


def case_pictures(case: Case, look: dict[str, Any], distance: np.ndarray,
                  most_bytes: float) -> dict[str, Any]:
    """The pictures of a case; those of a volume, whose voxels are `distance` apart, in `most_bytes`."""
    shown = volume_views(case, look, distance, most_bytes) if case.image.ndim == 4 else \
        flat_pictures(case, look)
    some = lambda mask: mask is not None and bool(mask.any())
    return {'step': 1, **shown, 'mapped': case.map is not None, 'relative': case.relative is not None,
            'outlined': some(case.mask), 'above': case.image.ndim == 3 and some(case.above)}


def flat_pictures(case: Case, look: dict[str, Any]) -> dict[str, Any]:
    """The pictures of an image (C, H, W); for the enlarged case the file itself, and the map as a layer."""
    path = lambda mask: '' if mask is None else outline_path(mask)
    pictures = [{'title': title, 'source': picture_source(one), 'lesion': outlined, 'above': title == 'map'}
                for title, (one,), outlined in overlays.panels(case, look, lambda x: [x])]
    if case.original is not None:
        pictures[0]['large'] = data_address(as_picture(as_color(case.original)), lossless=False)
    if case.shown is not None:
        pictures[-1]['large'] = data_address(overlays.layer(case.shown, look), lossless=True)
    return {'pictures': pictures, 'lesion_path': path(case.mask), 'above_path': path(case.above),
            'height': case.image.shape[-2], 'width': case.image.shape[-1]}


def original(path: Any, shape: Sequence[int], config: Any) -> np.ndarray | None:
    """An image file in its own resolution, padded, cropped or stretched as a model of this shape saw it by
    the flags of its data: (C, S, S) in [0, 1], S at most LARGEST_ORIGINAL. None if it is hardly finer than
    what the model saw, and for volumes, frames and records.
    """
    if not (path and isinstance(path, str)) or len(shape) != 3 or config.frames != 'refuse':
        return None
    try:
        image = decode(file_content(path))                                               # (H, W, C)
    except Unreadable:
        return None                                                      # no file, or it is gone since
    size = min(LARGEST_ORIGINAL, max(image.shape[:2]))
    if size < FINER * shape[1]:
        return None
    x = to_size(to_channels(image, shape[0]), size, config.fit)
    return 1 - x if config.invert else x


def volume_views(case: Case, look: dict[str, Any], distance: np.ndarray, most_bytes: float) -> dict[str, Any]:
    """The sheets of a volume (C, D, H, W) whose voxels are so far apart: (3,).

    They take at most `most_bytes`: of more, only every `step`-th slice is there, the one through the largest
    value of the map among them, unless one slice a direction takes more.
    """
    size = case.image.shape[1:]
    place, step = overlays.focus(case.shown, size), math.ceil(max(size) / MOST_SLICES)
    while True:
        views = [one_view(case, view, place[view.across], look, distance, step) for view in overlays.VIEWS]
        taken = sum(len(view['outline']) + sum(len(s['source']) for s in view['sheets']) for view in views)
        if taken <= most_bytes or step >= max(size):
            return {'views': views, 'step': step}
        step = min(max(step + 1, math.floor(step * taken / most_bytes)), max(size))


def one_view(case: Case, view: View, place: int, look: dict[str, Any], distance: np.ndarray,
             step: int) -> dict[str, Any]:
    """Every `step`-th slice of one direction, that at `place` among them: a sheet for each channel of the
    input and of the reconstruction, and one with the map over the first channel.
    """
    total, chosen = case.image.shape[1 + view.across], slice(place % step, None, step)
    slices = lambda volume: overlays.stack(volume, view)[..., chosen, :, :]                   # (..., n, h, w)
    sheets = [{'title': title, 'outlined': outlined, 'source': data_address(
        as_picture(sheet(one)), lossless=False)} for title, (one,), outlined in overlays.panels(
            case, look, lambda x: [slices(x)], channels=len(case.image))]
    number, height, width = slices(case.image).shape[1:]
    columns = sheet_columns(number)
    return {'name': view.name, 'letters': dict(zip(('left', 'right', 'top', 'bottom'), view.letters)),
            'sheets': sheets, 'outline': '' if case.mask is None else outline_path(sheet(slices(case.mask))),
            'first': place % step, 'last': place % step + (number - 1) * step, 'step': step, 'start': place,
            'total': total, 'columns': columns, 'rows': math.ceil(number / columns), 'height': height,
            'width': width, 'column': place // step % columns, 'row': place // step // columns,
            'aspect': width * distance[view.columns] / (height * distance[view.rows])}


def scale_bar(look: dict[str, Any]) -> dict[str, str]:
    """The colors of the maps from low to high, as a picture of one row."""
    values = np.linspace(look['vmin'], look['vmax'], 128)[None]
    return {'source': picture_source(blend(np.full((1, 128, 3), 0.5), values, look)),
            'low': f"{look['vmin']:.3g}", 'high': f"{look['vmax']:.3g}"}


def picture_source(colors: np.ndarray) -> str:
    """Colors (H, W, 3) in [0, 1] as the data address of a WebP picture, which holds nothing but pixels."""
    picture = as_picture(colors)
    picture.thumbnail((LARGEST, LARGEST))
    return data_address(picture, lossless=max(picture.size) <= LOSSLESS)


def data_address(picture: Image.Image, lossless: bool) -> str:
    file = io.BytesIO()
    picture.save(file, 'WEBP', lossless=lossless, quality=QUALITY, method=METHOD)
    return 'data:image/webp;base64,' + base64.b64encode(file.getvalue()).decode()


def outline_path(mask: np.ndarray) -> str:
    """The edges between lesion and other pixels of (H, W) bool, as the path of an SVG; '' without lesion."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    across = [f'M{x} {y}h1' for y, x in zip(rows, columns)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    return ''.join([*across, *(f'M{x} {y}v1' for y, x in zip(rows, columns))])


# ------------------------------------------------------------------------------------------------ as a figure

def case_figure(row: ScoreRow, validation: Any, test: Any, each: int) -> Any:
    """Overlays of the `each` most and least anomalous images by the score of `row`.

    Lesion masks are outlined, and on the map what is above the pixel threshold.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    most, least = test.cases[:each], test.cases[::-1][:each]
    maps = [case.shown for case in [*most, *least] if case.shown is not None]
    look = map_scale(maps)
    percentiles = percentile(test.values[row.name], validation.values[row.name])
    width, height = (7, 2.8) if test.cases[0].image.ndim == 4 else (10, 1.9)
    figure = new_figure(width, height * len(most) + 0.4)
    panels = figure.subplots(len(most), 2, squeeze=False)
    for column, title, cases in zip(panels.T, ('most anomalous', 'least anomalous'), (most, least)):
        for panel, case in zip(column, cases):
            entry, score = test.entries[case.place], test.values[row.name][case.place]
            panel.imshow(overlays.overlay(case, look, spacing(entry)), interpolation='none')
            panel.set_axis_off()
            call = ', flagged' if flagged(score, row.threshold) else ''
            panel.set_title(f"{entry.class_name} · {shorten(entry.id)}\n{row.name} {score:.5g}, percentile "
                            f"{percentiles[case.place]:.0f}{call}", fontsize=7, color=INK, loc='left')
        column[0].set_title(f'{title}\n{column[0].get_title(loc="left")}', fontsize=7, color=INK, loc='left')
    if maps:
        bar = figure.colorbar(ScalarMappable(Normalize(look['vmin'], look['vmax']), look['cmap']), ax=panels,
                              shrink=min(1, 2 / len(most)), anchor=(0, 1))
        bar.set_label('map, standard deviations above normal' if most[0].relative is not None else 'map',
                      color=INK, fontsize=7.5)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelcolor=INK, labelsize=7, color=FAINT)
    return figure


def shorten(text: str, most: int = 22) -> str:
    """The file's name without folder and ending, its middle cut out if it is long."""
    text = Path(text).stem
    return text if len(text) <= most else f'{text[:most // 2]}…{text[-most // 2 + 1:]}'
