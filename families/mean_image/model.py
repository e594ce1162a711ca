"""The mean image: every image is reconstructed as the mean of the training images."""

import torch
from torch import Tensor, nn

from distributions import Pixels
from families.mean_image.config import MeanImageConfig
from utils import UserError


class MeanImage(nn.Module):
    """One learned image (C, *S)."""
    Config = MeanImageConfig
    primary_score = MeanImageConfig.primary_score

    def __init__(self, shape: tuple[int, ...], config: MeanImageConfig, pixels: Pixels):
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        self.mean = nn.Parameter(torch.full(self.shape, 0.5))

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> dict[str, Tensor]:
        if skip:
            raise UserError(f"skip {skip}: mean_image has no latent groups, give 0.")
        return {'error': (x - self.mean).square().flatten(1).mean(1)}            # (B,)

    def objective(self, terms: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return terms['error'].mean(), {}

    def reconstruct(self, x: Tensor) -> Tensor:
        return ((1 - self.config.shrink) * self.mean).clamp(0, 1).expand(x.shape)
