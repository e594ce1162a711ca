"""Several trained runs on the same test images, in one table: what `evaluate.py --compare` runs.

Rows are scores of a run, named run/score, and the trivial baselines; columns are metrics with 95 % intervals.
All rows share the images and the resamples, so differences are paired. R resamples.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anomaly.detect import Evaluated, Settings, evaluate_all, join_tables
from anomaly.judge import join
from anomaly.report import comparison
from anomaly.report.provenance import code_and_date
from anomaly.runs import Run, choose, on_common_images
from distributed import launch
from utils import finite


def compare(runs: Sequence[Run], out: str | Path, settings: Settings,
            log: Callable[[str], None] = print) -> dict[str, Any]:
    """Scores the common test images with every run and compares; nothing is chosen or fitted on them.

    For each run its primary score and those of the selection that its model has; baselines on the images of
    the first run. Writes OUT/comparison.json, .md, .csv and figures/ from rank 0, prints the tables with
    `log`, and returns what comparison.json holds; other ranks return {}. Raises UserError if the runs have
    too little in common, or a score fits none of them.
    """
    runs, left_out = on_common_images(runs)
    left_out += [f"{run.name} has no split.json: whether it was trained on these images is not known"
                 for run in runs if not run.knows_split]
    chosen, warnings = choose(runs, settings.selection, added_up=False)
    found = evaluate_all(runs, chosen, settings)
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


def describe(run: Run, found: Evaluated) -> dict[str, Any]:
    """What is known of a run; seconds are those of one process for all its scores of an image."""
    return {'path': run.path, 'family': type(run.model).__name__, 'primary_score': found.normal.primary_score,
            'scores': [row.name for row in found.judgement.rows.values() if row.kind == 'model'],
            'parameters': sum(p.numel() for p in run.model.parameters()),
            'seconds_per_image': found.test.seconds / len(found.test),
            'shape': list(run.data.shape), 'bits': run.data.pixels.bits,
            'train_images': len(run.data.train), 'validation_images': len(run.data.val)}
