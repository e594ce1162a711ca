"""The cases that a reader looks at: which test images, and their pictures, on the page and as a figure.

C channels, S pixels, (H, W) or (D, H, W); N test images, in whose order places are counted. `result`,
`validation` and `test` are those of figures.py.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly.maps.overlays import as_colour, as_grey, as_picture, blend
from anomaly.maps.slices import CONVENTION, VIEWS, View, cuts, focus, sheet, sheet_columns, stack
from anomaly.metrics import make_finite, percentile
from anomaly.report.figures import CALLED, FAINT, INK, LESION, map_scale, new_figure
from anomaly.scoring import Case
from readers.volumes.nifti import entry_grids

LOSSLESS = 128          # pixels of the longer side up to which pictures on the page are exact
LARGEST = 256           # and to which larger ones are reduced: 60 cases are then below 10 MB
QUALITY = 90            # of WebP, where pictures are not exact
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
    """What the page shows of each case, and the colours of the maps. A card has `pictures`, or of a volume
    `views`: sheets with all slices of a direction, which the page's script moves.
    """
    name = result['primary_score']
    values, maps = test.values[name], [case.map for case in test.cases if case.map is not None]
    percentiles, look = percentile(values, validation.values[name]), map_scale(maps)
    volumes = bool(test.cases) and test.cases[0].image.ndim == 4
    cards = []
    for case in test.cases:
        entry, value = test.entries[case.place], float(values[case.place])
        shown = volume_views(case, look, spacing(entry), MOST_BYTES / len(test.cases)) if volumes else \
            flat_pictures(case, look)
        cards.append({'place': case.place, 'id': entry.id, 'class': entry.class_name, **shown,
                      'score': short_number(value), 'percentile': f'{percentiles[case.place]:.0f}',
                      'outcome': outcome(entry.label, not np.isfinite(value) or value > threshold)})
    return {'cards': cards, 'classes': list(dict.fromkeys(sorted(card['class'] for card in cards))),
            'scale': scale_bar(look) if maps else None, 'volumes': volumes, 'convention': CONVENTION,
            'skips': max((card['step'] for card in cards), default=1) if volumes else 1,
            'outlined': any(case.mask is not None and case.mask.any() for case in test.cases)}


def flat_pictures(case: Case, look: dict[str, Any]) -> dict[str, Any]:
    """The pictures of an image (C, H, W)."""
    colours = as_colour(case.image)
    pictures = [{'title': 'input', 'source': picture_source(colours), 'outlined': True}]
    if case.reconstruction is not None:
        pictures.append({'title': 'reconstruction', 'outlined': False,
                         'source': picture_source(as_colour(case.reconstruction))})
    if case.map is not None:
        pictures.append({'title': 'map', 'source': picture_source(blend(colours, case.map, look)),
                         'outlined': True})
    return {'pictures': pictures, 'outline': '' if case.mask is None else outline_path(case.mask),
            'height': case.image.shape[-2], 'width': case.image.shape[-1]}


def spacing(entry: Any) -> np.ndarray:
    """Distance of the voxels that a model sees, mm or any unit: (3,)."""
    return entry_grids(entry)[0].spacing if getattr(entry, 'grids', ()) else np.ones(3)


def volume_views(case: Case, look: dict[str, Any], distance: np.ndarray, most_bytes: float) -> dict[str, Any]:
    """The sheets of a volume (C, D, H, W) whose voxels are so far apart: (3,).

    They take at most `most_bytes`: of more, only every `step`-th slice is there, the one through the largest
    value of the map among them, unless one slice a direction takes more.
    """
    size = case.image.shape[1:]
    place, step = focus(case.map, size), math.ceil(max(size) / MOST_SLICES)
    while True:
        views = [one_view(case, view, place[view.across], look, distance, step) for view in VIEWS]
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
    slices = lambda volume: stack(volume, view)[..., chosen, :, :]                    # (..., n, h, w)
    sheets = [{'title': title if len(volume) == 1 else f'{title}, channel {channel}', 'outlined': outlined,
               'source': sheet_source(as_grey(one))}
              for title, volume, outlined in (('input', case.image, True),
                                              ('reconstruction', case.reconstruction, False))
              if volume is not None for channel, one in enumerate(slices(volume), 1)]
    if case.map is not None:
        sheets.append({'title': 'map', 'outlined': True, 'source': sheet_source(
            blend(as_grey(slices(case.image)[0]), slices(case.map), look))})
    number, height, width = slices(case.image).shape[1:]
    columns = sheet_columns(number)
    return {'name': view.name, 'letters': dict(zip(('left', 'right', 'top', 'bottom'), view.letters)),
            'sheets': sheets, 'outline': '' if case.mask is None else outline_path(sheet(slices(case.mask))),
            'first': place % step, 'last': place % step + (number - 1) * step, 'step': step, 'start': place,
            'total': total, 'columns': columns, 'rows': math.ceil(number / columns), 'height': height,
            'width': width, 'column': place // step % columns, 'row': place // step // columns,
            'aspect': width * distance[view.columns] / (height * distance[view.rows])}


def scale_bar(look: dict[str, Any]) -> dict[str, str]:
    """The colours of the maps from low to high, as a picture of one row."""
    values = np.linspace(look['vmin'], look['vmax'], 128)[None]
    return {'source': picture_source(blend(np.full((1, 128, 3), 0.5), values, look)),
            'low': short_number(look['vmin']), 'high': short_number(look['vmax'])}


def picture_source(colours: np.ndarray) -> str:
    """Colours (H, W, 3) in [0, 1] as the data address of a WebP picture, which holds nothing but pixels."""
    picture = as_picture(colours)
    picture.thumbnail((LARGEST, LARGEST))
    return data_address(picture, lossless=max(picture.size) <= LOSSLESS)


def sheet_source(slices: np.ndarray) -> str:
    """The same of slices (n, h, w, 3), as a sheet."""
    return data_address(as_picture(sheet(slices)), lossless=False)


def data_address(picture: Image.Image, lossless: bool) -> str:
    file = io.BytesIO()
    picture.save(file, 'WEBP', lossless=lossless, quality=QUALITY)
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

    Lesion masks are outlined, and on the map what is called at the pixel threshold. Of a volume three slices,
    axial, coronal and sagittal, through the largest value of the map, of the first channel.
    """
    name, first = result['primary_score'], test.cases[0]
    most, least = test.cases[:each], test.cases[::-1][:each]
    percentiles = percentile(test.values[name], validation.values[name])
    kinds = ['input', *(['reconstruction'] if first.reconstruction is not None else []),
             *([f'{name} map'] if first.map is not None else [])]
    volumes = first.image.ndim == 4
    titles = [f"{'' if i else kind}\n{view.name}" for kind in kinds
              for i, view in enumerate(VIEWS)] if volumes else kinds
    # All measures in inches: every picture `side` wide, two lines of text under each row.
    side, gap, text, rows, head = 1.1 if volumes else 1.5, 0.07, 0.36, len(most), 0.6 if volumes else 0.5
    block = len(titles) * (side + gap) + 0.2
    height, width = head + rows * (side + text), 2 * block + (0.55 if first.map is not None else 0)
    figure = new_figure(width, height, layout=None)

    def panel(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes([left / width, 1 - (top + high) / height, wide / width, high / height])

    look, shown = map_scale([case.map for case in [*most, *least] if case.map is not None]), None
    pixel_threshold = result['scores'][name].get('pixel_threshold', math.inf)
    if volumes:
        figure.text(1 - 0.1 / width, 1 - 0.17 / height, CONVENTION, fontsize=7.5, ha='right', color=INK)
    for left, title, cases in ((0, 'most anomalous', most), (block, 'least anomalous', least)):
        figure.text(left / width, 1 - 0.17 / height, title, fontsize=10, fontweight='bold', color=INK)
        for row, case in enumerate(cases):
            top = head + row * (side + text)
            cells = [panel(left + i * (side + gap), top, side, side) for i in range(len(titles))]
            for cell, words in zip(cells, titles):
                cell.set_axis_off()
                if row == 0:
                    cell.set_title(words, fontsize=7.5, color=INK, loc='left', pad=3)
            entry, score = test.entries[case.place], test.values[name][case.place]
            shown = draw_case(cells, case, look, pixel_threshold) or shown
            if volumes:
                distance = spacing(entry)
                for cell, view in zip(cells, VIEWS * len(kinds)):
                    cell.set_aspect(distance[view.rows] / distance[view.columns])
            called = '' if score <= threshold else ', called'
            figure.text(left / width, 1 - (top + side + 0.05) / height, f"{entry.class_name} · "
                        f"{shorten(entry.id)}\n{name} {score:.5g}, percentile "
                        f"{percentiles[case.place]:.0f}{called}", va='top', fontsize=7, color=INK)
    if shown is not None:
        bar = figure.colorbar(shown, cax=panel(2 * block, head, 0.12, min(3.5, height - head - text)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelcolor=INK, labelsize=7, color=FAINT)
    return figure


def draw_case(cells: list[Any], case: Case, look: dict[str, Any], pixel_threshold: float) -> Any | None:
    """Draws a case into one panel a picture, three of a volume; returns what its colour bar needs."""
    images, masks, maps = [case.image], [case.mask], [case.map]
    rebuilt = [] if case.reconstruction is None else [case.reconstruction]
    if case.image.ndim == 4:
        place = focus(case.map, case.image.shape[1:])
        images, masks, maps = ([None] * 3 if x is None else cuts(x, place)
                               for x in (case.image[:1], case.mask, case.map))
        rebuilt = [part for x in rebuilt for part in cuts(x[:1], place)]
    for cell, image, mask in zip(cells, [*images, *rebuilt], [*masks, *[None] * len(rebuilt)]):
        picture(cell, image, mask)
    shown = None
    if case.map is not None:
        for cell, values, mask in zip(cells[-len(maps):], maps, masks):
            shown = cell.imshow(values, interpolation='none', **look)
            outline(cell, values > pixel_threshold, CALLED[look['cmap']])
            outline(cell, mask)
    return shown


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
