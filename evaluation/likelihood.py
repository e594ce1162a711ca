"""Likelihood of a part of a data set: the bound of the model, and the tighter importance-weighted one."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from anomaly.outputs import elbo, log_weight
from distributed import launch
from distributions import bits_per_dim, log_mean_exp
from evaluation.config import Likelihood
from utils import UserError, seed_noise


@torch.no_grad()
def evaluate_likelihood(model: Any, batches: Iterable[tuple[int, Any]], *, num_iw_samples: int, seed: int,
                        num_dims: int, device: torch.device) -> dict[str, float]:
    """Mean NELBO and importance-weighted negative log-likelihood of all images of `batches`, over all ranks.

    The NELBO is averaged over the same `num_iw_samples` draws. Returns nats and bits per dimension, standard
    errors over images, and the number of images. Noise is a function of seed, batch number and draw, so the
    numbers do not depend on how many processes share the batches. Where there are both, 'normal' and
    'anomalous' hold the same of these images alone. Raises UserError if there are no images.
    """
    model.eval()
    rows = []
    for index, batch in batches:
        x, bounds, weights = batch.x.to(device, non_blocking=True), [], []
        for draw in range(num_iw_samples):
            seed_noise(seed, 'likelihood', index, draw)
            terms = model(x)
            bounds.append(elbo(terms).double())
            weights.append(log_weight(terms).double())
        nelbo, neg_log_p = -torch.stack(bounds).mean(0), -log_mean_exp(torch.stack(weights))
        rows.append((index, nelbo.cpu().numpy(), neg_log_p.cpu().numpy(), batch.y.numpy()))
    rows = sorted(launch.gather(rows), key=lambda row: row[0])
    if not rows:
        raise UserError("there are no images to evaluate. Set --val_fraction or --test_fraction above 0.")
    nelbo, neg_log_p, label = (np.concatenate([row[i] for row in rows]) for i in (1, 2, 3))
    result = {'num_iw_samples': num_iw_samples, **summary(nelbo, neg_log_p, num_dims)}
    if 0 < label.mean() < 1:
        for name, chosen in (('normal', label == 0), ('anomalous', label == 1)):
            result[name] = summary(nelbo[chosen], neg_log_p[chosen], num_dims)
    return result


def summary(nelbo: np.ndarray, neg_log_p: np.ndarray, num_dims: int) -> dict[str, float]:
    """Means over images (N,) in nats and bits per dimension, with the standard error of the nats."""
    result: dict[str, float] = {'num_images': len(nelbo)}
    for name, values in (('nelbo', nelbo), ('neg_log_p', neg_log_p)):
        result[f'{name}_nats'] = float(values.mean())
        result[f'{name}_nats_standard_error'] = float(values.std(ddof=1) / math.sqrt(len(values))) \
            if len(values) > 1 else 0.0
        result[f'{name}_bits_per_dim'] = bits_per_dim(float(values.mean()), num_dims)
    return result


def count_dims(shape: tuple[int, ...], padding: int) -> int:
    """Numbers in an image (C, *S) that the likelihood is over: without the border that was added."""
    return shape[0] * math.prod(side - 2 * padding for side in shape[1:])


def evaluate(run: Any) -> None:
    """The mode `evaluate`: NELBO and importance-weighted bound, in nats and bits per dimension."""
    config, data = run.flags(Likelihood), run.data()
    result = evaluate_likelihood(run.model, run.batches(data, config.max_images),
                                 num_iw_samples=config.num_iw_samples, seed=config.seed,
                                 num_dims=count_dims(data.shape, data.pixels.padding), device=launch.device())
    result |= {'part': run.part, 'seed': config.seed}
    run.write_metrics('likelihood', result)
    groups = {name: result[name] for name in ('normal', 'anomalous') if name in result}
    for group, values in (groups or {'': result}).items():
        run.say(' '.join(f"{values['num_images']} {group} {run.part} images, {result['num_iw_samples']} "
                         f"samples each".split()))
        for name, title in (('nelbo', 'NELBO'), ('neg_log_p', '-log p(x)')):
            mean, error, bits = (values[f'{name}_{unit}']
                                 for unit in ('nats', 'nats_standard_error', 'bits_per_dim'))
            run.say(f'  {title:9} {mean:.4f} +- {error:.4f} nats, {bits:.5f} bits per dim')
