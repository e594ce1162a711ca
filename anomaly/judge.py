"""How well scores tell normal from anomalous test images: from a table of scores to typed rows.

A group is one anomalous class, or 'all' of them; each is judged against all normal images. With --match there
are also the images of a class that have a normal partner of the same exposure, judged against their partners.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from anomaly import metrics
from anomaly.config import Judging, MapConfig
from anomaly.maps.localization import Localization, localize
from anomaly.maps.segmentation import Segmentation
from anomaly.maps.segmentation import judge as judge_segmentations
from anomaly.matching import LEAST_PAIRS, Group
from anomaly.metrics import Estimate, Resamples, evaluate_score, flagged, make_finite
from utils import finite


class Share(NamedTuple):
    """How many of some images."""
    count: int
    total: int


@dataclass(frozen=True)
class ScoreRow:
    """A score with its thresholds, and what `judge` finds of it on the test images."""
    name: str                                    # in a comparison run/score
    kind: str                                    # 'model' or 'baseline'
    about: str
    threshold: float                             # above it an image is flagged as anomalous; may be infinite
    pixel_threshold: float | None = None         # the same for pixels of its map; None: no map is judged
    primary: bool = False                        # chosen before looking at any anomaly
    run: str = ''                                # in a comparison, the run of the model
    flagged: Mapping[str, Share] = field(default_factory=dict)                        # 'normal' and groups
    metrics: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)      # group -> metric
    pixels: Localization | None = None
    segmentation: Segmentation | None = None

    def auroc(self, group: str) -> Estimate:
        return self.metrics[group]['auroc']

    def as_json(self) -> dict[str, Any]:
        """What metrics.json holds of the score; keys without a value are left out."""
        values = {'kind': self.kind, 'about': self.about, 'threshold': self.threshold,
                  'metrics': {group: {name: estimate.as_json() for name, estimate in found.items()}
                              for group, found in self.metrics.items()},
                  'flagged': dict(self.flagged), 'run': self.run or None,
                  'pixel_threshold': self.pixel_threshold, 'pixels': self.pixels and self.pixels.as_json(),
                  'segmentation': self.segmentation and self.segmentation.as_json()}
        return finite({key: value for key, value in values.items() if value is not None})


class Difference(NamedTuple):
    """AUROC of one score minus that of another against a group, from the same resamples."""
    group: str
    first: ScoreRow
    second: ScoreRow
    turned: bool                                 # the second is a baseline with an AUROC below 0.5, negated
    estimate: Estimate
    of: str = ''                                 # the class of a group of matched images

    @property
    def outcome(self) -> str:
        """What the interval says of the first."""
        return 'better' if self.estimate.low > 0 else 'worse' if self.estimate.high < 0 else 'undecided'

    @property
    def rival(self) -> str:
        return f'{self.second.name} negated' if self.turned else self.second.name

    @property
    def text(self) -> str:
        """The result for a primary score and the best baseline, as a sentence."""
        ours, theirs = (row.auroc(self.group).value for row in (self.first, self.second))
        verb = 'cannot be distinguished from' if self.outcome == 'undecided' else f'is {self.outcome} than'
        title, unmatched = group_title(self.group), ''
        if self.of:
            found, images = (self.first.flagged[group].total for group in (self.group, self.of))
            title = f"{self.of}, {found} of {images} images, each with a normal one of the same exposure"
            unmatched = f"; of all images {self.first.auroc(self.of).value:.3f}"
        return (f"{title}: the primary score {self.first.name} (AUROC {ours:.3f}{unmatched}) {verb} "
                f"the best trivial baseline, {self.rival} ({max(theirs, 1 - theirs):.3f}); difference "
                f"{self.estimate.low:+.3f} to {self.estimate.high:+.3f} (95 %, paired).")

    def as_json(self) -> dict[str, Any]:
        return {'group': self.group, 'first': self.first.name, 'second': self.second.name,
                'turned': self.turned, **self.estimate.as_json(), 'outcome': self.outcome}


@dataclass(frozen=True)
class Judgement:
    """All scores on the test images, of one run or of several; trivial baselines last."""
    rows: Mapping[str, ScoreRow]
    groups: Mapping[str, Group]                  # anomalous classes in their order, 'all', and matched ones
    judging: Judging
    warnings: Sequence[str] = ()

    @property
    def classes(self) -> list[str]:
        return [name for name, group in self.groups.items() if name != 'all' and not group.of]

    @property
    def matched(self) -> list[Group]:
        return [group for group in self.groups.values() if group.of]

    @property
    def shown_groups(self) -> list[str]:
        """Without 'all' where it is the only class again."""
        return [group for group in self.groups if group != 'all' or len(self.classes) != 1]

    @property
    def primaries(self) -> list[ScoreRow]:
        """The primary score of each run."""
        return [row for row in self.rows.values() if row.primary]

    @property
    def has_metrics(self) -> bool:
        """False where normal or anomalous test images are missing."""
        return all(row.metrics for row in self.rows.values())

    def title(self, group: str) -> str:
        """What a table against a group is about."""
        return (f"Normal ({self.images(self.groups[group].normal_name)}) against {group_title(group)} "
                f"({self.images(group)} test images)")

    def images(self, group: str) -> int:
        """The number of test images of a group, or of `normal` ones."""
        return next(iter(self.rows.values())).flagged[group].total

    def best_baseline(self, group: str) -> ScoreRow | None:
        """That with the AUROC farthest from 0.5, because a user may negate it; None without metrics."""
        rows = [row for row in self.rows.values() if row.kind == 'baseline' and group in row.metrics]
        return max(rows, key=lambda row: abs(row.auroc(group).value - 0.5), default=None)

    def differences(self, group: str) -> list[Difference]:
        """Between all primary scores, and from each to the best baseline; [] without metrics."""
        best = self.best_baseline(group)
        if not best:
            return []
        turned = best.auroc(group).value < 0.5
        rival = best.auroc(group).negated if turned else best.auroc(group)
        return [*(Difference(group, a, b, False, a.auroc(group) - b.auroc(group))
                  for a, b in combinations(self.primaries, 2)),
                *(Difference(group, row, best, turned, row.auroc(group) - rival, self.groups[group].of)
                  for row in self.primaries)]

    def as_json(self) -> dict[str, Any]:
        """`groups` and `scores` of metrics.json and comparison.json."""
        return {'groups': list(self.groups),
                'scores': {name: row.as_json() for name, row in self.rows.items()}}


def group_title(group: str) -> str:
    return 'all anomalous classes' if group == 'all' else group


# -------------------------------------------------------------------------------------------------- judging

def members(test: Any, name: str) -> Group:
    """The normal test images, and the anomalous ones of a class or of 'all'."""
    return Group(test.labels == 0, (test.labels == 1) & ((test.classes == name) | (name == 'all')))


def judge(test: Any, rows: Sequence[ScoreRow], judging: Judging, maps: MapConfig, seed: int,
          class_order: Sequence[str] = (), matched: Sequence[Group] = ()) -> Judgement:
    """Calls and metrics of every score against each group, and metrics of maps where lesion masks are known.

    `test` is a table of scores with the values of all `rows`; `matched` are further groups of its images.
    Resamples follow from the seed and the numbers of images alone: those of all scores, and of several runs
    on the same images, are paired.
    """
    order, warnings = list(class_order), not_finite('test', test)
    names = sorted(set(test.classes[test.labels == 1]), key=lambda name: ([*order, name].index(name), name))
    groups = {name: members(test, name) for name in [*names, 'all']}
    for group in matched:
        pairs, images = int(group.anomalous.sum()), int(groups[group.of].anomalous.sum())
        if pairs >= LEAST_PAIRS:
            groups[group.name] = group
        else:
            warnings.append(f"{group.of}: {pairs or 'none'} of {images} test images have a normal partner of "
                            f"the same exposure, too few for --match.")
    drawn, everything = {}, groups['all']
    if everything.normal.any() and everything.anomalous.any():
        drawn = {name: Resamples.draw(int(group.normal.sum()), int(group.anomalous.sum()),
                                      judging.num_bootstrap, seed) for name, group in groups.items()}
    else:
        warnings.insert(0, "the test part lacks normal or anomalous images: scores and calls only, no AUROC.")
    judged = {}
    for row in rows:
        scores, calls = make_finite(test.values[row.name]), flagged(test.values[row.name], row.threshold)
        judged[row.name] = replace(
            row, **judge_maps(test, row, judging, maps, seed),
            flagged={name: Share(int(calls[where].sum()), int(where.sum())) for one, group in groups.items()
                     for name, where in ((group.normal_name, group.normal), (one, group.anomalous))},
            metrics={name: evaluate_score(scores[groups[name].normal], scores[groups[name].anomalous],
                                          resamples) for name, resamples in drawn.items()})
    return Judgement(judged, groups, judging, warnings)


def judge_maps(test: Any, row: ScoreRow, judging: Judging, maps: MapConfig, seed: int) -> dict[str, Any]:
    """`pixels` and, for volumes, `segmentation` of a row; {} without a map or known lesions."""
    known, found, options = test.maps, {}, {'num_bootstrap': judging.num_bootstrap, 'seed': seed}
    if known is None or row.pixel_threshold is None or not known.masks.any():
        return {}
    if not known.masks.all():
        found['pixels'] = localize(known.masks, known.values[row.name], row.pixel_threshold,
                                   counted=known.counted, **options)
    if known.inside is not None:
        found['segmentation'] = judge_segmentations(known, row.name, test.entries, row.pixel_threshold, maps,
                                                    **options)
    return found


def join(judgements: Mapping[str, Judgement]) -> Judgement:
    """The rows of several runs on the same images under the names run/score; baselines last."""
    rows = [row if row.kind == 'baseline' else replace(row, name=f'{run}/{row.name}', run=run)
            for run, judgement in judgements.items() for row in judgement.rows.values()]
    return replace(next(iter(judgements.values())),
                   rows={row.name: row for row in sorted(rows, key=lambda row: row.kind == 'baseline')},
                   warnings=[f'{run}: {line}' for run, one in judgements.items() for line in one.warnings])


# ------------------------------------------------------------------------------------------------- warnings

def not_finite(part: str, table: Any) -> list[str]:
    """A line for each score that is not finite for some images of a part."""
    lines = []
    for name, values in table.values.items():
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            images, others = ('images have', ' and others') if len(broken) > 1 else ('image has', '')
            lines.append(f"{name}: {len(broken)} {part} {images} a score that is not finite, which counts as "
                         f"the most anomalous: {table.entries[broken[0]].id}{others}.")
    return lines


def validation_warnings(validation: Any, target_fpr: float) -> list[str]:
    """What limits the thresholds: too few normal validation images, and scores that are not finite."""
    n, least = len(validation.entries), metrics.smallest_sample(target_fpr)
    few = [] if n >= least else [
        f"{n} normal validation images cannot promise a false-positive rate of {100 * target_fpr:g} %, "
        f"which needs at least {least}. The thresholds are their largest scores, which promise "
        f"{100 * metrics.promised(n, target_fpr):.1f} %."]
    return few + not_finite('validation', validation)


def compare_normal(validation: Any, test: Any, number: int, seed: int) -> dict[str, dict[str, float]]:
    """AUROC of normal validation against normal test images for every score, with its 95 % interval from
    `number` resamples; empty without normal test images.

    It should be 0.5: these images differ by chance only. If they do not, thresholds do not hold in the test.
    """
    normal = test.labels == 0
    if not normal.any():
        return {}
    drawn = Resamples.draw(len(validation.entries), int(normal.sum()), number, seed)
    # made finite together, so that "the largest" is the same number in both parts
    both = {name: make_finite(np.concatenate([validation.values[name], values[normal]]))
            for name, values in test.values.items()}
    first = len(validation.entries)
    return {name: evaluate_score(values[:first], values[first:], drawn)['auroc'].as_json()
            for name, values in both.items()}


def broken_promises(judgement: Judgement, normal_parts: dict[str, dict[str, float]],
                    validation_images: int) -> list[str]:
    """A line where normal test images contradict the threshold of a primary score, or differ from those of
    validation in it, both beyond chance (95 %).
    """
    lines, target = [], judgement.judging.target_fpr
    for row in judgement.primaries if normal_parts else ():
        calls, drift = row.flagged['normal'], normal_parts[row.name]
        low, high = metrics.expected_calls(validation_images, target, calls.total)
        if not low <= calls.count <= high:
            lines.append(f"{row.name}: {100 * calls.count / calls.total:.1f} % of the normal test images "
                         f"are flagged; {100 * target:g} % is the target, and by chance it would be "
                         f"{100 * low / calls.total:.1f} to {100 * high / calls.total:.1f} % (95 %).")
        if not drift['low'] <= 0.5 <= drift['high']:
            side = 'higher' if drift['value'] > 0.5 else 'lower'
            lines.append(f"{row.name}: normal test images score {side} than normal validation images "
                         f"(AUROC {drift['value']:.3f} between them): the threshold does not hold for them.")
    return lines
