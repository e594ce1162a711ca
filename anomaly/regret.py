"""Likelihood regret: how much the bound of one image rises when the encoder is fitted to that image alone.

Xiao, Yan, Amit 2020, "Likelihood regret: an out-of-distribution detection score for variational
auto-encoder". The encoder was trained on normal images, so their bound rises little; for an unusual image it
rises more, however likely the image is. The decoder stays as it is.

B images, C channels, H x W pixels, D draws behind the bounds before and after.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from anomaly.outputs import Outputs, elbo
from anomaly.scores import Scoring
from utils import seed_noise


def likelihood_regret(outputs: Outputs) -> Tensor:
    """ELBO after minus ELBO before, nats: (B,). The model has `encoder_parameters() -> [Parameter, ...]`."""
    return outputs.once(('regret',), lambda: torch.cat([
        regret(outputs.model, image, outputs.scoring, name)
        for image, name in zip(outputs.x.split(1), outputs.ids, strict=True)]))


def regret(model: Any, image: Tensor, scoring: Scoring, name: str) -> Tensor:
    """That of one image (1, C, H, W): (1,) float64 on the CPU.

    The trained encoder takes `regret_steps` steps of Adam, each with noise of its own: with the same noise in
    every step the posterior would be fitted to that noise. Both bounds take the same D draws, so that their
    difference varies less. An optimal encoder has a regret near 0, which may be slightly negative because of
    the noise of the steps.
    """
    model = deepcopy(model).eval().requires_grad_(False)         # eval: batch norms stay as they are
    encoder = [parameter.requires_grad_(True) for parameter in model.encoder_parameters()]
    optimizer = torch.optim.Adam(encoder, lr=scoring.regret_learning_rate)

    def bound(*draw: int | str) -> Tensor:
        seed_noise(scoring.seed, 'regret', name, *draw)
        return elbo(model(image))

    def mean_bound() -> Tensor:
        return torch.stack([bound(draw).double().cpu() for draw in range(scoring.num_draws)]).mean(0)

    before = mean_bound()
    for step in range(scoring.regret_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            (-bound('step', step)).sum().backward()
        optimizer.step()
    return mean_bound() - before
