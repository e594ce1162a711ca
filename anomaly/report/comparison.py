"""What people read of a comparison: tables for the terminal, Markdown, CSV, and figures.

`result` is what comparison.json holds (compare.py); a row of `result['scores']` is a score of a run, named
run/score, or a trivial baseline.
"""

import csv
import math
from pathlib import Path
from typing import Any

from anomaly.report.figures import (
    COLOURS,
    FAINT,
    INK,
    curve_figure,
    group_title,
    keep,
    new_figure,
    shown_groups,
    style,
)
from anomaly.report.page import (
    MOST_TABLES,
    PIXEL_METRICS,
    SHOWN_METRICS,
    TITLES,
    align,
    number,
    pixel_heading,
    with_heading,
    with_pixels,
)
from utils import write_atomically, write_json

OUTCOMES = {'better': '{first} is better', 'worse': '{first} is worse', 'undecided': 'cannot be told apart'}


def write(out: Path, result: dict[str, Any], test: Any) -> None:
    """Writes comparison.json, comparison.md, comparison.csv and figures/{forest,roc}.png.

    `test` is a Scored with the values of all rows.
    """
    write_json(out / 'comparison.json', result)
    write_atomically(out / 'comparison.md', lambda path: path.write_text(markdown(result), encoding='utf-8'))
    write_csv(out / 'comparison.csv', result)
    keep(forest_figure(result), out, 'forest')
    keep(curve_figure(result, test, 'roc', result['primary_scores']), out, 'roc')


# ------------------------------------------------------------------------------------------------------ cells

def with_interval(metric: dict[str, float | None], decimals: int = 3) -> str:
    """'0.712 [0.636, 0.781]'; '-' where there is no value."""
    value, low, high = (number(metric[key], decimals) for key in ('value', 'low', 'high'))
    return value if value == '-' else f'{value} [{low}, {high}]'


def marked(name: str, result: dict[str, Any]) -> str:
    return f'{name} *' if name in result['primary_scores'] else name


def group_cells(result: dict[str, Any], group: str) -> list[list[str]]:
    """All rows against one anomalous group, the head first."""
    cells = [['', *(TITLES[metric] for metric in SHOWN_METRICS), 's/image', 'parameters']]
    for name, row in result['scores'].items():
        run = result['runs'].get(row.get('run'))
        cells.append([marked(name, result), *(with_interval(row['metrics'][group][m]) for m in SHOWN_METRICS),
                      *([f"{run['seconds_per_image']:.2g}", f"{run['parameters'] / 1e6:.2f} M"] if run
                        else ['-', '-'])])
    return cells


def group_heading(result: dict[str, Any], group: str) -> str:
    called = next(iter(result['scores'].values()))['called']
    return f"Normal ({called['normal'][1]}) against {group_title(group)} ({called[group][1]} test images)"


def pixel_cells(result: dict[str, Any], intervals: bool) -> list[list[str]]:
    """Metrics of the maps of all scores that have one, the head first; [] where there are no masks."""
    table = with_pixels(result)
    return [['', *(title for title, _ in PIXEL_METRICS.values())], *(
        [marked(name, result), *(with_interval(pixels[metric], decimals) if intervals
                                 else number(pixels[metric]['value'], decimals)
                                 for metric, (_, decimals) in PIXEL_METRICS.items())]
        for name, pixels in table.items())] if table else []


def difference_cells(result: dict[str, Any], group: str) -> list[list[str]]:
    """Differences of AUROC against one group, the head first."""
    cells = [['', '', 'difference of AUROC']]
    for found in result['differences']:
        if found['group'] == group:
            second = f"{found['second']} turned round" if found['turned'] else found['second']
            cells.append([f"{found['first']} - {second}", OUTCOMES[found['outcome']].format(**found),
                          f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"])
    return cells


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    first, about = next(iter(result['runs'].items()))
    size = ' x '.join(map(str, about['shape']))
    several = len(result['differences']) > 1
    return [
        f"95 % intervals in brackets: bootstrap of the test images, {result['num_bootstrap']} resamples, the "
        f"same for all rows, so that differences are paired. They do not cover another training run.",
        *(["Each difference has its own 95 % interval; among many, some exclude 0 by chance."] if several
          else []),
        f"* primary score of a run, chosen beforehand. Trivial baselines: on the images of {first} ({size}, "
        f"{about['bits']} bits); the best of them is picked on these images, and turned round if below 0.5.",
        f"s/image: seconds of one process for all scores of the run in this table, in batches of "
        f"{result['batch_size']}, without reading images.",
        *([f"Dice and what follows: at the threshold from the pixels of normal validation images, for "
           f"{100 * result['target_pixel_fpr']:g} %. False regions: an image."]
          if with_pixels(result) else [])]


# --------------------------------------------------------------------------------------------------- terminal

def text_tables(result: dict[str, Any]) -> list[str]:
    """Aligned lines: scores and differences of each group, or of all together where they are many; pixels."""
    groups = shown_groups(result)
    many = len(groups) > MOST_TABLES
    lines = ['', 'The tables of each class are in comparison.md.'] if many else []
    for group in ['all'] if many else groups:
        lines += ['', group_heading(result, group), *with_heading(align(group_cells(result, group)), result)]
        lines += ['', *align(difference_cells(result, group), left=2)]
    if cells := pixel_cells(result, intervals=False):
        lines += ['', pixel_heading(with_pixels(result)), *align(cells)]
    return [*lines, '', *notes(result), '']


# --------------------------------------------------------------------------------------------------- Markdown

def markdown(result: dict[str, Any]) -> str:
    """The same tables as a page of Markdown, ready for a README or a paper's supplement."""
    parts = [f"# Comparison on {result['dataset']}",
             markdown_table([['run', 'family', 'parameters', 'images', 'trained on', 'folder'], *(
                 [name, one['family'], f"{one['parameters'] / 1e6:.2f} M", ' x '.join(map(str, one['shape'])),
                  str(one['train_images']), f"`{one['path']}`"] for name, one in result['runs'].items())])]
    for group in shown_groups(result):
        parts += [f'## {escape(group_heading(result, group))}',
                  markdown_table(group_cells(result, group)), markdown_table(difference_cells(result, group))]
    if cells := pixel_cells(result, intervals=True):
        parts += [f'## {pixel_heading(with_pixels(result)).capitalize()}', markdown_table(cells)]
    parts += ['\n'.join(f'- {escape(line)}' for line in [*notes(result), *result['left_out'],
                                                         *result['warnings']])]
    return '\n\n'.join(parts) + f"\n\n```\n{result['command']}\n```\n"


def markdown_table(cells: list[list[str]]) -> str:
    head, *rows = [[escape(cell) for cell in row] for row in cells]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def escape(text: str) -> str:
    """Text in which Markdown sees no column and no emphasis."""
    return text.replace('|', r'\|').replace('*', r'\*')


# -------------------------------------------------------------------------------------------------------- CSV

def write_csv(path: Path, result: dict[str, Any]) -> None:
    """One line a row and group: each metric with its interval; the calls at the row's own threshold."""
    pixels = PIXEL_METRICS if with_pixels(result) else ()
    columns = [f'{metric}{end}' for metric in [*SHOWN_METRICS, *(f'pixel_{m}' for m in pixels)]
               for end in ('', '_low', '_high')]

    def put(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['row', 'run', 'kind', 'primary', 'group', 'normal_images', 'anomalous_images',
                             *columns, 'threshold', 'called_normal', 'called_anomalous', 'seconds_per_image',
                             'parameters'])
            for name, row in result['scores'].items():
                run = result['runs'].get(row.get('run'), {})
                for group in shown_groups(result):
                    called, metrics = row['called'], row['metrics'][group]
                    writer.writerow([
                        name, row.get('run', ''), row['kind'], int(name in result['primary_scores']), group,
                        called['normal'][1], called[group][1],
                        *(metrics[m][key] for m in SHOWN_METRICS for key in ('value', 'low', 'high')),
                        *(row['pixels'][m][key] if 'pixels' in row else ''
                          for m in pixels for key in ('value', 'low', 'high')),
                        row['threshold'], called['normal'][0], called[group][0],
                        run.get('seconds_per_image', ''), run.get('parameters', '')])
    write_atomically(path, put)


# ---------------------------------------------------------------------------------------------------- figures

def forest_figure(result: dict[str, Any]) -> Any:
    """AUROC and its 95 % interval of every row, one panel a group; models in colour, baselines in grey."""
    groups, rows = shown_groups(result), result['scores']
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(3.4 * columns + 1.6, (0.24 * len(rows) + 0.9) * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(result['runs'])}
    for group, panel in zip(groups, panels):
        for height, row in enumerate(rows.values()):
            auroc, colour = row['metrics'][group]['auroc'], colours.get(row.get('run'), FAINT)
            panel.plot([auroc['low'], auroc['high']], [height, height], color=colour, lw=2.2)
            panel.plot(auroc['value'], height, color=colour, marker='o', ms=5)
        panel.axvline(0.5, color=INK, lw=0.8, dashes=(4, 2), zorder=0)
        style(panel, group_title(group))
        panel.set_yticks(range(len(rows)), [marked(name, result) for name in rows])
        panel.set_xlabel('AUROC, 95 %')
    for panel in list(panels):
        panel.set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure
