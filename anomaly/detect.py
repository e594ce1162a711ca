"""From a model and a data set to scores, thresholds, metrics and a report: what `--eval_mode anomaly` runs.

B images, C channels, H x W pixels, L latent groups. Training and validation images are normal; only the test
part has anomalous ones, and nothing is fitted, chosen or thresholded on it.
"""

import csv
import dataclasses
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import launch
from anomaly import metrics, report
from anomaly.baselines import BASELINES
from anomaly.scores import DensityScore, Passes, ScoreConfig, choose_scores, cross_fit
from datasets import eval_batches
from utils import UserError, finite, read_json, write_atomically, write_json

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
            passes = Passes(self.model, batch.x.to(self.device), draws=self.config.num_draws,
                            iw_samples=self.num_iw_samples, bits=self.data.pixels.bits, file_bytes=sizes,
                            noise=(self.seed, 'score', name, index))
            ready = [s for s in [*self.scores, *self.baselines]
                     if not (isinstance(s, DensityScore) and s.state is None)]
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


def detect(model: Any, data: Any, out: str | Path, config: ScoreConfig, *, num_iw_samples: int,
           batch_size: int, seed: int, command: str, run_folder: str | Path | None = None,
           log: Callable[[str], None] = print, workers: int = 0, device: torch.device | str | None = None,
           rank: int | None = None, world: int | None = None,
           gather: Callable[[list], list] = launch.gather) -> dict[str, Any]:
    """Scores validation and test images, sets thresholds on the former, judges on the latter, reports.

    Writes OUT/scores.csv, metrics.json (its other keys are kept), thresholds.json (also to `run_folder`),
    figures/ and report.html from rank 0, prints the table with `log`, and returns what stands under 'anomaly'
    in metrics.json; other ranks return {}. Noise depends on seed, batch and draw, so the numbers do not
    depend on the number of ranks, but they do on `batch_size`. Device, rank, world and `gather` (joins lists,
    on every rank) are those of launch if not given. Raises UserError if a part is empty or a score unknown.
    """
    started, out = time.perf_counter(), Path(out)
    rank, world = launch.rank() if rank is None else rank, launch.world() if world is None else world
    check_parts(data)
    model.eval()
    scores, warnings = choose_scores(config.scores, model, num_iw_samples)
    primary = choose_primary(config.primary_score, [s.name for s in scores])
    baselines = [make() for make in BASELINES.values()]
    scorer = Scorer(model, data, scores, baselines, config, primary, num_iw_samples=num_iw_samples,
                    batch_size=batch_size, seed=seed, workers=workers, rank=rank, world=world, gather=gather,
                    device=torch.device(device or launch.device()))
    fitted_on = scorer.fit_baselines()
    validation = scorer.score(data.val, 'val')
    fit_densities(scores, validation)
    test = scorer.score(data.test, 'test', with_cases=True)
    if rank:
        return {}
    thresholds = {name: metrics.threshold(validation.values[name], config.target_fpr) for name in test.values}
    settings = {'primary_score': primary, 'target_fpr': config.target_fpr, 'num_draws': config.num_draws,
                'num_iw_samples': num_iw_samples, 'batch_size': batch_size, 'seed': seed}
    about = {s.name: {'kind': 'model', 'about': s.about} for s in scores}
    about |= {s.name: {'kind': 'baseline', 'about': s.about} for s in baselines}
    judged, samples = judge(validation, test, thresholds, about, config, seed, data.anomalous_classes)
    warnings += few_images(len(data.val), config.target_fpr) + judged.pop('warnings')
    result = {**settings, 'dataset': getattr(data.config, 'dataset', ''), 'command': command,
              'versions': versions(), 'counts': count(data), 'baselines_fitted_on': fitted_on,
              'data': list(data.report), **judged, 'warnings': warnings}
    result['verdict'] = verdict(result, samples)
    result['seconds'] = round(time.perf_counter() - started, 1)
    result = finite(result)
    write_scores(out / 'scores.csv', {'val': validation, 'test': test}, validation, thresholds)
    kept = keep_thresholds(settings, thresholds, validation, scores)
    path = out / 'metrics.json'
    write_json(path, {**(read_json(path) if path.exists() else {}), 'anomaly': result})
    report.write(out, result, validation, test, thresholds)
    for folder in {out, Path(run_folder or out)}:
        write_json(folder / 'thresholds.json', kept)
    for line in [*report.text_tables(result), *warnings, *(v['text'] for v in result['verdict']),
                 f"report: {out / 'report.html'}"]:
        log(line)
    return result


def check_parts(data: Any) -> None:
    """Raises UserError unless there are normal training and validation images, and test images."""
    for name in ('train', 'val', 'test'):
        if not len(getattr(data, name)):
            raise UserError(f"the {name} part is empty: anomaly detection needs normal training and "
                            f"validation images, and test images. Check --val_fraction, --test_fraction and "
                            f"--anomalous_classes.")
    for name in ('train', 'val'):
        entries = getattr(data, name).entries
        anomalous = [entry.id for entry in entries if entry.label]
        if anomalous:
            raise UserError(f"{len(anomalous)} of {len(entries)} images of the {name} part are anomalous, "
                            f"first {anomalous[0]}: only test images may be.")


def choose_primary(name: str, computed: list[str]) -> str:
    """The score of the figures: the one that the user names, else nelbo, else the first that is computed."""
    if not computed:
        raise UserError("no score fits this model: see the lines above, or name one with --scores.")
    if name and name not in computed:
        raise UserError(f"--primary_score {name} is not among the computed scores: {', '.join(computed)}.")
    return name or ('nelbo' if 'nelbo' in computed else computed[0])


def fit_densities(scores: list, validation: Scored) -> None:
    """Fits the density scores on all validation images and adds their cross-fitted validation scores."""
    patients = [getattr(entry, 'patient', '') or entry.id for entry in validation.entries]
    for score in scores:
        if isinstance(score, DensityScore):
            validation.values[score.name] = cross_fit(score, validation.features, patients)


def judge(validation: Scored, test: Scored, thresholds: dict[str, float], about: dict[str, dict],
          config: ScoreConfig, seed: int,
          class_order: Any) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Metrics and calls of every score against each anomalous class and all, and resampled AUROCs."""
    labels, classes, warnings = test.labels, test.classes, []
    names = sorted(set(classes[labels == 1]), key=lambda c: (list(class_order) + [c]).index(c))
    groups = {**{name: (labels == 1) & (classes == name) for name in names}, 'all': labels == 1}
    normal, table = labels == 0, {}
    judgeable = normal.any() and (labels == 1).any()
    if not judgeable:
        warnings.append("the test part lacks normal or anomalous images: scores and calls only, no AUROC.")
    resamples = {
        group: metrics.Resamples.draw(int(normal.sum()), int(chosen.sum()), config.num_bootstrap, seed)
        for group, chosen in groups.items()} if judgeable else {}
    samples: dict[str, dict[str, np.ndarray]] = {group: {} for group in resamples}
    for name, raw in test.values.items():
        scores, bad = metrics.make_finite(raw)
        for part, values, ids in (('test', raw, test), ('validation', validation.values[name], validation)):
            broken = np.flatnonzero(~np.isfinite(values))
            if len(broken):
                several = len(broken) > 1
                warnings.append(f"{name}: {len(broken)} {part} image{'s have' if several else ' has'} a "
                                f"score that is not finite, which counts as the most anomalous: "
                                f"{ids.entries[broken[0]].id}{' and others' if several else ''}.")
        called = bad | (scores > thresholds[name])
        row = {**about[name], 'threshold': thresholds[name], 'metrics': {}, 'called': {
            'normal': [int(called[normal].sum()), int(normal.sum())],
            **{group: [int(called[chosen].sum()), int(chosen.sum())] for group, chosen in groups.items()}}}
        for group, drawn in resamples.items():
            chosen = groups[group]
            row['metrics'][group], resampled = metrics.evaluate_score(scores[normal], scores[chosen], drawn)
            samples[group][name] = resampled['auroc']
        table[name] = row
    pixel_metrics(table, test)
    return {'groups': list(groups), 'scores': table, 'warnings': warnings}, samples


def pixel_metrics(table: dict[str, dict], test: Scored) -> None:
    """Adds AUROC and AUPRC over pixels to every score with a map, where test images have lesion masks."""
    for name, (mask, values) in test.pixels.items():
        if mask.any() and not mask.all():
            values, _ = metrics.make_finite(values)
            table[name]['pixels'] = {'auroc': float(roc_auc_score(mask, values)),
                                     'auprc': float(average_precision_score(mask, values)),
                                     'lesion_share': float(mask.mean())}


def verdict(result: dict[str, Any], samples: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """For every group, whether the primary score beats the best baseline, by a paired bootstrap of AUROC."""
    verdicts, primary, table = [], result['primary_score'], result['scores']
    for group in report.shown_groups(result) if samples else ():
        drawn = samples[group]
        value = {name: row['metrics'][group]['auroc']['value'] for name, row in table.items()}
        # A user may turn a baseline round (darker, not brighter), so it counts by its distance from 0.5.
        best = max((n for n in table if table[n]['kind'] == 'baseline'), key=lambda n: abs(value[n] - 0.5))
        turned = value[best] < 0.5
        low, high = np.percentile(drawn[primary] - (1 - drawn[best] if turned else drawn[best]), [2.5, 97.5])
        outcome = 'better' if low > 0 else 'worse' if high < 0 else 'undecided'
        says = 'cannot be told from' if outcome == 'undecided' else f'is {outcome} than'
        named = f"{best}{' turned round' if turned else ''} ({max(value[best], 1 - value[best]):.3f})"
        text = (f"{report.group_title(group)}: the primary score {primary} (AUROC {value[primary]:.3f}) "
                f"{says} the best trivial baseline, {named}; difference {low:+.3f} to {high:+.3f} "
                f"(95 %, paired).")
        verdicts.append({'group': group, 'baseline': best, 'turned': turned, 'low': float(low),
                         'high': float(high), 'outcome': outcome, 'text': text})
    return verdicts


def few_images(n: int, target_fpr: float) -> list[str]:
    """A line if n validation images are too few for the false-positive rate that the user wants."""
    least = metrics.smallest_sample(target_fpr)
    return [] if n >= least else [
        f"{n} normal validation images cannot promise a false-positive rate of {100 * target_fpr:g} %: "
        f"that needs at least {least}. The thresholds are their largest scores, which promise "
        f"{100 / (n + 1):.1f} %."]


def count(data: Any) -> dict[str, dict[str, int]]:
    """Images of every class in every part."""
    counts: dict[str, dict[str, int]] = {}
    for name in ('train', 'val', 'test'):
        counts[name] = {}
        for entry in getattr(data, name).entries:
            counts[name][entry.class_name] = counts[name].get(entry.class_name, 0) + 1
    return counts


def versions() -> dict[str, str]:
    import sklearn
    return {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__,
            'scikit-learn': sklearn.__version__}


def keep_thresholds(settings: dict, thresholds: dict[str, float], validation: Scored,
                    scores: list) -> dict[str, Any]:
    """What scoring a new image needs: thresholds, validation scores for percentiles, and fitted densities."""
    return finite({**settings, 'num_validation_images': len(validation.entries), 'scores': {
        name: {'threshold': value, 'normal_validation': sorted(validation.values[name].tolist())}
        for name, value in thresholds.items()}, 'fitted': {
        score.name: score.state for score in scores if isinstance(score, DensityScore)}})


def write_scores(path: Path, parts: dict[str, Scored], validation: Scored,
                 thresholds: dict[str, float]) -> None:
    """scores.csv: id, class, label, part; value, percentile of normal validation and call of each score."""
    def write(temporary: Path) -> None:
        with temporary.open('w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['id', 'class', 'label', 'part'] + [
                column for name in thresholds for column in (name, f'{name}_percentile', f'{name}_called')])
            for part, scored in parts.items():
                columns: list[list[str]] = []
                for name, value in thresholds.items():
                    scores = scored.values[name]
                    columns.append([repr(v) for v in scores.tolist()])
                    columns.append([f'{p:.2f}' for p in metrics.percentile(scores, validation.values[name])])
                    columns.append([str(int(c)) for c in ~np.isfinite(scores) | (scores > value)])
                for entry, *cells in zip(scored.entries, *columns, strict=True):
                    writer.writerow([entry.id, entry.class_name, entry.label, part, *cells])
    write_atomically(path, write)
