"""Small volumes with a bright lesion whose place is known, and a model that rebuilds the mean of a volume."""

from types import SimpleNamespace

import numpy as np
import torch
from test_detect import Part
from test_scores import seeded

from anomaly.scoring import Case
from datasets import DataConfig
from distributions import Pixels

SHAPE = (10, 12, 8)                 # voxels to the right, to the front, upwards
LESION = (7, 3, 5)                  # on the right, at the back, high up


class Mean(torch.nn.Module):
    """Its map of |x - reconstruction| is largest in the lesion."""

    pixels = Pixels()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def reconstruct(self, x):
        return x.flatten(2).mean(2)[..., None, None, None].expand(x.shape)


def make_volumes(channels=1, masks=True):
    """10 normal volumes a part around 0.3, and 4 anomalous ones with a lesion of 2 x 2 x 2 voxels."""
    def normal(n, seed):
        return (0.3 + 0.03 * torch.randn(n, channels, *SHAPE, generator=seeded(seed))).clamp(0, 1)
    test, marks = normal(14, 2), torch.zeros(14, 1, *SHAPE, dtype=torch.bool)
    box = tuple(slice(i, i + 2) for i in LESION)
    test[(slice(10, None), slice(None), *box)] = 0.9
    test[(slice(10, None), slice(None), *LESION)] = 1.0
    marks[(slice(10, None), slice(None), *box)] = True
    return SimpleNamespace(
        train=Part(normal(10, 0), ['Normal'] * 10), val=Part(normal(10, 1), ['Normal'] * 10),
        test=Part(test, ['Normal'] * 10 + ['Tumour'] * 4, marks if masks else None),
        shape=(channels, *SHAPE), pixels=SimpleNamespace(bits=8, padding=0), anomalous_classes=('Tumour',),
        report=[], split={'split_seed': 0, 'duplicates': []}, config=DataConfig(dataset='brain'))


def one_case(channels=1, voxel=LESION, size=SHAPE):
    """A black volume with one white voxel, which its map and its mask show too."""
    volume = np.zeros((channels, *size), np.float32)
    volume[(slice(None), *voxel)] = 1
    return Case(0, volume, volume / 2, volume[0], volume[0] > 0)
