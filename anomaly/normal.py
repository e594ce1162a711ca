"""What normal validation images teach: fitted densities, thresholds, percentiles. Kept in thresholds.json.

N validation images. `Normal.fit` learns from their table, `save` and `load` keep it, `apply` scores a table
by the densities. Nothing here ever sees a test image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomaly import metrics
from anomaly.baselines import BASELINES
from anomaly.choice import choose_scores
from anomaly.config import Judging, MapConfig
from anomaly.density import Density, are_alike, cross_fit
from anomaly.judge import ScoreRow
from anomaly.maps.postprocessing import Spread, pixel_threshold
from anomaly.scores import Score, Scoring
from anomaly.scoring import Case, Table
from distributed import launch
from storage.arrays import read_npz
from storage.checkpoint import fingerprint
from utils import WRONG_VALUES, UserError, finite, naming, read_flags, read_json, write_json, write_npz

MOST_COUNT = 10 ** 7                      # of anything that thresholds.json counts: draws, resamples, images
SPREADS = 'normal_maps.npz'               # beside thresholds.json
SECTIONS = {'scoring': Scoring, 'maps': MapConfig, 'judging': Judging}      # of thresholds.json


@dataclass
class Normal:
    """Densities, thresholds and validation scores, and the settings with which they were made."""
    primary_score: str
    scoring: Scoring
    maps: MapConfig
    judging: Judging
    validation: dict[str, np.ndarray]            # score -> (N,) float64, cross-fitted for densities
    thresholds: dict[str, float]                 # score -> above it an image is anomalous; may be infinite
    pixel_thresholds: dict[str, float]           # the same for the pixels of its map, where it has one
    densities: dict[str, Density] = field(default_factory=dict)            # score -> what it has learned
    spreads: dict[str, Spread] = field(default_factory=dict)               # score -> of its map's pixels
    weights: str = ''                            # fingerprint of the model
    preparation: dict[str, Any] = field(default_factory=dict)              # of files: flags, spacing
    notes: list[str] = field(default_factory=list)                         # what densities have learned from

    @classmethod
    def fit(cls, table: Table, scores: Sequence[Score], primary: str, scoring: Scoring, maps: MapConfig,
            judging: Judging, training: Table | None = None) -> Normal:
        """Learns from the table of normal validation images, and adds the scores of densities to it,
        cross-fitted, as thresholds need scores of images that were not fitted on themselves. Densities learn
        from the `training` images too, where these have features like the others. Raises UserError for too
        few images.
        """
        densities, notes = {}, []
        patients = [getattr(entry, 'patient', '') or entry.id for entry in table.entries]
        for score in scores:
            if score.density is None:
                continue
            densities[score.name] = density = copy.deepcopy(score.density)
            features = table.features[score.name]
            more = training.features.get(score.name) if training else None
            if more is not None:
                alike = are_alike(more, features)
                notes.append(f"{score.name} has learned from " + (
                    f"{len(more)} training images too: their features are distributed like those of "
                    f"validation images." if alike else f"the {len(features)} validation images alone: the "
                    f"features of training images are distributed otherwise."))
                more = more if alike else None
            with naming(f'score {score.name}'):
                table.values[score.name] = cross_fit(density, features, patients, more)
        normal = cls(primary, scoring, maps, judging, table.values, {}, {}, densities, notes=notes)
        normal.add_sums(table, scores)
        normal.validation = dict(table.values)
        normal.thresholds = {name: metrics.threshold(values, judging.target_fpr)
                             for name, values in table.values.items()}
        return normal

    def add_sums(self, table: Table, scores: Sequence[Score]) -> None:
        """Adds the scores that are sums to a table that has their terms: z-scores over validation images."""
        for score in scores:
            if score.terms:
                moments = {name: self.moments(name) for name in score.terms}
                table.values[score.name] = sum((table.values[name] - mean) / std
                                               for name, (mean, std) in moments.items())

    def moments(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation, or 1 for 0, of a score over finite validation scores."""
        # sorted, as in the file, so that sums round alike in every mode
        known = np.sort(self.validation[name][np.isfinite(self.validation[name])])
        return (float(known.mean()), float(known.std()) or 1.0) if len(known) else (0.0, 1.0)

    def fit_pixels(self, table: Table, shown: str) -> None:
        """Sets the thresholds of maps from those of normal validation images alone; for volumes from where
        segmentations may begin. Of the score whose map is `shown`, learns what each pixel is like too.
        """
        if table.maps is not None:
            counted = table.maps.counted if table.maps.inside is None else table.maps.inside
            self.pixel_thresholds = {name: pixel_threshold(values, self.judging.target_pixel_fpr, counted)
                                     for name, values in table.maps.values.items()}
            self.spreads = {name: Spread.of(values) for name, values in table.maps.values.items()
                            if name == shown}
        # Only the main process has the maps.
        self.pixel_thresholds, self.spreads = launch.gather([(self.pixel_thresholds, self.spreads)])[0]

    def apply(self, table: Table, scores: Sequence[Score]) -> Table:
        """The same table with the values of the scores that are densities, from its features, or sums."""
        for score in scores:
            if not len(table):                                     # no file could be read
                table.values[score.name] = np.empty(0)
            elif score.density is not None:
                table.values[score.name] = self.densities[score.name].score(table.features[score.name])
        self.add_sums(table, scores)
        return table

    def rows(self, scores: Sequence[Score], kind: str) -> list[ScoreRow]:
        """The rows of scores, or of baselines, before any test image is seen."""
        return [ScoreRow(score.name, kind, score.about, self.thresholds[score.name],
                         self.pixel_thresholds.get(score.name), primary=score.name == self.primary_score)
                for score in scores]

    def pixel_threshold(self, name: str) -> float:
        """Above which a pixel of the map of a score is anomalous; infinite where there is no threshold."""
        return self.pixel_thresholds.get(name, math.inf)

    def with_map(self, case: Case, name: str, values: np.ndarray) -> Case:
        """A case with the map (*S) of a score: as it is, and where normal images are known, beside theirs."""
        spread = self.spreads.get(name)
        return case._replace(map=values, relative=spread and spread.relative(values),
                             above=metrics.flagged(values, self.pixel_threshold(name)))

    # ------------------------------------------------------------------------------------------------- file

    def state(self) -> dict[str, Any]:
        """JSON for thresholds.json."""
        return finite({
            'primary_score': self.primary_score, 'weights': self.weights, 'preparation': self.preparation,
            **{name: asdict(getattr(self, name)) for name in SECTIONS},
            'scores': {name: {'threshold': value,
                              **({'pixel_threshold': self.pixel_thresholds[name]}
                                 if name in self.pixel_thresholds else {}),
                              'normal_validation': sorted(self.validation[name].tolist())}
                       for name, value in self.thresholds.items()},
            'fitted': {name: {key: value.tolist() for key, value in density.state().items()}
                       for name, density in self.densities.items()}})

    def save(self, path: Path) -> None:
        """Writes thresholds.json, and beside it what the pixels of a map are like."""
        write_json(path, self.state())
        write_npz(path.with_name(SPREADS), weights=np.array(self.weights), **{
            f'{field} {name}': values.astype(np.float32) for name, spread in self.spreads.items()
            for field, values in spread._asdict().items()})

    @classmethod
    def load(cls, path: Path, model: Any, remedy: str) -> Normal:
        """What `save` wrote for this model. Raises UserError, with the command that is the `remedy`, if the
        file is missing, of another kind, or of other weights.
        """
        if not path.exists():
            raise UserError(f"there is no {path}, which holds the thresholds. Create it once: {remedy}")
        kept = read_json(path)
        expected = {'weights', 'primary_score', 'preparation', 'scores', 'fitted', *SECTIONS}
        if missing := sorted(expected - set(kept if isinstance(kept, dict) else ())):
            raise UserError(f"{path} lacks {missing[0]!r}: another version wrote it. Create it again: "
                            f"{remedy}")
        if kept['weights'] != fingerprint(model):
            raise UserError(f"{path} belongs to other weights of the model (training went on, or --no_ema "
                            f"differs). Create it again: {remedy}")
        try:
            normal = cls._restored(kept, model)
            normal.read_spreads(path.with_name(SPREADS))
            return normal
        except UserError:
            raise
        except WRONG_VALUES as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:120]}). Create it again: "
                            f"{remedy}") from None

    @classmethod
    def _restored(cls, kept: dict[str, Any], model: Any) -> Normal:
        """From the content of thresholds.json. Raises UserError, or whatever wrong values lead to."""
        for name, value in ((n, v) for section in SECTIONS for n, v in kept[section].items()):
            if isinstance(value, int) and name != 'seed' and value > MOST_COUNT:
                raise ValueError(f'{name} is {value}')
        sections = {name: read_flags(config, kept[name]) for name, config in SECTIONS.items()}
        number = lambda value: math.inf if value is None else value        # JSON has no infinity
        normal = cls(
            kept['primary_score'], **sections, weights=kept['weights'], preparation=kept['preparation'],
            validation={name: np.array(row['normal_validation'], np.float64)
                        for name, row in kept['scores'].items()},
            thresholds={name: number(row['threshold']) for name, row in kept['scores'].items()},
            pixel_thresholds={name: number(row['pixel_threshold']) for name, row in kept['scores'].items()
                              if 'pixel_threshold' in row})
        for score in normal.scores((), model):
            if score.density is not None:
                normal.densities[score.name] = score.density.from_state(kept['fitted'][score.name])
        return normal

    def read_spreads(self, path: Path) -> None:
        """What `save` wrote beside thresholds.json, if it is there and of these weights."""
        found = read_npz(path) if path.exists() else {}
        if str(found.pop('weights', '')) == self.weights:
            names = dict.fromkeys(key.split(' ', 1)[1] for key in found)
            self.spreads = {name: Spread(found[f'mean {name}'], found[f'std {name}']) for name in names}

    def data_flags(self, flags: Any) -> Any:
        """The data flags of a run, as its images were prepared: an LMDB has some of its own."""
        return read_flags(type(flags), vars(flags) | self.preparation.get('flags', {}))

    def scores(self, names: Sequence[str], model: Any) -> list[Score]:
        """The scores of the model with a threshold, or those that `names` choose. Raises UserError."""
        known = [name for name in self.thresholds if name not in BASELINES]
        chosen, _ = choose_scores(names if names and 'all' not in names else known, model)
        if unknown := [score.name for score in chosen if score.name not in known]:
            raise UserError(f"--scores {unknown[0]}: the evaluation set no threshold for it, but for "
                            f"{', '.join(known)}. Run --eval_mode anomaly with it first.")
        return chosen
