"""What people read: the tables of the terminal, and report.html in one file that needs no network."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from anomaly.metrics import wilson_interval
from anomaly.report.figures import (
    CURVES,
    curve_figure,
    figure_scores,
    group_title,
    histogram_figure,
    keep,
    level_figure,
    levels,
    shown_groups,
    training_figure,
    with_baselines,
)
from anomaly.report.gallery import OUTCOMES, case_figure, gallery, short_number
from utils import finite, write_atomically

SHOWN_METRICS = ('auroc', 'auprc', 'fpr80', 'fpr95')
TITLES = {'auroc': 'AUROC', 'auprc': 'AUPRC', 'fpr80': 'FPR80', 'fpr95': 'FPR95'}
# of localization.py: metric -> its title and decimals
PIXEL_METRICS = {'auroc': ('AUROC', 3), 'auprc': ('AUPRC', 3), 'aupro': ('AUPRO', 3),
                 'best_dice': ('best Dice', 3), 'dice': ('Dice', 3), 'fpr': ('FPR', 4),
                 'lesions_found': ('lesions found', 3), 'false_regions': ('false regions', 2),
                 'region_ppv': ('region PPV', 3)}
# of segmentation.py
SEGMENTATION_METRICS = {'dice': ('Dice', 3), 'tpr': ('TPR', 3), 'fnr': ('FNR', 3), 'ppv': ('PPV', 3),
                        'iol': ('IOL', 3), 'hd95': ('HD95', 2), 'hd99': ('HD99', 2), 'msd': ('MSD', 2),
                        'hd95_directed': ('HD95 >', 2), 'hd99_directed': ('HD99 >', 2),
                        'msd_directed': ('MSD >', 2)}
MOST_TABLES = 4      # groups that get a table of their own in the terminal, and an open one on the page


def text_tables(result: dict[str, Any]) -> list[str]:
    """Aligned lines: scores and baselines against every anomalous class, and all if there are several.

    Many classes share one table of AUROCs; the tables of each are then on the page alone.
    """
    groups = shown_groups(result)
    tables = [group_table(result, group) for group in groups] if len(groups) <= MOST_TABLES else [
        [*auroc_table(result, groups), '', "The other metrics of each class are in report.html."]]
    return [line for table in tables for line in ['', *table]] + [
        "* primary score, chosen beforehand. Sensitivity and FPR: at the threshold from normal validation "
        f"images, for {100 * result['target_fpr']:g} %.", '', *pixel_table(result),
        *segmentation_table(result)]


def group_table(result: dict[str, Any], group: str) -> list[str]:
    """All metrics of all scores against one group."""
    normal, anomalous = (next(iter(result['scores'].values()))['called'][g][1] for g in ('normal', group))
    rows = [['', 'AUROC [95 % interval]', 'AUPRC', 'FPR80', 'FPR95', 'sensitivity', 'FPR']]
    for name, row in result['scores'].items():
        cells = ['-'] * 4
        if metrics := row['metrics'].get(group):
            auroc = metrics['auroc']
            cells = [f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]",
                     *(f"{metrics[m]['value']:.3f}" for m in SHOWN_METRICS[1:])]
        rows.append([marked(name, result), *cells, share(row['called'][group]),
                     share(row['called']['normal'])])
    return [f"normal ({normal}) against {group_title(group)} ({anomalous} test images)",
            *with_heading(align(rows, left=2), result)]


def auroc_table(result: dict[str, Any], groups: list[str]) -> list[str]:
    """AUROC and the share of calls: one row a score, one column a group."""
    called = next(iter(result['scores'].values()))['called']
    rows = [['', *(f'{group} ({called[group][1]})' for group in groups), 'FPR']]
    for name, row in result['scores'].items():
        metrics = row['metrics']
        rows.append([marked(name, result), *(f"{metrics[group]['auroc']['value']:.3f}" if metrics else '-'
                                             for group in groups), share(row['called']['normal'])])
    return [f"AUROC of normal ({called['normal'][1]}) against each class (its test images)",
            *with_heading(align(rows), result)]


def with_pixels(result: dict[str, Any], kind: str = 'pixels') -> dict[str, dict[str, Any]]:
    """Pixel metrics of the scores that have them; `kind` 'segmentation' takes those of segmentations."""
    return {name: row[kind] for name, row in result['scores'].items() if kind in row}


def pixel_table(result: dict[str, Any]) -> list[str]:
    """Metrics of the maps against lesion masks; no line where there are no masks."""
    table = with_pixels(result)
    if not table:
        return []
    rows = [['', *(title for title, _ in PIXEL_METRICS.values())]]
    rows += [[marked(name, result), *(number(pixels[metric]['value'], decimals)
                                      for metric, (_, decimals) in PIXEL_METRICS.items())]
             for name, pixels in table.items()]
    return [pixel_heading(table), *align(rows),
            "Dice and what follows: at the threshold from the pixels of normal validation images, for "
            f"{100 * result['target_pixel_fpr']:g} %. False regions: an image. Intervals: report.html.", '']


def segmentation_table(result: dict[str, Any]) -> list[str]:
    """Metrics of the segmentations; no line where there are none."""
    table = with_pixels(result, 'segmentation')
    if not table:
        return []
    rows = [['', *(title for title, _ in SEGMENTATION_METRICS.values()), 'none']]
    rows += [[marked(name, result), *(number(found[metric]['value'], decimals)
                                      for metric, (_, decimals) in SEGMENTATION_METRICS.items()),
              str(found['images_with_lesions'] - found['ppv']['images'])] for name, found in table.items()]
    return [segmentation_heading(table), *align(rows),
            "Means over the volumes with a lesion; distances in mm, > from lesions to the call alone. None: "
            "volumes in which nothing is called,", "which have no PPV and no distances. Each volume: "
            "segmentation.csv. Intervals: report.html.", '']


def segmentation_heading(table: dict[str, dict[str, Any]]) -> str:
    first = next(iter(table.values()))
    return (f"segmentations: {first['lesions']} lesions in {first['images_with_lesions']} of "
            f"{first['images']} test volumes; {100 * first['left_out_share']:.2g} % of the lesions' voxels "
            f"lie outside of the eroded body or in pieces too small, and are left out")


def pixel_heading(table: dict[str, dict[str, Any]]) -> str:
    first = next(iter(table.values()))
    return (f"maps against masks: {first['lesions']} lesions in {first['images_with_lesions']} of "
            f"{first['images']} test images, {100 * first['lesion_share']:.2g} % of the pixels")


def number(value: float | None, decimals: int) -> str:
    return '-' if value is None else f'{value:.{decimals}f}'


def marked(name: str, result: dict[str, Any]) -> str:
    return f'{name} *' if name == result['primary_score'] else name


def align(rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of a table, its first columns set to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ['  ' + '  '.join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in
                             enumerate(zip(row, widths))).rstrip() for row in rows]


def with_heading(lines: list[str], result: dict[str, Any]) -> list[str]:
    """The lines of a table of all scores, with a heading above the baselines."""
    first = next((i for i, row in enumerate(result['scores'].values(), 1) if row['kind'] == 'baseline'), 0)
    return [*lines[:first], '  trivial baselines', *lines[first:]] if first > 1 else lines


def share(counts: list[int]) -> str:
    """Per cent of a count: '95.0 %'; '-' of nothing."""
    return f"{100 * counts[0] / counts[1]:.1f} %" if counts[1] else '-'


def write(out: Path, result: dict[str, Any], validation: Any, test: Any, thresholds: dict[str, float],
          num_cases: int, history: dict[str, list[tuple[int, float]]]) -> None:
    """Writes figures/*.png and report.html; `validation` and `test` are the Scored of scorer.py.

    `num_cases` most and least anomalous images are in the figure of cases; `history` is what training logged.
    """
    threshold, figures = thresholds[result['primary_score']], {}
    if any(row['metrics'] for row in result['scores'].values()):
        figures |= {kind: keep(curve_figure(result, test, kind, figure_scores(result)), out, kind)
                    for kind in CURVES}
    figures['histograms'] = keep(histogram_figure(result, validation, test, thresholds), out, 'histograms')
    for name, figure in (('levels', level_figure(result, test)), ('training', training_figure(history))):
        if figure is not None:
            figures[name] = keep(figure, out, name)
    if num_cases and test.cases:                     # as a file; the page has them in its gallery
        keep(case_figure(result, validation, test, threshold, num_cases), out, 'cases')
    page = render(result, figures, gallery(result, validation, test, threshold),
                  page_data(result, validation, test, thresholds))
    write_atomically(out / 'report.html', lambda path: path.write_text(page, encoding='utf-8'))


# ------------------------------------------------------------------------------------------------------- page

def page_data(result: dict[str, Any], validation: Any, test: Any,
              thresholds: dict[str, float]) -> dict[str, Any]:
    """What the page's script computes calls from: label and class of each test image, and the scores that the
    figures show. None stands for what is not finite.
    """
    classes = list(dict.fromkeys(test.classes))
    return finite({
        'primary': result['primary_score'], 'classes': classes, 'label': test.labels.tolist(),
        'class': [classes.index(name) for name in test.classes],
        'scores': {name: {'threshold': thresholds[name], 'test': test.values[name].tolist(),
                          'validation': validation.values[name].tolist()}
                   for name in with_baselines(result, figure_scores(result))}})


def render(result: dict[str, Any], figures: dict[str, str], cases: dict[str, Any],
           numbers: dict[str, Any]) -> str:
    """report.html: one file, everything escaped but our own SVG and script, and a policy for the browser that
    forbids whatever comes from a network.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    folder = Path(__file__).parent / 'templates'
    script = (folder / 'report.js').read_text(encoding='utf-8')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    classes = list(dict.fromkeys(c for part in result['counts'].values() for c in part))
    return environment.get_template('report.html.j2').render(
        result=result, figures=figures, gallery=cases, page_data=numbers, script=Markup(script),
        script_hash=f'sha256-{digest}', primary=result['scores'][result['primary_score']],
        groups=shown_groups(result), real=[group for group in result['groups'] if group != 'all'],
        group_title=group_title, share=share, short_number=short_number, outcomes=OUTCOMES,
        classes=classes, titles=TITLES, interval=interval, wilson=lambda counts: wilson_interval(*counts),
        highest=highest(result), shade=shade, folded=len(shown_groups(result)) > MOST_TABLES,
        has_levels=bool(levels(result, 'llr') or levels(result, 'lk')),
        pixels=with_pixels(result), pixel_metrics=PIXEL_METRICS, pixel_heading=pixel_heading, number=number,
        segmentations=with_pixels(result, 'segmentation'), segmentation_metrics=SEGMENTATION_METRICS,
        segmentation_heading=segmentation_heading)


def interval(metric: dict[str, float]) -> dict[str, float]:
    """Where a metric's interval and value stand on a line that is 100 wide."""
    return {'from': 100 * metric['low'], 'to': 100 * metric['high'], 'at': 100 * metric['value']}


def shade(auroc: float) -> str:
    """Background of a cell: the stronger the farther from 0.5, in another colour below it."""
    colour = 'var(--accent)' if auroc >= 0.5 else 'var(--even)'
    return f'background: color-mix(in srgb, {colour} {60 * abs(2 * auroc - 1):.0f}%, transparent)'


def highest(result: dict[str, Any]) -> dict[str, str]:
    """The model score with the largest AUROC of every group: marked, but not the result."""
    scores = {name: row['metrics'] for name, row in result['scores'].items()
              if row['kind'] == 'model' and row['metrics']}
    return {group: max(scores, key=lambda name: scores[name][group]['auroc']['value'])
            for group in shown_groups(result) if scores}
