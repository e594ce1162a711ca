"""Likelihood regret: how much the bound of one image rises when the encoder is fitted to that image alone.

Xiao, Yan, Amit 2020, "Likelihood regret: an out-of-distribution detection score for variational
auto-encoder". The encoder was trained on normal images, so their bound rises little; for an unusual image it
rises more, however likely the image is. The decoder stays as it is.

B images, C channels, H x W pixels, D draws behind the bounds before and after.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from anomaly.outputs import Outputs, elbo
from utils import seed_noise


def likelihood_regret(outputs: Outputs) -> Tensor:
    """ELBO after minus ELBO before, nats: (B,). The model has `encoder_parameters() -> [Parameter, ...]`.

    Every image starts from the trained encoder and takes `regret_steps` steps of Adam, each with noise of
    its own: with the same noise in every step the posterior would be fitted to that noise. Both bounds take
    the same D draws, so that their difference varies less. An optimal encoder has a regret near 0, which may
    be slightly negative because of the noise of the steps.
    """
    def make() -> Tensor:
        scoring = outputs.scoring
        model = deepcopy(outputs.model).eval().requires_grad_(False)     # eval: batch norms stay as they are
        encoder = list(model.encoder_parameters())
        trained = [parameter.clone() for parameter in encoder]
        for parameter in encoder:
            parameter.requires_grad_(True)
        regrets = []
        for image, name in zip(outputs.x.split(1), outputs.ids, strict=True):    # (1, C, H, W)
            for parameter, value in zip(encoder, trained):
                parameter.copy_(value)
            noise = (scoring.seed, 'regret', name)
            before = bound(model, image, scoring.num_draws, noise)
            fit_encoder(model, encoder, image, scoring.regret_steps, scoring.regret_learning_rate, noise)
            regrets.append(bound(model, image, scoring.num_draws, noise) - before)
        return torch.cat(regrets)
    return outputs.once(('regret',), make)


def bound(model: Any, image: Tensor, draws: int, noise: tuple) -> Tensor:
    """The ELBO of an image (1, C, H, W), mean over the draws, nats: (1,) float64 on the CPU."""
    values = []
    for draw in range(draws):
        seed_noise(*noise, draw)
        values.append(elbo(model(image)).double().cpu())
    return torch.stack(values).mean(0)


@torch.enable_grad()
def fit_encoder(model: Any, encoder: Iterable[Tensor], image: Tensor, steps: int, learning_rate: float,
                noise: tuple) -> None:
    """Raises the ELBO of an image (1, C, H, W) by steps of Adam on the encoder's parameters, in place."""
    optimizer = torch.optim.Adam(encoder, lr=learning_rate)
    for step in range(steps):
        seed_noise(*noise, 'step', step)
        optimizer.zero_grad()
        (-elbo(model(image))).sum().backward()
        optimizer.step()
