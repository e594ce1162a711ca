"""What a model attains on a part of a data set: bounds of its likelihood, its objective, its diagnostics."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly.outputs import elbo, log_weight, passes
from distributed import launch
from distributions import bits_per_dim, log_mean_exp
from evaluation.config import Likelihood
from readers.parts import Batch
from utils import UserError, mix_seed, seed_noise

Batches = Iterable[tuple[int, Batch]]        # with the number of each


@torch.no_grad()
def over_batches(model: Any, batches: Batches, measure: Callable[[int, Batch], Any]) -> list[Any]:
    """measure(number, batch) of all batches in order, over all ranks; its noise is to follow from the number.

    Raises UserError if there are no images.
    """
    model.eval()
    rows = launch.gather([(number, measure(number, batch)) for number, batch in batches])
    if not rows:
        raise UserError("there are no images to evaluate. Set --val_fraction or --test_fraction above 0.")
    return [value for _, value in sorted(rows, key=lambda row: row[0])]


def evaluate_likelihood(model: Any, batches: Batches, *, num_iw_samples: int, seed: int,
                        num_dims: int, iw_batch: int = 0) -> dict[str, float]:
    """Mean NELBO and importance-weighted negative log-likelihood of all images of `batches`, over all ranks.

    The NELBO is averaged over the same `num_iw_samples` draws. Returns nats and bits per dimension, standard
    errors over images, and the number of images. `iw_batch` images pass at once, repeated for several draws;
    0 = as many as suit the device. Noise is a function of seed, batch number and draw, so the
    numbers do not depend on how many processes share the batches. Where there are both, 'normal' and
    'anomalous' hold the same of these images alone. Raises UserError if there are no images.
    """
    def bounds(number: int, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = batch.x.to(launch.device(), non_blocking=True)
        seeds = [[mix_seed(seed, 'likelihood', number, draw)] for draw in range(num_iw_samples)]
        elbos, weights = zip(*((elbo(terms).double(), log_weight(terms).double())
                               for terms in passes(model, x, seeds, iw_batch)))
        nelbo, neg_log_p = -torch.stack(elbos).mean(0), -log_mean_exp(torch.stack(weights))
        return nelbo.cpu().numpy(), neg_log_p.cpu().numpy(), batch.y.numpy()

    rows = over_batches(model, batches, bounds)
    nelbo, neg_log_p, label = map(np.concatenate, zip(*rows))
    result = {'num_iw_samples': num_iw_samples, **summary(nelbo, neg_log_p, num_dims)}
    if 0 < label.mean() < 1:
        for name, chosen in (('normal', label == 0), ('anomalous', label == 1)):
            result[name] = summary(nelbo[chosen], neg_log_p[chosen], num_dims)
    return result


def mean_objective(model: Any, batches: Batches, seed: int) -> float:
    """The model's loss at the end of all schedules, mean over all images and ranks."""
    def objective(number: int, batch: Batch) -> tuple[float, int]:
        seed_noise(seed, 'objective', number)
        loss, _ = model.objective(model(batch.x.to(launch.device(), non_blocking=True)), progress=1.0)
        return float(loss), len(batch.x)

    rows = over_batches(model, batches, objective)
    return sum(loss * images for loss, images in rows) / sum(images for _, images in rows)


def diagnose(model: Any, batches: Batches, seed: int) -> dict[str, Tensor]:
    """What `model.diagnose(x)` gives of each image: (N,) over all images and ranks."""
    def diagnostics(number: int, batch: Batch) -> dict[str, Tensor]:
        seed_noise(seed, 'diagnose', number)
        values = model.diagnose(batch.x.to(launch.device(), non_blocking=True))
        return {name: value.float().cpu() for name, value in values.items()}

    rows = over_batches(model, batches, diagnostics)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


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
                                 iw_batch=config.iw_batch,
                                 num_dims=count_dims(data.shape, data.pixels.padding))
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
