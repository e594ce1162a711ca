"""From a model and a data set to scores, thresholds, metrics and a report: the mode `anomaly`.

Training and validation images are normal; only the test part has anomalous ones, and nothing is fitted,
chosen or thresholded on it. Several runs give one score, the sum of z-scores of theirs, that is judged and
reported like that of one run. A score of one of several runs is named run/score.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from anomaly import metrics
from anomaly.baselines import BASELINES, EXPOSURE, fit_baselines
from anomaly.choice import choose_map, sum_score
from anomaly.config import Judging, MapConfig, Showing
from anomaly.judge import Judgement, broken_promises, compare_normal, join, judge, validation_warnings
from anomaly.maps import segmentation
from anomaly.maps.nifti import write_cases
from anomaly.matching import match
from anomaly.normal import Normal
from anomaly.report import page
from anomaly.report.figures import read_history
from anomaly.report.gallery import MOST_VOLUMES, choose_cases, original, spacing
from anomaly.report.provenance import about_run, code_and_date
from anomaly.runs import Chosen, Run, check_same_validation, choose, on_common_images
from anomaly.scores import Score, Scoring, Selection
from anomaly.scoring import Table, part_batches, pictures, score_images, select_maps
from distributed import launch
from readers.config import volume_flags
from readers.parts import SomeOf
from readers.split import count
from storage.checkpoint import fingerprint
from storage.provenance import versions
from utils import UserError, finite, mix_seed, naming, read_flags, read_json, write_csv, write_json


@dataclass(frozen=True)
class Settings:
    """The flags of the mode anomaly, the seed in `scoring` included."""
    selection: Selection = field(default_factory=Selection)
    scoring: Scoring = field(default_factory=Scoring)
    maps: MapConfig = field(default_factory=MapConfig)
    judging: Judging = field(default_factory=Judging)
    showing: Showing = field(default_factory=Showing)
    batch_size: int = 100
    command: str = ''

    @classmethod
    def read(cls, args: Any, **others: Any) -> Settings:
        """From the flags of a command."""
        kinds = (Selection, Scoring, MapConfig, Judging, Showing)
        return cls(*(read_flags(kind, args) for kind in kinds), **others)

    def facts(self) -> dict[str, Any]:
        """What results state of how they were made."""
        return {**asdict(self.scoring), **asdict(self.maps), **asdict(self.judging),
                'batch_size': self.batch_size, 'command': self.command, 'versions': versions()}


# ------------------------------------------------------------------------------------------------- evaluation

class Evaluated(NamedTuple):
    """What a model says of a data set, and what its validation images teach."""
    normal: Normal
    validation: Table
    test: Table
    judgement: Judgement | None          # None on ranks above 0
    shown: Score | None                  # whose map is shown


def evaluate(model: Any, data: Any, scores: list[Score], primary: str, settings: Settings,
             first: Evaluated | None = None) -> Evaluated:
    """Scores validation and test images, learns from the former what is normal and judges the latter.

    Resamples follow from the seed and the numbers of images: those of several models are paired. If several
    models share test images, only the `first` has the baselines and the pairs of --match, which all share.
    Raises UserError if a part is empty or holds anomalous images that it should not.
    """
    check_parts(data)
    learned = training_part(data.train, settings)
    batches = torch.arange(len(learned)).split(settings.batch_size)          # for what is in memory meanwhile
    baselines = [] if first else fit_baselines(torch.cat([learned.items(rows).x for rows in batches]))
    scoring, judging, warnings = settings.scoring, settings.judging, []
    scores = [replace(one, about=one.explained(model, scoring),
                      map=one.map if one.has_map(model, scoring) else None) for one in scores]
    every, shown = [*scores, *baselines], choose_map(primary, scores, model, scoring)
    with_maps = sum(one.map is not None for one in every)

    def score(part: Any, title: str, scores: Sequence[Score], densities: dict[str, Any]) -> Table:
        mapped, lines = select_maps(part.entries, with_maps * any(one.map for one in scores),
                                    math.prod(data.shape[1:]), scoring.seed)
        warnings.extend(f'{title}: {line}' for line in lines)
        batches = part_batches(part, settings.batch_size, title, getattr(data.config, 'num_workers', 0))
        table = score_images(model, batches, scores, scoring, densities, mapped, settings.maps)
        return table.select([entry.id for entry in part.entries])

    # densities have maps only when they are fitted
    validation = score(data.val, 'val', [replace(s, map=None) if s.density else s for s in every], {})
    training = None
    learners = [replace(s, map=None) for s in scores if s.density and s.density.takes_training]
    if learners and judging.density_images == 'auto':
        training = score(learned, 'train', learners, {})
    normal = Normal.fit(validation, scores, primary, scoring, settings.maps, judging, training)
    if of_densities := [replace(s, features=None) for s in scores if s.density and s.map]:
        late = score(data.val, 'val', of_densities, normal.densities).maps
        if validation.maps and late:
            late.values.update(validation.maps.values)
        validation.maps = late or validation.maps
    normal.fit_pixels(validation, shown.name if shown else '')
    validation.maps = None                               # their memory is needed for the test part
    described = [EXPOSURE] if settings.judging.match and not first else []
    test = normal.apply(score(data.test, 'test', [*every, *described], normal.densities), scores)
    judgement = None
    if launch.is_main():
        rows = [*normal.rows(scores, 'model'), *normal.rows(baselines, 'baseline')]
        pairs = first.judgement.matched if first else (
            match(test.features[EXPOSURE.name], test.labels, test.classes) if described else [])
        judgement = judge(test, rows, judging, settings.maps, scoring.seed, data.anomalous_classes, pairs)
        judgement = replace(judgement, warnings=[*validation_warnings(validation, judging.target_fpr),
                                                 *judgement.warnings, *dict.fromkeys(warnings),
                                                 *normal.notes])
    test.maps = None
    return Evaluated(normal, validation, test, judgement, shown)


def check_parts(data: Any) -> None:
    """Raises UserError unless there are normal training and validation images, and test images."""
    for name in ('train', 'val', 'test'):
        entries = getattr(data, name).entries
        if not len(entries):
            raise UserError(f"the {name} part is empty: anomaly detection needs normal training and "
                            f"validation images, and test images. Check --val_fraction, --test_fraction and "
                            f"--anomalous_classes.")
        anomalous = [entry.id for entry in entries if entry.label]
        if anomalous and name != 'test':
            raise UserError(f"{len(anomalous)} of {len(entries)} images of the {name} part are anomalous, "
                            f"first {anomalous[0]}: only test images may be.")


def training_part(part: Any, settings: Settings) -> Any:
    """The training images that are used, at most `max_train_images`; drawn, as files are often sorted."""
    number, most = len(part), settings.judging.max_train_images
    if number <= most:
        return part
    random = np.random.default_rng(mix_seed(settings.scoring.seed, 'training images'))
    return SomeOf(part, [part.entries[row].id for row in sorted(random.permutation(number)[:most])])


# ---------------------------------------------------------------------------------------------- several runs

@contextmanager
def on_device(model: Any) -> Iterator[Any]:
    """The model, which is on the device within the block alone: others may need its memory."""
    try:
        yield model.to(launch.device())
    finally:
        model.cpu()


def evaluate_all(runs: Sequence[Run], chosen: Sequence[Chosen], settings: Settings) -> dict[str, Evaluated]:
    """By its name, each run with the scores that are chosen for it, the first that counts as primary."""
    found: dict[str, Evaluated] = {}
    for run, (scores, own) in zip(runs, chosen):
        with naming(run.name), on_device(run.model) as model:
            found[run.name] = evaluate(model, run.data, scores, own[0], settings,
                                       next(iter(found.values()), None))
    return found


def join_tables(tables: Mapping[str, Table]) -> Table:
    """The tables of runs on the same images as one, with scores named run/score, but for the baselines."""
    first = next(iter(tables.values()))
    ids = [entry.id for entry in first.entries]
    values = {score if score in BASELINES else f'{run}/{score}': column for run, table in tables.items()
              for score, column in table.select(ids).values.items()}
    return replace(first, values=values, features={}, seconds=sum(one.seconds for one in tables.values()))


def add_up(found: Mapping[str, Evaluated], terms: Sequence[tuple[str, str]], settings: Settings) -> Evaluated:
    """The tables of several runs as one, with the sum of the scores `terms`, (run, score), judged."""
    named = lambda part: {f'{name}/{key}': value for name, one in found.items() for key, value in part(one)}
    total = sum_score(['/'.join(term) for term in terms])
    validation, test = (join_tables({name: getattr(one, part) for name, one in found.items()})
                        for part in ('validation', 'test'))
    normal = Normal.fit(validation, [total], total.name, settings.scoring, settings.maps, settings.judging)
    normal.pixel_thresholds = named(lambda one: one.normal.pixel_thresholds.items())
    normal.notes = [f'{name}: {note}' for name, one in found.items() for note in one.normal.notes]
    shown = next((replace(one.shown, name=f'{name}/{one.shown.name}') for name, one in found.items()
                  if one.shown), None)
    normal.apply(test, [total])
    judgement = None
    if launch.is_main():
        of_runs = join({name: one.judgement for name, one in found.items()})
        judged = judge(test, normal.rows([total], 'model'), settings.judging, settings.maps,
                       settings.scoring.seed, of_runs.classes, of_runs.matched)
        others = {name: replace(row, primary=False) for name, row in of_runs.rows.items()}
        judgement = replace(of_runs, rows={**judged.rows, **others})
    return Evaluated(normal, validation, test, judgement, shown)


def draw_cases(runs: Sequence[Run], of_runs: Mapping[str, Evaluated], found: Evaluated,
               settings: Settings) -> list[Any]:
    """The pictures of the test images that are shown, by falling primary score, by the run that has the map
    that is shown; on rank 0.
    """
    showing, run = settings.showing, next((run for run in runs if of_runs[run.name].shown), runs[0])
    most = showing.num_gallery if len(run.data.shape) == 3 else min(showing.num_gallery, MOST_VOLUMES)
    places = choose_cases(found.test.values[found.normal.primary_score], found.test.labels,
                          showing.num_cases, most)
    ids = [found.test.entries[place].id for place in places]
    batches = part_batches(SomeOf(run.data.test, ids), settings.batch_size, 'pictures')
    with on_device(run.model) as model:
        cases = dict(launch.gather([(entry.id, case) for entry, case in pictures(
            model, batches, of_runs[run.name].shown, of_runs[run.name].normal)]))
    if not launch.is_main():
        return []
    paths = [getattr(found.test.entries[place], 'path', '') for place in places]
    return [cases[i]._replace(place=place, original=original(path, run.data.shape, run.data.config))
            for i, place, path in zip(ids, places, paths)]


# ----------------------------------------------------------------------------------------------------- mode

def detect(runs: Sequence[Run], out: str | Path, settings: Settings, log: Callable[[str], None] = print,
           findings: Sequence[str] = ()) -> dict[str, Any]:
    """Scores validation and test images, sets thresholds on the former, judges on the latter, and reports.

    Writes OUT/scores.csv, metrics.json (its other keys are kept), thresholds.json (also to the folder of a
    single run, if it is writable; its log gives the training curves), figures/ and report.html, for volumes
    with known lesions segmentation.csv, and maps/ of the volumes in the report, from rank 0; prints the
    tables with `log`, and returns what stands under 'anomaly' in metrics.json; other ranks return {}.
    `findings` of an audit stand in the report. Raises UserError if a part is empty, a score unknown, or if
    runs do not fit together.
    """
    started, out = time.perf_counter(), Path(out)
    runs, left_out = on_common_images(runs)
    check_same_validation(runs)
    chosen, lacking = choose(runs, settings.selection, added_up=True)
    of_runs = evaluate_all(runs, chosen, settings)
    terms = [(run.name, name) for run, (_, own) in zip(runs, chosen) for name in own]
    found = add_up(of_runs, terms, settings) if len(runs) > 1 else of_runs['']
    scored = time.perf_counter()
    found.test.cases = draw_cases(runs, of_runs, found, settings)
    if not launch.is_main():
        return {}
    run_folder = Path(runs[0].path) if len(runs) == 1 else out
    if len(runs) == 1:
        found.normal.preparation = preparation_of(runs[0].data)
        found.normal.weights = fingerprint(runs[0].model)
    result = summarize(runs[0].data, found, settings, findings, [*left_out, *lacking])
    result |= {'models': [about_run(run.model, run.path) for run in runs],
               'seconds': round(time.perf_counter() - started, 1)}
    if len(runs) > 1:
        result['runs'] = {run.name: run.path for run in runs}
    write(out, result, found, settings, run_folder)
    log(f'scoring took {scored - started:.0f} s, the report {time.perf_counter() - scored:.0f} s')
    serious = sum(line.startswith('Serious') for line in findings)
    of_audit = f"{count(serious, 'serious finding')} of the audit of the data: see the report"
    for line in [*page.text_tables(found.judgement), *result['warnings'],
                 *(row['text'] for row in result['verdict']), *([of_audit] if serious else []),
                 f"report: {out / 'report.html'}"]:
        log(line)
    return result


def summarize(data: Any, found: Evaluated, settings: Settings, findings: Sequence[str],
              left_out: Sequence[str]) -> dict[str, Any]:
    """What stands under 'anomaly' in metrics.json."""
    judgement = found.judgement
    normal_parts = compare_normal(found.validation, found.test, settings.judging.num_bootstrap,
                                  settings.scoring.seed)
    verdict = [difference for group in judgement.shown_groups for difference in judgement.differences(group)]
    return finite({
        'primary_score': found.normal.primary_score, 'map_score': found.shown.name if found.shown else '',
        'dataset': getattr(data.config, 'dataset', ''),
        **settings.facts(),
        'baselines_fitted_on': min(len(data.train), settings.judging.max_train_images),
        'counts': {name: dict(Counter(entry.class_name for entry in getattr(data, name).entries))
                   for name in ('train', 'val', 'test')},
        'split_seed': data.split['split_seed'], 'data': list(data.report),
        'duplicates': dict(Counter(pair['kind'] for pair in data.split['duplicates'])),
        'findings': list(findings), **judgement.as_json(),
        'warnings': [*left_out, *judgement.warnings, *broken_promises(
            judgement, normal_parts, len(found.validation))],
        'promised': metrics.promised(len(found.validation), settings.judging.target_fpr),
        'notes': [*left_out, *found.normal.notes], **code_and_date(),
        'verdict': [{**difference.as_json(), 'text': difference.text} for difference in verdict],
        'normal_parts': normal_parts})


def preparation_of(data: Any) -> dict[str, Any]:
    """How files were prepared, which new ones must be too: flags, and of volumes the spacing in mm."""
    if len(data.shape) == 3:
        return {'flags': {name: getattr(data.config, name) for name in ('fit', 'frames')}}
    return {'spacing': spacing(data.val.entries[0]).tolist(), 'flags': volume_flags(data.config)}


def write(out: Path, result: dict[str, Any], found: Evaluated, settings: Settings, run_folder: Path) -> None:
    """All files of an evaluation."""
    normal, judgement, path = found.normal, found.judgement, out / 'metrics.json'
    shown = found.shown.name if found.shown else ''
    write_scores(out / 'scores.csv', {'val': found.validation, 'test': found.test}, normal)
    (out / 'segmentation.csv').unlink(missing_ok=True)                                  # of an earlier call
    if shown and (segmented := judgement.rows[shown].segmentation):
        segmentation.write_segmentation(out / 'segmentation.csv', segmented.rows)
    write_json(path, {**(read_json(path) if path.exists() else {}), 'anomaly': result})
    page.write(out, result, judgement, found.validation, found.test, settings.showing.num_cases,
               read_history(run_folder))
    write_cases(out / 'maps', found.test.cases, found.test.entries, shown)
    for folder in {out, run_folder} if os.access(run_folder, os.W_OK) else {out}:
        normal.save(folder / 'thresholds.json')


def score_columns(table: Table, normal: Normal, names: Iterable[str]) -> dict[str, list[str]]:
    """Columns of scores.csv by their titles, three a score: the values, the percentiles among normal
    validation images and the calls, N cells each.
    """
    columns = {}
    for name in names:
        values, validation = table.values[name], normal.validation[name]
        columns[name] = [f'{value:.6g}' for value in values.tolist()]
        columns[f'{name}_percentile'] = [f'{p:.2f}' for p in metrics.percentile(values, validation)]
        calls = metrics.flagged(values, normal.thresholds[name])
        columns[f'{name}_flagged'] = [str(int(call)) for call in calls]
    return columns


def write_scores(path: Path, parts: dict[str, Table], normal: Normal) -> None:
    """scores.csv: id, class, label, part; value, percentile and call of each score."""
    names = sorted(normal.thresholds, key=lambda name: name != normal.primary_score)      # it stands first
    columns = {part: score_columns(table, normal, names) for part, table in parts.items()}
    rows = [[entry.id, entry.class_name, entry.label, part, *cells] for part, table in parts.items()
            for entry, *cells in zip(table.entries, *columns[part].values(), strict=True)]
    write_csv(path, ['id', 'class', 'label', 'part', *columns['test']], rows)
