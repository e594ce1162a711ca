"""Flags of the multi-scale likelihood."""

from utils import flag, flags


@flags
class HaarConfig:
    """Flags of --model haar"""
    # 400 steps on 266 images. Validations draw the noise once.
    defaults = {'optimizer': 'adam', 'learning_rate': 4e-3, 'learning_rate_min': 1e-4, 'warmup_epochs': 0,
                'warmup_steps': 20, 'weight_decay': 0.0, 'grad_clip': 1.0, 'batch_size': 12, 'epochs': 18,
                'val_every': 6, 'val_iw_samples': 1}
    primary_score = 'dose'
    only_images = True

    levels: int = flag(5, 'times that the image is halved; what is left is not modeled', least=1, basic=True)
    width: int = flag(24, 'channels of the network of each level', least=1, basic=True)
