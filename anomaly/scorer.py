"""Scores the parts of a data set, each image once, and keeps the images that the gallery shows.

B images, C channels, H x W pixels, L latent groups; N images of a part, P pixels of it.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from anomaly.density import DensityScore
from anomaly.passes import Passes
from anomaly.scores import ScoreConfig
from datasets import eval_batches
from utils import UserError

MOST_PIXELS = 4_000_000      # pixels that pixel metrics use at most; of more, a random share


class Case(NamedTuple):
    """One image of the gallery. Arrays on the CPU; `reconstruction`, `map` and `mask` may be None."""
    score: float
    batch: int
    position: int
    id: str
    image: np.ndarray                    # (C, H, W) in [0, 1]
    reconstruction: np.ndarray | None    # (C, H, W)
    map: np.ndarray | None               # (H, W)
    mask: np.ndarray | None              # (H, W), bool


@dataclasses.dataclass
class Scored:
    """What the model and the baselines say of one part, in the order of the part's batches."""
    entries: list[Any]                   # N, each with id, class_name and label
    values: dict[str, np.ndarray]        # score -> (N,) float64
    features: np.ndarray | None          # (N, 1 + L), for density scores
    most: list[Case]
    least: list[Case]
    pixels: dict[str, tuple[np.ndarray, np.ndarray]]    # score with a map -> mask (P,) bool, map (P,) float32

    @property
    def labels(self) -> np.ndarray:
        return np.array([entry.label for entry in self.entries], int)

    @property
    def classes(self) -> np.ndarray:
        return np.array([entry.class_name for entry in self.entries], object)


class Cases:
    """Keeps the `number` most or least anomalous images seen, so that none has to be read twice."""

    def __init__(self, number: int, sign: int):
        """`sign` 1 keeps the largest scores, -1 the smallest."""
        self.number, self.sign, self.kept = number, sign, []

    def order(self, case: Case | tuple) -> tuple:
        """A score that is not finite is the most anomalous; ties go to the image that is listed first."""
        score = case[0] if math.isfinite(case[0]) else math.inf
        return -self.sign * score, case[1], case[2]

    def offer(self, batch_index: int, values: np.ndarray, make: Callable[[int], Case]) -> None:
        """Offers a batch with scores `values`; `make(i)` is called for the images that are kept."""
        known = {case[1:3]: case for case in self.kept}
        candidates = self.kept + [(value, batch_index, i) for i, value in enumerate(values.tolist())]
        best = sorted(candidates, key=self.order)[:self.number]
        self.kept = [known.get(c[1:3]) or make(c[2]) for c in best]

    def merge(self, cases: list[Case]) -> list[Case]:
        return sorted(cases, key=self.order)[:self.number]


class Scorer:
    """Scores the parts of a data set with all scores and baselines; each image once, on one rank."""

    def __init__(self, model: Any, data: Any, scores: list, baselines: list, config: ScoreConfig,
                 primary: str, *, num_iw_samples: int, batch_size: int, seed: int, workers: int,
                 device: torch.device, rank: int, world: int, gather: Callable[[list], list]):
        self.model, self.data, self.config, self.primary = model, data, config, primary
        self.scores, self.baselines = scores, baselines
        self.num_iw_samples, self.batch_size, self.seed = num_iw_samples, batch_size, seed
        self.workers, self.device = workers, device
        self.rank, self.world, self.gather = rank, world, gather
        self.has_density = any(isinstance(s, DensityScore) for s in scores)

    def fit_baselines(self) -> int:
        """Fits the baselines on at most `max_train_images` training images; returns how many."""
        images: list[torch.Tensor] = []
        count, most = 0, min(len(self.data.train), self.config.max_train_images)
        for _, batch in eval_batches(self.data.train, self.batch_size):
            images.append(batch.x[:most - count])
            count += len(images[-1])
            if count >= most:
                break
        if count < 2:
            raise UserError(f"the training part has {count} image: the baselines need at least 2.")
        for baseline in self.baselines:
            baseline.fit(None, images)
        return count

    def score(self, part: Any, name: str, *, with_cases: bool = False) -> Scored:
        """Scores every image of a part once; density scores only if they are fitted. Complete on rank 0."""
        from tqdm import tqdm
        entries = {entry.id: entry for entry in part.entries}
        if len(entries) != len(part.entries):
            raise UserError(f"the {name} part has {len(part.entries)} images but {len(entries)} ids.")
        number = self.config.num_cases if with_cases else 0
        most, least, rows, pixels = Cases(number, 1), Cases(number, -1), [], []
        share = MOST_PIXELS / max(1, len(part.entries) * math.prod(self.data.shape[1:]))
        batches = eval_batches(part, self.batch_size, rank=self.rank, world=self.world,
                               workers=self.workers)
        total = len(range(self.rank, -(-len(part.entries) // self.batch_size), self.world))
        hidden = True if self.rank else None              # None: hidden where there is no terminal
        for index, batch in tqdm(batches, desc=name, unit='batch', total=total, leave=False, disable=hidden):
            sizes = torch.tensor([float(entries[i].file_bytes) for i in batch.id])
            passes = self.passes(batch, sizes, (self.seed, 'score', name, index))
            ready = [s for s in [*self.scores, *self.baselines]
                     if not (isinstance(s, DensityScore) and not s.density.fitted)]
            values = {s.name: s(passes, with_map=False).image.double().cpu().numpy() for s in ready}
            features = passes.features().numpy() if self.has_density else None
            rows.append((index, list(batch.id), values, features))
            if number:
                primary = values[self.primary]
                for cases in (most, least):
                    cases.offer(index, primary, partial(self.case, passes, batch, index, primary))
            if with_cases and batch.mask is not None:
                pixels.append((index, self.pixel_values(passes, batch, share, index)))
        return self.collect(name, entries, rows, most, least, pixels)

    def passes(self, batch: Any, file_bytes: torch.Tensor, noise: tuple) -> Passes:
        config = self.config
        return Passes(self.model, batch.x.to(self.device), draws=config.num_draws,
                      iw_samples=self.num_iw_samples, iw_samples_elbo=config.iw_samples_elbo,
                      iw_samples_lk=config.iw_samples_lk, llr_noise=config.llr_noise,
                      regret_steps=config.regret_steps, regret_learning_rate=config.regret_learning_rate,
                      bits=self.data.pixels.bits, file_bytes=file_bytes, noise=noise)

    def collect(self, name: str, entries: dict, rows: list, most: Cases, least: Cases,
                pixels: list) -> Scored:
        """Brings together what the ranks have scored, in the order of the batches."""
        rows = sorted(self.gather(rows), key=lambda row: row[0])
        ids = [i for row in rows for i in row[1]]
        if sorted(ids) != sorted(entries):
            raise RuntimeError(f"{len(ids)} scores for the {len(entries)} images of the {name} part: each "
                               f"must be scored once. Check that all ranks have the same data.")
        values = {k: np.concatenate([row[2][k] for row in rows]) for k in rows[0][2]} if rows else {}
        features = np.concatenate([row[3] for row in rows]) if rows and rows[0][3] is not None else None
        joined: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        gathered = [p for _, p in sorted(self.gather(pixels), key=lambda p: p[0])]
        for score in gathered[0] if gathered else ():
            joined[score] = tuple(np.concatenate([p[score][j] for p in gathered]) for j in (0, 1))
        return Scored([entries[i] for i in ids], values, features, most.merge(self.gather(most.kept)),
                      least.merge(self.gather(least.kept)), joined)

    def case(self, passes: Passes, batch: Any, index: int, values: np.ndarray, i: int) -> Case:
        """The image, its reconstruction and the map of the primary score, if the model has them."""
        of_primary = next((s for s in self.scores if s.name == self.primary), None)
        shape = batch.x.shape[-2:]
        maps = of_primary.map(passes) if of_primary is not None and of_primary.map else None
        rebuilt = passes.reconstruction() if hasattr(self.model, 'reconstruct') else None
        return Case(float(values[i]), index, i, batch.id[i], batch.x[i].cpu().numpy(),
                    None if rebuilt is None else rebuilt[i].cpu().numpy(),
                    None if maps is None else maps[i, 0].float().cpu().numpy(),
                    None if batch.mask is None else batch.mask[i].reshape(shape).cpu().numpy() > 0)

    def pixel_values(self, passes: Passes, batch: Any, share: float, index: int) -> dict:
        """Lesion mask (P,) bool and map (P,) float32 of every score at a sample of the batch's pixels.

        Leaves out anomalous images with an empty mask, which nobody has drawn.
        """
        mask = batch.mask.reshape(len(batch.x), -1).cpu().numpy() > 0                      # (B, H*W)
        known = mask.any(1) | (batch.y.cpu().numpy() == 0)
        take = np.random.default_rng([self.seed, index]).random(mask.shape) < share
        take &= known[:, None]
        maps = {s.name: s.map(passes) for s in self.scores if s.map}
        return {name: (mask[take], m.float().cpu().numpy().reshape(mask.shape)[take])
                for name, m in maps.items() if m is not None}
