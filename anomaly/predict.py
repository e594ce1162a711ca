"""Scores new images without labels by what a run knows of normal ones: the mode `predict`.

The settings, thresholds, scores of normal validation images and fitted densities are those that the mode
`anomaly` left in thresholds.json. A file has the score that it has there: it follows from its pixels and the
run's seed, not from its name, other files, or how many processes share the work.
"""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from anomaly import metrics
from anomaly.choice import choose_map, choose_primary
from anomaly.config import PredictConfig
from anomaly.detect import score_columns
from anomaly.maps import dicom_seg
from anomaly.maps.nifti import file_names, plain, remove_maps, write_map
from anomaly.maps.overlays import map_scale, overlay
from anomaly.maps.segmentation import segment
from anomaly.normal import Normal
from anomaly.report.gallery import MOST_BYTES, case_pictures, original, short_number
from anomaly.report.page import write_predictions
from anomaly.report.provenance import about_run, code_and_date
from anomaly.scores import Score, Selection
from anomaly.scoring import Batches, Case, Table, pictures, score_images
from datasets import preparation
from distributed import launch
from distributed.progress import progress
from readers.images.decode import decode, from_size
from readers.parallel import in_order
from readers.paths import file_content, passed_line
from readers.source import Unreadable
from readers.split import count, noted, read_split, some
from utils import UserError, finite, read_flags, write_atomically, write_csv

SOME_UNREADABLE_STATUS = 3        # exit status: all that could be read is scored, but some files could not
ENDING = re.compile(r'(\.nii\.gz|\.\w{1,6})$')
# kind of a file -> its folder
FOLDERS = {'map': 'maps', 'segmentation': 'segmentations', 'dicom_seg': 'segmentations',
           'overlay': 'overlays'}
SCALE_IMAGES = 16                 # most anomalous images that set the color scale of all overlays
MAX_THREADS = 2                   # that decode at once: an image takes 30 bytes a pixel of its file meanwhile


# ------------------------------------------------------------------------------------------------------ files

class NewFile(NamedTuple):
    """A file, or a subject of volumes, that could be read."""
    id: str
    grids: tuple = ()                 # of a volume: the model's grid and the file's
    repairs: tuple[str, ...] = ()     # what was put right, in words that go on from 'n subjects'
    part: str = ''                    # train, val or test, if the run has this very content; '' = new


class NewFiles:
    """Files of a folder as batches, of which one and the next few images are in memory; a share a rank."""

    def __init__(self, prepared: Any, found: Any, batch_size: int, parts: Mapping[str, str]):
        """`prepared` loads one of the files `found`, as the run's own data were (datasets.preparation);
        `parts` are the run's parts by the SHA-256 of what they hold.
        """
        self.prepared, self.batch_size, self.parts = prepared, batch_size, parts
        self.files, self.ids = found.files, list(found.files)
        self.errors: dict[str, str] = {}              # id -> why it could not be read

    def batches(self, ids: Sequence[str], title: str) -> Batches:
        """The readable files of this rank, of those named."""
        chunks = [ids[i:i + self.batch_size] for i in range(0, len(ids), self.batch_size)]
        mine = chunks[launch.rank()::launch.world()]
        files = (self.files[name] for chunk in mine for name in chunk)
        images = in_order(self.prepared.loader.load, files, MAX_THREADS)
        for chunk in progress(mine, title, len(mine)):
            found = dict(zip(chunk, images))
            self.errors |= {name: why for name, why in found.items() if isinstance(why, str)}
            loaded = {name: image for name, image in found.items() if name not in self.errors}
            if loaded:
                yield ([NewFile(name, image.grids, image.repairs, self.parts.get(image.sha256, ''))
                        for name, image in loaded.items()],
                       self.prepared.batch(list(loaded.values()), list(loaded)))


# ------------------------------------------------------------------------------------------------------- mode

def predict(run: Any) -> int:
    """Writes predictions.html, scores.csv, overlays/, maps/, segmentations/; returns the exit status."""
    config, selection = read_flags(PredictConfig, run.args), read_flags(Selection, run.args)
    if config.dicom_seg:
        dicom_seg.check_possible(run.model.shape)
    path = Path(config.thresholds or run.run_folder / 'thresholds.json')
    normal = Normal.load(path, run.model, f'python evaluate.py --checkpoint {run.args.checkpoint} '
                                          f'--eval_mode anomaly')
    scores = normal.scores(selection.scores, run.model)
    names = [score.name for score in scores]
    primary = choose_primary(selection.primary_score, normal.primary_score, names)
    found, files = new_files(run, normal)
    table = score_images(run.model, files.batches(files.ids, 'predict'), scores, normal.scoring)
    table = normal.apply(table, scores)
    files.errors = dict(launch.gather([*files.errors.items()]))
    shown = choose_map(primary, scores, run.model, normal.scoring)
    names = [primary, *(name for name in names if name != primary)]
    ranked = sorted_files(table, normal, primary)
    drawn, look = draw(run, files, ranked, shown, normal)
    if launch.is_main():
        kinds = [kind for kind in FOLDERS if kind != 'dicom_seg' or config.dicom_seg]
        write_scores(run.out / 'scores.csv', files, table, drawn, kinds, normal, names)
        result = summarize(run, found, files, table, drawn, normal, primary)
        score, = (score for score in scores if score.name == primary)
        about = {'about': score.explained(run.model, normal.scoring),
                 'map_score': shown.name if shown else '', 'models': [about_run(run.model, run.run_folder)],
                 'command': 'python ' + shlex.join(sys.argv), **code_and_date()}
        cards = {name: one.card for name, one in drawn.items()}
        write_predictions(run.out, result | about, ranked, files.errors, cards, look)
    return SOME_UNREADABLE_STATUS if files.errors else 0


def new_files(run: Any, normal: Normal) -> tuple[Any, NewFiles]:
    """What is found below --data, and its files. Raises UserError if there are none."""
    if not run.args.data:
        raise UserError("--eval_mode predict needs --data: a folder of images or volumes, or one file.")
    prepared = preparation(normal.data_flags(run.data_config), run.model.shape, run.model.pixels,
                           normal.preparation.get('spacing', ()))
    # Every rank searches, so that all meet the same mistake; files may come and go, so the first one's count.
    found = launch.gather([prepared.loader.find(run.args.data, without=run.final)])[0]
    split = read_split(run.run_folder / 'split.json') or {}
    parts = {file['sha256']: file['part'] for file in split.get('files', ()) if file['sha256']}
    return found, NewFiles(prepared, found, run.batch_size, parts)


# --------------------------------------------------------------------------------------------------- pictures

class Drawn(NamedTuple):
    """What `draw` leaves of a file."""
    names: dict[str, str]                # kind of a file -> its name below the output folder
    card: dict[str, Any]                 # for the page
    without_seg: str                     # why it has no DICOM segmentation; '' = it has, or none is asked for


def draw(run: Any, files: NewFiles, ranked: Sequence[dict[str, Any]], shown: Score | None,
         normal: Normal) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """Draws the --num_overlays first of the files with the map of the score `shown`, and writes map and
    segmentation. Returns on every rank what there is of each, by its id, and the colors of the maps.
    """
    if launch.is_main():
        for folder in {run.out / name for name in FOLDERS.values()}:
            for old in folder.glob('[0-9]*_*.*'):                           # of an earlier call
                if old.suffix in ('.png', '.dcm'):
                    old.unlink()
            remove_maps(folder)
    launch.barrier()
    config, flags = read_flags(PredictConfig, run.args), normal.data_flags(run.data_config)
    chosen = [row['id'] for row in ranked[:None if config.num_overlays < 0 else config.num_overlays]]
    pictured = {name: picture_name(rank, len(chosen), name) for rank, name in enumerate(chosen, 1)}
    plain_names = dict(zip(sorted(chosen), file_names(sorted(chosen))))

    def cases(ids: Sequence[str], title: str) -> Iterator[tuple[NewFile, Case]]:
        return pictures(run.model, files.batches(ids, title), shown, normal)
    # One color scale for all, that of the most anomalous.
    look = map_scale(launch.gather([case.shown for _, case in cases(chosen[:SCALE_IMAGES], 'colors')]))
    drawn = []
    for file, case in cases(chosen, 'overlays'):
        names, why = {'overlay': f'overlays/{pictured[file.id]}'}, ''
        spacing, path = file.grids[0].spacing if file.grids else (1, 1), files.files[file.id]
        picture = overlay(case, look, spacing, titles=True)
        write_atomically(run.out / names['overlay'], lambda path, image=picture: image.save(path, 'PNG'))
        if file.grids and case.map is not None:
            names |= write_volumes(run.out, plain_names[file.id], file, case, normal, shown.name)
        elif case.relative is not None and isinstance(path, str):                 # not a frame of a file
            more, why = write_grids(run, flags.fit, pictured[file.id], path, case,
                                    shown.name if config.dicom_seg else '')
            names |= more
        case = case._replace(original=original(path, run.model.shape, flags))
        card = case_pictures(case, look, np.array(spacing), MOST_BYTES / len(chosen))
        drawn.append((file.id, Drawn(names, card, why)))
    return dict(sorted(launch.gather(drawn))), look


def sorted_files(table: Table, normal: Normal, primary: str) -> list[dict[str, Any]]:
    """The files that could be read, the most anomalous first, as rows of the page; scores that are not finite
    lead.
    """
    values = table.values[primary]
    percentiles = metrics.percentile(values, normal.validation[primary])
    calls = metrics.flagged(values, normal.thresholds[primary])
    order = np.argsort(-np.where(np.isfinite(values), values, np.inf), kind='stable')       # equal ones by id
    return [{'id': table.entries[i].id, 'class': '', 'place': rank, 'score': short_number(values[i]),
             'outcome': 'flagged' if calls[i] else 'clear', 'percentile': f'{percentiles[i]:.0f}'}
            for rank, i in enumerate(order, 1)]


def picture_name(rank: int, number: int, name: str) -> str:
    """'007_ward_scan.png': the rank tells apart names that only differ in what is left out here."""
    return f'{rank:0{len(str(number))}d}_{plain(ENDING.sub("", name))}.png'


def write_grids(run: Any, fit: str, name: str, path: str, case: Case,
                seg_score: str) -> tuple[dict[str, str], str]:
    """Writes the map of an image, in hundredths of a standard deviation, and what is above the threshold of
    pixels, 0 or 255, on the grid of its file; returns their names by kind. With the name of the map's score
    as `seg_score`, a DICOM image has a DICOM segmentation too, or there is a reason why it has none.
    """
    content, border, names = file_content(path), run.model.pixels.padding, {}
    height, width = decode(content).shape[:2]
    inner = slice(border, len(case.relative) - border)
    levels = {'map': np.nan_to_num(100 * case.relative, nan=65535).round().clip(max=65535).astype(np.uint16),
              'segmentation': 255 * case.above.astype(np.uint8)}
    for kind, values in levels.items():
        names[kind] = f'{FOLDERS[kind]}/{name}'
        on_grid = from_size(values[inner, inner], height, width, fit)
        write_atomically(run.out / names[kind], lambda path, x=on_grid: Image.fromarray(x).save(path, 'PNG'))
    if seg_score:                                                # `on_grid` is the segmentation, the last one
        place = str(Path(names['segmentation']).with_suffix('.dcm'))
        try:
            if dicom_seg.write_segmentation(run.out / place, content, on_grid > 0, seg_score):
                names['dicom_seg'] = place
        except Unreadable as why:
            return names, str(why)
    return names, ''


def write_volumes(out: Path, name: str, file: NewFile, case: Case, normal: Normal,
                  score: str) -> dict[str, str]:
    """Writes the map of a volume, and its segmentation if there is a threshold; their names by kind."""
    volumes = {f'maps/{name}_{score}.nii.gz': case.map}
    threshold = normal.pixel_threshold(score)
    if math.isfinite(threshold):
        volumes[f'segmentations/{name}.nii.gz'] = segment(case.map, case.image, threshold, normal.maps)
    for place, values in volumes.items():
        write_map(out / place, values, *file.grids)
    return dict(zip(('map', 'segmentation'), volumes))


# ------------------------------------------------------------------------------------------- what is written

def write_scores(path: Path, files: NewFiles, table: Table, drawn: dict[str, Drawn],
                      kinds: Sequence[str], normal: Normal, names: Sequence[str]) -> None:
    """scores.csv: one row a file. For an unreadable one the scores are empty and `error` says why; the
    columns `kinds` name the files that `draw` made; `part` is that of the run which has this very content.
    """
    columns = score_columns(table, normal, names)
    cells = {entry.id: row for entry, *row in zip(table.entries, *columns.values(), strict=True)}
    named = {name: one.names for name, one in drawn.items()}
    parts = {file.id: file.part for file in table.entries}
    rows = [[i, *cells.get(i, [''] * len(columns)), *(named.get(i, {}).get(kind, '') for kind in kinds),
             parts.get(i, ''), files.errors.get(i, '')] for i in files.ids]
    write_csv(path, ['id', *columns, *kinds, 'part', 'error'], rows)


def summarize(run: Any, found: Any, files: NewFiles, table: Table, drawn: dict[str, Drawn], normal: Normal,
              primary: str) -> dict[str, Any]:
    """Says what became of the files; keeps it in metrics.json, and returns it."""
    threshold, num_normal = normal.thresholds[primary], len(normal.validation[primary])
    anomalous = int(metrics.flagged(table.values[primary], threshold).sum())
    learned = sorted(file.id for file in table.entries if file.part in ('train', 'val'))
    promised = metrics.promised(num_normal, normal.judging.target_fpr)
    result = finite({
        'data': run.args.data, 'num_files': len(files.ids), 'num_scored': len(table),
        'num_unreadable': len(files.errors), 'passed_over': sum(map(len, found.passed_over.values())),
        'num_learned': len(learned), 'primary_score': primary, 'threshold': threshold,
        'num_flagged': anomalous, 'promised': promised,
        **dataclasses.asdict(normal.scoring), **dataclasses.asdict(normal.maps),
        **dataclasses.asdict(normal.judging)})
    run.write_metrics('predict', result)
    for repair in dict.fromkeys(repair for file in table.entries for repair in file.repairs):
        ids = sorted(file.id for file in table.entries if repair in file.repairs)
        kind = 'subject' if len(run.model.shape) == 4 else 'image'
        run.say(*noted(ids, kind, repair))
    for line in passed_line(found.passed_over):
        run.say(line)
    if len(table):
        run.say(f"{anomalous} of {len(table)} are flagged as anomalous ({primary} above {threshold:.5g}). "
                f"Of normal images like those of the run, at most {100 * promised:.3g} % are expected to be.")
    if learned:
        are = 'is' if len(learned) == 1 else 'are'
        run.say(f"{count(len(learned), 'file')} of them {are} in the training or validation part of the run, "
                f"so their scores do not tell how the model does on new images: {some(learned)}")
    for kind, folder in FOLDERS.items():
        if number := sum(kind in one.names for one in drawn.values()):
            run.say(f"{kind}s of the most anomalous, {number} in all: {run.out / folder}")
    for why in dict.fromkeys(one.without_seg for one in drawn.values() if one.without_seg):
        ids = [i for i, one in drawn.items() if one.without_seg == why]
        run.say(f"no DICOM segmentation of {count(len(ids), 'image')}, as each {why}: {some(ids)}")
    unread = f"{len(files.errors)} could not be read" if files.errors else "all readable"
    run.say(f"{len(table)} scored, {unread}: see {run.out / 'predictions.html'} and scores.csv")
    return result
