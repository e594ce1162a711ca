"""Several runs in one score: the sum of z-scores of their scores, judged and reported like that of one run.

The models may be of different families and image sizes; they must share the data, the validation images and
the test images. A score of a run is named run/score, as in a comparison.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomaly.choice import choose_primary, choose_scores, preset, sum_score
from anomaly.compare import (
    Run,
    available,
    check_same_data,
    common_images,
    evaluate_all,
    join_tables,
)
from anomaly.detect import Evaluated, Settings, draw_cases, report_lines, summarize, write
from anomaly.judge import join, judge, unjudged
from anomaly.normal import Normal
from anomaly.report.provenance import about_run
from anomaly.scores import Score, Selection
from distributed import launch
from readers.parts import SomeOf
from utils import UserError, naming


def detect_together(runs: Sequence[Run], out: Path, settings: Settings, log: Callable[[str], None] = print,
                    findings: Sequence[str] = ()) -> dict[str, Any]:
    """Scores the common images with every run, adds up, sets thresholds, judges and reports as `detect` does.

    The primary score is that of the settings, 'a/kl_knn+b/residual_top', or one score that all runs have, or
    the sum of the runs' own primary scores. Raises UserError if the runs do not fit together.
    """
    started = time.perf_counter()
    check_same_data(runs)
    check_same_validation(runs)
    ids, left_out = common_images(runs)
    chosen = choose_terms(runs, settings.selection)
    found = evaluate_all(runs, ids, [(scores, own[0]) for scores, own in chosen], settings)
    joined = join_evaluated(found, [(run.name, name) for run, (_, own) in zip(runs, chosen) for name in own],
                            settings)
    data = replace(runs[0].data, test=SomeOf(runs[0].data.test, ids))
    joined.test.cases = draw_first_maps(runs, joined, settings)
    if not launch.is_main():
        return {}
    result = summarize(data, joined, settings, findings, left_out) | {
        'runs': {run.name: run.path for run in runs},
        'models': [about_run(run.model, run.path) for run in runs],
        'seconds': round(time.perf_counter() - started, 1)}
    write(out, result, joined, settings, out)
    for line in report_lines(out, result, joined.judgement):
        log(line)
    return result


def check_same_validation(runs: Sequence[Run]) -> None:
    """Raises UserError unless all runs have the same validation images, over which z-scores are taken."""
    first = {entry.id for entry in runs[0].data.val.entries}
    for run in runs[1:]:
        if {entry.id for entry in run.data.val.entries} != first:
            raise UserError(f"the scores of {runs[0].name} and {run.name} cannot be added up: "
                            f"their validation images differ. Train both with the same --split_seed and "
                            f"--val_fraction.")


def choose_terms(runs: Sequence[Run], selection: Selection) -> list[tuple[list[Score], list[str]]]:
    """For each run the scores to compute, and which of them are added up: further scores are those of the
    selection that it has. Raises UserError for a score that no run has, and for a sum that does not fit.
    """
    wanted: dict[str, list[str]] = {run.name: [] for run in runs}
    for term in filter(None, selection.primary_score.split('+')):
        name, _, score = term.rpartition('/')
        if name and name not in wanted:
            raise UserError(f"--primary_score {term}: there is no run {name}, but {', '.join(wanted)}.")
        for run in [name] if name else wanted:
            wanted[run].append(score)
    chosen, (extra, _) = [], available(runs, selection.scores)
    for run, own, more in zip(runs, wanted.values(), extra):
        with naming(run.name):
            if not selection.primary_score:
                possible = [score.name for score in choose_scores((), run.model)[0]]
                own.append(choose_primary('', preset(run.model, run.data.config.dataset), possible))
            if not own:
                raise UserError("no score of this run is in --primary_score.")
            chosen.append((choose_scores((*own, *more), run.model)[0], own))
    return chosen


def join_evaluated(found: Mapping[str, Evaluated], terms: Sequence[tuple[str, str]],
                   settings: Settings) -> Evaluated:
    """The tables of several runs as one, with the sum of the scores `terms`, (run, score), and its judgement.
    """
    scores = {f'{name}/{score.name}': replace(score, name=f'{name}/{score.name}')
              for name, one in found.items() for score in one.scores}
    names = ['/'.join(term) for term in terms]
    total = sum_score('+'.join(names), [scores[name] for name in names])
    validation, test = (join_tables({name: getattr(one, part) for name, one in found.items()})
                        for part in ('validation', 'test'))
    normal = Normal.fit(validation, [total], total.name, settings.scoring, settings.maps, settings.judging)
    normal.pixel_thresholds = {f'{name}/{score}': value for name, one in found.items()
                               for score, value in one.normal.pixel_thresholds.items()}
    normal.spreads = {f'{name}/{score}': spread for name, one in found.items()
                      for score, spread in one.normal.spreads.items()}
    shown = next((replace(one.shown, name=f'{name}/{one.shown.name}') for name, one in found.items()
                  if one.shown), None)
    normal.apply(test, [total])
    judgement = None
    if launch.is_main():
        of_runs = join({name: one.judgement for name, one in found.items()})
        rows = unjudged([total], 'model', normal.thresholds, {}, total.name)
        judged = judge(test, rows, settings.judging, settings.maps, settings.scoring.seed, of_runs.classes,
                       list(of_runs.matched.values()))
        others = {name: replace(row, primary=False) for name, row in of_runs.rows.items()}
        judgement = replace(of_runs, rows={**judged.rows, **others})
    return Evaluated(normal, validation, test, [total], judgement, shown)


def draw_first_maps(runs: Sequence[Run], joined: Evaluated, settings: Settings) -> list[Any]:
    """Pictures of the cases, with the map of the first run that has one."""
    name = joined.shown.name.rpartition('/')[0] if joined.shown else runs[0].name
    run = next(run for run in runs if run.name == name)
    try:
        return draw_cases(run.model.to(launch.device()), run.data, joined, settings)
    finally:
        run.model.cpu()
