"""What people read of a comparison: tables for the terminal, Markdown, CSV, and figures.

`result` is what comparison.json holds. A row of the judgement is a score of a run, named run/score, or a
trivial baseline.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from anomaly.judge import Difference, Judgement, group_title
from anomaly.maps import localization
from anomaly.metrics import METRICS, Estimate
from anomaly.report import tables
from anomaly.report.figures import COLORS, FAINT, INK, curve_figure, keep, panel_grid, style
from anomaly.report.page import MATCH_NOTE, MOST_TABLES, PIXEL_NOTE, pixel_table, write_page
from anomaly.report.tables import Column, Label, ReportTable, as_markdown, as_text, escape_markdown
from utils import write_atomically, write_json

OUTCOMES = {'better': '{} is better', 'worse': '{} is worse', 'undecided': 'cannot be told apart'}


def write(out: Path, result: dict[str, Any], judgement: Judgement, test: Any) -> None:
    """Writes comparison.json, .html, .md, .csv, and figures/: forest, differences and roc.

    `test` is a table with the values of all rows.
    """
    write_json(out / 'comparison.json', result)
    page, groups = markdown(result, judgement), judgement.shown_groups
    write_atomically(out / 'comparison.md', lambda path: path.write_text(page, encoding='utf-8'))
    tables.save_csv(out / 'comparison.csv', csv_rows(result, judgement))
    figures = {'forest': forest_figure(judgement), 'differences': difference_figure(judgement),
               'roc': curve_figure(judgement, test, 'roc')}
    write_page(out / 'comparison.html', 'comparison.html.j2', result=result, judgement=judgement,
               groups=groups, figures=keep(figures, out), tables=all_tables(result, judgement, groups),
               runs=run_table(result), notes=notes(result, judgement))


# --------------------------------------------------------------------------------------------------- tables

def group_table(result: dict[str, Any], judgement: Judgement, group: str) -> ReportTable:
    """All rows against one anomalous group."""
    def fact(name: str, form: str) -> Column:
        runs = result['runs']
        return Column(name, lambda row: form.format(**runs[row.run]) if row.run else None)
    metrics = tables.metric_columns(METRICS, lambda row: row.metrics[group], interval=True)
    return tables.score_table(judgement.title(group), [
        *metrics, fact('s/image', '{seconds_per_image:.2g}'), fact('parameters', '{parameters:,}')],
        judgement.rows.values())


def difference_table(judgement: Judgement, group: str) -> ReportTable:
    """Differences of AUROC against one group."""
    def interval(difference: Difference) -> str:
        found = difference.estimate
        return f'{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]'
    return ReportTable('', [
        Column('', lambda difference: Label(f'{difference.first.name} - {difference.rival}')),
        Column('', lambda difference: OUTCOMES[difference.outcome].format(difference.first.name)),
        Column('difference of AUROC', interval)], judgement.differences(group))


def run_table(result: dict[str, Any]) -> ReportTable:
    """What is known of the runs."""
    rows = [{'run': name, 'family': run['family'], 'parameters': f"{run['parameters']:,}",
             'images': ' x '.join(map(str, run['shape'])), 'trained on': str(run['train_images']),
             'folder': run['path']} for name, run in result['runs'].items()]
    return ReportTable('', [Column(title, itemgetter(title)) for title in rows[0]], rows)


def all_tables(result: dict[str, Any], judgement: Judgement, groups: Sequence[str]) -> list[ReportTable]:
    """Scores and differences of each group, and the metrics of maps where there are masks."""
    pixels = pixel_table(judgement)
    return [*(table for group in groups for table in (group_table(result, judgement, group),
                                                      difference_table(judgement, group))),
            *([pixels] if pixels else [])]


def notes(result: dict[str, Any], judgement: Judgement) -> list[str]:
    """What a reader of the tables must know."""
    first, about = next(iter(result['runs'].items()))
    lines = [
        f"95 % intervals in brackets: bootstrap of the test images, {judgement.judging.num_bootstrap} "
        f"resamples, the same for all rows: differences are paired. They do not cover another training run.",
        "Each difference has its own 95 % interval; among many, some exclude 0 by chance.",
        f"* primary score of a run, chosen beforehand. Trivial baselines: on the images of {first} "
        f"({' x '.join(map(str, about['shape']))}, {about['bits']} bits); the best of them is picked on "
        f"these images, and negated if its AUROC is below 0.5.",
        f"s/image: seconds of one process for all scores of the run in this table, in batches of "
        f"{result['batch_size']}, without reading images.", *([MATCH_NOTE] if judgement.matched else [])]
    masks = pixel_table(judgement) is not None
    return [*lines, PIXEL_NOTE.format(100 * judgement.judging.target_pixel_fpr)] if masks else lines


def text_tables(result: dict[str, Any], judgement: Judgement) -> list[str]:
    """Aligned lines, with one table of all classes together where they are many."""
    groups = judgement.shown_groups
    many = len(groups) > MOST_TABLES
    shown = all_tables(result, judgement, ['all'] if many else groups)
    return [*(['', 'The tables of each class are in comparison.md.'] if many else []),
            *(line for table in shown for line in ['', *as_text(table)]), '', *notes(result, judgement), '']


def markdown(result: dict[str, Any], judgement: Judgement) -> str:
    """The same tables as a page of Markdown, ready for a README or a paper's supplement."""
    lines = [*notes(result, judgement), *result['left_out'], *result['warnings']]
    return '\n\n'.join([
        f"# Comparison on {result['dataset']}", as_markdown(run_table(result)),
        *map(as_markdown, all_tables(result, judgement, judgement.shown_groups)),
        '\n'.join(f'- {escape_markdown(line)}' for line in lines), f"```\n{result['command']}\n```\n"])


def csv_rows(result: dict[str, Any], judgement: Judgement) -> Iterator[dict[str, Any]]:
    """A row for each score and group: metrics with intervals, and the calls at the score's own threshold."""
    masks = pixel_table(judgement) is not None
    for row in judgement.rows.values():
        run, found = result['runs'].get(row.run, {}), row.pixels.metrics if row.pixels else {}
        pixels = {f'pixel_{metric.name}': found.get(metric.name, tables.MISSING)
                  for metric in localization.METRICS}
        for group in judgement.shown_groups:
            normal = row.flagged[judgement.groups[group].normal_name]
            anomalous = row.flagged[group]
            yield {'row': row.name, 'run': row.run, 'kind': row.kind, 'primary': int(row.primary),
                   'group': group, 'normal_images': normal.total, 'anomalous_images': anomalous.total,
                   **row.metrics[group], **(pixels if masks else {}), 'threshold': row.threshold,
                   'flagged_normal': normal.count, 'flagged_anomalous': anomalous.count,
                   'seconds_per_image': run.get('seconds_per_image'), 'parameters': run.get('parameters')}


# --------------------------------------------------------------------------------------------------- figure

def forest_figure(judgement: Judgement) -> Any:
    """AUROC and its 95 % interval of every row, one panel a group; models in color, baselines in gray."""
    rows = {f'{row.name} *' if row.primary else row.name: row for row in judgement.rows.values()}
    runs = list(dict.fromkeys(row.run for row in rows.values()))
    colors = {name: COLORS[runs.index(row.run) % len(COLORS)] if row.run else FAINT
              for name, row in rows.items()}
    return forest({group: {name: row.auroc(group) for name, row in rows.items()}
                   for group in judgement.shown_groups}, colors, 0.5, 'AUROC, 95 % interval')


def difference_figure(judgement: Judgement) -> Any | None:
    """Paired differences of AUROC with their 95 % intervals, one panel a group; None if there are none."""
    found = {group: {f'{d.first.name} - {d.rival}': d.estimate for d in judgement.differences(group)}
             for group in judgement.shown_groups}
    return forest(found, {}, 0.0, 'difference of AUROC, 95 % interval') if any(found.values()) else None


def forest(found: Mapping[str, Mapping[str, Estimate]], colors: Mapping[str, str], neutral: float,
           unit: str) -> Any:
    """Estimates by name with their 95 % intervals, one panel a group; dashed, where nothing differs. The
    names may differ from group to group, as the best baseline does.
    """
    names = list(dict.fromkeys(name for estimates in found.values() for name in estimates))
    figure, panels = panel_grid(len(found), (3.4, 0.24 * len(names) + 0.9), (1.6, 0), sharex=True,
                                sharey=True)
    for (group, estimates), panel in zip(found.items(), panels):
        for name, one in estimates.items():
            height, color = names.index(name), colors.get(name, COLORS[0])
            panel.plot([one.low, one.high], [height, height], color=color, lw=2.2)
            panel.plot(one.value, height, color=color, marker='o', ms=5)
        panel.axvline(neutral, color=INK, lw=0.8, dashes=(4, 2), zorder=0)
        style(panel, group_title(group))
        panel.set_yticks(range(len(names)), names)
        panel.set_xlabel(unit)
        panel.tick_params(labelbottom=True)                       # a shared axis would have them below alone
    panels[0].set_ylim(len(names) - 0.4, -0.6)                    # downwards
    return figure
