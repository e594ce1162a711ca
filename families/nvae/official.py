"""Reads checkpoints of the published NVAE: configuration, size of the images, names of the weights."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from distributions import Pixels
from families.nvae.config import NVAEConfig
from families.nvae.layers import Cell, WeightNormConv2d
from families.nvae.model import NVAE
from utils import UserError, read_flags

# Flags that old checkpoints lack, at the values they had before they were flags.
ABSENT_FLAGS = {'ada_groups': False, 'min_groups_per_scale': 1, 'num_mixture_dec': 10}
PADDED = {'mnist', 'omniglot', 'stacked_mnist'}       # 28 x 28 images in a frame of 2 pixels


def is_official(checkpoint: dict[str, Any]) -> bool:
    return {'state_dict', 'arch_instance', 'args'} <= checkpoint.keys()


def read_official(checkpoint: dict[str, Any]) -> tuple[NVAE, dict[str, Any]]:
    """The model in eval mode, and its training flags. UserError if a weight is missing or left over."""
    args = ABSENT_FLAGS | vars(checkpoint['args'])
    config = read_flags(NVAEConfig, args | {'compat_official': True})
    weights = {_canonical(name): value for name, value in checkpoint['state_dict'].items()
               if not name.endswith('weight_normalized')}     # a second name of the same parameter
    channels = weights['stem.weight'].shape[1]
    halvings = config.num_preprocess_blocks + config.num_latent_scales - 1
    size = [side * 2 ** halvings for side in weights['prior_ftr0'].shape[1:]]
    is_binary = weights['image_conditional.1.weight'].shape[0] == channels
    pixels = Pixels('bernoulli' if is_binary else 'discretized', args['num_x_bits'],
                    padding=2 if args['dataset'] in PADDED else 0)
    model = NVAE((channels, *size), config, pixels)
    if model.is_vanilla:
        del weights['prior_ftr0']                             # published, but used by no layer there
    names = dict(official_names(model))
    own = {n for n in model.state_dict() if not n.startswith(('spectral.', 'data_initialized'))}
    missing = sorted(own - {name for name, official in names.items() if official in weights})
    surplus = sorted(weights.keys() - set(names.values()))
    if missing or surplus:
        raise UserError(f"the checkpoint does not fit its own flags: {len(missing)} weights missing "
                        f"{missing[:3]}, {len(surplus)} left over {surplus[:3]}. "
                        f"Is it a checkpoint of the published NVAE?")
    model.load_state_dict({name: weights[names[name]] for name in own}, strict=False)
    model.data_initialized.fill_(True)                       # what it learned stays: no second initialization
    return model.eval(), args


def _canonical(name: str) -> str:
    """Batch norms stand under `.bn` or not, depending on the kind that was built; here they do not."""
    return re.sub(r'(\.bn)+\.(?=[^.]+$)', '.', name)


def official_names(model: NVAE) -> Iterator[tuple[str, str]]:
    """Pairs (our name, published name) of all weights of the model."""
    pairs = dict(_module_pairs(model))
    for name in model.state_dict():
        module, _, leaf = name.rpartition('.')
        if module in pairs:
            yield name, f'{pairs[module]}.{leaf}' if pairs[module] else leaf
    if not model.is_vanilla:
        yield 'initial_state', 'prior_ftr0'


def _module_pairs(model: NVAE) -> Iterator[tuple[str, str]]:
    yield from (('stem', 'stem'), ('top_features.1', 'enc0.1'), ('image_head.1', 'image_conditional.1'))
    for part in ('pre_process', 'post_process'):
        for j, cell in enumerate(getattr(model, part)):
            yield from _cell_pairs(cell, f'{part}.{j}', f'{part}.{j}')
    for i, group in enumerate(model.groups):
        yield f'groups.{i}.posterior', f'enc_sampler.{i}'
        if i > 0:
            yield f'groups.{i}.prior.1', f'dec_sampler.{i - 1}.1'
        for n in range(len(group.flows)):
            for half in (0, 1):
                ours = f'groups.{i}.flows.{n}.{half}'
                published = f'nf_cells.{i * len(group.flows) + n}.cell{half + 1}'
                yield f'{ours}.expand', f'{published}.conv.convz.0'
                yield f'{ours}.depthwise', f'{published}.conv.convz.2'
                yield f'{ours}.project', f'{published}.mu.conv_0'
    if model.is_vanilla:
        yield 'groups.0.into_decoder', 'stem_decoder'
        return
    for tower, order in (('enc_tower', _encoder_order(model)), ('dec_tower', _decoder_order(model))):
        for j, (ours, module) in enumerate(order):
            if isinstance(module, Cell):
                yield from _cell_pairs(module, ours, f'{tower}.{j}')
            else:
                yield ours, f'{tower}.{j}.conv'


def _encoder_order(model: NVAE) -> Iterator[tuple[str, nn.Module]]:
    """Cells and combiners as the published encoder lists them: from the image up."""
    for i in reversed(range(model.num_groups)):
        group = model.groups[i]
        yield from ((f'groups.{i}.encode.{n}', cell) for n, cell in enumerate(group.encode))
        if i > 0:
            yield f'groups.{i}.into_encoder', group.into_encoder
            if model.groups[i - 1].scale != group.scale:
                yield f'down.{group.scale}', model.down[group.scale]


def _decoder_order(model: NVAE) -> Iterator[tuple[str, nn.Module]]:
    for i, group in enumerate(model.groups):
        if i > 0:
            if model.groups[i - 1].scale != group.scale:
                yield f'up.{group.scale}', model.up[group.scale]
            yield from ((f'groups.{i}.decode.{n}', cell) for n, cell in enumerate(group.decode))
        yield f'groups.{i}.into_decoder', group.into_decoder


def _cell_pairs(cell: Cell, ours: str, published: str) -> Iterator[tuple[str, str]]:
    for k in range(4):
        yield f'{ours}.skip.phases.{k}', f'{published}.skip.conv_{k + 1}'
    yield f'{ours}.skip.conv', f'{published}.skip.1'
    for k in (0, 2):
        yield f'{ours}.se.{k}', f'{published}.se.se.{k}'
    for n, op in enumerate(cell.ops):
        k = 1 if isinstance(op[0], nn.Upsample) else 0
        weighted = [index for index, layer in enumerate(op) if list(layer.parameters())]
        if isinstance(op[weighted[-1]], WeightNormConv2d):
            has_swish = any(isinstance(layer, nn.SiLU) for layer in op)
            names = ['.bn_act' if has_swish else ''] * (len(weighted) - 1) + ['.conv_0']
        else:
            names = [f'.conv.{k}', f'.conv.{k + 1}.conv.0', f'.conv.{k + 1}.conv.1', f'.conv.{k + 2}.conv.0',
                     f'.conv.{k + 2}.conv.1', f'.conv.{k + 3}', f'.conv.{k + 4}']
        for index, name in zip(weighted, names):
            yield f'{ours}.ops.{n}.{index}', f'{published}._ops.{n}{name}'


def to_official(model: NVAE) -> dict[str, Tensor]:
    """The weights under their published names (batch norms without `.bn`)."""
    state = model.state_dict()
    return {published: state[name] for name, published in official_names(model)}
