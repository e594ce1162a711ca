"""The figures of an evaluation: ROC and PR curves, histograms, levels of the hierarchy, training.

Drawn once and kept twice: as PNG under figures/, and as SVG inside the report, where their ink takes the
color of the text, so that dark mode and paper both work. `validation` and `test` are tables of scores; k
counts the latent groups that a score draws from the prior.
"""

import io
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anomaly.judge import Judgement, ScoreRow, group_title
from anomaly.metrics import Resamples, make_finite, roc_curves
from utils import read_line, write_atomically

# Scores in the figures beside the primary one, fixed beforehand so that none is picked on the test set
FIGURE_SCORES = ('reconstruction', 'complexity', 'kl_profile', 'kl', 'llr_1', 'iw', 'recon_nll')
MOST_FIGURE_SCORES = 4
FIGURE_BASELINES = ('trivial_knn', 'file_size', 'pca')
MOST_FIGURE_BASELINES = 4
DPI = 150                           # of the PNG
BAND_RESAMPLES = 200                # behind the band around the ROC curve of a primary score
MOST_LEVEL_CLASSES = 6              # columns of the figure of levels
INK = '#1b2430'                     # becomes the color of the text in the report's SVG
COLORS = ('#2f7fd1', '#e07b39', '#2a9d74', '#b455a0', '#c9a227', '#7a6ff0')
NORMAL, FAINT = '#7f8b99', '#9aa5b1'


def new_figure(width: float, height: float, layout: str | None = 'constrained') -> Any:
    """An empty figure, width and height in inches, without the global state of pyplot."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout=layout)


def keep(drawn: dict[str, Any], out: Path) -> dict[str, str]:
    """Writes figures/NAME.png and NAME.svg of each figure that there is, and removes those of an earlier call
    of the others; returns the SVGs by name, their ink the color of the text around them.
    """
    for name in (name for name, figure in drawn.items() if figure is None):
        for ending in ('png', 'svg'):
            (out / 'figures' / f'{name}.{ending}').unlink(missing_ok=True)
    return {name: keep_one(figure, out, name) for name, figure in drawn.items() if figure is not None}


def keep_one(figure: Any, out: Path, name: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    for text in figure.findobj(matplotlib.text.Text):
        text.set_parse_math(False)                               # a $ in the name of a file is no formula
    (out / 'figures').mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    figure.set_dpi(DPI)
    # `savefig` would draw each twice, and compute the layout of the PNG at both.
    write_atomically(out / 'figures' / f'{name}.png', lambda path: FigureCanvasAgg(figure).print_png(
        path, metadata={'Software': None}))
    figure.set_layout_engine('none')                             # the SVG has the layout of the PNG
    for part in (figure, *figure.axes):
        part.patch.set_visible(False)                            # and no background
    # The salt keeps the ids of several figures in one page apart, and the same from run to run.
    with matplotlib.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'path'}):
        FigureCanvasSVG(figure).print_svg(text, metadata={'Date': None, 'Creator': None})
    svg = text.getvalue()
    write_atomically(out / 'figures' / f'{name}.svg', lambda path: path.write_text(svg, encoding='utf-8'))
    # the page shows it somewhat larger than its inches, and no larger
    svg = f'<svg style="--width: {7 * figure.get_figwidth():.1f}rem"' + svg[svg.index('<svg') + len('<svg'):]
    svg = svg.replace(INK, 'currentColor')
    svg = re.sub(r'id="(\w[\w.]*_\d+)"', rf'id="{name}_\1"', svg)         # numbered in each figure anew
    return svg


def style(axes: Any, title: str = '') -> None:
    """The common look of the plots: no box, thin lines, ink that can change."""
    axes.set_title(title, color=INK, fontsize=10, loc='left', fontweight='bold')
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ('left', 'bottom'))
        spine.set_color(FAINT)
    axes.tick_params(labelcolor=INK, labelsize=8, color=FAINT)
    axes.xaxis.label.set(color=INK, fontsize=8.5)
    axes.yaxis.label.set(color=INK, fontsize=8.5)


def legend(owner: Any, **options: Any) -> None:
    owner.legend(frameon=False, fontsize=8, labelcolor=INK, **options)


def panel_grid(count: int, size: tuple[float, float], margins: tuple[float, float],
               **options: Any) -> tuple[Any, list[Any]]:
    """A figure with `count` panels of a size in inches, at most three in a row, and room around them all."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = new_figure(size[0] * columns + margins[0], size[1] * rows + margins[1])
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def figure_scores(judgement: Judgement) -> list[ScoreRow]:
    """The primary scores and a few others, fixed beforehand; then baselines, the best of each group first."""
    known = lambda names: [judgement.rows[name] for name in names if name in judgement.rows]
    others = [row for row in known(FIGURE_SCORES) if not row.primary]
    best = [row.name for group in judgement.shown_groups if (row := judgement.best_baseline(group))]
    baselines = known(dict.fromkeys([*best, *FIGURE_BASELINES]))
    return [*judgement.primaries, *others[:MOST_FIGURE_SCORES - 1], *baselines[:MOST_FIGURE_BASELINES]]


def roc_band(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rates, and the 2.5 and 97.5 percentiles of the true-positive rate at each of them, over
    bootstrap resamples of the scores (n,) and (m,).
    """
    grid, bands = np.linspace(0, 1, 101), []
    drawn = Resamples.draw(len(normal), len(anomalous), BAND_RESAMPLES, seed=0)
    for curves in roc_curves(normal, anomalous, drawn):
        # before and after each distinct anomalous score, at which alone the true-positive rate rises
        before, after = curves.true_positive - curves.positive, curves.true_positive               # (r, U)
        fpr = np.stack([curves.above, curves.false_positive], 2).reshape(len(after), -1) / len(normal)
        tpr = np.stack([before, after], 2).reshape(len(after), -1) / len(anomalous)
        bands += [np.interp(grid, np.r_[x, 1], np.r_[y, 1]) for x, y in zip(fpr, tpr)]
    return grid, *np.percentile(bands[1:], [2.5, 97.5], axis=0)              # the first is the sample itself


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rate from (0, 0) to (1, 1), of images (N,) each."""
    from sklearn.metrics import roc_curve
    return roc_curve(labels, scores)[:2]


def precision_recall(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision in steps, the area below which is the AUPRC."""
    from sklearn.metrics import precision_recall_curve
    precision, recall, _ = precision_recall_curve(labels, scores)
    recall, first = np.unique(recall[::-1], return_index=True)      # the threshold at an anomalous score
    return np.repeat(recall, 2)[1:-1], np.repeat(precision[::-1][first[1:]], 2)


# kind of curve -> what draws it, its axes, and the line of a score that knows nothing, from the prevalence
CURVES = {
    'roc': (roc, ('false-positive rate', 'true-positive rate'), lambda prevalence: [0, 1]),
    'pr': (precision_recall, ('recall (true-positive rate)', 'precision'),
           lambda prevalence: [prevalence, prevalence]),
}


def curve_figure(judgement: Judgement, test: Any, kind: str) -> Any:
    """ROC or precision-recall curves, one panel a group: model scores in color, trivial baselines dashed."""
    points, (x_label, y_label), chance = CURVES[kind]
    groups, rows = judgement.shown_groups, figure_scores(judgement)
    figure, panels = panel_grid(len(groups), (3.5, 3.4), (0.6, 0.9))
    dashes = iter(((4, 2), (1, 1.5), (6, 2, 1, 2), (8, 3)))
    looks = [{'color': COLORS[i % len(COLORS)], 'lw': 2.2 if row.primary else 1.4} if row.kind == 'model' else
             {'color': INK, 'lw': 1.1, 'dashes': next(dashes), 'alpha': 0.75} for i, row in enumerate(rows)]
    for group, panel in zip(groups, panels):
        normal, anomalous, _ = judgement.groups[group]
        judged = normal | anomalous
        for row, look in zip(rows, looks):
            scores = make_finite(test.values[row.name])
            panel.plot(*points(anomalous[judged], scores[judged]), label=row.name, solid_capstyle='round',
                       **look)
            if kind == 'roc' and row.primary:
                grid, low, high = roc_band(scores[normal], scores[anomalous])
                panel.fill_between(grid, low, high, color=look['color'], alpha=0.15, lw=0)
        prevalence = float(anomalous[judged].mean())
        panel.plot([0, 1], chance(prevalence), color=FAINT, lw=0.9, zorder=0, label='chance')
        panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect='equal', xlabel=x_label, ylabel=y_label)
        style(panel, group_title(group))
        of_panel = lambda row, group=group: f'{row.name} {row.auroc(group).value:.3f}'
        if kind == 'roc' and judgement.has_metrics:
            panel.text(0.98, 0.03, '\n'.join(['AUROC', *map(of_panel, rows)]), color=INK, fontsize=7,
                       ha='right', va='bottom', transform=panel.transAxes)
    legend(figure, handles=panels[0].get_lines(), loc='outside lower left', ncols=3)
    return figure


def histogram_figure(judgement: Judgement, validation: Any, test: Any) -> Any:
    """The distributions of normal and anomalous scores, with the threshold."""
    best = [judgement.best_baseline(group) for group in judgement.shown_groups]
    rows = sorted(figure_scores(judgement), key=lambda row: not (row.primary or row in best))[:6]
    figure, panels = panel_grid(len(rows), (3.5, 2.3), (0, 0.5))
    parts = {group: judgement.groups[group].anomalous for group in judgement.classes}
    fewest = min([len(validation.entries), *(int(part.sum()) for part in parts.values())])
    edges = int(np.clip(3 * fewest ** (1 / 3), 8, 40)) + 1                  # Rice's rule, somewhat finer
    for panel, row in zip(panels, rows):
        known, values = validation.values[row.name], test.values[row.name]
        finite = np.concatenate([v[np.isfinite(v)] for v in (known, values)])
        low, high = np.percentile(finite, [0.5, 99.5]) if len(finite) else (0, 1)
        draw = partial(draw_histogram, panel, np.linspace(low, high if high > low else low + 1, edges))
        draw(values[test.labels == 0], color=NORMAL, alpha=0.45, label='normal, test')
        draw(known, histtype='step', color=INK, lw=1, label='normal, validation')
        for i, (group, part) in enumerate(parts.items()):
            color = COLORS[1 + i % 5]
            draw(values[part], histtype='stepfilled', alpha=0.3, color=color)
            draw(values[part], histtype='step', lw=1.4, color=color, label=group)
        if math.isfinite(row.threshold):
            panel.axvline(row.threshold, color=INK, lw=1.2, dashes=(4, 2), label='threshold')
        style(panel, f'{row.name} (baseline)' if row.kind == 'baseline' else row.name)
        panel.spines['left'].set_visible(False)
        panel.set_yticks([])
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    handles, labels = fullest.get_legend_handles_labels()
    legend(figure, handles=handles, labels=labels, loc='outside lower left', ncols=4)
    return figure


def draw_histogram(panel: Any, bins: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """The density of the finite values; those beyond the bins are counted in the outermost ones."""
    values = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
    if len(values):
        panel.hist(values, bins, density=True, **look)


def levels(judgement: Judgement, prefix: str, with_nelbo: bool = False) -> dict[int, ScoreRow]:
    """k -> the score PREFIX_k, by rising k; `with_nelbo` puts the NELBO before those of 'lk', as L>0."""
    found = {int(level): row for name, row in judgement.rows.items()
             for before, _, level in [name.partition('_')] if before == prefix and level.isdigit()}
    if found and with_nelbo and 'nelbo' in judgement.rows:
        found[0] = judgement.rows['nelbo']
    return dict(sorted(found.items()))


def level_figure(judgement: Judgement, test: Any, lk_is_elbo: bool) -> Any | None:
    """Which levels find images unusual: LLR>k, -L>k and their AUROC against k, one column an anomalous class.

    Lines are medians, bands reach from the lower to the upper quartile of the images; bars are the 95 %
    intervals of the AUROC. None if the scores have fewer than two levels. `lk_is_elbo`: -L>k are ELBOs, too.
    """
    lines = {'LLR>k': levels(judgement, 'llr'), '-L>k': levels(judgement, 'lk', with_nelbo=lk_is_elbo)}
    lines = {title: rows for title, rows in lines.items() if len(rows) > 1}
    if not lines:
        return None
    classes, judged = judgement.classes[:MOST_LEVEL_CLASSES], judgement.has_metrics
    shape = len(lines) + judged, max(1, len(classes))
    figure = new_figure(max(5.5, 2.7 * shape[1]), 2.3 * shape[0] + 0.5)
    panels = figure.subplots(*shape, squeeze=False, sharex='col')
    for i, column in enumerate(panels.T):
        group = classes[i] if classes else ''
        parts = [('normal', test.labels == 0, NORMAL),
                 *([(group, judgement.groups[group].anomalous, COLORS[1 + i % 5])] if group else [])]
        for panel, (title, rows) in zip(column, lines.items()):
            for label, images, color in parts:
                draw_quartiles(panel, {k: test.values[row.name][images] for k, row in rows.items()},
                               color=color, label=label)
            panel.set(ylabel=f'{title}, nats' if i == 0 else '')
            style(panel, group if panel is column[0] else '')
        if column[0].get_lines():
            legend(column[0], loc='best')
        if judged:
            draw_auroc(column[-1], lines, group)
        column[-1].set_xlabel('k, groups from the prior')
    if judged:
        panels[-1, 0].set_ylabel('AUROC')
        legend(panels[-1, 0], loc='lower right')
    for panel in panels.flat:
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_quartiles(panel: Any, values: dict[int, np.ndarray], **look: Any) -> None:
    """Median and quartiles of the finite values (n,) of each k."""
    quartiles = {k: np.percentile(v[np.isfinite(v)], [25, 50, 75]) for k, v in values.items()
                 if np.isfinite(v).any()}
    if quartiles:
        low, middle, high = np.array(list(quartiles.values())).T
        panel.plot(list(quartiles), middle, lw=1.8, marker='o', ms=3, **look)
        panel.fill_between(list(quartiles), low, high, color=look['color'], alpha=0.22, lw=0)


def draw_auroc(panel: Any, lines: dict[str, dict[int, ScoreRow]], group: str) -> None:
    """AUROC and its 95 % interval against k, one line a kind of score."""
    for i, (title, rows) in enumerate(lines.items()):
        aurocs = [row.auroc(group) for row in rows.values()]
        value, low, high = np.array([(auroc.value, auroc.low, auroc.high) for auroc in aurocs]).T
        bars = np.maximum(0, [value - low, high - value])      # a percentile interval need not hold the value
        panel.errorbar(list(rows), value, bars, color=COLORS[5 * i], lw=1.4, marker='o', ms=3, label=title)
    panel.axhline(0.5, color=FAINT, lw=0.7, zorder=0)
    panel.set_ylim(-0.02, 1.02)
    style(panel)


def read_history(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag in the metrics.jsonl of a run; empty where there is none."""
    history: dict[str, list[tuple[int, float]]] = {}
    path = run_folder / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for values in filter(None, map(read_line, lines)):
        for tag, value in values.items():
            if '/' in tag and value is not None:
                history.setdefault(tag, []).append((values['step'], value))
    return history


def training_figure(history: dict[str, list[tuple[int, float]]]) -> Any | None:
    """Training against validation by step, one panel a quantity that both have; None if there is none."""
    names = [tag.removeprefix('val/') for tag in history
             if tag.startswith('val/') and tag.replace('val/', 'train/', 1) in history]
    if not names:
        return None
    figure = new_figure(5.2 * len(names), 2.9)
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names):
        for part, label, color in (('train', 'training', NORMAL), ('val', 'validation', COLORS[0])):
            panel.plot(*zip(*history[f'{part}/{name}']), label=label, color=color, lw=1.6, marker='o', ms=3)
        panel.set(xlabel='step', ylabel=name)
        style(panel, name)
        legend(panel, loc='best')
    return figure
