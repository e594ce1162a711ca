"""What a trained model says: likelihoods, anomaly scores, predictions, samples, FID, reconstructions,
latents.

    python evaluate.py --checkpoint runs/eval-chest/checkpoint.pt --eval_mode anomaly --save OUT

    python evaluate.py --compare runs/eval-a runs/eval-b --save OUT

Reads what train.py and the published NVAE, HVAE, LVAE and BIVA leave. The data set and its split are those
of the run; flags given here win over the run's. Writes OUT/metrics.json and what the mode adds. --compare
scores several runs on the test images that they share, and writes OUT/comparison.md, .json and .csv.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anomaly.compare import Run, compare, run_names
from anomaly.detect import detect
from anomaly.out_of_distribution import with_ood
from anomaly.predict import PredictConfig, predict
from anomaly.scores import ScoreConfig
from audit.audit import audit, sentences
from datasets import Data, DataConfig, load_data
from distributed import launch
from distributed.launch import LaunchConfig
from distributions import Pixels
from evaluation.fid import (
    GREY_LEVELS,
    FidConfig,
    distance,
    load_features,
    measure_part,
    measure_samples,
    read_statistics,
)
from evaluation.latent_space import decode, interpolation, latents, traversal
from evaluation.likelihood import count_dims, evaluate_likelihood
from evaluation.pictures import image_grid, save_png
from evaluation.sampling import readjust_batch_norm, samples
from model import MODELS, describe, family_config, open_model, place
from readers.batches import eval_batches
from readers.parts import Batch
from utils import (
    UserError,
    add_flags,
    finite,
    flag,
    read_flags,
    read_json,
    run_program,
    save_checkpoint,
    write_json,
    write_npz,
)

NUM_SHOWN = 64                                    # images in a grid
DEFAULT_NUM_SAMPLES = {'sample': 64, 'evaluate_fid': 50000, 'reconstruct': 64, 'interpolate': 8,
                       'traverse': 4}
DEFAULT_TEMPERATURE = 0.7                         # of families that do not say theirs
DEFAULT_IW_SAMPLES = {'evaluate': 1000, 'anomaly': 16}
SAMPLE_BATCH = 100
AUDIT_RESAMPLES = 200                             # behind the intervals of the report's audit
SAMPLED = [config for config in map(family_config, MODELS) if hasattr(config, 'Sampling')]  # own flags
_DEFAULTS = ', '.join(f'{mode} {number}' for mode, number in DEFAULT_NUM_SAMPLES.items())


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""
    checkpoint: str = flag('', 'checkpoint.pt of a run, or its folder; or what the published '
                              'NVAE, HVAE, LVAE and BIVA leave')
    compare: tuple = flag((), 'in place of --checkpoint: folders or checkpoints of two or more runs, whose '
                              'anomaly scores are compared on the test images that all have', metavar='RUN')
    save: str = flag('', "folder for the results; '' = a folder named after the mode, beside the checkpoint; "
                         "with --compare, a folder 'comparison' beside the first run")
    eval_mode: str = flag('sample', 'what to do', choices=(
        'sample', 'evaluate', 'evaluate_fid', 'anomaly', 'predict', 'reconstruct', 'latents', 'decode',
        'interpolate', 'traverse'))
    eval_on_train: bool = flag(False, 'take the training images, not the test images (anomaly takes both)')
    readjust_bn: bool = flag(False, 'sample, evaluate_fid: first fit the batch norms to the temperature')
    save_bn: bool = flag(False, 'with --readjust_bn: keep the model with these statistics as checkpoint.pt')
    temp: float | None = flag(None, 'sample, evaluate_fid, decode: temperature of what is drawn from the '
                                    'prior (default: 0.7; of score, whose noise it scales, 1)', type=float)
    num_samples: int = flag(0, f'number of images, or of pairs to interpolate; 0 = {_DEFAULTS}')
    keep_groups: tuple = flag((), 'reconstruct: keep so many latent groups from the top, the others at their '
                                  'prior means; each number is a column; none given = all groups', type=int)
    latents: str = flag('', 'decode: npz file of the mode latents, as it is or edited, or a folder of such')
    num_frames: int = flag(9, 'interpolate, traverse: pictures from one end to the other')
    groups: tuple = flag((), 'traverse: groups to walk in, 0 is the top; none given = all', type=int)
    channel: int = flag(-1, 'traverse: latent channel; -1 = in each group the one with most information')
    reach: float = flag(3.0, 'traverse: farthest shift of the channel, to both sides')
    ood: tuple = flag((), 'anomaly: sets of images to tell from the normal ones, each a class NAME, brought '
                          'to the shape of the run. NAME is a data set of --dataset, of which the test part '
                          "is taken, or any name with a folder of images or an LMDB; PATH 'test' is the "
                          "run's own normal test images. A CHANGE is rot90, rot180, rot270, flip, invert, "
                          'lesion, tumour, or of labelled test images enhanced',
                      metavar='NAME=PATH[:CHANGE]')
    max_ood: int = flag(0, 'anomaly: at most so many images of each set of --ood, drawn by --seed; 0 = all')
    audit_images: int = flag(100, 'anomaly: images of each class and part that the audit in the report '
                                  'measures; 0 = no audit')
    max_images: int = flag(0, 'evaluate: only the first so many images, in whole batches; 0 = all')
    num_iw_samples: int = flag(0, 'importance samples an image; 0 = 1000 for evaluate, 16 for anomaly')
    batch_size: int = flag(0, "images a batch; 0 = the training's (sample, evaluate_fid: 100)")
    no_ema: bool = flag(False, 'use the last weights even where the run kept an average')
    seed: int = flag(1, 'all noise follows from it')

    def __post_init__(self):
        least_of = {'num_samples': 0, 'max_images': 0, 'num_iw_samples': 0, 'batch_size': 0,
                    'num_frames': 2, 'channel': -1, 'max_ood': 0, 'audit_images': 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}.")
        if self.temp is not None and self.temp < 0:
            raise UserError(f"--temp {self.temp}: it must be at least 0.")
        if self.save_bn and not self.readjust_bn:
            raise UserError("--save_bn keeps readjusted batch-norm statistics: give --readjust_bn too.")
        if self.compare and self.eval_mode not in ('sample', 'anomaly'):
            raise UserError(f"--compare with --eval_mode {self.eval_mode}: it compares anomaly scores, leave "
                            f"--eval_mode out.")
        if self.ood and not (self.compare or self.eval_mode == 'anomaly'):
            raise UserError(f"--ood with --eval_mode {self.eval_mode}: only the mode anomaly takes such "
                            f"sets.")
        if (self.eval_mode == 'decode') != bool(self.latents):
            raise UserError(f"--eval_mode {self.eval_mode} with --latents {self.latents!r}: decode needs the "
                            f"file or folder that the mode latents wrote, and no other mode takes it.")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, EvalConfig)
    add_flags(parser, ScoreConfig)
    add_flags(parser, PredictConfig)
    add_flags(parser, FidConfig)
    add_flags(parser, LaunchConfig)
    add_flags(parser, DataConfig, optional=True)
    for family in SAMPLED:
        add_flags(parser, family.Sampling, optional=True)
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.compare):
        parser.error('give --checkpoint, the checkpoint.pt of a run, or --compare, several runs')
    return args


def grey_levels(pixels: Pixels) -> Pixels:
    """The same with 1 bit where pixels are binary: published checkpoints say 8, which means nothing there."""
    return replace(pixels, bits=1) if pixels.likelihood == 'bernoulli' else pixels


@dataclass
class Evaluation:
    """What a mode works with."""
    model: Any
    run_args: dict[str, Any]
    args: argparse.Namespace
    config: EvalConfig
    say: Callable[[str], None]

    @property
    def run_folder(self) -> Path:
        path = Path(self.config.checkpoint)
        return path if path.is_dir() else path.parent

    @property
    def out(self) -> Path:
        return Path(self.config.save) if self.config.save else self.run_folder / self.config.eval_mode

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or int(self.run_args.get('batch_size', 100))

    @property
    def temperature(self) -> float:
        if self.config.temp is not None:
            return self.config.temp
        return getattr(self.model, 'temperatures', (DEFAULT_TEMPERATURE,))[0]

    @property
    def num_samples(self) -> int:
        return self.config.num_samples or DEFAULT_NUM_SAMPLES[self.config.eval_mode]

    @property
    def num_iw_samples(self) -> int:
        return self.config.num_iw_samples or DEFAULT_IW_SAMPLES[self.config.eval_mode]

    @property
    def data_config(self) -> DataConfig:
        """The run's flags; those of this command win."""
        return read_flags(DataConfig, self.run_args | vars(self.args))

    def data(self, **changes: Any) -> Data:
        """The run's data set and split, in the pixels that the model knows, but for `changes` of flags."""
        path = self.run_folder / 'split.json'
        config = replace(self.data_config, **changes)
        split = read_json(path) if path.exists() else None
        with launch.main_first():
            # The split says nothing of another data set.
            data = load_data(config, split if split and split['dataset'] == config.dataset else None)
        if tuple(data.shape) != tuple(self.model.shape):
            raise UserError(f"the model was trained on images of shape {tuple(self.model.shape)}, the data "
                            f"have {tuple(data.shape)}. Set --image_size and --channels as in training.")
        if not changes and grey_levels(data.pixels) != grey_levels(self.model.pixels):
            raise UserError(f"the model was trained on {self.model.pixels}, the data have {data.pixels}. Set "
                            f"--num_x_bits and --dataset as in training.")
        for line in data.report:
            self.say(line)
        return data

    def batches(self, data: Data) -> Iterator[tuple[int, Batch]]:
        part = data.train if self.config.eval_on_train else data.test
        if not len(part):
            raise UserError(f"the {self.part} part has no images. Set --test_fraction in training, or take "
                            f"--eval_on_train.")
        batches = eval_batches(part, self.batch_size, rank=launch.rank(), world=launch.world(),
                               workers=data.config.num_workers)
        wanted = self.config.max_images if self.config.eval_mode == 'evaluate' else 0
        number = min(len(part), wanted or len(part))
        batches = takewhile(lambda item: item[0] * self.batch_size < number, batches)
        total = -(-number // (self.batch_size * launch.world()))
        return tqdm(batches, self.part, total, leave=False, disable=None if launch.is_main() else True)

    @property
    def part(self) -> str:
        return 'train' if self.config.eval_on_train else 'test'

    def need(self, *capabilities: str) -> None:
        """Raises UserError for a model that cannot do what the mode is about."""
        for capability in capabilities:
            if not hasattr(self.model, capability):
                lacks = 'likelihood and no latent groups' if capability == 'num_groups' else f'`{capability}`'
                raise UserError(f"--eval_mode {self.config.eval_mode}: this model has no {lacks}. Choose "
                                f"another mode.")

    def first_images(self, number: int) -> tuple[Tensor, list[str]]:
        """The first images (number, C, *S) of the part, on the device, and their ids."""
        data = self.data()
        part = data.train if self.config.eval_on_train else data.test
        if len(part) < number:
            raise UserError(f"{number} images are wanted, the {self.part} part has {len(part)}: lower "
                            f"--num_samples.")
        batch = part.items(range(number))
        return batch.x.to(launch.device()), batch.id

    def checked(self, name: str, first: int, last: int) -> list[int]:
        """The numbers of the flag `name`, each within first to last. Raises UserError."""
        numbers = getattr(self.config, name)
        if wrong := [n for n in numbers if not first <= n <= last]:
            raise UserError(f"--{name} {wrong[0]}: this model has {getattr(self.model, 'num_groups', 0)} "
                            f"latent groups, give {first} to {last}.")
        return list(numbers)

    def readjust(self) -> None:
        """Fits the batch norms to samples at the temperature, if asked, and keeps the result, if asked."""
        if not self.config.readjust_bn:
            return
        readjust_batch_norm(self.model, self.temperature, seed=self.config.seed)
        if self.config.save_bn:
            if launch.is_main():
                save_checkpoint(self.out / 'checkpoint.pt', {
                    'description': describe(self.model), 'weights': self.model.state_dict(), 'ema': None,
                    'args': finite(self.run_args), 'readjusted_to': self.temperature})
            self.say(f"readjusted to temperature {self.temperature}: {self.out / 'checkpoint.pt'}")

    def write_metrics(self, key: str, values: dict[str, Any]) -> None:
        """Puts `values` under `key` into metrics.json; what other modes wrote stays."""
        if launch.is_main():
            path = self.out / 'metrics.json'
            write_json(path, (read_json(path) if path.exists() else {}) | {key: values})


# ------------------------------------------------------------------------------------------------------ modes

def evaluate(run: Evaluation) -> None:
    """NELBO and importance-weighted bound."""
    run.need('num_groups')
    data = run.data()
    result = evaluate_likelihood(run.model, run.batches(data), num_iw_samples=run.num_iw_samples,
                                 seed=run.config.seed, num_dims=count_dims(data.shape, data.pixels.padding),
                                 device=launch.device())
    result |= {'part': run.part, 'seed': run.config.seed}
    run.write_metrics('likelihood', result)
    groups = {name: result[name] for name in ('normal', 'anomalous') if name in result}
    for group, values in (groups or {'': result}).items():
        run.say(' '.join(f"{values['num_images']} {group} {run.part} images, {result['num_iw_samples']} "
                         f"samples each".split()))
        for name, title in (('nelbo', 'NELBO'), ('neg_log_p', '-log p(x)')):
            mean, error, bits = (values[f'{name}_{unit}']
                                 for unit in ('nats', 'nats_standard_error', 'bits_per_dim'))
            run.say(f'  {title:9} {mean:.4f} +- {error:.4f} nats, {bits:.5f} bits per dim')


def sample(run: Evaluation) -> None:
    """Images drawn from the prior: samples_<batch>.npz, and a grid of the first as samples.png."""
    run.need('sample')
    config, batch_size = run.config, run.config.batch_size or SAMPLE_BATCH
    run.readjust()
    if launch.is_main():
        for path in run.out.glob('samples_*.npz'):                  # of an earlier, larger call
            if int(path.stem.split('_')[1]) * batch_size >= run.num_samples:
                path.unlink()
    for index, images in samples(run.model, run.num_samples, batch_size, run.temperature, seed=config.seed,
                                 rank=launch.rank(), world=launch.world()):
        write_npz(run.out / f'samples_{index}.npz', samples=images.cpu().numpy())
        if index == 0:
            save_png(run.out / 'samples.png', image_grid(images[:NUM_SHOWN]))
    run.write_metrics('sample', {'num_samples': run.num_samples, 'temperature': run.temperature,
                                 'readjust_bn': config.readjust_bn, 'seed': config.seed})
    run.say(f"{run.num_samples} images at temperature {run.temperature}: {run.out / 'samples.png'}")


def evaluate_fid(run: Evaluation) -> None:
    """Frechet distance between the features of drawn images and of training images."""
    run.need('sample')
    config, batch_size = run.config, run.config.batch_size or SAMPLE_BATCH
    fid = read_flags(FidConfig, run.args)
    features = load_features(fid, run.model.shape, launch.device())
    if fid.fid_dir:
        reference = read_statistics(fid.fid_dir, run.data_config, features, run.model.shape)
    else:
        reference = measure_part(run.data(**GREY_LEVELS), features, batch_size)
    run.readjust()
    # Binary models are drawn as probabilities, which are means.
    images = 'mean' if run.model.pixels.likelihood == 'bernoulli' else fid.fid_images
    drawn = measure_samples(run.model, features, run.num_samples, batch_size, run.temperature,
                            seed=config.seed, mean=images == 'mean')
    if not launch.is_main():
        return                                              # the distance takes one process
    for line in reference.notes + drawn.notes:
        run.say(line)
    result = distance(drawn, reference) | {
        'images': images, 'temperature': run.temperature, 'readjust_bn': config.readjust_bn,
        'batch_size': batch_size, 'seed': config.seed, 'features': features.identity}
    run.write_metrics('fid', result)
    run.say(f"FID {result['fid']:.4f} of {result['num_images']} images at temperature {run.temperature} to "
            f"{result['num_reference'] or 'an unknown number of'} of {reference.source}")


@torch.no_grad()
def reconstruct(run: Evaluation) -> None:
    """Inputs beside their reconstructions at the posterior means: reconstructions.npz and .png.

    With --keep_groups there is a reconstruction from each of these numbers of groups.
    """
    run.need('reconstruct')
    total = getattr(run.model, 'num_groups', 0)
    kept = run.checked('keep_groups', 0, total)
    options = [{'skip': total - k} for k in kept] or [{}]
    names = [f'reconstruction_{k}' for k in kept] or ['reconstruction']
    data, rows = run.data(), []
    last = -(-run.num_samples // run.batch_size)
    for index, batch in run.batches(data):
        if index >= last:
            break
        x = batch.x.to(launch.device())
        rows.append((index, batch.id, batch.x, *(run.model.reconstruct(x, **option).cpu()
                                                 for option in options)))
    rows = sorted(launch.gather(rows), key=lambda row: row[0])
    if not launch.is_main():
        return
    x, *images = (torch.cat(column)[:run.num_samples] for column in list(zip(*rows))[2:])
    ids = [name for row in rows for name in row[1]][:run.num_samples]
    write_npz(run.out / 'reconstructions.npz', x=x.numpy(), id=np.array(ids),
               **{name: y.numpy() for name, y in zip(names, images)})
    sets = max(1, 8 // (1 + len(names)))                                 # of input and outputs in a row
    shown = torch.stack([x, *images], dim=1)[:NUM_SHOWN // 2]            # input, output(s), input, ...
    save_png(run.out / 'reconstructions.png', image_grid(shown.flatten(0, 1), columns=sets * shown.shape[1]))
    errors = [float((x - y).abs().mean()) for y in images]
    run.write_metrics('reconstruct', {
        'num_images': len(x), 'part': run.part,
        'mean_absolute_error': dict(zip(map(str, kept), errors)) if kept else errors[0]})
    for error, k in zip(errors, kept or [total]):
        groups = f' from {k} of {total} groups' if total else ''
        run.say(f"{len(x)} images{groups}, mean absolute error {error:.4f}")
    run.say(f"{run.out / 'reconstructions.png'}")


def data_with_ood(run: Evaluation) -> Data:
    """The data set of the run, and the sets of --ood in its test part, to be scored."""
    data = run.data()
    if run.config.ood:
        said = len(data.report)
        with launch.main_first():
            data = with_ood(data, run.config.ood, run.config.max_ood, run.config.seed)
        for line in data.report[said:]:
            run.say(line)
    return data


def anomaly(run: Evaluation) -> None:
    """Scores, thresholds, metrics and the report."""
    data, number, seed = data_with_ood(run), run.config.audit_images, run.config.seed
    findings = sentences(audit(data, number, AUDIT_RESAMPLES, seed)) if number and launch.is_main() else []
    detect(run.model, data, run.out, read_flags(ScoreConfig, run.args), num_iw_samples=run.num_iw_samples,
           batch_size=run.batch_size, seed=seed, command='python ' + shlex.join(sys.argv),
           run_folder=run.run_folder, log=run.say, workers=data.config.num_workers, findings=findings)


MODES = {'evaluate': evaluate, 'evaluate_fid': evaluate_fid, 'anomaly': anomaly, 'predict': predict,
         'sample': sample, 'reconstruct': reconstruct, 'latents': latents, 'decode': decode,
         'interpolate': interpolation, 'traverse': traversal}


def compare_runs(args: argparse.Namespace, config: EvalConfig, say: Callable[[str], None]) -> None:
    """Scores of several runs on the same test images."""
    runs, tasks = [], []
    for name, path in zip(run_names(config.compare), config.compare):
        model, run_args = open_model(path, ema=not config.no_ema)
        change_sampling(model, 'anomaly', args)
        say(f'{name}: {path}')
        its_config = replace(config, checkpoint=path, eval_mode='anomaly')
        task = Evaluation(model, run_args, args, its_config, say)
        knows_split = (task.run_folder / 'split.json').exists()
        runs.append(Run(name, path, place(model, 'cpu'), data_with_ood(task), knows_split))
        tasks.append(task)
    out = Path(config.save) if config.save else tasks[0].run_folder.parent / 'comparison'
    # One size for all: seconds depend on it, and the noise of a score.
    batch_size = config.batch_size or min(task.batch_size for task in tasks)
    compare(runs, out, read_flags(ScoreConfig, args), num_iw_samples=tasks[0].num_iw_samples,
            batch_size=batch_size, seed=config.seed, command='python ' + shlex.join(sys.argv), log=say,
            workers=runs[0].data.config.num_workers)


def change_sampling(model: Any, mode: str, args: argparse.Namespace) -> None:
    """Gives a model the flags of sampling that this command has; scores keep to those of the run."""
    flags = {f.name: getattr(args, f.name) for family in SAMPLED for f in fields(family.Sampling)
             if hasattr(args, f.name)}
    if flags and (mode not in ('sample', 'evaluate_fid') or not hasattr(model, 'change_sampling')):
        raise UserError(f"--{next(iter(flags))} is for the modes sample and evaluate_fid of a model that "
                        f"draws images step by step; this is {mode} of {type(model).__name__}. Leave it out.")
    if flags:
        model.change_sampling(**flags)


def work(args: argparse.Namespace) -> int:
    config = read_flags(EvalConfig, args)
    say = print if launch.is_main() else (lambda line: None)
    if config.compare:
        compare_runs(args, config, say)
        return 0
    model, run_args = open_model(config.checkpoint, ema=not config.no_ema)
    change_sampling(model, config.eval_mode, args)
    run = Evaluation(place(model, launch.device()), run_args, args, config, say)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.out} ({error.strerror}). Name a folder with --save.") from None
    return MODES[config.eval_mode](run) or 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    for config in (EvalConfig, ScoreConfig, PredictConfig):
        read_flags(config, args)                       # a wrong value is said before anything starts
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
