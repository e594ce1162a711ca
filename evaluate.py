"""What a trained model says: likelihoods, samples, reconstructions, anomaly scores.

    python evaluate.py --checkpoint runs/eval-chest/checkpoint.pt --eval_mode anomaly --save OUT

Reads checkpoints of train.py and of the published NVAE. The data set and its split are those of the run;
flags given here win over the run's. Writes OUT/metrics.json and what the mode adds.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import launch
from anomaly.detect import detect
from anomaly.scores import ScoreConfig
from checkpoint import read_checkpoint
from datasets import Batch, Data, DataConfig, eval_batches, load_data
from distributions import Pixels
from generative.likelihood import count_dims, evaluate_likelihood
from generative.pictures import image_grid, save_png
from generative.sampling import readjust_batch_norm, samples
from launch import LaunchConfig
from model import restore
from utils import (
    UserError,
    add_flags,
    flag,
    read_flags,
    read_json,
    run_program,
    write_atomically,
    write_json,
)

NUM_SHOWN = 64                                    # images in a grid
DEFAULT_IW_SAMPLES = {'evaluate': 1000, 'anomaly': 16}
SAMPLE_BATCH = 100


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""
    checkpoint: str = flag('', 'checkpoint.pt of a run, or its folder; or a checkpoint of the published NVAE')
    save: str = flag('', "folder for the results; '' = a folder named after the mode, beside the checkpoint")
    eval_mode: str = flag('sample', 'what to do', choices=('sample', 'evaluate', 'reconstruct', 'anomaly'))
    eval_on_train: bool = flag(False, 'evaluate, reconstruct: the training images, not the test images')
    readjust_bn: bool = flag(False, 'sample: fit the batch-norm statistics to the temperature first')
    temp: float = flag(0.7, 'sample: temperature of the latents')
    num_samples: int = flag(64, 'sample, reconstruct: number of images')
    max_images: int = flag(0, 'evaluate: only the first so many images, in whole batches; 0 = all')
    num_iw_samples: int = flag(0, 'importance samples an image; 0 = 1000 for evaluate, 16 for anomaly')
    batch_size: int = flag(0, "images a batch; 0 = the training's (sample: 100)")
    no_ema: bool = flag(False, 'use the last weights even where the run kept an average')
    seed: int = flag(1, 'all noise follows from it')

    def __post_init__(self):
        least_of = {'num_samples': 1, 'max_images': 0, 'num_iw_samples': 0, 'batch_size': 0, 'temp': 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}.")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, EvalConfig)
    add_flags(parser, ScoreConfig)
    add_flags(parser, LaunchConfig)
    add_flags(parser, DataConfig, optional=True)
    args = parser.parse_args(argv)
    if not args.checkpoint:
        parser.error('--checkpoint is needed: the checkpoint.pt of a run')
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
    def num_iw_samples(self) -> int:
        return self.config.num_iw_samples or DEFAULT_IW_SAMPLES[self.config.eval_mode]

    def data(self) -> Data:
        """The run's data set and split; flags of this command win."""
        path = self.run_folder / 'split.json'
        config = read_flags(DataConfig, self.run_args | vars(self.args))
        split = read_json(path) if path.exists() else None
        with launch.main_first():
            # The split says nothing of another data set.
            data = load_data(config, split if split and split['dataset'] == config.dataset else None)
        if tuple(data.shape) != tuple(self.model.shape):
            raise UserError(f"the model was trained on images of shape {tuple(self.model.shape)}, the data "
                            f"have {tuple(data.shape)}. Set --image_size and --channels as in training.")
        if grey_levels(data.pixels) != grey_levels(self.model.pixels):
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

    def need(self, capability: str) -> None:
        """Raises UserError for a model that cannot do what the mode is about."""
        if not hasattr(self.model, capability):
            raise UserError(f"--eval_mode {self.config.eval_mode}: this model has no `{capability}`. Choose "
                            f"another mode.")

    def write_metrics(self, key: str, values: dict[str, Any]) -> None:
        """Puts `values` under `key` into metrics.json; what other modes wrote stays."""
        if launch.is_main():
            path = self.out / 'metrics.json'
            write_json(path, (read_json(path) if path.exists() else {}) | {key: values})


# ------------------------------------------------------------------------------------------------------ modes

def evaluate(run: Evaluation) -> None:
    """NELBO and importance-weighted bound."""
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
    if config.readjust_bn:
        readjust_batch_norm(run.model, config.temp, seed=config.seed)
    if launch.is_main():
        for path in run.out.glob('samples_*.npz'):                  # of an earlier, larger call
            if int(path.stem.split('_')[1]) * batch_size >= config.num_samples:
                path.unlink()
    for index, images in samples(run.model, config.num_samples, batch_size, config.temp, seed=config.seed,
                                 rank=launch.rank(), world=launch.world()):
        _write_npz(run.out / f'samples_{index}.npz', samples=images.cpu().numpy())
        if index == 0:
            save_png(run.out / 'samples.png', image_grid(images[:NUM_SHOWN]))
    run.write_metrics('sample', {'num_samples': config.num_samples, 'temperature': config.temp,
                                 'readjust_bn': config.readjust_bn, 'seed': config.seed})
    run.say(f"{config.num_samples} images at temperature {config.temp}: {run.out / 'samples.png'}")


@torch.no_grad()
def reconstruct(run: Evaluation) -> None:
    """Inputs beside their reconstructions at the posterior means: reconstructions.npz and .png."""
    run.need('reconstruct')
    data, rows = run.data(), []
    last = -(-run.config.num_samples // run.batch_size)
    for index, batch in run.batches(data):
        if index >= last:
            break
        rows.append((index, batch.x, run.model.reconstruct(batch.x.to(launch.device())).cpu(), batch.id))
    rows = sorted(launch.gather(rows), key=lambda row: row[0])
    if not launch.is_main():
        return
    x, y = (torch.cat([row[i] for row in rows])[:run.config.num_samples] for i in (1, 2))
    ids = [name for row in rows for name in row[3]][:run.config.num_samples]
    _write_npz(run.out / 'reconstructions.npz', x=x.numpy(), reconstruction=y.numpy(), id=np.array(ids))
    pairs = torch.stack([x, y], dim=1)[:NUM_SHOWN // 2].flatten(0, 1)              # input, output, input, ...
    save_png(run.out / 'reconstructions.png', image_grid(pairs, columns=8))
    error = float((x - y).abs().mean())
    run.write_metrics('reconstruct', {'num_images': len(x), 'mean_absolute_error': error, 'part': run.part})
    run.say(f"{len(x)} images, mean absolute error {error:.4f}: {run.out / 'reconstructions.png'}")


def anomaly(run: Evaluation) -> None:
    """Scores, thresholds, metrics and the report."""
    data = run.data()
    keeps = run.run_folder if os.access(run.run_folder, os.W_OK) else None
    detect(run.model, data, run.out, read_flags(ScoreConfig, run.args), num_iw_samples=run.num_iw_samples,
           batch_size=run.batch_size, seed=run.config.seed, command='python ' + shlex.join(sys.argv),
           run_folder=keeps, log=run.say, workers=data.config.num_workers)


MODES = {'evaluate': evaluate, 'sample': sample, 'reconstruct': reconstruct, 'anomaly': anomaly}


def _write_npz(path: Path, **arrays: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open('wb') as f:
            np.savez_compressed(f, **arrays)
    write_atomically(path, write)


def work(args: argparse.Namespace) -> int:
    config = read_flags(EvalConfig, args)
    say = print if launch.is_main() else (lambda line: None)
    model, run_args = restore(read_checkpoint(config.checkpoint), ema=not config.no_ema)
    run = Evaluation(model.to(launch.device()), run_args, args, config, say)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {run.out} ({error.strerror}). Name a folder with --save.") from None
    MODES[config.eval_mode](run)
    return 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    for config in (EvalConfig, ScoreConfig):
        read_flags(config, args)                       # a wrong value is said before anything starts
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
