"""What a run shows of itself while it trains."""

import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from distributed import launch


class Meter:
    """The progress bar, the speed, and the running mean of an epoch's `figure`: nelbo or loss."""

    def __init__(self, figure: str, step: int, end: int):
        self.figure = figure
        self.bar = tqdm(total=end, initial=step, unit='step', disable=None if launch.is_main() else True,
                        dynamic_ncols=True)
        self.images, self.since = 0, time.perf_counter()
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor, images: int) -> None:
        """Counts a step; the mean is over its finite values and stays on the device."""
        finite = torch.isfinite(value)
        self.total = self.total + torch.where(finite, value, 0.0)
        self.count = self.count + finite
        self.images += images
        self.bar.update()

    def read(self) -> dict[str, float]:
        """Mean figure of the epoch so far, and images a second since the last reading."""
        now = time.perf_counter()
        speed, self.images, self.since = self.images / (now - self.since), 0, now
        self.bar.set_postfix_str(f'{self.figure} {self.mean():.5g}, {speed:.0f} images/s')
        return {f'train/{self.figure}_avg': self.mean(), 'train/images_per_second': speed}

    def mean(self) -> float:
        return float(self.total / self.count) if self.count else math.nan

    def end_epoch(self) -> float:
        """The mean of the epoch that ends; starts the next."""
        mean, self.total, self.count = self.mean(), 0.0, 0
        return mean

    def close(self) -> None:
        self.bar.close()
