"""What the report says of the data: counts, split, duplicates, what tells parts apart without a model."""

from collections import Counter
from typing import Any

import numpy as np

from anomaly.judge import Judgement
from anomaly.metrics import Resamples, evaluate_score, make_finite, wilson_interval


def describe(data: Any) -> dict[str, Any]:
    """Images of every class in every part, the seed of the split, pairs of duplicates across parts by kind,
    and the lines of the reader.
    """
    return {'counts': {name: dict(Counter(entry.class_name for entry in getattr(data, name).entries))
                       for name in ('train', 'val', 'test')},
            'split_seed': data.split['split_seed'],
            'duplicates': dict(Counter(pair['kind'] for pair in data.split['duplicates'])),
            'data': list(data.report)}


def compare_normal(validation: Any, test: Any, number: int, seed: int) -> dict[str, dict[str, float]]:
    """AUROC of normal validation against normal test images for every score, with its 95 % interval from
    `number` resamples; empty without normal test images.

    It should be 0.5: these images differ by chance only. If they do not, thresholds do not hold in the test.
    """
    normal = test.labels == 0
    if not normal.any():
        return {}
    drawn = Resamples.draw(len(validation.entries), int(normal.sum()), number, seed)
    # made finite together, so that "the largest" is the same number in both parts
    both = {name: make_finite(np.concatenate([validation.values[name], values[normal]]))
            for name, values in test.values.items()}
    first = len(validation.entries)
    return {name: evaluate_score(values[:first], values[first:], drawn)['auroc'].as_json()
            for name, values in both.items()}


def broken_promises(judgement: Judgement, normal_parts: dict[str, dict[str, float]]) -> list[str]:
    """A line where normal test images contradict the threshold of a primary score, or differ from those of
    validation in it, both beyond chance (95 %).
    """
    lines, target = [], judgement.judging.target_fpr
    for row in judgement.primaries if normal_parts else ():
        flagged, drift = row.flagged['normal'], normal_parts[row.name]
        low, high = wilson_interval(*flagged)
        if not low <= target <= high:
            lines.append(f"{row.name}: {100 * flagged.count / flagged.total:.1f} % of the normal test images "
                         f"are flagged (95 % interval {100 * low:.1f} to {100 * high:.1f} %), "
                         f"{100 * target:g} % is the target.")
        if not drift['low'] <= 0.5 <= drift['high']:
            side = 'higher' if drift['value'] > 0.5 else 'lower'
            lines.append(f"{row.name}: normal test images score {side} than normal validation images "
                         f"(AUROC {drift['value']:.3f} between them): the threshold does not hold for them.")
    return lines
