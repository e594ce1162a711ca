"""Finetuning: a run that starts from trained weights, and Reptile's slow weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from model import load_model
from utils import UserError


def start_from(model: Any, path: str | Path) -> None:
    """Fills the model with the (averaged) weights of a run folder or checkpoint of the same architecture.

    A family may read further formats with `load_weights(path)`. Raises UserError if they do not fit.
    """
    if hasattr(model, 'load_weights'):
        model.load_weights(path)
        return
    weights = load_model(path).state_dict()
    own = {name: value.shape for name, value in model.state_dict().items()}
    if own != {name: value.shape for name, value in weights.items()}:
        raise UserError(f"--init_from {path}: its weights are not those of this model. Give the flags of the "
                        f"model that it holds.")
    model.load_state_dict(weights)


@torch.no_grad()
def update_slow_weights(slow: AveragedModel, model: nn.Module, restart: bool) -> None:
    """Moves the average towards the weights; with `restart` these go on from there (Reptile, Nichol 2018)."""
    slow.update_parameters(model)
    if restart:
        model.load_state_dict(slow.module.state_dict())
