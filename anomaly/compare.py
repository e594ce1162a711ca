"""Several trained runs on the same test images, in one table: what `evaluate.py --compare` runs.

Rows are scores of a run, named run/score, and the trivial baselines; columns are metrics with 95 % intervals.
All rows share the images and the resamples, so differences are paired. R resamples.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomaly.baselines import BASELINES
from anomaly.detect import SETTINGS, Examined, best_baseline, choose_primary, examine, few_images, versions
from anomaly.metrics import paired_difference
from anomaly.report import comparison as compare_report
from anomaly.report.figures import shown_groups
from anomaly.scores import ScoreConfig, choose_scores
from anomaly.scoring import Scored
from distributed import launch
from readers.parts import SomeOf
from utils import UserError, finite


@dataclass(frozen=True)
class Run:
    """A trained model, and its data set with the split of its training."""
    name: str
    path: str
    model: Any
    data: Any
    knows_split: bool = True         # False: which images it was trained on is not known


def run_names(paths: Sequence[str]) -> list[str]:
    """A name for each run: that of its folder without 'eval-', with folders above it where names meet.

    A checkpoint other than checkpoint.pt adds its own name: 'chest-best'. Raises UserError for fewer than two
    runs, and for one that is named twice.
    """
    if len(paths) < 2:
        raise UserError(f"--compare {' '.join(paths)}: one run is nothing to compare, name two or more.")
    parts = []
    for path in map(Path, paths):
        folder = (path.parent if path.is_file() else path).resolve()
        stem = f'-{path.stem}' if path.is_file() and path.name != 'checkpoint.pt' else ''
        parts.append((*folder.parts[:-1], folder.name.removeprefix('eval-') + stem))
        if parts.count(parts[-1]) > 1:
            raise UserError(f"--compare names the run {path} twice: name each once.")

    def name(i: int) -> str:
        shown = next(n for n in range(1, len(parts[i]) + 1)
                     if not any(other[-n:] == parts[i][-n:] for j, other in enumerate(parts) if j != i))
        return '/'.join(parts[i][-shown:])
    return [name(i) for i in range(len(parts))]


# -------------------------------------------------------------------------------------------- the same images

def check_same_data(runs: Sequence[Run]) -> None:
    """Raises UserError if the runs are of different data sets or normal classes, or if files differ."""
    first = runs[0]
    facts = {'the data set': lambda run: run.data.config.dataset,
             'the normal classes': lambda run: ', '.join(sorted(run.data.normal_classes))}
    for run in runs[1:]:
        for what, fact in facts.items():
            if fact(run) != fact(first):
                raise UserError(f"the runs cannot be compared: {what} of {run.name} is '{fact(run)}', of "
                                f"{first.name} '{fact(first)}'. Name runs of the same data.")
    contents: dict[str, tuple[str, str]] = {}                  # id -> content, and the run that has it so
    for run in runs:
        for entry in run.data.test.entries:
            content, other = contents.setdefault(entry.id, (entry.sha256, run.name))
            if content and entry.sha256 and content != entry.sha256:
                raise UserError(f"the runs cannot be compared: {entry.id} is another file in the data of "
                                f"{run.name} than in those of {other}. Give both the same --data.")


def common_images(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Ids of the images that every run has in its test part and none has learned from; what is left out.

    An image that a run has in training or validation, by its id or its content, is used for nobody. In the
    order of the first run. Raises UserError if no normal or no anomalous image is left.
    """
    tests = [{entry.id: entry for entry in run.data.test.entries} for run in runs]
    every = {name: entry for test in tests for name, entry in test.items()}
    unfit: dict[str, set[str]] = {}                                             # reason -> ids
    for run, test in zip(runs, tests):
        seen = {mark for part in (run.data.train, run.data.val) for entry in part.entries
                for mark in (entry.id, entry.sha256) if mark}
        learned = {name for name, entry in every.items() if name in seen or entry.sha256 in seen}
        unfit[f'in the training or validation part of {run.name}'] = learned
        unfit[f'not among the test images of {run.name}'] = every.keys() - test.keys() - learned
    dropped = set().union(*unfit.values())
    ids = [name for name in tests[0] if name not in dropped]
    lines = [f"{len(dropped)} of {len(every)} test images are left out: " + ', '.join(
        f'{len(names)} {reason}' for reason, names in unfit.items() if names)] if dropped else []
    for label, kind in enumerate(('normal', 'anomalous')):
        if not any(tests[0][name].label == label for name in ids):
            had = ', '.join(f"{sum(e.label == label for e in test.values())} in that of {run.name}"
                            for run, test in zip(runs, tests))
            raise UserError(' '.join([f"the runs have no {kind} test image in common ({had}).", *(
                f'{line}.' for line in lines), "Name runs of the same split (--split_seed)."]))
    return ids, lines


# ---------------------------------------------------------------------------------------------------- compare

def compare(runs: Sequence[Run], out: str | Path, config: ScoreConfig, *, num_iw_samples: int,
            batch_size: int, seed: int, command: str, log: Callable[[str], None] = print, workers: int = 0,
            device: torch.device | str | None = None, rank: int | None = None, world: int | None = None,
            gather: Callable[[list], list] = launch.gather) -> dict[str, Any]:
    """Scores the common test images with every run and compares; nothing is chosen or fitted on them.

    Of each run its primary score and those of `config.scores` that its model has; baselines on the images of
    the first run. Writes OUT/comparison.json, .md, .csv and figures/ from rank 0, prints the tables with
    `log`, and returns what comparison.json holds; other ranks return {}. Keywords are those of `detect`.
    Raises UserError if the runs have too little in common, or a score fits none of them.
    """
    check_same_data(runs)
    ids, left_out = common_images(runs)
    left_out += [f"{run.name} has no split.json: whether it was trained on these images is not known"
                 for run in runs if not run.knows_split]
    chosen, warnings = choose_for_all(runs, config, num_iw_samples)
    rank, world = launch.rank() if rank is None else rank, launch.world() if world is None else world
    config = replace(config, num_cases=0, num_gallery=0)
    found = examine_all(runs, ids, chosen, config, num_iw_samples=num_iw_samples,
                        batch_size=batch_size, seed=seed, workers=workers, rank=rank, world=world,
                        gather=gather, device=torch.device(device or launch.device()))
    if rank:
        return {}
    rows, samples, test = join(runs, found)
    about = {run.name: describe(run, *which, one) for run, which, one in zip(runs, chosen, found)}
    for run, one in zip(runs, found):
        warnings += [f'{run.name}: {line}' for line in one.judged['warnings']
                     + few_images(len(run.data.val), config.target_fpr)]
    result = {'dataset': runs[0].data.config.dataset, 'command': command, 'versions': versions(),
              'num_iw_samples': num_iw_samples, 'batch_size': batch_size, 'seed': seed,
              'num_bootstrap': config.num_bootstrap, **{name: getattr(config, name) for name in SETTINGS},
              'counts': Counter(entry.class_name for entry in test.entries), 'left_out': left_out,
              'runs': about, 'primary_scores': [f'{run.name}/{one[1]}' for run, one in zip(runs, chosen)],
              'groups': found[0].judged['groups'], 'scores': rows, 'warnings': warnings}
    result['differences'] = differences(result, samples)
    result = finite(result)
    compare_report.write(Path(out), result, test)
    for line in [*compare_report.text_tables(result), *left_out, *warnings,
                 f"comparison: {Path(out) / 'comparison.md'}"]:
        log(line)
    return result


def examine_all(runs: Sequence[Run], ids: Sequence[str], chosen: Sequence[tuple[list, str]],
                config: ScoreConfig, *, device: torch.device, **options: Any) -> list[Examined | None]:
    """Each run on the images `ids`, one after the other on the device; baselines with the first alone."""
    found = []
    for run, (scores, primary) in zip(runs, chosen):
        baselines = [] if found else [make() for make in BASELINES.values()]
        data = replace(run.data, test=SomeOf(run.data.test, ids))
        try:
            found.append(examine(run.model.to(device), data, scores, baselines, primary, config,
                                 device=device, **options))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
        run.model.cpu()                                       # room for the next
    return found


def join(runs: Sequence[Run], found: Sequence[Examined]) -> tuple[dict[str, dict], dict[str, dict], Scored]:
    """Rows, resampled AUROCs and values of all runs under the names run/score, baselines last."""
    rows: dict[str, dict] = {}
    samples: dict[str, dict[str, np.ndarray]] = {}
    values: dict[str, np.ndarray] = {}
    for run, one in zip(runs, found):
        for score, row in one.judged['scores'].items():
            name = score if row['kind'] == 'baseline' else f'{run.name}/{score}'
            rows[name] = row if row['kind'] == 'baseline' else {'run': run.name, **row}
            values[name] = one.test.values[score]
            for group, drawn in one.samples.items():
                samples.setdefault(group, {})[name] = drawn[score]
    rows = dict(sorted(rows.items(), key=lambda item: item[1]['kind'] == 'baseline'))
    return rows, samples, replace(found[0].test, values=values)


def choose_for_all(runs: Sequence[Run], config: ScoreConfig,
                   iw_samples: int) -> tuple[list[tuple[list, str]], list[str]]:
    """For each run its scores and the primary among them; a line for each score that a run does not have.

    Raises UserError for a score that no run has.
    """
    chosen, lines, refused = [], [], {name: [] for name in config.scores}
    for run in runs:
        wanted = set()
        for name in config.scores:
            try:
                wanted |= {score.name for score in choose_scores((name,), run.model, iw_samples)[0]}
            except UserError as error:
                refused[name].append(error)
                lines.append(f"{run.name} has no score {name}")
        candidates, _ = choose_scores(('all', *wanted), run.model, iw_samples)
        published = getattr(run.model, 'primary_score', '')
        try:
            primary = choose_primary(config.primary_score, published, [s.name for s in candidates])
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
        chosen.append(([s for s in candidates if s.name in wanted | {primary}], primary))
    for errors in refused.values():
        if len(errors) == len(runs):
            raise errors[0]
    return chosen, lines


def describe(run: Run, scores: list, primary: str, found: Examined) -> dict[str, Any]:
    """What is known of a run; seconds are those of one process for all its scores of an image."""
    return {'path': run.path, 'family': type(run.model).__name__, 'primary_score': primary,
            'scores': [score.name for score in scores],
            'parameters': sum(p.numel() for p in run.model.parameters()),
            'seconds_per_image': found.test.seconds / len(found.test.entries),
            'shape': list(run.data.shape), 'bits': run.data.pixels.bits,
            'train_images': len(run.data.train), 'validation_images': len(run.data.val)}


def differences(result: dict[str, Any], samples: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """AUROC of one minus another, paired by resamples: all pairs of primary scores, and each with the best
    trivial baseline.
    """
    found = []
    for group in shown_groups(result):
        auroc = {name: row['metrics'][group]['auroc']['value'] for name, row in result['scores'].items()}
        best, turned = best_baseline(result['scores'], group)
        pairs = [*((a, b, False) for a, b in combinations(result['primary_scores'], 2)),
                 *((name, best, turned) for name in result['primary_scores'])]
        for first, second, turn in pairs:
            value, drawn = auroc[second], samples[group][second]
            if turn:
                value, drawn = 1 - value, 1 - drawn
            found.append({'group': group, 'first': first, 'second': second, 'turned': turn,
                          'value': auroc[first] - value,
                          **paired_difference(samples[group][first], drawn)})
    return found
