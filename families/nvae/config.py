"""Flags of NVAE, and the operations that its architectures are made of."""

import math
from dataclasses import dataclass

from utils import flag, flags


@dataclass(frozen=True)
class Architecture:
    """The operations of a cell in each part of the network; `pre` and `post` stand next to the image."""
    pre: tuple[str, ...]
    enc: tuple[str, ...]
    dec: tuple[str, ...]
    post: tuple[str, ...]


def _same(op: str) -> Architecture:
    return Architecture((op, op), (op, op), (op, op), (op, op))


def _residual_encoder(*ops: str, kernel: int = 5) -> Architecture:
    return Architecture(ops, ops, (f'mconv_e6k{kernel}g0',), (f'mconv_e3k{kernel}g0',))


_SWISH, _SWISH5 = 'res_bnswish', 'res_bnswish5'
ARCHITECTURES = {
    'res_elu': _same('res_elu'),
    'res_bnelu': _same('res_bnelu'),
    'res_bnswish': _same('res_bnswish'),
    'res_mbconv': _residual_encoder(_SWISH, _SWISH),
    'res53_mbconv': _residual_encoder(_SWISH5, _SWISH),
    'res35_mbconv': _residual_encoder(_SWISH, _SWISH5),
    'res55_mbconv': _residual_encoder(_SWISH5, _SWISH5),
    'res_mbconv9': _residual_encoder(_SWISH, _SWISH, kernel=9),
    'mbconv_sep': Architecture(('mconv_e3k5g0',), ('mconv_e6k5g0',), ('mconv_e6k5g0',), ('mconv_e3k5g0',)),
    'mbconv_sep11': Architecture(('mconv_e3k5g0',), ('mconv_e6k11g0',), ('mconv_e6k11g0',),
                                 ('mconv_e3k5g0',)),
    'mbconv_res': Architecture(('mconv_e3k5g0',), ('mconv_e6k5g0',), (_SWISH, _SWISH), (_SWISH, _SWISH)),
    'mbconv_den': Architecture(('mconv_e3k5g8',), ('mconv_e6k5g0',), ('mconv_e6k5g0',), ('mconv_e3k5g8',)),
}


@flags
class NVAEConfig:
    """Flags of --model nvae"""
    only_images = True                         # S is (H, W)

    arch_instance: str = flag('res_mbconv', 'kinds of cells', choices=tuple(ARCHITECTURES))
    num_latent_scales: int = flag(1, 'spatial resolutions that hold latents', least=1, basic=True)
    num_groups_per_scale: int = flag(10, 'latent groups at each resolution', least=1, basic=True)
    num_latent_per_group: int = flag(20, 'channels of a latent group', least=1, basic=True)
    ada_groups: bool = flag(False, 'halve the number of groups from each scale to the next coarser one')
    min_groups_per_scale: int = flag(1, 'with --ada_groups: fewest groups of a scale', least=1,
                                     needs='ada_groups')
    num_channels_enc: int = flag(32, 'channels of the first encoder layer', least=1, basic=True)
    num_preprocess_blocks: int = flag(2, 'blocks before the latents; each halves the resolution', least=0)
    num_preprocess_cells: int = flag(3, 'cells of each block before the latents', least=1)
    num_cell_per_cond_enc: int = flag(1, 'encoder cells of each group', least=1)
    num_channels_dec: int = flag(32, 'channels of the last decoder layer', least=1, basic=True)
    num_postprocess_blocks: int = flag(2, 'blocks after the latents; each doubles the resolution', least=0)
    num_postprocess_cells: int = flag(3, 'cells of each block after the latents', least=1)
    num_cell_per_cond_dec: int = flag(1, 'decoder cells of each group', least=1)
    num_nf: int = flag(0, 'normalizing-flow cells of each group', least=0)
    num_mixture_dec: int = flag(10, 'logistics in the mixture of a pixel; 1 = a normal decoder', least=1)
    use_se: bool = flag(False, 'squeeze-and-excitation in every cell', basic=True)
    res_dist: bool = flag(False, 'residual posteriors: q is given as an offset from p', basic=True)
    kl_anneal_portion: float = flag(0.3, 'fraction of the training in which the KL weight rises; 0 = it is 1 '
                                         'from the start', least=0, most=1)
    kl_const_portion: float = flag(1e-4, 'fraction of the training before the rise, at --kl_const_coeff',
                                   least=0, most=1, needs='kl_anneal_portion')
    kl_const_coeff: float = flag(1e-4, 'smallest KL weight', least=0, most=1, needs='kl_anneal_portion')
    weight_decay_norm: float = flag(0.0, 'weight of the spectral and batch-norm regularizers; 0 = none',
                                    least=0)
    weight_decay_norm_init: float = flag(10.0, 'with --weight_decay_norm_anneal: the weight at the start',
                                         above=0, needs='weight_decay_norm_anneal')
    weight_decay_norm_anneal: bool = flag(False, 'anneal the weight of the regularizers geometrically, '
                                                 'from --weight_decay_norm_init to --weight_decay_norm',
                                          needs='weight_decay_norm')
    coarse_noise: float = flag(0.0, 'denoising: standard deviation of the coarse noise added to the input of '
                                    'the encoder in training, for images in [0, 1]; 0 = none',
                               least=0, below=math.inf)
    compat_official: bool = flag(False, 'likelihoods with the quirks of the published NVAE')
