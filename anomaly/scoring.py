"""Scores images: the only place where a model meets an image that is to be scored.

B images of a batch, N of a table, C channels, *S = (H, W) or (D, H, W), L latent groups. Every mode hands in
batches and gets a Table: `anomaly` and `compare` those of a data set, `predict` those of new files. Batches
are those of this process; the tables of all processes are joined.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from anomaly.config import MapConfig
from anomaly.maps.postprocessing import Maps, final_maps
from anomaly.outputs import Outputs
from anomaly.scores import Score, Scoring
from distributed import launch
from distributed.progress import progress
from readers.batches import eval_batches
from readers.body import body
from readers.parts import Batch
from utils import mix_seed

MAX_MAP_VALUES = 2 ** 28   # map values that a table keeps, 1 GiB in float32; of more, a random subset
GROUPS = ('normal', 'all')   # of test images: the normal ones, and the anomalous ones of all classes
# What a batch consists of: its B entries (id, class_name, label, ...), and their images.
Batches = Iterable[tuple[Sequence[Any], Batch]]


class Case(NamedTuple):
    """The pictures of one image. Arrays on the CPU; `reconstruction`, `map` and `mask` may be None."""
    place: int                           # row of the table; -1 = not known
    image: np.ndarray                    # (C, *S) in [0, 1]
    reconstruction: np.ndarray | None    # (C, *S)
    map: np.ndarray | None               # (*S)
    mask: np.ndarray | None              # (*S), bool
    relative: np.ndarray | None = None   # (*S), the map in standard deviations above normal images
    above: np.ndarray | None = None      # (*S) bool, where the map is above the threshold of pixels
    original: np.ndarray | None = None   # (C, S, S) in [0, 1], the file's own resolution

    @property
    def shown(self) -> np.ndarray | None:
        """The map as it is drawn: (*S)."""
        return self.map if self.relative is None else self.relative


@dataclass
class Table:
    """What a model and the baselines say of N images: one row an image, one column a score."""
    entries: list[Any]                                 # N, each with id, class_name and label
    values: dict[str, np.ndarray]                      # score -> (N,) float64, larger = more anomalous
    features: dict[str, np.ndarray] = field(default_factory=dict)   # of densities: score -> (N, D)
    maps: Maps | None = None                           # of images with known masks, on rank 0
    seconds: float = 0.0                               # that the model's scores took, summed over processes
    cases: list[Case] = field(default_factory=list)    # pictures, by falling primary score

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """0 normal, 1 anomalous: (N,)."""
        return np.array([entry.label for entry in self.entries], int)

    @property
    def classes(self) -> np.ndarray:
        """Class names: (N,). One that is the name of a group of images, such as 'all', is in quotes."""
        return np.array([f'"{entry.class_name}"' if entry.class_name in GROUPS and entry.label else
                         entry.class_name for entry in self.entries], object)

    def select(self, ids: Sequence[str]) -> Table:
        """The rows of these images, in this order. Raises KeyError for an id that the table does not have."""
        places = {entry.id: row for row, entry in enumerate(self.entries)}
        rows = [places[i] for i in ids]
        return replace(self, entries=[self.entries[row] for row in rows],
                       values={name: values[rows] for name, values in self.values.items()},
                       features={name: values[rows] for name, values in self.features.items()})


# --------------------------------------------------------------------------------------------------- scores

def model_outputs(model: Any, batches: Batches, scoring: Scoring,
                  densities: Mapping[str, Any] | None) -> Iterator[tuple[Sequence[Any], Batch, Outputs]]:
    """The entries, the images and the outputs of a model for each batch."""
    model.eval()
    for entries, batch in batches:
        sizes = [float(getattr(entry, 'file_bytes', 0)) for entry in entries]
        yield entries, batch, Outputs(model, batch.x.to(launch.device()), scoring, model.pixels.bits,
                                      torch.tensor(sizes), densities)


def score_images(model: Any, batches: Batches, scores: Sequence[Score], scoring: Scoring,
                 densities: Mapping[str, Any] | None = None, mapped: Container[str] = (),
                 config: MapConfig | None = None) -> Table:
    """Scores every image once: the values of `scores`, and the features of those that are densities.

    The table is the same on every rank, in the order of the ids, but for its maps, which are on rank 0.
    Fitted `densities` by name give the maps of their scores; normal.py gives their values. The maps of the
    images whose ids are `mapped` are kept, as `config` says.
    """
    rows, kept = [], []
    for entries, batch, outputs in model_outputs(model, batches, scoring, densities):
        values, learned, seconds = {}, {}, 0.0
        for score in scores:
            started = time.perf_counter()
            for found, make in ((values, score.image), (learned, score.features)):
                if make is not None:
                    found[score.name] = make(outputs).double().cpu().numpy()
            seconds += (time.perf_counter() - started) * bool(score.needs)
        rows.append((list(entries), values, learned, seconds))
        kept += keep_maps(outputs, batch, [s for s in scores if s.map], mapped, config)
    rows = launch.gather(rows)
    entries = [entry for row in rows for entry in row[0]]
    order = sorted(range(len(entries)), key=lambda i: entries[i].id)
    join = lambda k: {name: np.concatenate([row[k][name] for row in rows])[order] for name in rows[0][k]}
    values, learned = (join(1), join(2)) if rows else ({}, {})
    return Table([entries[i] for i in order], values, learned, join_maps(kept), sum(row[3] for row in rows))


def pictures(model: Any, batches: Batches, score: Score | None, normal: Any) -> Iterator[tuple[Any, Case]]:
    """The entry of each image, and its pictures: the image, its reconstruction, the map of the score if there
    is one, its mask. `normal` is what normal images have taught (normal.py).
    """
    for entries, batch, outputs in model_outputs(model, batches, normal.scoring, normal.densities):
        maps, _ = final_maps(outputs, [score] if score else [], normal.maps)
        rebuilt = outputs.reconstruction().cpu().numpy() if hasattr(model, 'reconstruct') else None
        for i, entry in enumerate(entries):
            case = Case(-1, batch.x[i].cpu().numpy(), None if rebuilt is None else rebuilt[i], None,
                        None if batch.mask is None else batch.mask[i, 0].cpu().numpy() > 0)
            yield entry, normal.with_map(case, score.name, maps[score.name][i]) if maps else case


# ---------------------------------------------------------------------------------------------------- batches

def part_batches(part: Any, batch_size: int, title: str, workers: int = 0) -> Batches:
    """This rank's batches of a part, behind a progress bar. Raises ValueError if an id occurs twice."""
    entries = {entry.id: entry for entry in part.entries}
    if len(entries) != len(part.entries):
        raise ValueError(f"the {title} part has {len(part.entries)} images but {len(entries)} ids.")
    batches = eval_batches(part, batch_size, workers=workers)
    total = len(range(launch.rank(), -(-len(part.entries) // batch_size), launch.world()))
    for _, batch in progress(batches, title, total):
        yield [entries[i] for i in batch.id], batch


# ------------------------------------------------------------------------------------------------------- maps

def select_maps(entries: Sequence[Any], number: int, pixels: int, seed: int) -> tuple[set[str], list[str]]:
    """The ids of a part whose maps are kept, those of images with known masks, and a line if they are too
    many: then a random subset is kept. None where no score has a map, or no anomalous image a mask: maps of
    normal images alone say nothing about lesions. `number` scores have maps of `pixels` pixels each.
    """
    anomalous = [entry for entry in entries if entry.label]
    known = [entry.id for entry in entries if entry.has_mask]
    if not number or not known or (anomalous and not any(entry.has_mask for entry in anomalous)):
        return set(), []
    most, lines = max(1, MAX_MAP_VALUES // (number * pixels)), []
    if len(known) > most:
        lines = [f"the maps of {number} scores are kept for a random {most} of {len(known)} images: fewer "
                 f"--scores leave memory for more images."]
        random = np.random.default_rng(mix_seed(seed, 'maps'))
        known = [known[i] for i in random.permutation(len(known))[:most]]
    return set(known), lines


def keep_maps(outputs: Outputs, batch: Batch, scores: Sequence[Score], ids: Container[str],
              config: MapConfig | None) -> list[Maps]:
    """The maps of those images of a batch that are among `ids` and normal or have a lesion in their mask.

    Lesions count outside the body too, but not for segmentations, which are those of volumes.
    """
    known = batch.y == 0
    if batch.mask is not None:
        known = known | batch.mask.flatten(1).any(1)
    known = known.cpu().numpy() & [i in ids for i in batch.id]
    if not known.any():
        return []
    values, inside = final_maps(outputs, scores, config)
    masks = np.zeros((len(batch.x), *batch.x.shape[2:]), bool) if batch.mask is None else (
        batch.mask[:, 0].cpu().numpy() > 0)
    x = batch.x.float().cpu().numpy()
    return [Maps(masks[known], None if inside is None else (inside | masks)[known],
                 {name: value[known] for name, value in values.items()}, np.array(batch.id)[known],
                 body(x[known], config.body_mask or None, config.seg_erosion) if x.ndim == 5 else None)]


def join_maps(kept: list[Maps]) -> Maps | None:
    """The maps of all ranks in the order of their ids, on rank 0; one score at a time saves memory."""
    ids = np.concatenate(launch.gather([m.ids for m in kept]) or [np.array([], str)])
    order = np.argsort(ids, kind='stable')

    def together(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        found = [array for array in launch.gather(arrays) if array is not None]
        return np.concatenate(found)[order] if found and launch.is_main() else None
    names = sorted({name for names in launch.gather([list(m.values) for m in kept]) for name in names})
    values = {name: together([m.values.pop(name) for m in kept]) for name in names}
    masks, counted, inside = (together([getattr(m, name) for m in kept])
                              for name in ('masks', 'counted', 'inside'))
    return Maps(masks, counted, values, ids[order], inside) if values and launch.is_main() else None
