"""Scores new images without labels by what a run knows of normal ones: what `--eval_mode predict` runs.

N files, or subjects of volumes, K scores, B images of a batch, C channels, S pixels, (H, W) or (D, H, W). The
settings, the thresholds, the scores of normal validation images and the fitted densities are those that the
mode anomaly left in thresholds.json. A file's score follows from its pixels, its id and the seed: not from
other files, nor from how many processes share the work, beyond rounding.
"""

import csv
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomaly.baselines import BASELINES
from anomaly.config import PredictConfig, Selection
from anomaly.density import DensityScore
from anomaly.detect import SETTINGS, cells, choose_primary, titles
from anomaly.maps.nifti import file_names, plain, remove_maps, write_map
from anomaly.maps.overlays import overlay
from anomaly.maps.postprocessing import treated
from anomaly.maps.segmentation import segment
from anomaly.passes import Passes
from anomaly.report.figures import map_scale
from anomaly.scores import ScoreConfig, choose_scores
from datasets import DataConfig, flags_from_json, preparation
from distributed import launch
from readers.images.folder import cores
from readers.images.new_files import Found, Loaded, Preparation
from readers.source import Unreadable
from readers.split import count, some
from readers.volumes.new_volumes import NewVolumes
from readers.volumes.nifti import Grid
from utils import UserError, fingerprint, read_flags, read_json, write_atomically

SOME_UNREADABLE_STATUS = 3        # exit status: all that could be read is scored, but some files could not
VOLUME_FOLDERS = {'map': 'maps', 'segmentation': 'segmentations'}
MOST_THREADS = 2                  # that decode at once: an image takes 30 bytes a pixel of its file meanwhile


def predict(run: Any) -> int:
    """Writes scores.csv, overlays/ and of volumes maps/ and segmentations/ for the files of --data; returns
    the exit status.
    """
    config, wanted = read_flags(PredictConfig, run.args), read_flags(Selection, run.args)
    if not (data := config.data):
        raise UserError("--eval_mode predict needs --data: a folder of images or volumes, or one file.")
    path = Path(config.thresholds or run.run_folder / 'thresholds.json')
    normal = Normal.read(path, run.model, f'python evaluate.py --checkpoint {run.args.checkpoint} '
                                          f'--eval_mode anomaly')
    settings = normal.settings
    scores = normal.scores(wanted, run.model, settings['num_iw_samples'])
    names = [score.name for score in scores]
    prepared = preparation(normal.data_config(run.data_config), run.model.shape, run.model.pixels,
                           normal.spacing)
    # All walk, so that all meet the same mistake; files may come and go meanwhile, so the first one's count.
    found = launch.gather([prepared.find(data, without=run.out)])[0]
    primary = normal.primary(wanted, names)
    predictor = Predictor(run.model, prepared, found, scores, primary, settings, batch_size=run.batch_size,
                          seed=run.args.seed)
    values, errors = predictor.score()
    written = predictor.draw(values, errors, run.out, config.num_overlays, normal.pixel_threshold(primary))
    if launch.is_main():
        write_predictions(run.out / 'scores.csv', found, values, errors, written, normal, names)
        for words in dict.fromkeys(words for several in predictor.repairs.values() for words in several):
            ids = [found.ids[i] for i, several in sorted(predictor.repairs.items()) if words in several]
            run.say(f"{count(len(ids), 'subject')} {words}: {some(ids)}")
        say_all(run, data, found, values[:, names.index(primary)], errors, written, normal, primary, settings)
    return SOME_UNREADABLE_STATUS if errors else 0


# ------------------------------------------------------------------------------------------- what is normal

@dataclass(frozen=True)
class Normal:
    """What thresholds.json holds: how scores were made, and what those of normal validation images are."""
    path: Path
    kept: dict[str, Any]

    @classmethod
    def read(cls, path: Path, model: Any, command: str) -> 'Normal':
        """Raises UserError if the file is missing, of another kind, or of other weights; says the remedy."""
        if not path.exists():
            raise UserError(f"there is no {path}, which says what is normal. Make it once: {command}")
        kept = read_json(path)
        expected = {'weights', 'primary_score', 'num_iw_samples', 'scores', 'fitted', 'spacing', 'volumes',
                    *SETTINGS}
        if missing := sorted(expected - set(kept if isinstance(kept, dict) else ())):
            raise UserError(f"{path} lacks {missing[0]!r}: it is not what this version writes. Make it anew: "
                            f"{command}")
        if kept['weights'] != fingerprint(model):
            raise UserError(f"{path} belongs to other weights of the model (training went on, or --no_ema "
                            f"differs). Make it anew: {command}")
        return cls(path, kept)

    def data_config(self, flags: DataConfig) -> DataConfig:
        """The run's flags, with those by which its volumes were prepared: of an LMDB these are its own."""
        return dataclasses.replace(flags, **flags_from_json(self.kept['volumes']))

    @property
    def spacing(self) -> list[float]:
        """Of the voxels that the model saw, mm: (3,); empty for images."""
        return self.kept['spacing']

    @property
    def settings(self) -> dict[str, Any]:
        """How scores were made."""
        return {name: self.kept[name] for name in ('num_iw_samples', *SETTINGS)}

    def scores(self, wanted: Selection, model: Any, num_iw_samples: int) -> list[Any]:
        """The scores of that evaluation, or those that the command chooses of them, ready for use."""
        known = [name for name in self.kept['scores'] if name not in BASELINES]
        all_known = not wanted.scores or 'all' in wanted.scores
        scores, _ = choose_scores(known if all_known else wanted.scores, model, num_iw_samples)
        if unknown := [score.name for score in scores if score.name not in known]:
            raise UserError(f"--scores {unknown[0]}: {self.path} has no threshold for it, but for "
                            f"{', '.join(known)}. Run --eval_mode anomaly with it first.")
        for score in scores:
            if isinstance(score, DensityScore):
                score.load(self.kept['fitted'])
        return scores

    def primary(self, wanted: Selection, names: list[str]) -> str:
        """The score that ranks the images: the one named, else that of the evaluation, if it is computed."""
        return choose_primary(wanted.primary_score, self.kept['primary_score'], names)

    def threshold(self, name: str) -> float:
        value = self.kept['scores'][name]['threshold']
        return math.inf if value is None else value              # JSON has no infinity

    def pixel_threshold(self, name: str) -> float:
        """Of the map of a score, above which a pixel is outlined; infinite where the evaluation set none."""
        value = self.kept['scores'][name].get('pixel_threshold')
        return math.inf if value is None else value

    def validation(self, name: str) -> np.ndarray:
        """Scores of the normal validation images; NaN where one was not finite."""
        return np.array(self.kept['scores'][name]['normal_validation'], np.float64)


# ------------------------------------------------------------------------------------------ scores, pictures

class Predictor:
    """Scores files batch by batch: no more than one batch of images is in memory. Every rank has one."""

    def __init__(self, model: Any, prepared: Preparation | NewVolumes, found: Found, scores: list,
                 primary: str, settings: dict[str, Any], *, batch_size: int, seed: int):
        self.model, self.prepared, self.found = model.eval(), prepared, found
        self.volumes = len(model.shape) == 4
        self.repairs: dict[int, tuple[str, ...]] = {}           # number of a file -> what was put right
        self.scores, self.settings, self.batch_size, self.seed = scores, settings, batch_size, seed
        self.primary = next(i for i, score in enumerate(scores) if score.name == primary)

    def batches(self, numbers: Sequence[int], title: str) -> Any:
        """({number of a file: what it holds}, passes of these, {number: why it could not be read}) of this
        rank's batches.
        """
        from tqdm import tqdm
        chunks = [numbers[i:i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]
        mine = chunks[launch.rank()::launch.world()]
        Image.init()                             # all decoders, before threads ask for them at once
        with ThreadPoolExecutor(min(MOST_THREADS, cores())) as pool, warnings.catch_warnings():
            warnings.simplefilter('ignore')      # Pillow warns of odd metadata and of large images
            for chunk in tqdm(mine, title, unit='batch', leave=False, disable=launch.rank() > 0 or None):
                loaded = dict(zip(chunk, pool.map(self.load, chunk)))
                errors = {i: x for i, x in loaded.items() if isinstance(x, str)}
                images = {i: x for i, x in loaded.items() if i not in errors}
                yield images, self.passes(images) if images else None, errors

    def load(self, number: int) -> Loaded | str:
        """A file's image, or why there is none."""
        try:
            return self.prepared.load(self.found.paths[number])
        except Unreadable as error:
            return str(error)

    def passes(self, images: dict[int, Loaded]) -> Passes:
        ids, options = [self.found.ids[i] for i in images], self.settings
        batch = self.prepared.batch(list(images.values()), ids)
        config = ScoreConfig(**{name: options[name] for name in SETTINGS})
        return Passes(self.model, batch.x.to(launch.device()), draws=options['num_draws'],
                      iw_samples=options['num_iw_samples'], iw_samples_elbo=options['iw_samples_elbo'],
                      iw_samples_lk=options['iw_samples_lk'], llr_noise=options['llr_noise'],
                      regret_steps=options['regret_steps'],
                      regret_learning_rate=options['regret_learning_rate'], msma=config.msma,
                      msma_map=config.msma_map, bits=self.prepared.pixels.bits,
                      noise=(self.seed, 'predict'), ids=ids)

    def score(self) -> tuple[np.ndarray, dict[int, str]]:
        """All scores (N, K) float64, NaN where a file could not be read, and why: on every rank."""
        rows = []
        for images, passes, errors in self.batches(range(len(self.found.ids)), 'predict'):
            columns = [s(passes, with_map=False).image.double().cpu().numpy() for s in self.scores if passes]
            rows.append((list(images), columns, errors, {i: x.repairs for i, x in images.items()}))
        values, errors = np.full((len(self.found.ids), len(self.scores)), np.nan), {}
        for numbers, columns, unread, repairs in launch.gather(rows):
            if numbers:
                values[numbers] = np.stack(columns, 1)
            errors |= unread
            self.repairs |= repairs
        return values, errors

    def draw(self, values: np.ndarray, errors: dict[int, str], out: Path, number: int,
             pixel_threshold: float) -> dict[str, dict[int, str]]:
        """Draws the `number` most anomalous images, -1 = all, and writes map and segmentation of volumes.

        Returns for each kind of file {number of the image: name below `out`}; every rank has all.
        """
        if launch.is_main():
            for old in (out / 'overlays').glob('[0-9]*_*.png'):     # of an earlier call
                old.unlink()
            for name in VOLUME_FOLDERS.values():
                remove_maps(out / name)
        launch.barrier()
        readable = [i for i in range(len(values)) if i not in errors]
        place = lambda i: -values[i, self.primary] if math.isfinite(values[i, self.primary]) else -math.inf
        chosen = sorted(readable, key=place)[:None if number < 0 else number]
        names = {i: picture_name(rank, len(chosen), self.found.ids[i]) for rank, i in enumerate(chosen, 1)}
        ordered = sorted(chosen)
        plain_names = dict(zip(ordered, file_names([self.found.ids[i] for i in ordered])))
        # One colour scale for all, that of the most anomalous.
        look = launch.gather([self.colours(chosen[:self.batch_size])] if launch.is_main() else [])[0]
        made = []
        for images, passes, _ in self.batches(chosen, 'overlays'):
            for i, *arrays in zip(images, *self.pictures(passes)) if passes else ():
                spacing = images[i].grids[0].spacing if self.volumes else (1, 1)
                picture = overlay(*arrays, look, pixel_threshold, spacing)
                write_atomically(out / 'overlays' / names[i],
                                 lambda path, picture=picture: picture.save(path, 'PNG'))
                made.append((i, 'overlay', f'overlays/{names[i]}'))
                if self.volumes and arrays[-1] is not None:
                    made += [(i, *file) for file in self.write_volumes(
                        out, plain_names[i], arrays[0], arrays[-1], images[i].grids, pixel_threshold)]
        made, kinds = launch.gather(made), [*(VOLUME_FOLDERS if self.volumes else ()), 'overlay']
        return {kind: {i: path for i, k, path in sorted(made) if k == kind} for kind in kinds}

    def write_volumes(self, out: Path, name: str, image: np.ndarray, anomaly_map: np.ndarray,
                      grids: tuple[Grid, ...], pixel_threshold: float) -> Iterator[tuple[str, str]]:
        """Writes the map (*S) of an image (C, *S), and what it calls where there is a threshold for it; the
        (kind, name below `out`) of each file.
        """
        volumes = {'map': (f'{name}_{self.scores[self.primary].name}', anomaly_map)}
        if math.isfinite(pixel_threshold):
            volumes['segmentation'] = name, segment(anomaly_map, image, pixel_threshold,
                                                    SimpleNamespace(**self.settings))
        for kind, (file, values) in volumes.items():
            path = f'{VOLUME_FOLDERS[kind]}/{file}.nii.gz'
            write_map(out / path, values, *grids)
            yield kind, path

    def colours(self, numbers: Sequence[int]) -> dict[str, Any]:
        images = {i: x for i in numbers if not isinstance(x := self.load(i), str)}
        maps = self.pictures(self.passes(images))[2] if images else []
        return map_scale([m for m in maps if m is not None])

    @torch.no_grad()
    def pictures(self, passes: Passes) -> tuple[Sequence, Sequence, Sequence]:
        """Images, reconstructions (C, *S) and maps (*S) of a batch; None for each where there is none."""
        score = self.scores[self.primary]
        maps, _ = treated(passes, [score] if score.map else [], self.settings['map_smoothing'],
                          self.settings['body_mask'])
        rebuilt = passes.reconstruction() if hasattr(self.model, 'reconstruct') else None
        nothing = [None] * len(passes.x)
        return (passes.x.cpu().numpy(), nothing if rebuilt is None else rebuilt.cpu().numpy(),
                maps.get(score.name, nothing))


def picture_name(rank: int, most: int, name: str) -> str:
    """'007_ward_scan.dcm.png': the rank tells names apart that are alike without the signs left out here."""
    return f'{rank:0{len(str(most))}d}_{plain(name)}.png'


# ------------------------------------------------------------------------------------------- what is written

def write_predictions(path: Path, found: Found, values: np.ndarray, errors: dict[int, str],
                      written: dict[str, dict[int, str]], normal: Normal, names: list[str]) -> None:
    """scores.csv: a row a file. Of an unreadable one the scores are empty, and `error` says why; the columns
    of `written` name the files that `Predictor.draw` made.
    """
    columns = [column for k, name in enumerate(names)
               for column in cells(values[:, k], normal.validation(name), normal.threshold(name))]

    def write(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['id', *titles(names), *written, 'error'])
            for i, (name, *row) in enumerate(zip(found.ids, *columns, strict=True)):
                row = [''] * len(row) if i in errors else row
                files = [paths.get(i, '') for paths in written.values()]
                writer.writerow([name, *row, *files, errors.get(i, '')])
    write_atomically(path, write)


def say_all(run: Any, data: str, found: Found, ranking: np.ndarray, errors: dict[int, str],
            written: dict[str, dict[int, str]], normal: Normal, primary: str,
            settings: dict[str, Any]) -> None:
    """Tells what became of the files, and keeps it in metrics.json; `ranking` (N,) are the primary scores."""
    total, threshold = len(found.ids), normal.threshold(primary)
    scored, num_normal = total - len(errors), len(normal.validation(primary))
    called = sum(1 for i, value in enumerate(ranking.tolist())
                 if i not in errors and not value <= threshold)
    run.write_metrics('predict', {
        'data': data, 'num_files': total, 'num_scored': scored, 'num_unreadable': len(errors),
        'passed_over': found.passed_over, 'primary_score': primary, 'threshold': threshold,
        'num_called': called, 'seed': run.args.seed, **settings})
    if found.passed_over:
        run.say(f"{found.passed_over} files and folders are passed over: {found.kinds}")
    if scored:
        promised = max(settings['target_fpr'], 1 / (num_normal + 1))                  # see metrics.threshold
        run.say(f"{called} of {scored} called anomalous: {primary} above {threshold:.5g}, which at most "
                f"{100 * promised:.3g} % of normal images like those of the run are")
    for kind, paths in written.items():
        if paths:
            run.say(f"{kind}s of the {len(paths)} most anomalous: {run.out / f'{kind}s'}")
    unread = f"{len(errors)} could not be read" if errors else "none unreadable"
    run.say(f"{scored} scored, {unread}: see {run.out / 'scores.csv'}")
