"""Small score-based models, and data whose scores are known."""

import math

import torch

from distributions import Pixels
from families.score.config import ScoreModelConfig
from families.score.model import ScoreModel
from families.score.samplers import Diffusion
from families.score.sde import SDE, VE, VP, SubVP, expand

SMALL = {'nf': 8, 'blocks_down': (1, 1), 'blocks_up': (1,), 'norm_num_groups': 2, 'time_embedding_sz': 4,
         'num_scales': 4}


def make_sde(name: str, steps: int = 1000) -> SDE:
    return {'vesde': VE(steps, 0.01, 20.0), 'vpsde': VP(steps), 'subvpsde': SubVP(steps)}[name]


def build(shape=(1, 8, 8), seed=0, **flags):
    """A small network of random weights, none near zero, in float64."""
    torch.manual_seed(seed)
    steps = {} if flags.get('sde', 'vesde') == 'vesde' else {'num_scales': 25}
    model = ScoreModel(shape, ScoreModelConfig(**SMALL | {'init_scale': 1.0} | steps | flags), Pixels())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


class Mixture:
    """K normals of one diagonal variance, means (K, C, *S). With noise it is again one, its score known."""

    def __init__(self, means: torch.Tensor, variance: torch.Tensor, weights: torch.Tensor):
        self.means, self.variance, self.weights = means, variance, weights

    def noisy(self, sde: SDE, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log density (B,) and score (B, C, *S) of noisy images x at t (B,)."""
        factor, std = (expand(value, x).unsqueeze(1) for value in (sde.mean_factor(t), sde.std(t)))
        variance = factor ** 2 * self.variance + std ** 2                              # (B, 1, C, *S)
        error = x.unsqueeze(1) - factor * self.means                                   # (B, K, C, *S)
        log_p = -0.5 * (error ** 2 / variance + torch.log(2 * math.pi * variance)).flatten(2).sum(2)
        log_joint = self.weights.log() + log_p                                                      # (B, K)
        share = torch.softmax(log_joint, dim=1).reshape(*log_joint.shape, *[1] * (x.ndim - 1))
        return torch.logsumexp(log_joint, 1), -(share * error / variance).sum(1)

    def sample(self, n: int) -> torch.Tensor:
        which = torch.multinomial(self.weights, n, replacement=True)
        return self.means[which] + self.variance.sqrt() * torch.randn_like(self.means[which])

    def diffusion(self, sde: SDE) -> Diffusion:
        return Diffusion(sde, lambda x, t: self.noisy(sde, x, t)[1])


def gaussian(shape=(2, 3, 1)) -> Mixture:
    """A single normal with another mean and variance at every place."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, *shape, generator=generator, dtype=torch.float64) * 0.5
    return Mixture(mean, torch.linspace(0.05, 0.4, mean[0].numel(), dtype=torch.float64).reshape(shape),
                   torch.ones(1, dtype=torch.float64))


def two_in_the_plane() -> Mixture:
    """Two unequal clouds of points (1, 1, 2): images of one row and two columns."""
    means = torch.tensor([[-0.5, 0.2], [0.4, -0.3]], dtype=torch.float64).reshape(2, 1, 1, 2)
    return Mixture(means, torch.tensor([0.01, 0.02], dtype=torch.float64).reshape(1, 1, 2),
                   torch.tensor([0.3, 0.7], dtype=torch.float64))
