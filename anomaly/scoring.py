"""Scores the parts of a data set, each image once; then makes the pictures of the images that are shown.

B images, C channels, S pixels, (H, W) or (D, H, W), L latent groups; N images of a part.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from anomaly.density import DensityScore
from anomaly.maps.postprocessing import Maps, treated
from anomaly.passes import Passes
from anomaly.scores import ScoreConfig
from readers.batches import eval_batches
from readers.body import body
from utils import UserError, mix_seed

MOST_VALUES = 2 ** 28      # of the maps of a part that are kept, in float32 1 GiB; of more, a random share


class Case(NamedTuple):
    """The pictures of one image. Arrays on the CPU; `reconstruction`, `map` and `mask` may be None."""
    place: int                           # in the part
    image: np.ndarray                    # (C, *S) in [0, 1]
    reconstruction: np.ndarray | None    # (C, *S)
    map: np.ndarray | None               # (*S)
    mask: np.ndarray | None              # (*S), bool


@dataclasses.dataclass
class Scored:
    """What the model and the baselines say of one part, in the order of the part's batches."""
    entries: list[Any]                   # N, each with id, class_name and label
    values: dict[str, np.ndarray]        # score -> (N,) float64
    features: dict[str, np.ndarray]      # what density scores need -> (N, D)
    maps: Maps | None                    # of images with known masks; None where there are none
    seconds: float                       # that the model's scores took, of all processes together
    cases: list[Case] = dataclasses.field(default_factory=list)         # by falling primary score

    @property
    def labels(self) -> np.ndarray:
        return np.array([entry.label for entry in self.entries], int)

    @property
    def classes(self) -> np.ndarray:
        return np.array([entry.class_name for entry in self.entries], object)


def unfitted(score: Any) -> bool:
    """Whether the score is of a density that has not learned yet."""
    return isinstance(score, DensityScore) and not score.density.fitted


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
        self.features = {s.needs: s.features for s in scores if isinstance(s, DensityScore)}
        # Maps of densities come after their fit.
        self.late = [s for s in scores if s.map and isinstance(s, DensityScore) and config.msma_map != 'none']
        self.mapped = [s for s in [*scores, *baselines] if s.map and not isinstance(s, DensityScore)]
        self.mapped += self.late
        self.warnings: list[str] = []

    def fit_baselines(self) -> int:
        """Fits the baselines on at most `max_train_images` training images; returns how many; 0 for none."""
        if not self.baselines:
            return 0
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

    def score(self, part: Any, name: str) -> Scored:
        """Scores every image of a part once, density scores only if they are fitted. Scores are the same on
        every rank, maps are on rank 0.
        """
        entries = {entry.id: entry for entry in part.entries}
        if len(entries) != len(part.entries):
            raise UserError(f"the {name} part has {len(part.entries)} images but {len(entries)} ids.")
        rows, maps, wanted = [], [], self.images_with_maps(part.entries, name)
        for index, batch in self.batches(part, name):
            sizes = torch.tensor([float(entries[i].file_bytes) for i in batch.id])
            passes = self.passes(batch, sizes, (self.seed, 'score', name, index))
            ready = [s for s in self.scores if not unfitted(s)]
            started = time.perf_counter()
            values = {s.name: s(passes, with_map=False).image.double().cpu().numpy() for s in ready}
            seconds = time.perf_counter() - started
            values |= {b.name: b(passes).image.double().cpu().numpy() for b in self.baselines}
            features = {needs: of(passes).numpy() for needs, of in self.features.items()}
            rows.append((index, list(batch.id), values, features, seconds))
            if (known := self.known(batch, wanted)).any():
                mapped = [s for s in self.mapped if not unfitted(s)]
                maps.append((index, self.judged_maps(passes, batch, known, mapped)))
        return self.collect(name, entries, rows, maps)

    def add_density_maps(self, part: Any, name: str, scored: Scored) -> None:
        """Adds the maps of density scores, which are there only once these are fitted: a second pass."""
        if not self.late:
            return
        wanted, maps = self.images_with_maps(part.entries, name), []
        for index, batch in self.batches(part, f'{name}, maps'):
            passes = self.passes(batch, None, (self.seed, 'score', name, index))
            if (known := self.known(batch, wanted)).any():
                maps.append((index, self.judged_maps(passes, batch, known, self.late)))
        if added := self.join(maps):
            earlier = scored.maps.values if scored.maps else {}
            scored.maps = added._replace(values=earlier | added.values)

    def batches(self, part: Any, name: str, only: Collection[int] | None = None) -> Iterable[tuple[int, Any]]:
        """This rank's batches with their numbers, all or those of `only`, behind a progress bar."""
        from tqdm import tqdm
        batches = eval_batches(part, self.batch_size, rank=self.rank, world=self.world,
                               workers=self.workers, only=only)
        numbers = range(self.rank, -(-len(part.entries) // self.batch_size), self.world)
        total = len(numbers) if only is None else len(set(numbers) & set(only))
        hidden = True if self.rank else None              # None: hidden where there is no terminal
        return tqdm(batches, desc=name, unit='batch', total=total, leave=False, disable=hidden)

    def passes(self, batch: Any, file_bytes: torch.Tensor | None, noise: tuple) -> Passes:
        config = self.config
        return Passes(self.model, batch.x.to(self.device), draws=config.num_draws,
                      iw_samples=self.num_iw_samples, iw_samples_elbo=config.iw_samples_elbo,
                      iw_samples_lk=config.iw_samples_lk, llr_noise=config.llr_noise,
                      regret_steps=config.regret_steps, regret_learning_rate=config.regret_learning_rate,
                      msma=config.msma, msma_map=config.msma_map, bits=self.data.pixels.bits,
                      file_bytes=file_bytes, noise=noise)

    def collect(self, name: str, entries: dict, rows: list, maps: list[tuple[int, Maps]]) -> Scored:
        """Brings together what the ranks have scored, in the order of the batches."""
        rows = sorted(self.gather(rows), key=lambda row: row[0])
        ids = [i for row in rows for i in row[1]]
        if sorted(ids) != sorted(entries):
            raise RuntimeError(f"{len(ids)} scores for the {len(entries)} images of the {name} part: each "
                               f"must be scored once. Check that all ranks have the same data.")
        values = {k: np.concatenate([row[2][k] for row in rows]) for k in rows[0][2]} if rows else {}
        features = {k: np.concatenate([row[3][k] for row in rows]) for k in rows[0][3]} if rows else {}
        return Scored([entries[i] for i in ids], values, features, self.join(maps),
                      sum(row[4] for row in rows))

    def cases(self, part: Any, name: str, places: Sequence[int]) -> list[Case]:
        """The images at `places` of a part with their pictures, in this order; the same on every rank.

        A second look, when all scores are known. Noise is the batch's, so whole batches are passed again.
        """
        made = []
        for index, batch in self.batches(part, f'{name}, cases', {p // self.batch_size for p in places}):
            passes = self.passes(batch, None, (self.seed, 'score', name, index))
            first = index * self.batch_size
            made += [self.case(passes, batch, p, p - first) for p in places
                     if first <= p < first + len(batch.x)]
        found = {case.place: case for case in self.gather(made)}
        return [found[place] for place in places]

    def case(self, passes: Passes, batch: Any, place: int, i: int) -> Case:
        """Image `i` of the batch, its reconstruction and map of the primary score, if the model has them."""
        maps, _ = self.maps(passes, [s for s in self.mapped if s.name == self.primary])
        rebuilt = passes.reconstruction() if hasattr(self.model, 'reconstruct') else None
        return Case(place, batch.x[i].cpu().numpy(), None if rebuilt is None else rebuilt[i].cpu().numpy(),
                    maps[self.primary][i] if maps else None,
                    None if batch.mask is None else batch.mask[i, 0].cpu().numpy() > 0)

    # ------------------------------------------------------------------------------------------------- maps

    def images_with_maps(self, entries: list[Any], name: str) -> set[str]:
        """Ids of the images whose maps are kept: those with known masks, at random if they are too many.

        None where no anomalous image has a mask: the maps of normal images alone say nothing about lesions.
        """
        anomalous = [entry for entry in entries if entry.label]
        known = [entry.id for entry in entries if entry.has_mask]
        if not self.mapped or (anomalous and not any(entry.has_mask for entry in anomalous)):
            return set()
        most = max(1, MOST_VALUES // (len(self.mapped) * math.prod(self.data.shape[1:])))
        if len(known) > most:
            line = (f"the maps of {len(self.mapped)} scores are kept for a random {most} of {len(known)} "
                    f"{name} images: fewer --scores leave memory for more images.")
            self.warnings += [line] if line not in self.warnings else []
            random = np.random.default_rng(mix_seed(self.seed, 'maps', name))
            known = [known[i] for i in random.permutation(len(known))[:most]]
        return set(known)

    def known(self, batch: Any, wanted: set[str]) -> np.ndarray:
        """Which images of a batch are wanted, (B,) bool, without anomalous ones whose mask is empty."""
        known = batch.y == 0
        if batch.mask is not None:
            known = known | batch.mask.flatten(1).any(1)
        return known.cpu().numpy() & [i in wanted for i in batch.id]

    def maps(self, passes: Passes, scores: list) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The maps (B, *S) of these scores as they are judged and drawn, and the body (B, *S) bool or None.

        Without maps where the model has none.
        """
        return treated(passes, scores, self.config.map_smoothing, self.config.body_mask)

    def judged_maps(self, passes: Passes, batch: Any, known: np.ndarray, scores: list) -> Maps:
        """The maps of `scores`, for the `known` images of a batch. Lesions count outside the body too, but
        not for segmentations, which are those of volumes.
        """
        values, inside = self.maps(passes, scores)
        masks = np.zeros((len(batch.x), *batch.x.shape[2:]), bool) if batch.mask is None else (
            batch.mask[:, 0].cpu().numpy() > 0)
        x, level, erosion = passes.x.float().cpu().numpy(), self.config.body_mask, self.config.seg_erosion
        return Maps(masks[known], None if inside is None else (inside | masks)[known],
                    {name: value[known] for name, value in values.items()}, np.array(batch.id)[known],
                    body(x[known], level or None, erosion) if x.ndim == 5 else None)

    def join(self, maps: list[tuple[int, Maps]]) -> Maps | None:
        """The maps of all ranks in the order of the batches, on rank 0; one score at a time saves memory."""
        def together(arrays: list[tuple[int, np.ndarray]]) -> np.ndarray | None:
            found = [array for _, array in sorted(self.gather(arrays), key=lambda pair: pair[0])]
            return np.concatenate(found) if found and not self.rank else None
        masks, ids = (together([(index, getattr(m, name)) for index, m in maps]) for name in ('masks', 'ids'))
        counted, inside = (together([(index, getattr(m, name)) for index, m in maps
                                     if getattr(m, name) is not None]) for name in ('counted', 'inside'))
        values = {s.name: together([(index, m.values.pop(s.name)) for index, m in maps
                                    if s.name in m.values])
                  for s in self.mapped}
        values = {name: value for name, value in values.items() if value is not None}
        return Maps(masks, counted, values, ids, inside) if values else None
