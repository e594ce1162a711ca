"""The figures of an evaluation: ROC and PR curves, histograms, levels of the hierarchy, training.

Drawn once and kept twice: as PNG under figures/, and as SVG inside the report, where their ink takes the
colour of the text, so that dark mode and paper both work. `result` is what stands under 'anomaly' in
metrics.json, `validation` and `test` are the Scored of scorer.py; k counts the latent groups that a score
draws from the prior.
"""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anomaly.metrics import make_finite
from utils import write_atomically

# Scores in the figures beside the primary one, fixed beforehand so that none is picked on the test set
FIGURE_SCORES = ('reconstruction', 'complexity', 'kl_profile', 'kl', 'llr_1', 'iw', 'recon_nll')
MOST_FIGURE_SCORES = 4
FIGURE_BASELINES = ('png_size', 'file_size', 'pca')
MOST_LEVEL_CLASSES = 6              # columns of the figure of levels
INK = '#1b2430'                     # becomes the colour of the text in the report's SVG
COLOURS = ('#2f7fd1', '#e07b39', '#2a9d74', '#b455a0', '#c9a227', '#7a6ff0')
NORMAL, FAINT = '#7f8b99', '#9aa5b1'
LESION = '#39e0d0'
CALLED = {'inferno': '#ffffff', 'coolwarm': '#000000'}   # pixels above the threshold, on each colour map


def shown_groups(result: dict[str, Any]) -> list[str]:
    """The anomalous classes, and 'all' where there are several."""
    return [g for g in result['groups'] if g != 'all' or len(result['groups']) != 2]


def group_title(group: str) -> str:
    return 'all anomalous classes' if group == 'all' else group


def new_figure(width: float, height: float, layout: str | None = 'constrained') -> Any:
    """An empty figure of so many inches, without the global state of pyplot."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout=layout)


def keep(figure: Any, out: Path, name: str) -> str:
    """Writes figures/NAME.png; returns the same as SVG whose ink is the colour of the text around it."""
    import matplotlib
    (out / 'figures').mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    # The salt keeps the ids of several figures in one page apart, and the same from run to run.
    with matplotlib.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'path'}):
        write_atomically(out / 'figures' / f'{name}.png', lambda path: figure.savefig(
            path, format='png', dpi=150, facecolor='white', metadata={'Software': None}))
        figure.savefig(text, format='svg', transparent=True, dpi=150,
                       metadata={'Date': None, 'Creator': None})
    svg = text.getvalue()
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


def figure_scores(result: dict[str, Any]) -> list[str]:
    """The primary score and a few others, fixed beforehand."""
    others = [name for name in FIGURE_SCORES if name in result['scores'] and name != result['primary_score']]
    return [result['primary_score'], *others[:MOST_FIGURE_SCORES - 1]]


def with_baselines(result: dict[str, Any], scores: list[str]) -> list[str]:
    """These scores and the trivial baselines that stand beside them."""
    return [*scores, *(name for name in FIGURE_BASELINES if name in result['scores'])]


def chosen(test: Any, group: str) -> np.ndarray:
    """Which test images are the anomalous ones of a group: (N,) bool."""
    return (test.labels == 1) & ((test.classes == group) | (group == 'all'))


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and true-positive rate."""
    from sklearn.metrics import roc_curve
    return roc_curve(labels, scores)[:2]


def pr_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision."""
    from sklearn.metrics import precision_recall_curve
    precision, recall, _ = precision_recall_curve(labels, scores, drop_intermediate=True)
    return recall, precision


# kind of curve -> what draws it, its axes, and the line of a score that knows nothing, from the prevalence
CURVES: dict[str, tuple[Callable, tuple[str, str], Callable[[float], list[float]]]] = {
    'roc': (roc_curve, ('false-positive rate', 'true-positive rate'), lambda prevalence: [0, 1]),
    'pr': (pr_curve, ('recall (true-positive rate)', 'precision'), lambda prevalence: [prevalence] * 2)}


def curve_figure(result: dict[str, Any], test: Any, kind: str, scores: list[str]) -> Any:
    """ROC or precision-recall curves, one panel a group: `scores` in colour, trivial baselines dashed."""
    curve, (x_label, y_label), chance = CURVES[kind]
    groups = shown_groups(result)
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(3.5 * columns + 1.7, 3.4 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    names = with_baselines(result, scores)
    dashes = iter(((4, 2), (1, 1.5), (6, 2, 1, 2)))
    primary = result.get('primary_scores') or [result['primary_score']]
    looks = {n: {'color': COLOURS[i % len(COLOURS)], 'lw': 2.2 if n in primary else 1.4}
             if result['scores'][n]['kind'] == 'model'
             else {'color': INK, 'lw': 1.1, 'dashes': next(dashes), 'alpha': 0.75}
             for i, n in enumerate(names)}
    for group, panel in zip(groups, panels):
        these = (test.labels == 0) | chosen(test, group)
        labels = test.labels[these]
        for name in names:
            panel.plot(*curve(labels, make_finite(test.values[name])[0][these]), label=name,
                       solid_capstyle='round', **looks[name])
        panel.plot([0, 1], chance(float(labels.mean())), color=FAINT, lw=0.9, zorder=0, label='chance')
        panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect='equal', xlabel=x_label, ylabel=y_label)
        style(panel, group_title(group))
    for panel in list(panels):
        panel.set_visible(False)
    legend(figure, handles=figure.axes[0].get_lines(), loc='outside right upper')
    return figure


def histogram_figure(result: dict[str, Any], validation: Any, test: Any, thresholds: dict[str, float]) -> Any:
    """How the scores of normal and anomalous images are distributed, with the threshold."""
    names = [*figure_scores(result), *(b for b in FIGURE_BASELINES[:2] if b in result['scores'])]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.5 * columns, 2.3 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    classes = [g for g in result['groups'] if g != 'all']
    fewest = min([len(validation.entries), *(int(chosen(test, group).sum()) for group in classes)])
    number = int(np.clip(3 * fewest ** (1 / 3), 8, 40))                 # of bins: Rice's rule, somewhat finer
    for panel, name in zip(panels.flat, names):
        everything = np.concatenate([validation.values[name], test.values[name]])
        low, high = np.percentile(everything[np.isfinite(everything)], [0.5, 99.5])
        bins = np.linspace(low, high if high > low else low + 1, number + 1)

        def draw(values: np.ndarray, panel: Any = panel, bins: np.ndarray = bins, **look: Any) -> None:
            values = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
            if len(values):
                panel.hist(values, bins, density=True, **look)
        draw(test.values[name][test.labels == 0], color=NORMAL, alpha=0.45, label='normal, test')
        draw(validation.values[name], histtype='step', color=INK, lw=1, label='normal, validation')
        for i, group in enumerate(classes):
            values, colour = test.values[name][chosen(test, group)], COLOURS[1 + i % 5]
            draw(values, histtype='stepfilled', alpha=0.3, color=colour)
            draw(values, histtype='step', lw=1.4, color=colour, label=group)
        if math.isfinite(thresholds[name]):
            panel.axvline(thresholds[name], color=INK, lw=1.2, dashes=(4, 2), label='threshold')
        kind = ' (baseline)' if result['scores'][name]['kind'] == 'baseline' else ''
        style(panel, name + kind)
        panel.spines['left'].set_visible(False)
        panel.set_yticks([])
    for panel in panels.flat[len(names):]:
        panel.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    legend(figure, handles=handles, labels=labels, loc='outside lower center', ncols=min(6, len(labels)))
    return figure


def levels(result: dict[str, Any], row: str) -> dict[int, str]:
    """k -> name of the scores of a row, 'llr' or 'lk', by rising k; 'lk' begins with L>0, the NELBO."""
    found = {int(name.removeprefix(f'{row}_')): name for name in result['scores']
             if name.startswith(f'{row}_')}
    if row == 'lk' and found and 'nelbo' in result['scores'] and result['iw_samples_lk'] == 1:
        found[0] = 'nelbo'
    return dict(sorted(found.items()))


def level_figure(result: dict[str, Any], test: Any) -> Any | None:
    """Which level finds it strange: LLR>k, -L>k and their AUROC against k, one column an anomalous class.

    Lines are medians, bands reach from the lower to the upper quartile of the images; bars are the 95 %
    intervals of the AUROC. None if the scores have fewer than two levels.
    """
    rows = {title: names for title, row in (('LLR>k', 'llr'), ('-L>k', 'lk'))
            if len(names := levels(result, row)) > 1}
    if not rows:
        return None
    classes = [group for group in result['groups'] if group != 'all'][:MOST_LEVEL_CLASSES]
    judged = bool(classes) and all(row['metrics'] for row in result['scores'].values())
    shape = len(rows) + judged, max(1, len(classes))
    figure = new_figure(max(5.5, 2.7 * shape[1]), 2.3 * shape[0] + 0.5)
    panels = figure.subplots(*shape, squeeze=False, sharex='col')
    for column in range(shape[1]):
        parts = [('normal', test.labels == 0, NORMAL)]
        parts += [(group, chosen(test, group), COLOURS[1 + column % 5])
                  for group in classes[column:column + 1]]
        for i, (panel, (title, names)) in enumerate(zip(panels[:, column], rows.items())):
            for label, images, colour in parts:
                values = {k: test.values[name][images] for k, name in names.items()}
                draw_quartiles(panel, values, label, colour)
            panel.set(ylabel=f'{title}, nats' if column == 0 else '')
            style(panel)
            if i == 0:
                legend(panel, loc='best')
        if judged:
            draw_auroc(panels[-1, column], result, rows, classes[column])
            if column == 0:
                panels[-1, column].set_ylabel('AUROC')
                legend(panels[-1, column], loc='lower right')
        if classes:
            style(panels[0, column], classes[column])
        panels[-1, column].set_xlabel('k, groups from the prior')
    for panel in panels.flat:
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_quartiles(panel: Any, values: dict[int, np.ndarray], label: str, colour: str) -> None:
    """Median and quartiles of the finite values (n,) of each k."""
    quartiles = {k: np.percentile(v[np.isfinite(v)], [25, 50, 75]) for k, v in values.items()
                 if np.isfinite(v).any()}
    if quartiles:
        low, middle, high = np.array(list(quartiles.values())).T
        panel.plot(list(quartiles), middle, color=colour, lw=1.8, marker='o', ms=3, label=label)
        panel.fill_between(list(quartiles), low, high, color=colour, alpha=0.22, lw=0)


def draw_auroc(panel: Any, result: dict[str, Any], rows: dict[str, dict[int, str]], group: str) -> None:
    """AUROC and its 95 % interval against k, one line a row of scores."""
    for i, (title, names) in enumerate(rows.items()):
        found = [result['scores'][name]['metrics'][group]['auroc'] for name in names.values()]
        value, low, high = (np.array([auroc[key] for auroc in found]) for key in ('value', 'low', 'high'))
        # a percentile interval need not hold the value itself
        bars = np.maximum(0, [value - low, high - value])
        panel.errorbar(list(names), value, bars, color=COLOURS[5 * i], lw=1.4, marker='o', ms=3, label=title)
    panel.axhline(0.5, color=FAINT, lw=0.7, zorder=0)
    panel.set_ylim(-0.02, 1.02)
    style(panel)


def read_history(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag in the metrics.jsonl of a run; empty where there is none."""
    history: dict[str, list[tuple[int, float]]] = {}
    path = run_folder / 'metrics.jsonl'
    # a run that was killed, or still goes on, may leave half a line at the end
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for values in (json.loads(line) for line in lines if line.endswith('\n')):
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
        for part, label, colour in (('train', 'training', NORMAL), ('val', 'validation', COLOURS[0])):
            panel.plot(*zip(*history[f'{part}/{name}']), label=label, color=colour, lw=1.6, marker='o', ms=3)
        panel.set(xlabel='step', ylabel=name)
        style(panel, name)
        legend(panel, loc='best')
    return figure


def map_scale(maps: list[np.ndarray]) -> dict[str, Any]:
    """One colour scale for all maps: from 0, or around 0 if some are negative; the top 0.5 % is clipped."""
    values = np.concatenate([m.ravel() for m in maps]) if maps else np.zeros(1)
    values = values[np.isfinite(values)]
    high = float(np.percentile(np.abs(values), 99.5)) if len(values) else 1.0
    high = high or 1.0
    return {'cmap': 'coolwarm', 'vmin': -high, 'vmax': high} if len(values) and values.min() < 0 else {
        'cmap': 'inferno', 'vmin': 0, 'vmax': high}
