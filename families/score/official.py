"""Weights of the published SADE: their names and order, and how its checkpoints are read.

Such a checkpoint does not say what network it holds: the flags and the size of the images have to be given.
"""

import re
from pathlib import Path

from torch import Tensor, nn

from families.score.unet import Matryoshka, SegResNetBlock
from storage.checkpoint import read_checkpoint
from utils import UserError

# Our names and the published ones, applied one after the other. The order of modules is the same.
LEAVES = ((r'\.before\.', '.pre_conv.conv.'), (r'\.conv_([01])\.', r'.conv_\1.conv.'))
SEGRESNET = ((r'\.norm_([12])\.', r'.resblock.norm\1.'), (r'\.conv_([12])\.', r'.resblock.conv\1.conv.'))
EMBEDDING = ((r'^embedding\.features\.', 'time_embed_layer.0.'),
             (r'^embedding\.hidden\.', 'time_embed_layer.1.'), (r'^embedding\.out\.', 'time_embed_layer.3.'))
UNET = ((r'^stem\.', 'convInit.conv.'), (r'^up\.', 'up_layers.'),
        (r'^narrow\.(\d+)\.', r'up_samples.\1.0.conv.'), (r'^head_norm\.', 'conv_final.0.'),
        (r'^head\.', 'conv_final.1.conv.'), (r'^attention\.', 'attention_block.'))
MATRYOSHKA = ((r'^widen\.', 'enc.outer_dblock_preconv.conv.'),
              (r'^outer_block\.', 'enc.outer_dblock_res-skip.'),
              (r'^down_block\.before\.', 'enc.outer_dblock_res-down.pre_conv.'),
              (r'^down_block\.', 'enc.outer_dblock_res-down.'), (r'^stem\.', 'channel_expand.conv.'),
              (r'^to_image\.', 'channel_squeeze.conv.'), (r'^from_image\.', 'dec.up_channel_expand.conv.'),
              (r'^up_block\.', 'dec.outer_upblock_res-skip.'), (r'^head\.', 'dec.channel_squeeze.conv.'))


def official_name(network: nn.Module, name: str) -> str:
    """The published name of one of our network's weights."""
    if isinstance(network, Matryoshka):
        if name.startswith('inner.'):
            return 'inner_unet.' + official_name(network.inner, name.removeprefix('inner.'))
        rules = (*MATRYOSHKA, *EMBEDDING, *LEAVES)
    else:
        level = re.match(r'down\.(\d+)\.', name)
        down = (r'^down\.(\d+)\.', rf'down_layers.resnet_\1x{len(network.down[int(level[1])])}.') \
            if level else ('^$', '')
        is_segresnet = isinstance(network.down[0][0], SegResNetBlock)
        rules = (down, *UNET, *EMBEDDING, *(SEGRESNET if is_segresnet else ()), *LEAVES)
    for pattern, published in rules:
        name = re.sub(pattern, published, name)
    return name


def to_official(network: nn.Module) -> dict[str, Tensor]:
    """The weights under their published names."""
    return {official_name(network, name): value for name, value in network.state_dict().items()}


def renamed(own: dict[str, Tensor], names: dict[str, str], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published `weights` under our names; `names` are {ours: published}, `own` what they are to fill.

    UserError if one is missing, left over or of another size.
    """
    missing = sorted(set(names.values()) - weights.keys())
    surplus = sorted(weights.keys() - set(names.values()))
    if missing or surplus:
        raise UserError(f"the published weights do not fit these flags: {len(missing)} missing "
                        f"{missing[:3]}, {len(surplus)} left over {surplus[:3]}.")
    for name, published in names.items():
        if own[name].shape != weights[published].shape:
            raise UserError(f"the published weights do not fit these flags: {published} has the shape "
                            f"{tuple(weights[published].shape)}, not {tuple(own[name].shape)}.")
    return {name: weights[published] for name, published in names.items()}


def from_official(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names. UserError if one is missing, left over or of another size."""
    weights = {name.removeprefix('module.'): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if name.split('.')[-1] != 'sigmas'}
    own = network.state_dict()
    return renamed(own, {name: official_name(network, name) for name in own}, weights)


def with_averages(network: nn.Module, weights: dict[str, Tensor],
                  averages: list[Tensor]) -> dict[str, Tensor]:
    """The same with the averages in place of the weights: published as a bare list of what was trained."""
    names = [name for name, _ in network.named_parameters()]
    frozen = [name for name in names if name.endswith('features.W')]
    for trained in (names, [name for name in names if name not in frozen]):
        if [weights[name].shape for name in trained] == [value.shape for value in averages]:
            return weights | dict(zip(trained, averages))
    raise UserError(f"{len(averages)} averaged weights do not fit the {len(names)} of these flags.")


def read_weights(path: str | Path, network: nn.Module) -> dict[str, Tensor]:
    """Averaged weights for `network`, the U-Net or matryoshka of a model, from a checkpoint or run folder.

    Ours or published. Raises UserError if it is neither, or does not fit.
    """
    content = read_checkpoint(path)
    if isinstance(content.get('model'), dict) and isinstance(content.get('ema'), dict):
        return with_averages(network, from_official(network, content['model']),
                             content['ema']['shadow_params'])
    if not {'weights', 'description'} <= content.keys():
        raise UserError(f"{path} is no checkpoint of a score, ours or published: its keys are "
                        f"{sorted(content)[:6]}.")
    weights = {name.removeprefix('network.'): value
               for name, value in (content['ema'] or content['weights']).items()
               if name.startswith('network.')}
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise UserError(f"the weights of {path} do not fit the flags that are given for them.")
    return weights
