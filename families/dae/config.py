"""Flags of the denoising autoencoder."""

import math

from utils import UserError, flag, flags

GROUPS = 8                           # of every group norm


@flags
class DAEConfig:
    """Flags of --model dae"""
    defaults = {'optimizer': 'adamw', 'learning_rate': 3e-3, 'learning_rate_min': 1e-5,
                'lr_schedule': 'cosine_by_step', 'warmup_epochs': 0,
                'warmup_steps': 100, 'weight_decay': 1e-4, 'batch_size': 16, 'epochs': 20,
                'ema_decay': 0.99, 'ema_ramp': True}
    primary_score = 'residual_top'

    widths: tuple = flag((24, 48, 64, 96), 'channels of each level of the U-Net, multiples of 8; the first '
                                           'is at half the resolution, each further one halves it again',
                         type=int, least=GROUPS, basic=True)
    coarse_noise: float = flag(0.2, 'standard deviation of the noise at the points of its grid, for images '
                                    'in [0, 1]', above=0, below=math.inf, basic=True)
    noise_grids: tuple = flag((8, 16), 'grids of the noise, one of them at random for each image: points '
                                       'along its longest side', type=int, least=1, basic=True)

    def __post_init__(self) -> None:
        for name in ('widths', 'noise_grids'):
            if not getattr(self, name):
                raise UserError(f"--{name}: give one number or more.")
        if wrong := [width for width in self.widths if width % GROUPS]:
            raise UserError(f"--widths {' '.join(map(str, self.widths))}: {wrong[0]} is no multiple of "
                            f"{GROUPS}, the groups of a group norm.")
