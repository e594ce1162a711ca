"""Several trained runs on the same test images, in one table: what `evaluate.py --compare` runs.

Rows are scores of a run, named run/score, and the trivial baselines; columns are metrics with 95 % intervals.
All rows share the images and the resamples, so differences are paired. R resamples.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anomaly.baselines import BASELINES
from anomaly.choice import choose_primary, choose_scores, preset
from anomaly.detect import Evaluated, Settings, evaluate
from anomaly.judge import join
from anomaly.report import comparison
from anomaly.report.provenance import code_and_date
from anomaly.scores import Score, Selection
from anomaly.scoring import Table
from distributed import launch
from readers.parts import SomeOf
from utils import UserError, finite, naming


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

def compare(runs: Sequence[Run], out: str | Path, settings: Settings,
            log: Callable[[str], None] = print) -> dict[str, Any]:
    """Scores the common test images with every run and compares; nothing is chosen or fitted on them.

    For each run its primary score and those of the selection that its model has; baselines on the images of
    the first run. Writes OUT/comparison.json, .md, .csv and figures/ from rank 0, prints the tables with
    `log`, and returns what comparison.json holds; other ranks return {}. Raises UserError if the runs have
    too little in common, or a score fits none of them.
    """
    check_same_data(runs)
    ids, left_out = common_images(runs)
    left_out += [f"{run.name} has no split.json: whether it was trained on these images is not known"
                 for run in runs if not run.knows_split]
    chosen, warnings = choose_for_all(runs, settings.selection)
    found = evaluate_all(runs, ids, chosen, settings)
    if not launch.is_main():
        return {}
    judgement = join({name: one.judgement for name, one in found.items()})
    test = join_tables({name: one.test for name, one in found.items()})
    warnings += judgement.warnings
    result = finite({
        'dataset': runs[0].data.config.dataset, **settings.facts(), **code_and_date(),
        'counts': Counter(entry.class_name for entry in test.entries), 'left_out': left_out,
        'runs': {run.name: describe(run, found[run.name]) for run in runs},
        'primary_scores': [row.name for row in judgement.primaries], **judgement.as_json(),
        'differences': [difference.as_json() for group in judgement.shown_groups
                        for difference in judgement.differences(group)], 'warnings': warnings})
    comparison.write(Path(out), result, judgement, test)
    for line in [*comparison.text_tables(result, judgement), *left_out, *warnings,
                 f"comparison: {Path(out) / 'comparison.html'}"]:
        log(line)
    return result


def evaluate_all(runs: Sequence[Run], ids: Sequence[str], chosen: Sequence[tuple[list[Score], str]],
                 settings: Settings) -> dict[str, Evaluated]:
    """By its name, each run on the test images `ids`, with the scores and the primary score chosen for it.
    Only the model at work is on the device.
    """
    found: dict[str, Evaluated] = {}
    for run, (scores, primary) in zip(runs, chosen):
        data = replace(run.data, test=SomeOf(run.data.test, ids))
        try:
            with naming(run.name):
                found[run.name] = evaluate(run.model.to(launch.device()), data, scores, primary, settings,
                                           next(iter(found.values()), None))
        finally:
            run.model.cpu()
    return found


def join_tables(tables: Mapping[str, Table]) -> Table:
    """The tables of runs on the same images as one, with scores named run/score, but for the baselines."""
    first = next(iter(tables.values()))
    ids = [entry.id for entry in first.entries]
    values = {score if score in BASELINES else f'{run}/{score}': column for run, table in tables.items()
              for score, column in table.select(ids).values.items()}
    return replace(first, values=values, features={}, seconds=sum(one.seconds for one in tables.values()))


def available(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The scores that each run has of those that `names` ask for, and a line for what one lacks. Raises
    UserError for what no run has.
    """
    own, lines = [[] for _ in runs], []
    for name in names:
        errors = []
        for run, known in zip(runs, own):
            try:
                known += [score.name for score in choose_scores((name,), run.model)[0]]
            except UserError as error:
                errors.append(error)
                lines.append(f"{run.name} has no score {name}")
        if len(errors) == len(runs):
            raise errors[0]
    return own, lines


def choose_for_all(runs: Sequence[Run],
                   selection: Selection) -> tuple[list[tuple[list[Score], str]], list[str]]:
    """For each run its scores and the primary among them; a line for each score that a run does not have.

    Raises UserError for a score that no run has.
    """
    chosen, (own, lines) = [], available(runs, selection.scores)
    sums = [name for name in selection.names if '+' in name]
    for run, names in zip(runs, own):
        with naming(run.name):
            possible, _ = choose_scores(('all', *names, *sums), run.model)
            primary = choose_primary(selection.primary_score, preset(run.model, run.data.config.dataset),
                                     [score.name for score in possible])
            wanted = {*names, primary, *(term for s in possible if s.name == primary for term in s.terms)}
            chosen.append(([score for score in possible if score.name in wanted], primary))
    return chosen, lines


def describe(run: Run, found: Evaluated) -> dict[str, Any]:
    """What is known of a run; seconds are those of one process for all its scores of an image."""
    return {'path': run.path, 'family': type(run.model).__name__, 'primary_score': found.normal.primary_score,
            'scores': [score.name for score in found.scores],
            'parameters': sum(p.numel() for p in run.model.parameters()),
            'seconds_per_image': found.test.seconds / len(found.test),
            'shape': list(run.data.shape), 'bits': run.data.pixels.bits,
            'train_images': len(run.data.train), 'validation_images': len(run.data.val)}
