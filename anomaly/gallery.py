"""The cases that a reader looks at: which test images, and their pictures, on the page and as a figure.

C channels, H x W pixels; N test images, in whose order places are counted. `result`, `validation` and `test`
are those of figures.py.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly.figures import CALLED, FAINT, INK, LESION, map_scale, new_figure
from anomaly.metrics import make_finite, percentile
from anomaly.overlays import as_colour, blend

LOSSLESS = 128          # pixels of the longer side up to which pictures on the page are exact
LARGEST = 256           # and to which larger ones are reduced: 60 cases are then below 10 MB
OUTCOMES = {'tp': 'true positive', 'fp': 'false positive', 'tn': 'true negative', 'fn': 'false negative'}


def choose_cases(scores: np.ndarray, labels: np.ndarray, num_cases: int, num_gallery: int) -> list[int]:
    """Places of the test images that are shown, by falling score; scores and labels (N,), 1 anomalous.

    A fifth each, and at least `num_cases`, are the most and the least anomalous of all; a fifth each the most
    anomalous normal and the least anomalous abnormal images, which are wrong at most thresholds; the others,
    up to `num_gallery`, are evenly spaced by rank. Scores that are not finite count as the largest.
    """
    order = np.argsort(-make_finite(scores)[0], kind='stable')
    normal, anomalous = order[labels[order] == 0], order[labels[order] == 1]
    share = num_gallery // 5
    ends = max(num_cases, share)
    chosen = {*order[:ends], *order[::-1][:ends], *normal[:share], *anomalous[::-1][:share]}
    rest = [place for place in order if place not in chosen]
    more = min(len(rest), max(0, num_gallery - len(chosen)))
    chosen |= {rest[i * len(rest) // more] for i in range(more)}
    return [int(place) for place in order if place in chosen]


def outcome(label: int, called: bool) -> str:
    return {(1, True): 'tp', (0, True): 'fp', (0, False): 'tn', (1, False): 'fn'}[int(label), bool(called)]


def short_number(value: float) -> str:
    """Five digits, or all before the point."""
    if not np.isfinite(value):
        return 'not finite'
    return f'{value:.5g}' if abs(value) < 1e5 else f'{value:.0f}'


# ------------------------------------------------------------------------------------------------ on the page

def gallery(result: dict[str, Any], validation: Any, test: Any, threshold: float) -> dict[str, Any]:
    """What the page shows of each case, and the colours of the maps."""
    name = result['primary_score']
    values, maps = test.values[name], [case.map for case in test.cases if case.map is not None]
    percentiles, look = percentile(values, validation.values[name]), map_scale(maps)
    cards = []
    for case in test.cases:
        entry, value = test.entries[case.place], float(values[case.place])
        colours = as_colour(case.image)
        pictures = [{'title': 'input', 'source': picture_source(colours), 'outlined': True}]
        if case.reconstruction is not None:
            pictures.append({'title': 'reconstruction', 'outlined': False,
                             'source': picture_source(as_colour(case.reconstruction))})
        if case.map is not None:
            pictures.append({'title': 'map', 'source': picture_source(blend(colours, case.map, look)),
                             'outlined': True})
        cards.append({'place': case.place, 'id': entry.id, 'class': entry.class_name, 'pictures': pictures,
                      'score': short_number(value), 'percentile': f'{percentiles[case.place]:.0f}',
                      'outcome': outcome(entry.label, not np.isfinite(value) or value > threshold),
                      'outline': '' if case.mask is None else outline_path(case.mask),
                      'height': case.image.shape[-2], 'width': case.image.shape[-1]})
    return {'cards': cards, 'classes': list(dict.fromkeys(sorted(card['class'] for card in cards))),
            'scale': scale_bar(look) if maps else None}


def scale_bar(look: dict[str, Any]) -> dict[str, str]:
    """The colours of the maps from low to high, as a picture of one row."""
    values = np.linspace(look['vmin'], look['vmax'], 128)[None]
    return {'source': picture_source(blend(np.full((1, 128, 3), 0.5), values, look)),
            'low': short_number(look['vmin']), 'high': short_number(look['vmax'])}


def picture_source(colours: np.ndarray) -> str:
    """Colours (H, W, 3) in [0, 1] as the data address of a WebP picture, which holds nothing but pixels."""
    picture = Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, 'WEBP', lossless=max(picture.size) <= LOSSLESS, quality=90)
    return 'data:image/webp;base64,' + base64.b64encode(file.getvalue()).decode()


def outline_path(mask: np.ndarray) -> str:
    """The edges between lesion and other pixels of (H, W) bool, as the path of an SVG; '' without lesion."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    across = [f'M{x} {y}h1' for y, x in zip(rows, columns)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    return ''.join([*across, *(f'M{x} {y}v1' for y, x in zip(rows, columns))])


# ------------------------------------------------------------------------------------------------ as a figure

def case_figure(result: dict[str, Any], validation: Any, test: Any, threshold: float, each: int) -> Any:
    """Input | reconstruction | map of the `each` most and least anomalous images.

    Lesion masks are outlined, and on the map what is called at the pixel threshold.
    """
    name, first = result['primary_score'], test.cases[0]
    most, least = test.cases[:each], test.cases[::-1][:each]
    percentiles = percentile(test.values[name], validation.values[name])
    kinds = ['input', *(['reconstruction'] if first.reconstruction is not None else []),
             *([f'{name} map'] if first.map is not None else [])]
    # All measures in inches: every picture `side` wide, two lines of text under each row.
    side, gap, text, rows, head = 1.5, 0.07, 0.36, len(most), 0.5
    block = len(kinds) * (side + gap) + 0.2
    height, width = head + rows * (side + text), 2 * block + (0.55 if first.map is not None else 0)
    figure = new_figure(width, height, layout=None)

    def panel(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes([left / width, 1 - (top + high) / height, wide / width, high / height])

    look, shown = map_scale([case.map for case in [*most, *least] if case.map is not None]), None
    pixel_threshold = result['scores'][name].get('pixel_threshold', math.inf)
    for left, title, cases in ((0, 'most anomalous', most), (block, 'least anomalous', least)):
        figure.text(left / width, 1 - 0.17 / height, title, fontsize=10, fontweight='bold', color=INK)
        for row, case in enumerate(cases):
            top = head + row * (side + text)
            pictures = [case.image, *([case.reconstruction] if case.reconstruction is not None else [])]
            cells = [panel(left + i * (side + gap), top, side, side) for i in range(len(kinds))]
            for i, (cell, image) in enumerate(zip(cells, pictures)):
                picture(cell, image, case.mask if i == 0 else None)
            if case.map is not None:
                shown = cells[-1].imshow(case.map, interpolation='none', **look)
                outline(cells[-1], case.map > pixel_threshold, CALLED[look['cmap']])
                outline(cells[-1], case.mask)
            for cell, kind in zip(cells, kinds):
                cell.set_axis_off()
                if row == 0:
                    cell.set_title(kind, fontsize=7.5, color=INK, loc='left', pad=3)
            entry, score = test.entries[case.place], test.values[name][case.place]
            called = '' if score <= threshold else ', called'
            figure.text(left / width, 1 - (top + side + 0.05) / height, f"{entry.class_name} · "
                        f"{shorten(entry.id)}\n{name} {score:.5g}, percentile "
                        f"{percentiles[case.place]:.0f}{called}", va='top', fontsize=7, color=INK)
    if shown is not None:
        bar = figure.colorbar(shown, cax=panel(2 * block, head, 0.12, min(3.5, height - head - text)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelcolor=INK, labelsize=7, color=FAINT)
    return figure


def picture(panel: Any, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """An image (C, H, W) in [0, 1] in grey, or in colour if C = 3; other channel counts show their first."""
    colour = len(image) == 3
    panel.imshow(np.moveaxis(image, 0, -1).clip(0, 1) if colour else image[0], interpolation='none',
                 **({} if colour else {'cmap': 'gray', 'vmin': 0, 'vmax': 1}))
    outline(panel, mask)


def outline(panel: Any, mask: np.ndarray | None, colour: str = LESION) -> None:
    if mask is not None and mask.any() and not mask.all():
        panel.contour(mask, [0.5], colors=colour, linewidths=0.9)


def shorten(text: str, most: int = 22) -> str:
    """The file's name without folder and ending, its middle cut out if it is long."""
    text = Path(text).stem
    return text if len(text) <= most else f'{text[:most // 2]}…{text[-most // 2 + 1:]}'
