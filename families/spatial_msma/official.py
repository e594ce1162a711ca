"""Weights of the published flow of Spatial-MSMA under our names."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.score.official import renamed
from utils import UserError

# Our names and the published ones, applied one after the other.
CONTEXT = ((r'^global_context\.(conv_init|conv_pooler)\.', r'\1.conv.'),
           (r'^global_context\.residual\.conv([12])\.', r'global_attention.conv_res_block.conv\1.conv.'),
           (r'^global_context\.residual\.', 'global_attention.conv_res_block.'),
           (r'^global_context\.project\.', 'global_attention.proj.'),
           (r'^global_context\.norm_out\.', 'global_attention.normout.'),
           (r'^global_context\.', 'global_attention.'), (r'^flow\.base\.', 'base_distribution.'))
BASE = 'base_distribution.'
LINEAR = ('lower_entries', 'upper_entries', 'unconstrained_upper_diag', 'bias')
# Published besides: repetitions, and what follows from the sizes.
SURPLUS = re.compile(r'flow\.q0\.|global_pooler\.|local_pooler\.|position_encoder\.|.*\.(mask|degrees)$|'
                     r'.*\.(identity|transform)_features$|global_attention\.position_encoding$')


def official_name(name: str, num_layers: int) -> str:
    """The published name of one of our weights; it counts the layers from the latent, we from the data."""
    if layer := re.match(r'flow\.layers\.(\d+)\.(.+)', name):
        number, rest = num_layers - 1 - int(layer[1]), layer[2]
        if not int(layer[1]):
            rest = rest.replace('net.', 'autoregressive_net.', 1)
        elif rest == 'permutation':
            rest = 'permutation._permutation'
        elif rest in LINEAR:
            rest = f'linear.{rest}'
        else:
            rest = f"prqct.{rest.replace('net.', 'transform_net.', 1)}" if rest.startswith('net.') \
                else f'prqct.unconditional_transform.{rest}'
        return f'flow.flows.{number}.{rest}'
    for pattern, published in CONTEXT:
        name = re.sub(pattern, published, name)
    return name


def find_weights(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in a published checkpoint: itself, or a dictionary in it, averages before others."""
    inside = sorted((name for name, value in content.items() if isinstance(value, dict)),
                    key=lambda name: 'ema' not in name)
    for found in (content, *(content[name] for name in inside)):
        found = {str(name).removeprefix('module.'): value for name, value in found.items()}
        if any(name.startswith('flow.flows.') for name in found):
            return found
    raise UserError(f"{path} is no checkpoint of a spatial_msma, ours or published: its keys are "
                    f"{sorted(content)[:6]}.")


def from_official(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the model, those of the flow and its contexts from the published ones.

    UserError if one is missing, left over or of another size.
    """
    own = model.state_dict()
    names = {name: official_name(name, len(model.flow.layers)) for name in own
             if not name.startswith('score_model.')}
    weights = {name: value for name, value in weights.items() if not SURPLUS.match(name)}
    return own | renamed(own, names, with_our_base(weights))


def with_our_base(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights with the parameters that our base distributions have: of the full normal a triangular
    factor, with logarithms on its diagonal, of the standard normal none.
    """
    base = {name.removeprefix(BASE): value for name, value in weights.items() if name.startswith(BASE)}
    if 'cov_diag' in base:
        factor = F.softplus(base['cov_diag'].double() + 1e-5).log().diag()
        factor[*torch.tril_indices(*factor.shape, -1)] = base['cov_factor'].double()         # row by row
        base = {'loc': base['mean'], 'factor': factor}
    elif 'weight_scores' not in base and not any(value.any() for value in base.values()):
        base = {}
    others = {name: value for name, value in weights.items() if not name.startswith(BASE)}
    return others | {BASE + name: value for name, value in base.items()}
