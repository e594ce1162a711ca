"""What people read of an evaluation, tables of the terminal and report.html, and of predictions.

A page is one HTML file: everything is escaped but our own SVG and scripts, and nothing comes from a network.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomaly.judge import Judgement, group_title
from anomaly.maps import localization, segmentation
from anomaly.metrics import METRICS, Estimate, wilson_interval
from anomaly.report import figures, tables
from anomaly.report.gallery import OUTCOMES, about_cards, case_figure, gallery, short_number
from anomaly.report.tables import Column, Label, ReportTable, as_text, metric_columns, score_table
from utils import finite, write_atomically

TEMPLATES = Path(__file__).parent / 'templates'
MOST_ROWS = 2000     # of the worklist of predictions on their page; scores.csv has all
CALLS = {'flagged': 'anomalous', 'clear': 'not flagged'}
MOST_TABLES = 4      # groups that get a table of their own in the terminal, and an open one on the page
SCORE_NOTE = ("* primary score, chosen beforehand. Sensitivity and FPR: at the threshold from normal "
              "validation images, for {:g} %.")
MATCH_NOTE = ("Matched: images in pairs, an anomalous and a normal one of about the same exposure and frame, "
              "which then hardly tell the classes apart.")
PIXEL_NOTE = ("Dice and the columns after it: at the threshold from the pixels of normal validation images, "
              "for {:g} %. False regions: per image.")
SEGMENTATION_NOTE = ("Means over the volumes with a lesion; PPV and distances without those in which nothing "
                     "is flagged. Distances in mm, > from lesions to the predicted voxels alone.")


# --------------------------------------------------------------------------------------------------- tables

def group_table(judgement: Judgement, group: str) -> ReportTable:
    """All metrics of all scores against one group; the page marks the model score with the largest AUROC."""
    auroc, *others = metric_columns(METRICS, lambda row: row.metrics.get(group, {}))
    columns = [replace(auroc, title=f'{auroc.title} [95 % interval]', interval=True),
               replace(auroc, title='0 · 0.5 · 1', look='bar'), *others,
               Column('sensitivity', lambda row: row.flagged[group]),
               Column('FPR', lambda row: row.flagged[judgement.groups[group].normal_name])]
    highest = max((row for row in judgement.rows.values() if row.kind == 'model' and row.metrics),
                  key=lambda row: row.auroc(group).value, default=None)
    return score_table(judgement.title(group), columns, judgement.rows.values(),
                       lambda row: ('highest',) if row is highest else ())


def auroc_columns(judgement: Judgement) -> list[Column]:
    """The AUROC against each group."""
    return [Column(f'{group} ({judgement.images(group)})', lambda row, group=group: row.auroc(group),
                   METRICS[0], look='shade')
            for group in judgement.shown_groups if judgement.has_metrics]


def auroc_table(judgement: Judgement) -> ReportTable:
    """AUROC of all scores against all groups, and the share of normal images flagged."""
    return score_table(f"AUROC of normal ({judgement.images('normal')}) against each class (its test images)",
                       [*auroc_columns(judgement), Column('FPR', lambda row: row.flagged['normal'])],
                       judgement.rows.values())


def pixel_table(judgement: Judgement) -> ReportTable | None:
    """Metrics of the maps against lesion masks; None where there are no masks."""
    rows = [row for row in judgement.rows.values() if row.pixels]
    if not rows:
        return None
    first = rows[0].pixels
    return score_table(f"maps against masks: {first.lesions} lesions in {first.images_with_lesions} of "
                       f"{first.images} test images, {100 * first.lesion_share:.2g} % of the pixels",
                       metric_columns(localization.METRICS, lambda row: row.pixels.metrics), rows)


def segmentation_table(judgement: Judgement) -> ReportTable | None:
    """Metrics of the segmentations; None where there are none."""
    rows = [row for row in judgement.rows.values() if row.segmentation]
    if not rows:
        return None
    first, total = rows[0].segmentation, rows[0].segmentation.images_with_lesions
    nothing = lambda row: f"{total - row.segmentation.metrics['ppv'].images} of {total}"
    return score_table(f"segmentations: {first.lesions} lesions in {total} of {first.images} test volumes; "
                       f"{100 * first.left_out_share:.2g} % of the lesions' voxels lie outside of the eroded "
                       f"body or in components that are too small, and are left out",
                       [*metric_columns(segmentation.METRICS, lambda row: row.segmentation.metrics),
                        Column('nothing flagged', nothing)], rows)


def text_tables(judgement: Judgement) -> list[str]:
    """Aligned lines: scores and baselines against every anomalous class, and all if there are several.

    Many classes share one table of AUROCs; the tables of each are then on the page alone.
    """
    groups, judging = judgement.shown_groups, judgement.judging
    many = len(groups) > MOST_TABLES
    shown = [auroc_table(judgement)] if many else [group_table(judgement, group) for group in groups]
    lines = [line for table in shown for line in ['', *as_text(table)]]
    lines += ['', "The other metrics of each class are in report.html."] if many else []
    lines += [SCORE_NOTE.format(100 * judging.target_fpr), *([MATCH_NOTE] if judgement.matched else []), '']
    for table, note in ((pixel_table(judgement), PIXEL_NOTE.format(100 * judging.target_pixel_fpr)),
                        (segmentation_table(judgement), SEGMENTATION_NOTE)):
        lines += [*as_text(table), f'{note} Intervals: report.html.', ''] if table else []
    return lines


def count_table(result: dict[str, Any]) -> ReportTable:
    """Images of each class in each part."""
    classes = dict.fromkeys(name for part in result['counts'].values() for name in part)
    return ReportTable('Counts', [Column('class', Label), *(
        Column(part, lambda name, counts=counts: counts.get(name, 0))
        for part, counts in result['counts'].items())], list(classes))


def confound_table(result: dict[str, Any], judgement: Judgement) -> ReportTable | None:
    """How baselines and the primary score tell parts and classes apart; None without normal test images."""
    found = {name: Estimate(**auroc) for name, auroc in result['normal_parts'].items()}
    columns = [Column('normal validation against normal test', lambda row: found[row.name]),
               *auroc_columns(judgement)]
    rows = [row for row in judgement.rows.values() if row.primary or row.kind == 'baseline']
    differs = lambda row: () if found[row.name].low <= 0.5 <= found[row.name].high else ('differs',)
    return score_table('Confounds', columns, rows, differs) if found else None


# ----------------------------------------------------------------------------------------------------- page

def write(out: Path, result: dict[str, Any], judgement: Judgement, validation: Any, test: Any,
          num_cases: int, history: dict[str, list[tuple[int, float]]]) -> None:
    """Writes figures/*.png and report.html; `validation` and `test` are tables of scores.

    `result` is what metrics.json holds. `num_cases` most and least anomalous images are in the figure of
    cases; `history` is what training logged.
    """
    primary, groups = judgement.primaries[0], judgement.shown_groups
    drawn = {kind: figures.curve_figure(judgement, test, kind) if judgement.has_metrics else None
             for kind in figures.CURVES}
    drawn |= {'histograms': figures.histogram_figure(judgement, validation, test),
              'levels': figures.level_figure(judgement, test, lk_is_elbo=result['iw_samples_lk'] == 1),
              'training': figures.training_figure(history)}
    cases = case_figure(primary, validation, test, num_cases) if num_cases and test.cases else None
    figures.keep({'cases': cases}, out)              # as a file; the page has them in its gallery
    write_page(
        out / 'report.html', 'report.html.j2', ('gallery.js', 'report.js'), result=result,
        judgement=judgement, primary=primary, threshold=finite(primary.threshold), groups=groups,
        folded=len(groups) > MOST_TABLES, figures=figures.keep(drawn, out),
        gallery=gallery(primary, validation, test), outcomes=OUTCOMES,
        page_data=page_data(judgement, validation, test), wilson=lambda share: wilson_interval(*share),
        aurocs=auroc_table(judgement) if len(groups) > 1 and judgement.has_metrics else None,
        group_tables=[group_table(judgement, group) for group in groups],
        pixels=pixel_table(judgement), segmentations=segmentation_table(judgement),
        counts=count_table(result), confounds=confound_table(result, judgement))


def write_page(path: Path, template: str, scripts: Sequence[str] = ('gallery.js',), **variables: Any) -> None:
    """Fills a template; a policy for the browser allows the `scripts` and nothing from a network."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    script = ''.join((TEMPLATES / name).read_text(encoding='utf-8') for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {name: getattr(tables, name)
                            for name in ('number', 'bracket', 'show', 'shade', 'percent')}
    page = environment.get_template(template).render(
        script=Markup(script), script_hash=f'sha256-{digest}', group_title=group_title,
        short_number=short_number, **variables)
    write_atomically(path, lambda path: path.write_text(page, encoding='utf-8'))


def page_data(judgement: Judgement, validation: Any, test: Any) -> dict[str, Any]:
    """What the page's script computes calls from: label and class of each test image, and the scores that the
    figures show. None stands for what is not finite.
    """
    classes = list(dict.fromkeys(test.classes))
    return finite({
        'primary': judgement.primaries[0].name, 'classes': classes, 'label': test.labels.tolist(),
        'class': [classes.index(name) for name in test.classes],
        'scores': {row.name: {'threshold': row.threshold, 'test': test.values[row.name].tolist(),
                              'validation': validation.values[row.name].tolist()}
                   for row in figures.figure_scores(judgement)}})


# ----------------------------------------------------------------------------------------------- predictions

def write_predictions(out: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]],
                      errors: Mapping[str, str], cards: Mapping[str, dict[str, Any]],
                      look: dict[str, Any]) -> None:
    """Writes predictions.html. `rows` are the files that could be read (see predict.sorted_files), `errors`
    tell of the others; `cards` are pictures by id, `look` the colors of their maps.
    """
    worklist = ReportTable('Worklist', [
        Column('file', lambda row: Label(row['id'])), Column('call', lambda row: CALLS[row['outcome']]),
        Column(result['primary_score'], lambda row: row['score']),
        Column('percentile', lambda row: row['percentile']), Column('rank', lambda row: row['place'])],
        rows[:MOST_ROWS])
    unreadable = ReportTable('Files that could not be read', [
        Column('file', lambda row: Label(row[0])), Column('why', lambda row: row[1])], sorted(errors.items()))
    shown = [cards[row['id']] | row for row in rows if row['id'] in cards]
    write_page(out / 'predictions.html', 'predictions.html.j2', result=result, outcomes=CALLS,
               gallery=about_cards(shown, look), worklist=worklist, unreadable=unreadable)
