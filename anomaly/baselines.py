"""Scores that need no model: what brightness, file size or a linear fit of the pixels tell of an image.

They stand beside every model's scores, because medical data sets differ in scanner, exposure and file format
between classes: a model that is no better than they are has learned that difference. Two have maps, beside
which those of models stand. N, B images, C channels, S pixels, (H, W) or (D, H, W).
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly.passes import Passes, Scores, as_passes
from readers.images.png import png_bytes
from utils import UserError

PCA_VARIANCE = 0.9       # share of the variance of normal images that the components keep
PCA_MOST = 200           # components at most


class Baseline:
    """A score of the image alone, fitted on training images where there is something to learn."""
    needs = ''
    map: Callable[[Passes], Tensor] | None = None              # -> (B, 1, *S)

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        """Nothing to learn; `model` is not used and may be None."""

    def image(self, passes: Passes) -> Tensor:
        raise NotImplementedError

    def __call__(self, model: Any, x: Tensor | None = None, with_map: bool = False) -> Scores:
        passes = as_passes(model, x)
        return Scores(self.image(passes), self.map(passes) if self.map and with_map else None)


class MeanIntensity(Baseline):
    """Mean intensity, as it is: below 0.5 in AUROC means that anomalous images are darker."""
    name, about = 'mean_intensity', "mean intensity: an AUROC below 0.5 says that anomalous images are darker"

    def image(self, passes: Passes) -> Tensor:
        return passes.x.double().flatten(1).mean(1).cpu()

    def map(self, passes: Passes) -> Tensor:
        return passes.x.float().mean(1, keepdim=True).cpu()


class IntensityDeviation(Baseline):
    """|mean intensity - mean intensity of normal training images|: dark and bright images both count."""
    name, about = 'intensity_deviation', "|mean intensity - that of normal training images|"

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        self.centre = torch.cat([x.double().flatten(1).mean(1).cpu() for x in normal]).mean()

    def image(self, passes: Passes) -> Tensor:
        return (passes.x.double().flatten(1).mean(1).cpu() - self.centre).abs()


class MeanImageDistance(Baseline):
    """Euclidean distance to the mean of the normal training images."""
    name, about = 'mean_image', "Euclidean distance to the mean normal training image"

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        total, count = 0, 0
        for x in normal:
            total, count = total + x.double().sum(0).cpu(), count + len(x)
        self.centre = total / count

    def image(self, passes: Passes) -> Tensor:
        return (passes.x.double().cpu() - self.centre).flatten(1).norm(dim=1)

    def map(self, passes: Passes) -> Tensor:
        return (passes.x.double().cpu() - self.centre).abs().mean(1, keepdim=True).float()


class PngSize(Baseline):
    """Bytes of the image as the model sees it, as an optimised PNG."""
    name, about = 'png_size', "bytes of the image as the model sees it, as a PNG"

    def image(self, passes: Passes) -> Tensor:
        levels = 2 ** min(passes.bits, 8) - 1
        values = (passes.x.detach().cpu().double().clamp(0, 1) * levels).round().mul(255 / levels).numpy()
        return torch.tensor([float(png_bytes(v)) for v in values.astype(np.uint8)], dtype=torch.float64)


class FileSize(Baseline):
    """Bytes of the image's file on disk."""
    name, about = 'file_size', "bytes of the file on disk"

    def image(self, passes: Passes) -> Tensor:
        if passes.file_bytes is None:
            raise UserError("baseline file_size needs file sizes, which these images do not have.")
        return passes.file_bytes.double().cpu()


class PcaResidual(Baseline):
    """Euclidean distance to the linear subspace that keeps 90 % of the variance of normal training images."""
    name, about = 'pca', "Euclidean distance to principal components of normal training images"

    def fit(self, model: Any, normal: Iterable[Tensor]) -> None:
        from sklearn.decomposition import PCA
        x = torch.cat([x.flatten(1).cpu() for x in normal]).double().numpy()               # (N, D)
        # At most half as many components as images: more would fit the training images themselves.
        most = max(1, min(PCA_MOST, len(x) // 2, x.shape[1] - 1))
        pca = PCA(most, svd_solver='randomized' if min(x.shape) > 100 else 'full', random_state=0).fit(x)
        kept = min(most, 1 + int((np.cumsum(pca.explained_variance_ratio_) < PCA_VARIANCE).sum()))
        self.centre, self.components = pca.mean_, pca.components_[:kept]                     # (D,), (kept, D)

    def image(self, passes: Passes) -> Tensor:
        x = passes.x.flatten(1).double().cpu().numpy() - self.centre                       # (B, D)
        return torch.from_numpy(np.linalg.norm(x - x @ self.components.T @ self.components, axis=1))


BASELINES: dict[str, type[Baseline]] = {b.name: b for b in (
    MeanIntensity, IntensityDeviation, MeanImageDistance, PngSize, FileSize, PcaResidual)}
