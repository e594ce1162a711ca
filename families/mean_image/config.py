"""Flags of the mean image."""

from utils import flag, flags


@flags
class MeanImageConfig:
    """Flags of --model mean_image"""
    primary_score = 'reconstruction'

    shrink: float = flag(0.0, 'fraction of the mean image that is taken off', least=0, below=1, basic=True)
