"""How well a model in training tells anomalous test images apart: to be watched, never to choose by."""

import math
from typing import Any

import numpy as np
import torch

from anomaly.choice import choose_primary, choose_scores, preset
from anomaly.config import Judging, MapConfig
from anomaly.metrics import Resamples, evaluate_score, make_finite
from anomaly.normal import Normal
from anomaly.scores import Scoring
from anomaly.scoring import part_batches, score_images
from readers.parts import SomeOf
from utils import UserError, mix_seed

QUICK = Scoring(num_draws=1)


def choose_monitored(data: Any, number: int, seed: int) -> Any:
    """At most `number` test images, half of them normal, drawn by the seed: a part. Raises UserError where
    the test part has not both kinds.
    """
    if not len(data.val):
        raise UserError("--monitor_anomalies needs normal validation images: set --val_fraction.")
    random, ids = np.random.default_rng(mix_seed(seed, 'monitor')), []
    for label in (0, 1):
        known = [entry.id for entry in data.test.entries if entry.label == label]
        if not known:
            raise UserError(f"--monitor_anomalies needs normal and anomalous test images, and there are no "
                            f"{'anomalous' if label else 'normal'} ones: leave it out.")
        ids += [known[i] for i in random.permutation(len(known))[:max(1, number // 2)]]
    return SomeOf(data.test, ids)


def monitor(model: Any, data: Any, part: Any, batch_size: int) -> dict[str, float]:
    """AUROC of the primary score, with one draw of its noise, on a part with both kinds: by name of the
    score. Densities learn from the validation images; NaN where these do not suffice.
    """
    own = preset(model, data.config.dataset)
    name = choose_primary('', own, [score.name for score in choose_scores((), model)[0]])
    scores, _ = choose_scores((name,), model)
    training = model.training
    with torch.no_grad():
        known = score_images(model, part_batches(data.val, batch_size, 'val'), scores, QUICK)
        test = score_images(model, part_batches(part, batch_size, 'monitor'), scores, QUICK)
    model.train(training)
    try:
        Normal.fit(known, scores, name, QUICK, MapConfig(), Judging()).apply(test, scores)
    except UserError:                                # a training goes on without what nothing depends on
        return {name: math.nan}
    values, labels = make_finite(test.values[name]), test.labels
    normal, anomalous = values[labels == 0], values[labels == 1]
    found = evaluate_score(normal, anomalous, Resamples.draw(len(normal), len(anomalous)))
    return {name: found['auroc'].value}
