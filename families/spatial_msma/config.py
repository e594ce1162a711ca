"""Flags of Spatial-MSMA."""

from typing import Any

from families.score.config import SCHEDULES, Levels, resolve_network
from utils import UserError, flag, flags

BASES = ('gaussian_mixture', 'multivariate_normal', 'standard')     # distributions in the table of flow.py
HEADS = 8                                                           # of the attention over patches


@flags
class SpatialMSMAConfig:
    """Flags of --model spatial_msma"""
    # As published; the rate is constant, and --weight_decay is that of AdamW.
    defaults = {'optimizer': 'adamw', 'learning_rate': 3e-4, 'lr_schedule': 'constant', 'warmup_epochs': 0,
                'weight_decay': 1e-5, 'batch_size': 2, 'ema_halflife_kimg': 50.0, 'ema_rampup_ratio': 0.01}
    primary_score = 'voxel_nll'

    score_model: str = flag('', 'the score model, which is not trained: run folder or checkpoint of '
                                '--model score; or JSON, or a JSON file, with its image_size, flags, and '
                                'checkpoint (ours or published)', basic=True)
    msma_levels: int = flag(20, 'noise levels at which the score is evaluated', least=2, basic=True)
    msma_min_timestep: float = flag(0.01, 'time of the least noise, above 0', above=0, most=1)
    msma_max_timestep: float = flag(0.8, 'time of the most noise, up to 1', above=0, most=1)
    msma_schedule: str = flag('geometric', "spacing of the noise levels; thinned = those of the sampler's "
                                           "steps", choices=SCHEDULES)
    local_patch_kernel: int = flag(3, 'side of the neighborhood of a voxel, in voxels, odd', least=1)
    use_global_context: bool = flag(True, 'condition the density on the image as a whole too')
    global_patch_kernel: int = flag(17, 'global context: side of its patches, in voxels, odd', least=1,
                                    needs='use_global_context')
    global_patch_stride: int = flag(8, 'global context: voxels from one patch to the next', least=1,
                                    needs='use_global_context')
    global_embedding_size: int = flag(512, 'global context: width of its attention, a multiple of 8',
                                      least=1, needs='use_global_context')
    context_embedding_size: int = flag(128, 'numbers that encode the position, and as many the image',
                                       least=1)
    base_distribution: str = flag('gaussian_mixture', 'distribution of the latents of the flow: a mixture of '
                                                      'ten normals, a normal with full covariance, or the '
                                                      'standard normal', choices=BASES)
    num_blocks: int = flag(20, 'blocks of the flow: permutation, linear layer and splines', least=1,
                           basic=True)
    hidden_features: int = flag(256, 'width of the networks of the flow', least=1, basic=True)
    standardize: bool = flag(False, 'give the flow features of mean 0 and variance 1, estimated on the first '
                                    'batch, which helps short trainings (published: as they are)', basic=True)
    patches_per_step: int = flag(16384, 'voxels of an image in a training step, drawn from the foreground',
                                 aliases=('patches_per_train_step',), least=1, basic=True)
    patch_batch_size: int = flag(16384, 'voxels that are scored at a time: fewer take less memory', least=1)
    cache_maps: bool = flag(True, 'keep the score maps of images in memory; useless where images change, as '
                                  'with --augment or --flip')
    cache_gb: float = flag(4.0, 'memory for these maps, GiB per process; maps beyond it are computed again',
                           least=0, needs='cache_maps')

    def __post_init__(self):
        for name in ('local_patch_kernel', 'global_patch_kernel'):
            if getattr(self, name) % 2 == 0:
                raise UserError(f"--{name} {getattr(self, name)}: give an odd number.")
        if self.global_embedding_size % HEADS:
            raise UserError(f"--global_embedding_size {self.global_embedding_size}: give a multiple of "
                            f"{HEADS}.")
        Levels(**self.levels)
        if not self.score_model:
            raise UserError("--model spatial_msma needs --score_model: the run folder of a --model score "
                            "that was trained on the same data.")
        object.__setattr__(self, 'score_model', resolve_network(self.score_model, 'score_model'))

    @property
    def levels(self) -> dict[str, Any]:
        """Arguments of the score model's `score_maps`."""
        return {'number': self.msma_levels, 'min_timestep': self.msma_min_timestep,
                'max_timestep': self.msma_max_timestep, 'schedule': self.msma_schedule}
