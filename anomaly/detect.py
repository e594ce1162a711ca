"""From a model and a data set to scores, thresholds, metrics and a report: what `--eval_mode anomaly` runs.

B images, C channels, H x W pixels, L latent groups. Training and validation images are normal; only the test
part has anomalous ones, and nothing is fitted, chosen or thresholded on it.
"""

import csv
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from anomaly import metrics
from anomaly.baselines import BASELINES
from anomaly.density import DensityScore, cross_fit
from anomaly.maps import segmentation
from anomaly.maps.localization import localize
from anomaly.maps.nifti import write_cases
from anomaly.maps.postprocessing import pixel_threshold
from anomaly.report import page as report
from anomaly.report.datacard import compare_normal, describe
from anomaly.report.figures import read_history
from anomaly.report.gallery import MOST_VOLUMES, choose_cases, spacing
from anomaly.scores import ScoreConfig, choose_scores
from anomaly.scoring import Scored, Scorer
from datasets import volume_flags
from distributed import launch
from utils import UserError, fingerprint, finite, read_json, write_atomically, write_json

# fields of ScoreConfig that the scores, maps and calls of an image depend on
SETTINGS = ('target_fpr', 'num_draws', 'iw_samples_elbo', 'iw_samples_lk', 'llr_noise', 'regret_steps',
            'regret_learning_rate', 'msma_levels', 'msma_min_timestep', 'msma_max_timestep', 'msma_schedule',
            'msma_denoise', 'msma_map', 'target_pixel_fpr', 'map_smoothing', 'body_mask', 'seg_erosion',
            'seg_min_voxels', 'seg_dilation')


def detect(model: Any, data: Any, out: str | Path, config: ScoreConfig, *, num_iw_samples: int,
           batch_size: int, seed: int, command: str, run_folder: str | Path | None = None,
           log: Callable[[str], None] = print, workers: int = 0, device: torch.device | str | None = None,
           rank: int | None = None, world: int | None = None,
           gather: Callable[[list], list] = launch.gather, findings: Sequence[str] = ()) -> dict[str, Any]:
    """Scores validation and test images, sets thresholds on the former, judges on the latter, reports.

    Writes OUT/scores.csv, metrics.json (its other keys are kept), thresholds.json (also to `run_folder`, if
    it may be written; its log gives the training curves), figures/ and report.html, of volumes with known
    lesions segmentation.csv, and maps/ of the volumes in the report, from rank 0, prints the table with
    `log`, and returns what stands under 'anomaly' in metrics.json; other ranks return {}. Noise depends on
    seed, batch and draw, so the numbers do not depend on the number of ranks, but they do on `batch_size`.
    Device, rank, world and `gather` (joins lists, on every rank) are those of launch if not given. `findings`
    of an audit stand in the report. Raises UserError if a part is empty or a score unknown.
    """
    started, out = time.perf_counter(), Path(out)
    rank, world = launch.rank() if rank is None else rank, launch.world() if world is None else world
    scores, warnings = choose_scores(config.scores, model, num_iw_samples)
    published = getattr(model, 'primary_score', '')
    primary = choose_primary(config.primary_score, published, [s.name for s in scores])
    baselines = [make() for make in BASELINES.values()]
    found = examine(model, data, scores, baselines, primary, config, num_iw_samples=num_iw_samples,
                    batch_size=batch_size, seed=seed, workers=workers, rank=rank, world=world, gather=gather,
                    device=torch.device(device or launch.device()))
    if found is None:
        return {}
    validation, test, thresholds, pixel_thresholds, judged, samples, fitted_on, segmented = found
    settings = {'primary_score': primary, 'num_iw_samples': num_iw_samples, 'batch_size': batch_size,
                'seed': seed, **{name: getattr(config, name) for name in SETTINGS}}
    warnings += few_images(len(data.val), config.target_fpr) + judged.pop('warnings')
    result = {**settings, 'dataset': getattr(data.config, 'dataset', ''), 'command': command,
              'versions': versions(), 'baselines_fitted_on': fitted_on,
              **describe(data), 'findings': list(findings), **judged, 'warnings': warnings}
    result['verdict'] = verdict(result, samples)
    result['normal_parts'] = compare_normal(validation, test, config.num_bootstrap, seed)
    result['seconds'] = round(time.perf_counter() - started, 1)
    result = finite(result)
    write_scores(out / 'scores.csv', {'val': validation, 'test': test}, validation, thresholds)
    if segmented:
        segmentation.write_segmentation(out / 'segmentation.csv', segmented)
    prepared = settings | {'weights': fingerprint(model), 'spacing': [], 'volumes': {}}
    if len(data.shape) == 4:
        prepared |= {'spacing': spacing(validation.entries[0]).tolist(), 'volumes': volume_flags(data.config)}
    kept = keep_thresholds(prepared, thresholds, pixel_thresholds, validation, scores)
    path = out / 'metrics.json'
    write_json(path, {**(read_json(path) if path.exists() else {}), 'anomaly': result})
    run_folder = Path(run_folder or out)
    report.write(out, result, validation, test, thresholds, config.num_cases, read_history(run_folder))
    write_cases(out / 'maps', test.cases, test.entries, primary)
    for folder in {out, run_folder} if os.access(run_folder, os.W_OK) else {out}:
        write_json(folder / 'thresholds.json', kept)
    for line in [*report.text_tables(result), *warnings, *(v['text'] for v in result['verdict']),
                 f"report: {out / 'report.html'}"]:
        log(line)
    return result


class Examined(NamedTuple):
    """What the scores of a model say of the parts of a data set, and how well."""
    validation: Scored
    test: Scored
    thresholds: dict[str, float]
    pixel_thresholds: dict[str, float]
    judged: dict[str, Any]                             # groups, scores and warnings, as in metrics.json
    samples: dict[str, dict[str, np.ndarray]]          # group -> score -> AUROC of every resample (R,)
    fitted_on: int                                     # training images behind the baselines
    segmented: list[dict[str, Any]]                    # a row a volume whose lesions are known: primary score


def examine(model: Any, data: Any, scores: list, baselines: list, primary: str, config: ScoreConfig, *,
            num_iw_samples: int, batch_size: int, seed: int, workers: int, rank: int, world: int,
            gather: Callable[[list], list], device: torch.device) -> Examined | None:
    """Scores validation and test images, sets thresholds on the former and judges on the latter.

    Resamples follow from the seed and the numbers of images: those of two models on the same images are
    paired. None on ranks above 0.
    """
    check_parts(data)
    model.eval()
    scorer = Scorer(model, data, scores, baselines, config, primary, num_iw_samples=num_iw_samples,
                    batch_size=batch_size, seed=seed, workers=workers, rank=rank, world=world, gather=gather,
                    device=device)
    fitted_on = scorer.fit_baselines()
    validation = scorer.score(data.val, 'val')
    fit_densities(scores, validation)
    scorer.add_density_maps(data.val, 'val', validation)
    pixel_thresholds = choose_pixel_thresholds(validation, config.target_pixel_fpr)
    validation.maps = None                                          # their memory is needed for the test part
    test = scorer.score(data.test, 'test')
    most = config.num_gallery if len(data.shape) == 3 else min(config.num_gallery, MOST_VOLUMES)
    places = choose_cases(test.values[primary], test.labels, config.num_cases, most)
    test.cases = scorer.cases(data.test, 'test', places)
    if rank:
        return None
    thresholds = {name: metrics.threshold(validation.values[name], config.target_fpr) for name in test.values}
    about = {s.name: {'kind': 'model', 'about': s.about} for s in scores}
    about |= {s.name: {'kind': 'baseline', 'about': s.about} for s in baselines}
    judged, samples = judge(validation, test, thresholds, about, config, seed, data.anomalous_classes)
    judged['warnings'] += scorer.warnings
    add_pixels(judged['scores'], test, pixel_thresholds, config.num_bootstrap, seed)
    segmented = add_segmentations(judged['scores'], test, pixel_thresholds, config, seed)
    test.maps = None
    return Examined(validation, test, thresholds, pixel_thresholds, judged, samples, fitted_on,
                    segmented.get(primary, []))


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


def choose_primary(name: str, published: str, computed: list[str]) -> str:
    """The score of the figures: the one that the user names; else, if it is computed, the one that the family
    is `published` with; else nelbo; else the first that is computed.
    """
    if not computed:
        raise UserError("no score fits this model: see the lines above, or name one with --scores.")
    if name and name not in computed:
        raise UserError(f"--primary_score {name} is not among the computed scores: {', '.join(computed)}.")
    return name or next((s for s in (published, 'nelbo') if s in computed), computed[0])


def fit_densities(scores: list, validation: Scored) -> None:
    """Fits the density scores on all validation images and adds their cross-fitted validation scores."""
    patients = [getattr(entry, 'patient', '') or entry.id for entry in validation.entries]
    for score in scores:
        if isinstance(score, DensityScore):
            try:
                features = validation.features[score.needs]
                validation.values[score.name] = cross_fit(score.density, features, patients)
            except UserError as error:
                raise UserError(f"score {score.name}: {error}") from None


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
            estimates = metrics.evaluate_score(scores[normal], scores[chosen], drawn)
            row['metrics'][group] = {metric: estimate.as_json() for metric, estimate in estimates.items()}
            samples[group][name] = estimates['auroc'].resamples
        table[name] = row
    return {'groups': list(groups), 'scores': table, 'warnings': warnings}, samples


def choose_pixel_thresholds(validation: Scored, target_fpr: float) -> dict[str, float]:
    """The threshold of the pixels of every score with a map, from normal validation images alone; of volumes
    from where segmentations may begin.
    """
    maps = validation.maps
    if maps is None:
        return {}
    counted = maps.counted if maps.inside is None else maps.inside
    return {name: pixel_threshold(values, target_fpr, counted) for name, values in maps.values.items()}


def add_pixels(table: dict[str, dict], test: Scored, thresholds: dict[str, float], num_bootstrap: int,
               seed: int) -> None:
    """Adds its pixel threshold to every score with a map, and pixel metrics where lesion masks are known."""
    maps = test.maps
    for name, value in thresholds.items():
        table[name]['pixel_threshold'] = value
        if maps is not None and maps.masks.any() and not maps.masks.all():
            table[name]['pixels'] = localize(maps.masks, maps.values[name], value, counted=maps.counted,
                                             num_bootstrap=num_bootstrap, seed=seed).as_json()


def add_segmentations(table: dict[str, dict], test: Scored, thresholds: dict[str, float], config: ScoreConfig,
                      seed: int) -> dict[str, list[dict[str, Any]]]:
    """Adds metrics of the segmentations by every score with a map, where volumes have known lesions; returns
    a row of each volume, by score.
    """
    maps, rows = test.maps, {}
    if maps is None or maps.inside is None or not maps.masks.any():
        return {}
    for name, value in thresholds.items():
        found = segmentation.judge(maps, name, test.entries, value, config,
                                   num_bootstrap=config.num_bootstrap, seed=seed)
        table[name]['segmentation'], rows[name] = found.as_json(), found.rows
    return rows


def verdict(result: dict[str, Any], samples: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """For every group, whether the primary score beats the best baseline, by a paired bootstrap of AUROC."""
    verdicts, primary, table = [], result['primary_score'], result['scores']
    for group in report.shown_groups(result) if samples else ():
        drawn = samples[group]
        value = {name: row['metrics'][group]['auroc']['value'] for name, row in table.items()}
        best, turned = best_baseline(table, group)
        found = metrics.paired_difference(drawn[primary], 1 - drawn[best] if turned else drawn[best])
        low, high, outcome = found['low'], found['high'], found['outcome']
        says = 'cannot be told from' if outcome == 'undecided' else f'is {outcome} than'
        named = f"{best}{' turned round' if turned else ''} ({max(value[best], 1 - value[best]):.3f})"
        text = (f"{report.group_title(group)}: the primary score {primary} (AUROC {value[primary]:.3f}) "
                f"{says} the best trivial baseline, {named}; difference {low:+.3f} to {high:+.3f} "
                f"(95 %, paired).")
        verdicts.append({'group': group, 'baseline': best, 'turned': turned, **found, 'text': text})
    return verdicts


def best_baseline(table: dict[str, dict], group: str) -> tuple[str, bool]:
    """The baseline whose AUROC is farthest from 0.5, and whether it is below: a user may turn it round."""
    value = {name: row['metrics'][group]['auroc']['value'] for name, row in table.items()
             if row['kind'] == 'baseline'}
    best = max(value, key=lambda name: abs(value[name] - 0.5))
    return best, value[best] < 0.5


def few_images(n: int, target_fpr: float) -> list[str]:
    """A line if n validation images are too few for the false-positive rate that the user wants."""
    least = metrics.smallest_sample(target_fpr)
    return [] if n >= least else [
        f"{n} normal validation images cannot promise a false-positive rate of {100 * target_fpr:g} %: "
        f"that needs at least {least}. The thresholds are their largest scores, which promise "
        f"{100 / (n + 1):.1f} %."]


def versions() -> dict[str, str]:
    import sklearn
    return {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__,
            'scikit-learn': sklearn.__version__}


def keep_thresholds(settings: dict, thresholds: dict[str, float], pixel_thresholds: dict[str, float],
                    validation: Scored, scores: list) -> dict[str, Any]:
    """What scoring a new image needs: thresholds, validation scores for percentiles, and fitted densities."""
    return finite({**settings, 'num_validation_images': len(validation.entries), 'scores': {
        name: {'threshold': value,
               **({'pixel_threshold': pixel_thresholds[name]} if name in pixel_thresholds else {}),
               'normal_validation': sorted(validation.values[name].tolist())}
        for name, value in thresholds.items()}, 'fitted': {
        score.name: {name: value.tolist() for name, value in score.density.state().items()}
        for score in scores if isinstance(score, DensityScore)}})


def titles(names: Iterable[str]) -> list[str]:
    """The columns of scores.csv that `cells` fills, three a score."""
    return [title for name in names for title in (name, f'{name}_percentile', f'{name}_called')]


def cells(scores: np.ndarray, validation: np.ndarray, threshold: float) -> list[list[str]]:
    """Of N scores (N,), each one's value, percentile among those of normal validation images, and call."""
    return [[repr(v) for v in scores.tolist()],
            [f'{p:.2f}' for p in metrics.percentile(scores, validation)],
            [str(int(c)) for c in ~np.isfinite(scores) | (scores > threshold)]]


def write_scores(path: Path, parts: dict[str, Scored], validation: Scored,
                 thresholds: dict[str, float]) -> None:
    """scores.csv: id, class, label, part; value, percentile of normal validation and call of each score."""
    def write(temporary: Path) -> None:
        with temporary.open('w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['id', 'class', 'label', 'part', *titles(thresholds)])
            for part, scored in parts.items():
                columns: list[list[str]] = []
                for name, value in thresholds.items():
                    columns += cells(scored.values[name], validation.values[name], value)
                for entry, *row in zip(scored.entries, *columns, strict=True):
                    writer.writerow([entry.id, entry.class_name, entry.label, part, *row])
    write_atomically(path, write)
