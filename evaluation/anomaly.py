"""The modes `anomaly` and `compare`: the data of a run, with the sets of --ood, scored and judged."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from anomaly.choice import choose_scores
from anomaly.compare import Run, choose_for_all, run_names
from anomaly.compare import compare as compare_runs
from anomaly.config import Audit, CompareConfig, OutOfDistribution
from anomaly.detect import Settings, detect
from anomaly.ensemble import choose_terms, detect_together
from anomaly.out_of_distribution import with_ood
from anomaly.scores import Score, Scoring, Selection, check_used
from audit.audit import audit, sentences
from datasets import Data
from distributed import launch
from evaluation.run import Evaluation
from model import place

AUDIT_RESAMPLES = 200                             # behind the intervals of the report's audit


def data_with_ood(run: Evaluation) -> Data:
    """The data set of the run, and the sets of --ood in its test part, to be scored."""
    data, config = run.data(), run.flags(OutOfDistribution)
    if config.ood:
        known = len(data.report)
        with launch.main_first():
            data = with_ood(data, config.ood, config.max_ood, run.args.seed)
        for line in data.report[known:]:
            run.say(line)
    return data


def settings(run: Evaluation, batch_size: int) -> Settings:
    """The flags of the command, and what results state of it."""
    return Settings.read(run.args, batch_size=batch_size, command='python ' + shlex.join(sys.argv))


def anomaly(run: Evaluation) -> None:
    """Scores, thresholds, metrics and the report."""
    if run.args.together:
        together(run)
        return
    scores, _ = choose_scores(run.flags(Selection).names, run.model)
    check_used(run.flags(Scoring), [score.name for score in scores])
    data = data_with_ood(run)
    detect(run.model, data, run.out, settings(run, run.batch_size), run.run_folder, run.say,
           audit_findings(run, data))


def audit_findings(run: Evaluation, data: Data) -> list[str]:
    """What the audit of --audit_images says of the data."""
    number = run.flags(Audit).audit_images
    if not number or not launch.is_main():
        return []
    return sentences(audit(data, number, AUDIT_RESAMPLES, run.args.seed))


def together(run: Evaluation) -> None:
    """The same for several runs, whose scores are added up."""
    runs, batch_size = open_runs(run, run.args.together)
    check_flags(run, choose_terms(runs, run.flags(Selection)))
    detect_together(runs, run.out, settings(run, batch_size), run.say,
                    audit_findings(run, runs[0].data))


def compare(run: Evaluation) -> None:
    """Scores of several runs on the test images that all have. Only the run at work is on the device."""
    runs, batch_size = open_runs(run, run.flags(CompareConfig).compare)
    check_flags(run, choose_for_all(runs, run.flags(Selection))[0])
    compare_runs(runs, run.out, settings(run, batch_size), run.say)


def check_flags(run: Evaluation, chosen: Sequence[tuple[list[Score], Any]]) -> None:
    """Raises UserError for a flag on which none of the scores depends that are chosen for several runs."""
    check_used(run.flags(Scoring), [score.name for scores, _ in chosen for score in scores])


def open_runs(run: Evaluation, paths: Sequence[str]) -> tuple[list[Run], int]:
    """Several runs, their models on the CPU, and the smallest of their batch sizes."""
    runs, batch_sizes = [], []
    for name, path in zip(run_names(paths), paths):
        one = Evaluation(Namespace(**vars(run.args) | {'checkpoint': path}))
        run.say(f'{name}: {path}')
        knows_split = (one.run_folder / 'split.json').exists()
        runs.append(Run(name, path, place(one.opened[0], 'cpu'), data_with_ood(one), knows_split))
        batch_sizes.append(one.batch_size)
    return runs, min(batch_sizes)        # one size for all, as seconds depend on it
