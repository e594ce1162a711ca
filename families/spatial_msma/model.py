"""Spatial-MSMA: the density of a voxel's score norms, given where the voxel is and what the image is.

Mahmood et al. 2024 (arXiv 2407.00148). A frozen score-based model gives n maps of an image, one per level of
noise; a conditional flow learns the density of their norms around a voxel on normal images. B images, C
channels, S two or three spatial axes with V voxels, P voxels of a step.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distributed import launch
from distributions import EIGHT_BITS, Pixels, Terms
from families.score.config import Levels, read_network
from families.score.model import ScoreModel
from families.score.msma import level_times
from families.spatial_msma.config import SpatialMSMAConfig
from families.spatial_msma.flow import ConditionalFlow
from families.spatial_msma.official import find_weights, from_official
from families.spatial_msma.patches import FeatureCache, GlobalContext, PositionCode, pool
from neural_operations import foreground
from storage.checkpoint import read_checkpoint
from utils import UserError

LEAST_SPREAD = 1e-6        # of a feature that is the same in all voxels of the first batch


class SpatialMSMA(nn.Module):
    """The contract's model. Its only term is the loss of an image; it has no likelihood of whole images."""

    Config, primary_score = SpatialMSMAConfig, SpatialMSMAConfig.primary_score
    capturable = False                     # which voxels a pass takes depends on the images

    def __init__(self, shape: tuple[int, ...], config: SpatialMSMAConfig, pixels: Pixels = EIGHT_BITS):
        """`shape` (C, *S). Raises UserError if the score model has another size."""
        super().__init__()
        self.shape, self.config, self.pixels = tuple(shape), config, pixels
        channels, *size = self.shape
        inner, inner_size, _ = read_network(config.score_model)
        if tuple(size) != inner_size:
            raise UserError(f"images of {' x '.join(map(str, size))}, and a --score_model of "
                            f"{' x '.join(map(str, inner_size))}: give the data flags that it was trained "
                            f"with.")
        self.score_model = ScoreModel(self.shape, inner, pixels).requires_grad_(False).eval()
        with torch.device('cpu'):                                  # a number, also of models without memory
            self.levels = len(level_times(Levels(**config.levels), self.score_model.sde))
        self.position = PositionCode(config.context_embedding_size, size)
        self.global_context = GlobalContext(
            channels, size, kernel=config.global_patch_kernel, stride=config.global_patch_stride,
            embedding=config.global_embedding_size, width=config.context_embedding_size) \
            if config.use_global_context else None
        width = config.context_embedding_size * (1 + config.use_global_context)
        self.flow = ConditionalFlow(self.levels, width, hidden=config.hidden_features,
                                    num_blocks=config.num_blocks, base=config.base_distribution)
        one = torch.ones(self.levels, dtype=torch.float64)
        self.register_buffer('feature_mean', 0 * one, persistent=config.standardize)                # (n,)
        self.register_buffer('feature_std', one, persistent=config.standardize)
        self.cache = FeatureCache(int(config.cache_gb * 2 ** 30) if config.cache_maps else 0)
        self.score_model.register_load_state_dict_post_hook(self.cache.clear)

    def train(self, mode: bool = True) -> 'SpatialMSMA':
        """The score model stays in evaluation mode."""
        super().train(mode)
        self.score_model.eval()
        return self

    def initialize(self, x: Tensor) -> None:
        """Fills the score model from its checkpoint, and with --standardize the mean and spread of features
        from the images x (B, C, *S) in [0, 1] of all ranks: once before training.
        """
        path = read_network(self.config.score_model)[2]
        if path:
            self.score_model.load_weights(path)
            self.cache.clear()
        if self.config.standardize:
            with full_precision_on(x.device):
                rows = self.features(x).double().movedim(1, -1)[foreground(x)[:, 0]]                # (N, n)
            mean, square = map(launch.mean_over_ranks, (rows.mean(0), rows.square().mean(0)))
            self.feature_mean.copy_(mean)
            self.feature_std.copy_((square - mean ** 2).clamp(min=LEAST_SPREAD ** 2).sqrt())

    def load_weights(self, path: str) -> None:
        """Fills all from a run folder or checkpoint of ours; or the flow from a published one.

        The averaged weights. The score model of a published flow is that of --score_model.
        """
        content = read_checkpoint(path)
        if {'weights', 'description'} <= content.keys():
            weights, own = content['ema'] or content['weights'], self.state_dict()
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
                raise UserError(f"the weights of {path} do not fit these flags.")
            self.load_state_dict(weights)
        else:
            self.load_state_dict(from_official(self, find_weights(content, path)))
            self.initialize(None)

    # ---------------------------------------------------------------------------------- features and contexts

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Norms of the scores around every voxel at n levels, of images x (B, C, *S) in [0, 1]: (B, n, *S).

        Each image is passed alone: its numbers do not depend on others, nor on what is in the cache. They
        take no part in the backward pass, so that estimates of its memory need none.
        """
        if x.is_meta:
            return x.new_empty(len(x), self.levels, *x.shape[2:])

        def make(image: Tensor) -> Tensor:
            maps = self.score_model.score_maps(image[None], **self.config.levels)
            return pool(maps, self.config.local_patch_kernel)[0]

        return torch.stack([self.cache.get(image, make) for image in x])

    def image_code(self, x: Tensor) -> Tensor | None:
        """The code (B, E) of images x (B, C, *S) in [0, 1]; None without global context."""
        return self.global_context(2 * x - 1) if self.global_context is not None else None

    def log_prob(self, features: Tensor, image_code: Tensor | None, voxels: Tensor) -> Tensor:
        """log p of features (B, n, *S) at voxels (B, P), or (P,) in all images: nats, float64, (B, P)."""
        voxels = voxels.expand(len(features), -1)
        places = voxels[:, None].expand(-1, self.levels, -1)
        rows = features.flatten(2).gather(2, places).transpose(1, 2)                         # (B, P, n)
        context = self.position(voxels.flatten()).to(rows).unflatten(0, voxels.shape)        # (B, P, E)
        if image_code is not None:
            context = torch.cat([context, image_code[:, None].expand(-1, voxels.shape[1], -1)], dim=2)
        standard = ((rows - self.feature_mean) / self.feature_std).to(rows)
        return self.flow.log_prob(standard, context) - self.feature_std.log().sum()

    # ----------------------------------------------------------------------------------------------- training

    def forward(self, x: Tensor, skip: int = 0, temperature: float = 1.0) -> Terms:
        """Mean -log p (B,) over voxels of images x (B, C, *S) in [0, 1], nats, in full precision.

        --patches_per_step voxels of each image's foreground, at random; with `temperature` 0 all of them.
        There are no groups to skip: UserError for `skip`.
        """
        if skip:
            raise UserError(f"skip {skip}: spatial_msma has no latent groups, give 0.")
        with full_precision_on(x.device):
            if temperature == 0:
                return {'loss': torch.stack([nll.mean() for _, nll in self._foreground_nll(x)]).to(x.dtype)}
            order = torch.rand_like(x[:, 0].flatten(1)).where(foreground(x).flatten(1), -1)  # (B, V)
            order, voxels = order.topk(min(self.config.patches_per_step, order.shape[1]))    # (B, P)
            counted = (order >= 0).double()              # 0 where the foreground has fewer voxels than P
            nll = -self.log_prob(self.features(x), self.image_code(x), voxels)               # (B, P)
            return {'loss': ((nll * counted).sum(1) / counted.sum(1)).to(x.dtype)}

    def objective(self, terms: Terms, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimize (scalar): the mean over images. There are no schedules."""
        return terms['loss'].mean(), {}

    # ------------------------------------------------------------------------------------------- capabilities

    def _foreground_nll(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each image the voxels (P,) of its foreground and -log p there, nats, float64: (P,)."""
        features, image_code, found = self.features(x), self.image_code(x), []
        for i, inside in enumerate(foreground(x).flatten(1)):
            voxels, row = inside.nonzero().squeeze(1), slice(i, i + 1)
            code = None if image_code is None else image_code[row]
            found.append((voxels, torch.cat([-self.log_prob(features[row], code, chunk)[0]
                                             for chunk in voxels.split(self.config.patch_batch_size)])))
        return found

    def foreground(self, x: Tensor) -> Tensor:
        """Where a channel of images x (B, C, *S) is above the least value of its image: (B, 1, *S), bool."""
        return foreground(x)

    @torch.no_grad()
    def voxel_nll(self, x: Tensor) -> Tensor:
        """-log p of every voxel of images x (B, C, *S) in [0, 1], nats: (B, 1, *S).

        Outside the foreground, which the flow has not learnt, the least value of the inside.
        """
        with full_precision_on(x.device):
            found = self._foreground_nll(x)
        maps = torch.stack([nll.amin().repeat(x[0, 0].numel()).index_copy(0, voxels, nll)
                            for voxels, nll in found])
        return maps.reshape(len(x), 1, *x.shape[2:]).to(x.dtype)

    def score_norms(self, x: Tensor, **options: Any) -> Tensor:
        """Those of the score model: see ScoreModel."""
        return self.score_model.score_norms(x, **options)

    def score_norm(self, x: Tensor, level: int, **options: Any) -> Tensor:
        """One of them, differentiable: see ScoreModel."""
        return self.score_model.score_norm(x, level, **options)

    @property
    def last_block(self) -> nn.Module:
        """What heat-maps of activations look at: see ScoreModel."""
        return self.score_model.last_block

    def score_maps(self, x: Tensor, **options: Any) -> Tensor:
        """Those of the score model: see ScoreModel."""
        return self.score_model.score_maps(x, **options)


def full_precision_on(device: torch.device) -> AbstractContextManager:
    """Leaves an autocast: densities need all digits, and kept maps must be those of an evaluation."""
    return nullcontext() if device.type == 'meta' else torch.autocast(device.type, enabled=False)
