"""What the report says of the data: counts, split, duplicates, what tells parts apart without a model."""

from collections import Counter
from typing import Any

import numpy as np

from anomaly.metrics import Resamples, evaluate_score, make_finite


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
    both = {name: make_finite(np.concatenate([validation.values[name], values[normal]]))[0]
            for name, values in test.values.items()}
    first = len(validation.entries)
    return {name: evaluate_score(values[:first], values[first:], drawn)['auroc'].as_json()
            for name, values in both.items()}
