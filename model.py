"""The contract of a model family, the table of families, and how a model is built and loaded."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distributions import Pixels
from families.autoencoder.model import AE, VAE
from families.hvae.model import BIVA, HVAE, LVAE
from families.hvae.official import official_folder
from families.hvae.official import read_official as read_official_folder
from families.nvae.model import NVAE
from families.nvae.official import is_official, read_official
from families.score.model import ScoreModel
from families.spatial_msma.model import SpatialMSMA
from utils import UserError, read_checkpoint, read_flags

Terms = dict[str, Tensor]     # per image, never averaged: (B,) or (B, L)


class Model(Protocol):
    """Family(shape=(C, *S), config=Family.Config(...), pixels=Pixels(...)), for (B, C, *S) float32 in [0, 1].

    A likelihood family's terms are recon (B,) = -log p(x|z), kl (B, L) from the top group down, log_q and
    log_p (B,), in nats, and logits. `skip=k` draws the k groups nearest the image from the prior;
    `temperature` scales the noise, 0 takes means. Capabilities that a family may have besides:
    reconstruct(x) -> (B, C, *S) in [0, 1], residual(x) = x - an output that may leave [0, 1], maps(x) -> dict
    of (B, n, *S), sample(n, temperature) -> (n, C, *S), latents(x) -> list of (B, Z, h, w) and
    decode(latents) -> (B, C, *S), initialize(x) once before training. `defaults`, flags of the training, and
    `primary_score` are those that the family is published with.
    """
    Config: type              # frozen dataclass; its fields are the family's flags

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms: ...

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]: ...


MODELS: dict[str, type] = {'nvae': NVAE, 'hvae': HVAE, 'lvae': LVAE, 'biva': BIVA,
                           'ae': AE, 'vae': VAE, 'score': ScoreModel, 'spatial_msma': SpatialMSMA}
# By device and axes of an image, where it is faster: by up to 2 on a CPU; volumes on an H100 are slower.
CHANNELS_LAST = {('cpu', 3): torch.channels_last, ('cpu', 4): torch.channels_last_3d,
                 ('cuda', 3): torch.channels_last}


def build_model(name: str, shape: tuple[int, ...], config: Any, pixels: Pixels) -> Model:
    """A new model of the family `name`. Raises UserError if that is made for images and these are volumes."""
    family = MODELS[name]
    if getattr(family, 'only_images', False) and len(shape) != 3:
        size = ' x '.join(map(str, shape[1:]))
        raise UserError(f"--model {name} takes images, the data has volumes of {size} voxels: choose another "
                        f"--model, or --dataset.")
    return family(shape=shape, config=config, pixels=pixels)


def place(model: Model, device: str | torch.device) -> Model:
    """The same on a device, with the filters in the order that is fast there."""
    order = CHANNELS_LAST.get((torch.device(device).type, len(model.shape)), torch.contiguous_format)
    return model.to(device, memory_format=order)


def describe(model: Model) -> dict[str, Any]:
    """What `restore` needs besides the weights to build the model again: plain data for a checkpoint."""
    name = next(name for name, family in MODELS.items() if type(model) is family)
    return {'model': name, 'shape': list(model.shape), 'config': dataclasses.asdict(model.config),
            'pixels': dataclasses.asdict(model.pixels)}


def restore(checkpoint: dict[str, Any], ema: bool = True) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint, ours or the published NVAE's, in eval mode on the CPU, and its flags.

    `ema` takes the averaged weights where the run kept them.
    """
    if is_official(checkpoint):
        return read_official(checkpoint)
    if 'weights' not in checkpoint or 'description' not in checkpoint:
        raise UserError(f"not a checkpoint of this framework or of the published NVAE: its keys are "
                        f"{sorted(checkpoint)[:6]}.")
    description = checkpoint['description']
    if description['model'] not in MODELS:
        raise UserError(f"the checkpoint holds a model '{description['model']}'; known are "
                        f"{', '.join(MODELS)}.")
    family = MODELS[description['model']]
    model = family(shape=tuple(description['shape']), config=read_flags(family.Config, description['config']),
                   pixels=read_flags(Pixels, description['pixels']))
    averaged = checkpoint.get('ema') if ema else None
    try:
        model.load_state_dict(averaged or checkpoint['weights'])
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit the model that it describes: another version "
                        f"wrote it. {' '.join(str(error).split())[:200]}") from None
    return model.eval(), dict(checkpoint['args'])


def open_model(path: str | Path, ema: bool = True) -> tuple[Model, dict[str, Any]]:
    """The model of a run folder or checkpoint file, ours or published, on the CPU, and its flags.

    A run folder of the published HVAE, LVAE or BIVA is one too. Raises UserError as `load_model` does.
    """
    folder = official_folder(path)
    return read_official_folder(folder) if folder else restore(read_checkpoint(path), ema)


def load_model(path: str | Path, device: str | torch.device = 'cpu', ema: bool = True) -> Model:
    """The trained model of a run folder or checkpoint file, ready for `model(x, temperature=0.0)`.

    Raises UserError if the file is missing, damaged or unknown.
    """
    return place(open_model(path, ema)[0], device)
