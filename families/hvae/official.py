"""Reads run folders of the published HVAE, LVAE and BIVA: configuration, names of weights."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributions import Pixels
from families.hvae.config import HVAEConfig
from families.hvae.layers import Affine, Dense, Pointwise
from families.hvae.likelihoods import LIKELIHOODS
from families.hvae.model import BIVA, HVAE, LVAE
from utils import UserError

CLASSES: dict[str, type[HVAE]] = {'VAE': HVAE, 'LVAE': LVAE, 'BIVA': BIVA}
FILES = ('model_class_name.pt', 'model_kwargs.pt', 'model_state_dict.pt')
DATA_FILE = 'datamodule_config.pt'                    # of a whole run; the model does without
FRAMED = {'MNIST': 'mnist', 'Omniglot28x28': 'omniglot'}       # 28 x 28 there, in a frame of 2 pixels here
FRAME = 2
# Published without a use, or after one: what recorded the initialization, and constants of the softplus.
UNUSED = re.compile(r'\.(initialized|std_activation_inverse\.(beta|threshold))$')

# Our names of modules, level by level, and the published ones; `lift` and `project` depend on the model.
PARTS = {'generate': 'p_deterministic.layers', 'encode': 'q_deterministic.layers',
         'bottom_up': 'q_bu_convs.layers', 'top_down': 'q_td_convs.layers', 'join': 'q_top',
         'latent': 'stochastic', 'td_latent': 'td_stochastic', 'bu_latent': 'bu_stochastic',
         'to_posterior': 'in_transform_q', 'to_prior': 'in_transform_p', 'aux': 'aux_op',
         'head': 'likelihood', 'net': 'parameter_net'}
PROJECTIONS = {HVAE: {'lift': 'q_projection.transform', 'project': 'p_projection.transform'},
               LVAE: {'project': 'p_projection.transform'},
               BIVA: {'lift': 'bu_proj.transform', 'project': 'z_proj.transform'}}
LEAVES = {'v': 'weight_v', 'g': 'weight_g', 'w': 'weight', 'bias': 'bias'}


def official_folder(path: str | Path) -> Path | None:
    """The published run folder that `path` is, or is a file of; None if it is no such thing."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name in FILES
    return folder if named and any((folder / name).exists() for name in FILES) else None


def read_official(folder: str | Path) -> tuple[HVAE, dict[str, Any]]:
    """The model in eval mode, and what is known of its training flags.

    Raises UserError if a file is missing, damaged or of another kind, or if a weight is missing or left over.
    Where the folder says that the model was trained on MNIST or Omniglot, the model takes our images of
    these, which have a frame that it does not see.
    """
    folder = Path(folder)
    name, kwargs, weights = (_load(folder / file) for file in FILES)
    if not isinstance(name, str) or name not in CLASSES:
        raise UserError(f"{folder / FILES[0]} holds {str(name)[:40]!r}: known are {', '.join(CLASSES)}.")
    if not isinstance(weights, dict):
        raise UserError(f"{folder / FILES[2]} holds a {type(weights).__name__}, not weights.")
    kwargs = kwargs.get('kwargs') if isinstance(kwargs, dict) else None
    wanted = {'input_shape', 'likelihood_module', 'config_deterministic', 'config_stochastic'}
    if not isinstance(kwargs, dict) or wanted - kwargs.keys():
        lacking = sorted(wanted - kwargs.keys() if isinstance(kwargs, dict) else wanted)
        raise UserError(f"{folder / FILES[1]} lacks {', '.join(lacking)}: it is not of a published HVAE, "
                        f"LVAE or BIVA.")
    args = _training(folder)
    frame = FRAME if args.get('dataset') in FRAMED.values() else 0
    channels, *size = kwargs['input_shape']
    known = {'activation', 'q_dropout', 'p_dropout', 'skip_stochastic', 'likelihood_module'} & kwargs.keys()
    config = HVAEConfig(
        config_deterministic=json.dumps(kwargs['config_deterministic']),
        config_stochastic=json.dumps(kwargs['config_stochastic']),
        padded_shape=tuple(kwargs.get('padded_shape') or ()), compat_official=True,
        **{name: kwargs[name] for name in known})
    if config.likelihood_module == 'auto':
        raise UserError(f"{folder / FILES[1]} holds the likelihood 'auto', which is not a published one.")
    is_binary = LIKELIHOODS[config.likelihood_module].pixels == 'bernoulli'
    pixels = Pixels('bernoulli', 1, frame) if is_binary else Pixels('discretized', 8, frame)
    model = CLASSES[name]((channels, *(side + 2 * frame for side in size)), config, pixels)
    load_official(model, weights)
    return model.eval(), args


def load_official(model: HVAE, weights: dict[str, Tensor]) -> None:
    """Fills the model with published weights. UserError if one is missing, left over or of another size."""
    names, own = dict(official_names(model)), model.state_dict()
    weights = {name: value for name, value in weights.items() if not UNUSED.search(name)}
    missing = sorted(set(names.values()) - weights.keys())
    surplus = sorted(weights.keys() - set(names.values()))
    if missing or surplus:
        raise UserError(f"the published weights do not fit their own configuration: {len(missing)} missing "
                        f"{missing[:3]}, {len(surplus)} left over {surplus[:3]}.")
    # What stands alone in space is a vector there, and 1 x 1 here.
    bare = lambda tensor: [n for n in tensor.shape if n != 1]
    for ours, published in names.items():
        if bare(own[ours]) != bare(weights[published]):
            raise UserError(f"the published weights do not fit their own configuration: {published} has the "
                            f"shape {tuple(weights[published].shape)}, not {tuple(own[ours].shape)}.")
    model.load_state_dict({ours: weights[published].view_as(own[ours]) for ours, published in names.items()},
                          strict=False)
    model.data_initialized.fill_(True)                       # what it learned stays: no second initialization


def official_names(model: HVAE) -> Iterator[tuple[str, str]]:
    """Pairs (our name, published name) of all weights of the model."""
    modules = dict(model.named_modules())
    parts = PARTS | PROJECTIONS[type(model)]
    for name in model.state_dict():
        if name == 'data_initialized':
            continue
        path, _, leaf = name.rpartition('.')
        published = [parts.get(part, part) for part in path.split('.')]
        if isinstance(modules[path], Affine):
            kind = 'linear' if isinstance(modules[path], Dense | Pointwise) else 'conv'
            published += [kind, LEAVES[leaf]]
        else:
            published.append(leaf)
        yield name, '.'.join(published)


def to_official(model: HVAE) -> dict[str, Tensor]:
    """The weights under their published names."""
    state = model.state_dict()
    return {published: state[name] for name, published in official_names(model)}


def _training(folder: Path) -> dict[str, Any]:
    """Flags of this framework that follow from the folder; the others have to be given."""
    path = folder / DATA_FILE
    config = _load(path) if path.exists() else {}
    if not isinstance(config, dict):
        return {}
    args = {'batch_size': config['batch_size']} if isinstance(config.get('batch_size'), int) else {}
    trained_on = config.get('train_datasets')
    first = next(iter(trained_on), '') if isinstance(trained_on, dict) else ''
    for published, ours in FRAMED.items():
        if re.fullmatch(f'{published}(Quantized|Binarized|Dequantized)(-.*)?', first):
            args['dataset'] = ours
    return args


def _load(path: Path) -> Any:
    """What a file holds, read without running code from it."""
    try:
        with torch.serialization.safe_globals([torch.Size]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: a published run folder holds {', '.join(FILES)}.") from None
    except pickle.UnpicklingError as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        what = f"holds a {foreign[1]}, which is code and not data" if foreign else "is damaged"
        raise UserError(f"{path} {what}; it is not loaded. Take another copy.") from None
    except Exception as error:      # a damaged file can mislead the reader into any of them
        raise UserError(f"{path} cannot be read: it is damaged ({type(error).__name__}: "
                        f"{str(error).split(chr(10))[0][:120]}).") from None
