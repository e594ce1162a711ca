"""What tells a data set's classes apart without looking at the disease: confounds, duplicates, unlike parts.

Every trivial feature (trivial.py) is compared between the normal images and each anomalous class, and between
the normal images that a model learns from (train, val) and those of the test part, which should be alike.
AUROC above 0.5: the feature is larger in the anomalous, or in the test images. What follows from the figures
is said in findings.py. N images.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from anomaly import metrics
from audit.findings import LEARNED, TESTED, all_findings, sentences
from audit.trivial import FEATURES, TRAITS, Measured, measure
from readers.source import CLASSES_SHOWN
from readers.split import PARTS, count
from utils import finite, mix_seed

__all__ = ['audit', 'sentences']

LEAST_IMAGES = 10            # of a group: with fewer an interval says nothing
COMMON = 0.02                # share of a group that must have a trait ('JPEG') for it to be compared
MOST_WORDS = 12              # values of a trait that are compared
FOLDS = 5                    # of the cross-validation of the regression


def audit(data: Any, max_images: int = 500, num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The findings about a data set (datasets.Data), and all that they rest on, JSON-ready.

    At most `max_images` images of each part, of its normal images and of each anomalous class, are drawn by
    `seed` and measured; duplicates are those of all images. 'findings' are sorted, the worst first, see
    `sentences`.
    """
    samples = draw_samples(data, max_images, seed)
    measured = {key: measure(getattr(data, key[0]), indices) for key, (indices, _) in samples.items()}
    normal = data.normal_classes[0] if len(data.normal_classes) == 1 else 'normal'
    groups = make_groups(normal, measured)
    notes = [f"{name}: {count(len(group), 'image')}, too few to compare (at least {LEAST_IMAGES})"
             for name, group in groups.items() if len(group) < LEAST_IMAGES]
    pairs = [('class', normal, name) for name in groups if name not in (normal, LEARNED, TESTED)]
    comparisons = [{'kind': kind, 'first': first, 'second': second,
                    **compare(groups[first], groups[second], num_bootstrap, seed)}
                   for kind, first, second in [*pairs, ('parts', LEARNED, TESTED)]
                   if min(len(groups[first]), len(groups[second])) >= LEAST_IMAGES]
    result = {
        'dataset': getattr(data.config, 'dataset', ''), 'data': getattr(data.config, 'data', ''),
        'shape': list(data.shape), 'max_images': max_images, 'num_bootstrap': num_bootstrap, 'seed': seed,
        'images': [{'part': part, 'group': name or normal, 'measured': len(indices), 'of': total}
                   for (part, name), (indices, total) in samples.items() if total],
        'features': {name: {'about': f.about, 'topic': f.topic, 'unit': f.unit}
                     for name, f in FEATURES.items()},
        'groups': {name: {'images': len(group), 'features': quartiles(group), 'traits': shares(group)}
                   for name, group in groups.items() if len(group)},
        'comparisons': comparisons, 'notes': notes}
    return finite(result | {'findings': all_findings(result, data)})


# ---------------------------------------------------------------------------------------------------- samples

def draw_samples(data: Any, max_images: int, seed: int) -> dict[tuple[str, str], tuple[np.ndarray, int]]:
    """{(part, anomalous class or '' for the normal images): (places in the part, images there in all)}.

    Of more than CLASSES_SHOWN anomalous classes all are one.
    """
    samples = {}
    for part_name in PARTS:
        part = getattr(data, part_name)
        labels = part.labels.numpy()
        anomalous = np.flatnonzero(labels)
        classes = np.array([part.entries[i].class_name for i in anomalous], object)
        if len(set(classes)) > CLASSES_SHOWN:
            classes[:] = 'anomalous classes'
        wanted = {'': np.flatnonzero(labels == 0)}
        wanted |= {name: anomalous[classes == name] for name in sorted(set(classes))}
        for group, places in wanted.items():
            random = np.random.default_rng(mix_seed(seed, 'audit', part_name, group))
            chosen = random.choice(places, min(len(places), max_images), replace=False)
            samples[part_name, group] = np.sort(chosen), len(places)
    return samples


def make_groups(normal: str, measured: dict[tuple[str, str], Measured]) -> dict[str, Measured]:
    """The images that are compared: all normal ones, the anomalous classes, the normal ones of both sides."""
    learned, tested = measured['train', ''] + measured['val', ''], measured['test', '']
    anomalous = {group: images for (_, group), images in measured.items() if group}
    return {normal: learned + tested, **anomalous, LEARNED: learned, TESTED: tested}


def quartiles(group: Measured) -> dict[str, dict[str, float]]:
    """{feature: {'median', 'low', 'high'}}, low and high the quartiles, of the images where it is known."""
    known = {name: values[np.isfinite(values)] for name, values in group.numbers.items()}
    return {name: dict(zip(('low', 'median', 'high'), np.percentile(values, [25, 50, 75]).tolist()))
            for name, values in known.items() if len(values)}


def shares(group: Measured) -> dict[str, dict[str, float]]:
    """{trait: {words: share of the images}}, the most frequent first, at most MOST_WORDS."""
    return {name: {word: n / len(words) for word, n in Counter(filter(None, words)).most_common(MOST_WORDS)}
            for name, words in group.traits.items()}


# ------------------------------------------------------------------------------------------------ comparisons

def compare(first: Measured, second: Measured, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """AUROC with its 95 % interval of each feature that is known of all images of both groups.

    'features': {name: {'topic', 'auroc', 'low', 'high'}}, a trait as 'format=JPEG' with its 'word' and
    'shares'; 'combined': the same of a logistic regression on all of them, cross-validated; None if all are
    constant, or a group comes from one patient.
    """
    resamples = metrics.Resamples.draw(len(first), len(second), num_bootstrap, seed)
    columns = {name: (first.numbers[name], second.numbers[name]) for name in FEATURES}
    about: dict[str, dict[str, Any]] = {name: {'topic': f.topic} for name, f in FEATURES.items()}
    for trait, word in common_words(first, second):
        has = [np.array([w == word for w in group.traits[trait]], np.float64) for group in (first, second)]
        about[f'{trait}={word}'] = {'topic': TRAITS[trait][0], 'word': word,
                                    'shares': [float(h.mean()) for h in has]}
        columns[f'{trait}={word}'] = tuple(has)
    known = {name: pair for name, pair in columns.items() if all(np.isfinite(v).all() for v in pair)}
    varied = {name: pair for name, pair in known.items() if np.ptp(np.concatenate(pair)) > 0}
    rows = {name: about[name] | interval(*pair, resamples) for name, pair in varied.items()}
    combined, folds = None, min(FOLDS, len(set(first.groups)), len(set(second.groups)))
    if varied and folds > 1:
        x = np.stack([np.concatenate(pair) for pair in varied.values()], 1)                  # (N, features)
        scores = classify(x, np.arange(len(x)) >= len(first), first.groups + second.groups, folds, seed)
        combined = interval(scores[:len(first)], scores[len(first):], resamples)
    return {'images': [len(first), len(second)], 'features': rows, 'combined': combined}


def interval(first: np.ndarray, second: np.ndarray, resamples: metrics.Resamples) -> dict[str, float]:
    auroc = metrics.evaluate_score(first, second, resamples)['auroc']
    return {'auroc': auroc.value, 'low': auroc.low, 'high': auroc.high}


def common_words(first: Measured, second: Measured) -> list[tuple[str, str]]:
    """The (trait, words) to compare: frequent in a group; of two words of a trait one says all."""
    chosen = []
    for trait in TRAITS:
        share = [{word: n / len(group) for word, n in Counter(group.traits[trait]).items()}
                 for group in (first, second)]
        words = {*share[0], *share[1]}
        if '' in words:                                                # images without a file
            continue
        lead = {word: share[1].get(word, 0) - share[0].get(word, 0) for word in words
                if max(share[0].get(word, 0), share[1].get(word, 0)) >= COMMON}
        ranked = sorted(lead, key=lambda word: (-lead[word], word))
        chosen += [(trait, word) for word in ranked[:1 if len(words) == 2 else MOST_WORDS]]
    return chosen


def classify(x: np.ndarray, y: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Scores (N,) of the rows of x (N, features), each from a logistic regression that tells y (N,) bool and
    has not seen the row or others of its group.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return cross_val_predict(model, x, y, groups=groups, cv=splits, method='decision_function')
