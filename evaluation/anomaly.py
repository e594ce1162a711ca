"""The modes `anomaly` and `compare`: the data of runs, with the sets of --ood, scored and judged."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from anomaly.compare import compare as compare_runs
from anomaly.config import Audit, CompareConfig, Judging, OutOfDistribution
from anomaly.detect import Settings, detect
from anomaly.out_of_distribution import with_ood
from anomaly.runs import Run, choose, run_names
from anomaly.scores import Scoring, Selection, check_used
from audit.audit import audit, sentences
from datasets import Data
from distributed import launch
from evaluation.run import Evaluation
from model import place
from utils import UserError

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


def anomaly(run: Evaluation) -> None:
    """Scores, thresholds, metrics and the report, of one run or of several whose scores are added up."""
    runs, settings = open_runs(run, run.args.together or [run.args.checkpoint], added_up=True)
    detect(runs, run.out, settings, run.say, audit_findings(run, runs[0].data))


def audit_findings(run: Evaluation, data: Data) -> list[str]:
    """What the audit of --audit_images says of the data."""
    number = run.flags(Audit).audit_images
    if not number or not launch.is_main():
        return []
    return sentences(audit(data, number, AUDIT_RESAMPLES, run.args.seed))


def compare(run: Evaluation) -> None:
    """Scores of several runs on the test images that all have."""
    runs, settings = open_runs(run, run.flags(CompareConfig).compare, added_up=False)
    compare_runs(runs, run.out, settings, run.say)


def open_runs(run: Evaluation, paths: Sequence[str], added_up: bool) -> tuple[list[Run], Settings]:
    """The runs, their models on the CPU, as only the one at work is on the device; and the flags of the
    command. Raises UserError for a flag on which none of the scores depends that are chosen for them.
    """
    alone, runs, batch_sizes = list(paths) == [run.args.checkpoint], [], []
    for name, path in zip([''] if alone else run_names(paths), paths):
        one = replace(run, args=Namespace(**vars(run.args) | {'checkpoint': path}))
        if not alone:
            run.say(f'{name}: {path}')
        # `place` sets the memory format of the device, which the model keeps.
        runs.append(Run(name, str(one.run_folder) if alone else path,
                        place(one.opened[0], launch.device()).cpu(), data_with_ood(one),
                        (one.run_folder / 'split.json').exists()))
        batch_sizes.append(one.batch_size)
    chosen, _ = choose(runs, run.flags(Selection), added_up)
    scores = [(score, one.model) for one, (some, _) in zip(runs, chosen) for score in some]
    check_used(run.flags(Scoring), [name for score, model in scores for name in score.flag_names(model)])
    if run.flags(Judging).density_images == 'val' and not any(
            score.density and score.density.takes_training for score, _ in scores):
        raise UserError("--density_images does nothing, as no computed score learns from training images: "
                        "name one with --scores, such as kl_knn or dose, or leave it out.")
    command = 'python ' + shlex.join(sys.argv)
    return runs, Settings.read(run.args, batch_size=min(batch_sizes), command=command)      # one size for all
