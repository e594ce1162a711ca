"""The contract of a model family, the table of families, and how a model is built and loaded.

Names, flags and published settings of the families are known without PyTorch, which only their models import.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from storage.checkpoint import not_finite, read_checkpoint
from storage.limits import excess
from utils import WRONG_VALUES, UserError, read_flags, read_json, write_atomically, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distributions import Pixels, Terms


class Model(Protocol):
    """The contract of a family: Family(shape=(C, *S), config=Family.Config(...), pixels=Pixels(...)).

    B images x (B, C, *S), float32 in [0, 1]; L latent groups. tests/test_model.py checks every clause.

    - A model keeps `shape`, `config` and `pixels`: with its weights they build it again.
    - `forward` gives terms of each image, never averaged, (B,) or (B, L). Those of a likelihood family, which
      has `num_groups`, are recon = -log p(x|z), kl from the top group down, log_q and log_p, in nats, and
      those of a decoder its logits. `skip=k` draws the k groups nearest the image from the prior, their noise
      scaled by `prior_temperature` too (of likelihood families only); a family without groups refuses `skip`
      with a UserError. `temperature` scales all noise; 0 takes means.
    - `forward` runs inside DDP, so every trained weight takes part in every pass, and on the meta device,
      where it estimates memory: it never looks at values. In evaluation mode it changes no buffer.
    - All noise of `forward` and of the capabilities comes from `torch.randn_like` and `torch.rand_like` of
      tensors with a row for each image. In evaluation mode no image depends on the others of its batch, so
      with `RowNoise` its results follow from the image and its seed.
    - `objective` gives the loss of the batch, a scalar, and what to log: numbers without gradient. A
      likelihood family logs 'train/nelbo_iter', the mean negative ELBO in nats; the loop adds
      'train/loss_iter'. `progress`, from 0 to 1, drives every schedule.
    - `Config` is a class of flags, frozen, which imports no PyTorch. Its class attributes are optional:
      `defaults`, flags of the training as published; `primary_score`, the published score, which the model
      has too; `only_images`, S is (H, W); `Sampling`, flags that an evaluation may change.

    Capabilities that a family may have: reconstruct(x) -> (B, C, *S) in [0, 1]; residual(x), x minus an
    output that may leave [0, 1]; maps(x, skip) -> dict of (B, n, *S); sample(n, temperature) -> (n, C, *S);
    latents(x) -> list of (B, Z, h, w), and decode(latents) -> (B, C, *S); initialize(x), called once before
    training; statistics(x) -> (B, n), whose density on normal images tells the unusual on either side (DoSE).
    docs/architecture.md lists them all.
    """
    Config: type
    shape: tuple[int, ...]
    config: Any
    pixels: Pixels

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms: ...

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]: ...

    def __getattr__(self, name: str) -> Any: ...         # capabilities, and what every nn.Module has


class Families(Mapping[str, Callable[..., Model]]):
    """Model families by name; a family's class, and PyTorch with it, is imported when it is looked up."""

    def __init__(self, rows: dict[str, tuple[str, str, str]]):
        self.rows = rows

    def __getitem__(self, name: str) -> Callable[..., Model]:
        folder, model, _ = self.rows[name]
        return getattr(import_module(f'families.{folder}.model'), model)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows


MODELS = Families({   # name: folder in families/, class in its model.py, flag class in its config.py
    'nvae': ('nvae', 'NVAE', 'NVAEConfig'),
    'hvae': ('hvae', 'HVAE', 'HVAEConfig'),
    'lvae': ('hvae', 'LVAE', 'HVAEConfig'),
    'biva': ('hvae', 'BIVA', 'HVAEConfig'),
    'ae': ('autoencoder', 'AE', 'AEConfig'),
    'vae': ('autoencoder', 'VAE', 'VAEConfig'),
    'dae': ('dae', 'DAE', 'DAEConfig'),
    'haar': ('haar', 'Haar', 'HaarConfig'),
    'score': ('score', 'ScoreModel', 'ScoreModelConfig'),
    'spatial_msma': ('spatial_msma', 'SpatialMSMA', 'SpatialMSMAConfig'),
})
PRETRAINED_WEIGHTS, PRETRAINED_CONFIG = 'model.safetensors', 'model.json'
MOST_TIMES, FREE_WEIGHTS = 4, 10_000        # weights that a model may have while it is built, by those stored
# Memory format by device and axes of an image, where it is faster: up to twice on a CPU. Volumes on an H100
# are slower with it.
CHANNELS_LAST = {('cpu', 3): 'channels_last', ('cpu', 4): 'channels_last_3d', ('cuda', 3): 'channels_last'}


def family_config(name: str) -> type:
    """The flag class of the family `name`, without importing PyTorch."""
    folder, _, config = MODELS.rows[name]
    return getattr(import_module(f'families.{folder}.config'), config)


def build_model(name: str, shape: tuple[int, ...], config: Any, pixels: Pixels) -> Model:
    """A new model of the family `name`. Raises UserError for volumes if the family takes images only."""
    if getattr(config, 'only_images', False) and len(shape) != 3:
        size = ' x '.join(map(str, shape[1:]))
        raise UserError(f"--model {name} takes images, the data has volumes of {size} voxels: choose another "
                        f"--model, or --dataset.")
    return MODELS[name](shape=shape, config=config, pixels=pixels)


def place(model: Model, device: str | torch.device) -> Model:
    """The model on a device, with its filters in the memory format that is fast there."""
    import torch
    order = CHANNELS_LAST.get((torch.device(device).type, len(model.shape)), 'contiguous_format')
    return model.to(device, memory_format=getattr(torch, order))


def family_name(model: Any) -> str:
    """The name of the model's family in MODELS; '' if it is of none."""
    return next((name for name, row in MODELS.rows.items() if type(model).__name__ == row[1]), '')


def describe(model: Model) -> dict[str, Any]:
    """Plain data for a checkpoint from which, with the weights, `restore` builds the model again."""
    return {'model': family_name(model), 'shape': list(model.shape),
            'config': dataclasses.asdict(model.config), 'pixels': dataclasses.asdict(model.pixels)}


def restore(checkpoint: dict[str, Any], ema: bool = True) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint, ours or the published NVAE's, in eval mode on the CPU, and its flags, among
    them the hash of its `split`.

    `ema` takes the averaged weights where the run kept them.
    """
    from distributions import Pixels
    from families.nvae.official import is_official, read_official
    if is_official(checkpoint):
        return read_official(checkpoint)
    if not all(isinstance(checkpoint.get(key), dict) for key in ('weights', 'description', 'args')):
        raise UserError(f"not a checkpoint of this framework or of the published NVAE: its keys are "
                        f"{sorted(map(str, checkpoint))[:6]}.")
    description, name = checkpoint['description'], checkpoint['description'].get('model')
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"the checkpoint holds a model '{name}'; known are {', '.join(MODELS)}.")
    averaged = checkpoint.get('ema') if ema else None
    try:
        model = build_described(description, averaged or checkpoint['weights'], Pixels)
        model.load_state_dict(averaged or checkpoint['weights'])
    except UserError:
        raise
    except WRONG_VALUES as error:
        raise UserError(f"the checkpoint's description of its model is damaged ({type(error).__name__}: "
                        f"{str(error)[:100]}).") from None
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit the model that it describes: another version "
                        f"wrote it. {' '.join(str(error).split())[:200]}") from None
    if name := not_finite(model.state_dict()):
        raise UserError(f"the checkpoint's weights have numbers that are not finite, first in {name}: "
                        f"nothing can be evaluated with them. Take an older one.")
    kept = {'split': checkpoint['split']} if 'split' in checkpoint else {}
    return model.eval(), checkpoint['args'] | kept


def build_described(description: dict[str, Any], weights: dict[str, Tensor], pixels: type) -> Model:
    """The model that `describe` described. It is not built farther than these weights go: a file may claim
    any size. Raises UserError, or whatever wrong values lead to.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook
    name, most = description['model'], MOST_TIMES * sum(w.numel() for w in weights.values()) + FREE_WEIGHTS
    shape, built = tuple(int(n) for n in description['shape']), [0, 0]

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        built[0] += 1 if parameter is None else parameter.numel()
        built[1] += 1
        if built[0] > most or built[1] > MOST_TIMES * len(weights) + FREE_WEIGHTS:
            raise UserError("the checkpoint's weights do not fit the larger model that it describes: it is "
                            "damaged, or meant to exhaust memory.")
    if not shape or min(shape) < 1 or excess(4 * math.prod(shape)):
        raise UserError(f"the checkpoint describes images of shape {shape}: it is damaged.")
    hook = register_module_parameter_registration_hook(count)
    try:
        return MODELS[name](shape=shape, config=read_flags(family_config(name), description['config']),
                            pixels=read_flags(pixels, description['pixels']))
    finally:
        hook.remove()


def open_model(path: str | Path, ema: bool = True) -> tuple[Model, dict[str, Any]]:
    """The model of a run folder or checkpoint file, ours or published, on the CPU, and its flags.

    A run folder of the published HVAE, LVAE or BIVA will do too. Raises UserError as `load_model` does.
    """
    from families.hvae.official import official_folder, read_official
    if (Path(path) / PRETRAINED_WEIGHTS).exists():
        return restore(read_pretrained(Path(path)))
    folder = official_folder(path)
    return read_official(folder) if folder else restore(read_checkpoint(path), ema)


def save_pretrained(model: Model, folder: str | Path, args: dict[str, Any] | None = None) -> None:
    """Writes model.safetensors, the weights, and model.json, what builds the model: `load_model` reads the
    folder. Of the flags `args` of its run, no path is kept. Raises ImportError without safetensors.
    """
    from safetensors.torch import save_file
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    kept = {name: value for name, value in (args or {}).items() if os.sep not in str(value)}
    write_atomically(Path(folder) / PRETRAINED_WEIGHTS, lambda path: save_file(weights, path))
    write_json(Path(folder) / PRETRAINED_CONFIG, {'description': describe(model), 'args': kept})


def read_pretrained(folder: Path) -> dict[str, Any]:
    """What `save_pretrained` wrote, as a checkpoint for `restore`. Raises UserError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{folder} holds safetensors: pip install safetensors.") from None
    try:
        weights = load_file(folder / PRETRAINED_WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / PRETRAINED_WEIGHTS} is damaged ({error}). Take another copy.") from None
    kept = read_json(folder / PRETRAINED_CONFIG)
    return {**(kept if isinstance(kept, dict) else {}), 'weights': weights}


def load_model(path: str | Path, device: str | torch.device = 'cpu', ema: bool = True) -> Model:
    """The trained model of a run folder or checkpoint file, ready for `model(x, temperature=0.0)`.

    Raises UserError if the file is missing, damaged or unknown.
    """
    return place(open_model(path, ema)[0], device)


def start_from(model: Model, path: str | Path) -> None:
    """Fills the model with the (averaged) weights of a run folder or checkpoint of the same architecture.

    A family may read further formats with `load_weights(path)`. Raises UserError if they do not fit.
    """
    if hasattr(model, 'load_weights'):
        model.load_weights(path)
        return
    try:
        model.load_state_dict(load_model(path).state_dict())
    except RuntimeError:
        raise UserError(f"--init_from {path}: its weights are not those of this model. Give the flags of the "
                        f"model that it holds.") from None
