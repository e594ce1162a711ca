"""Trained runs under evaluation: their names, the images on which all may be judged, their scores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anomaly.choice import choose_primary, choose_scores, preset
from anomaly.scores import Score, Selection
from readers.parts import SomeOf
from utils import UserError, naming


@dataclass(frozen=True)
class Run:
    """A trained model, and its data set with the split of its training."""
    name: str                        # '' where it is the only one
    path: str                        # its folder, or a checkpoint in it
    model: Any
    data: Any
    knows_split: bool = True         # False: which images it was trained on is not known


def run_names(paths: Sequence[str]) -> list[str]:
    """A name for each run: that of its folder without 'eval-', with folders above it where names meet, and
    that of a checkpoint other than checkpoint.pt: 'chest-best'. Raises UserError for fewer than two runs, and
    for one that is named twice.
    """
    if len(paths) < 2:
        raise UserError(f"--compare {' '.join(paths)}: one run is nothing to compare, name two or more.")
    parts = []
    for path in map(Path, paths):
        folder = (path.parent if path.is_file() else path).resolve()
        stem = f'-{path.stem}' if path.is_file() and path.name != 'checkpoint.pt' else ''
        parts.append((*folder.parts[:-1], folder.name.removeprefix('eval-') + stem))
        if parts.count(parts[-1]) > 1:
            raise UserError(f"the run {path} is named twice: name each once.")

    def name(i: int) -> str:
        shown = next(n for n in range(1, len(parts[i]) + 1)
                     if not any(other[-n:] == parts[i][-n:] for j, other in enumerate(parts) if j != i))
        return '/'.join(parts[i][-shown:])
    return [name(i) for i in range(len(parts))]


# -------------------------------------------------------------------------------------------- the same images

def on_common_images(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs, with the test images that all may be judged on, and lines about what is left out. A single
    run keeps its test part.
    """
    if len(runs) == 1:
        return [*runs], []
    check_same_data(runs)
    ids, lines = common_images(runs)
    return [replace(run, data=replace(run.data, test=SomeOf(run.data.test, ids))) for run in runs], lines


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


def check_same_validation(runs: Sequence[Run]) -> None:
    """Raises UserError unless all runs have the same validation images, over which z-scores are taken."""
    first, *others = ({entry.id for entry in run.data.val.entries} for run in runs)
    for run, ids in zip(runs[1:], others):
        if ids != first:
            raise UserError(f"the scores of {runs[0].name} and {run.name} cannot be added up: "
                            f"their validation images differ. Train both with the same --split_seed and "
                            f"--val_fraction.")


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


# --------------------------------------------------------------------------------------------- their scores

Chosen = tuple[list[Score], list[str]]       # the scores of a run, and the names of those that count for it


def choose(runs: Sequence[Run], selection: Selection, added_up: bool) -> tuple[list[Chosen], list[str]]:
    """For each run the scores to compute and the names of those that count, its primary score first; lines
    about scores that a run does not have.

    Of a single run these are all that the selection names; of several the primary score, and further ones
    that a run has. If scores of several runs are `added_up`, the primary score names the terms: each is of
    one run, 'run/score', or of all. Raises UserError for a score that no run has.
    """
    if len(runs) == 1:
        scores, lines = choose_scores(selection.names, runs[0].model)
        return [(scores, [primary_of(runs[0], selection.primary_score, scores)])], lines
    terms: dict[str, list[str]] = {run.name: [] for run in runs}
    # the name of a run may hold a '+' or '/', that of a score does not
    names = '|'.join(map(re.escape, sorted(terms, key=len, reverse=True)))
    for name, score in re.findall(f'(?:({names})/)?([^+]+)', selection.primary_score) if added_up else ():
        if '/' in score:
            raise UserError(f"--primary_score {score}: there is no run {score.rpartition('/')[0]}, but "
                            f"{', '.join(terms)}.")
        for run in [name] if name else terms:
            terms[run].append(score)
    chosen, (extra, lines) = [], available(runs, selection.scores)
    wanted = '' if added_up else selection.primary_score
    sums = [wanted] if '+' in wanted else []
    for run, own, more in zip(runs, terms.values(), extra):
        with naming(run.name):
            if not own and added_up and selection.primary_score:
                raise UserError("no score of this run is in --primary_score.")
            own = own or [primary_of(run, wanted, choose_scores(('all', *more, *sums), run.model)[0])]
            names = {*own, *more, *(term for name in own for term in name.split('+'))}
            found, _ = choose_scores((*own, *more), run.model)
            chosen.append(([score for score in found if score.name in names], own))
    return chosen, lines


def primary_of(run: Run, name: str, scores: Sequence[Score]) -> str:
    """The primary score `name`, or for '' that of the family, among the scores of a run. Raises UserError."""
    dataset = getattr(run.data.config, 'dataset', '')
    return choose_primary(name, preset(run.model, dataset), [score.name for score in scores])


def available(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The scores of each run that `names` ask for; a line for what one lacks. UserError if all lack it."""
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
