"""Trains a model on normal images: flags -> data -> model -> loop -> checkpoint.

    python train.py --dataset covid --data FOLDER --root runs --save chest ...
    python train.py ... --cont_training        goes on where the run stopped; starts it where there is none
    python train.py ... --dry_run              a step: parameters, memory, speed, time; needs no --data

In <root>/eval-<save>/ it leaves checkpoint.pt, args.json, split.json, log.txt, metrics.jsonl and events for
TensorBoard.
"""

import argparse
import dataclasses
import json
import math
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets import (
    DATASETS,
    Data,
    DataConfig,
    data_flags,
    load_data,
    stand_in,
)
from distributed import launch
from distributed.launch import LaunchConfig
from evaluation.likelihood import count_dims, evaluate_likelihood
from model import MODELS, build_model, describe, family_config, place
from neural_operations import activation_bytes, checkpoint_activations
from readers.batches import eval_batches, steps_per_epoch, train_batches
from readers.parts import Batch
from training.finetuning import start_from, update_slow_weights
from training.graph import capture_passes, check_graph
from training.meter import Meter
from training.optimization import (
    SCHEDULES,
    SafeBuffers,
    average_of,
    by_half_life,
    learning_rate,
    optimizer_step,
    ramped,
    recalibrate_batch_norm,
    steady,
)
from training.pictures import show_images
from training.rehearsal import MEMORY_MARGIN, rehearse
from training.validation import diagnose, mean_objective
from training.weights_and_biases import start_wandb
from utils import (
    RunLog,
    UserError,
    flag,
    mix_seed,
    owners,
    parse_flags,
    peek_flags,
    read_checkpoint,
    read_flags,
    read_json,
    run_program,
    save_checkpoint,
    seed_noise,
    write_json,
)

TABLES = {'model': MODELS, 'dataset': DATASETS}
FREE_DATA_FLAGS = ('data', 'cache_dir', 'num_workers')     # may change when a run goes on
ALONE = {'num_proc_node': 1, 'node_rank': 0, 'num_process_per_node': 1, 'world_size': 1, 'global_rank': 0,
         'local_rank': 0}             # a dry run is one process, whatever the flags say of the run
VALIDATION_TAGS = {'val/nelbo': 'nelbo_nats', 'val/neg_log_p': 'neg_log_p_nats',
                   'val/bpd_elbo': 'nelbo_bits_per_dim', 'val/bpd_log_p': 'neg_log_p_bits_per_dim'}
OPTIMIZERS = {'adamax': partial(torch.optim.Adamax, eps=1e-3),       # eps of the published NVAE
              'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW, 'radam': torch.optim.RAdam}
MOST_SKIPPED = 100                  # steps in a row that are not finite; then the run has diverged


@dataclass(frozen=True)
class RunConfig:
    """The run"""
    model: str = flag('nvae', 'model family', choices=tuple(MODELS), basic=True)
    root: str = flag('runs', 'folder of all runs')
    save: str = flag('exp', 'name of this run: it lives in <root>/eval-<save>')
    cont_training: bool = flag(False, 'go on from the checkpoint of this run; start where there is none yet')
    seed: int = flag(1, 'everything random follows from it')
    wandb_project: str = flag('', "show what TensorBoard gets in this project of Weights & Biases too; '' = "
                                  "do not")
    dry_run: bool = flag(False, 'build the model, take a step in one process, say what the run would need; '
                                'nothing is left behind. Without --data on random images')


@dataclass(frozen=True)
class TrainConfig:
    """Optimization"""
    batch_size: int = flag(200, 'images a batch, per process')
    accumulate: int = flag(1, 'batches a step, per process: their gradients are averaged')
    epochs: int = flag(200, 'passes over the training images')
    max_steps: int = flag(0, 'end the run after so many steps, whatever the epochs; 0 = no limit')
    warmup_epochs: int = flag(5, 'epochs over which the learning rate rises from 0')
    warmup_steps: int = flag(0, 'the same in steps; the longer of the two counts')
    learning_rate: float = flag(1e-2, 'highest learning rate')
    learning_rate_min: float = flag(1e-4, 'learning rate at the end of the cosine, and below all steps')
    lr_schedule: str = flag('cosine', 'learning rate after the warm-up: cosine, by epoch; step, by 0.3 '
                            'towards the lowest after every 40 % of the steps; constant',
                            choices=tuple(SCHEDULES))
    optimizer: str = flag('adamax', 'optimizer', choices=tuple(OPTIMIZERS))
    beta1: float = flag(0.9, 'share of the running mean gradient that a step keeps')
    weight_decay: float = flag(3e-4, 'L2 penalty inside the optimizer, on all weights; of adamw beside it')
    fast_adamax: bool = flag(False, 'update all weights in one fused operation; the numbers are the same')
    grad_clip: float = flag(0.0, 'largest gradient norm; 0 = do not clip')
    ema_decay: float = flag(0.0, 'average the weights with this decay and evaluate the average; 0 = do not')
    ema_ramp: bool = flag(False, 'average less at first: the n-th step by (1 + n) / (10 + n), up to '
                                 '--ema_decay')
    ema_halflife_kimg: float = flag(0.0, 'in place of --ema_decay: thousands of images over which the '
                                         'average keeps half; 0 = --ema_decay')
    ema_rampup_ratio: float = flag(0.0, '--ema_halflife_kimg: but at most this times the images seen so '
                                        'far; 0 = no limit')
    init_from: str = flag('', "start from the weights of this run folder or checkpoint; '' = afresh")
    reptile_steps: int = flag(0, 'finetuning by Reptile: average the weights every so many steps only, and '
                                 'go on from the average; 0 = every step, and do not')
    ema_bn_batches: int = flag(0, 'training batches that give the averaged weights batch-norm statistics of '
                                  'their own before they are evaluated or saved; 0 = these are averaged too')
    amp: str = flag('auto', 'network in bfloat16, likelihoods in float32; auto = on CUDA only',
                    choices=('auto', 'bf16', 'off'))
    checkpoint_activations: str = flag('auto', 'compute activations again in the backward pass: less memory, '
                                       'more time; auto = if the batch does not fit otherwise',
                                       choices=('auto', 'on', 'off'))
    cuda_graph: bool = flag(False, 'GPU, one process: replay the passes of the network as one CUDA graph, '
                                   'faster where batches are small; the same numbers up to rounding')
    save_every: int = flag(0, 'steps between checkpoints; 0 = a hundredth of the run, at least an epoch')
    log_every: int = flag(100, 'steps between lines of metrics')
    image_every: int = flag(1000, 'steps between pictures in TensorBoard; 0 = none')
    val_every: int = flag(0, 'epochs between validations; 0 = 1 in a run of up to 50 epochs, else 20')
    val_iw_samples: int = flag(10, 'importance samples of a validation')
    keep_best: bool = flag(False, 'also keep best.pt, the model of the lowest validation NELBO (or loss)')

    def __post_init__(self):
        least_of = {'batch_size': 1, 'epochs': 1, 'accumulate': 1, 'ema_bn_batches': 0, 'warmup_steps': 0,
                    'reptile_steps': 0, 'beta1': 0, 'ema_halflife_kimg': 0, 'ema_rampup_ratio': 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}.")
        for name in ('ema_bn_batches', 'reptile_steps'):
            if getattr(self, name) and not self.averages:
                raise UserError(f"--{name} {getattr(self, name)} is for averaged weights: set --ema_decay "
                                f"too, such as 0.999.")
        if self.ema_decay and self.ema_halflife_kimg:
            raise UserError(f"--ema_decay {self.ema_decay} --ema_halflife_kimg {self.ema_halflife_kimg}: set "
                            f"one of them to 0.")
        if self.beta1 >= 1:
            raise UserError(f"--beta1 {self.beta1}: it must be below 1.")

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return bool(self.ema_decay or self.ema_halflife_kimg)

    def kept(self, images: int) -> Callable[[int], float]:
        """What the n-th update of the average keeps of it, with so many images a step."""
        if self.ema_halflife_kimg:
            return by_half_life(1000 * self.ema_halflife_kimg, self.ema_rampup_ratio,
                                images * (self.reptile_steps or 1))
        return (ramped if self.ema_ramp else steady)(self.ema_decay)


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of the model and the data set that the command names; no others are known."""
    chosen = {'model': 'nvae', 'dataset': 'mnist'}
    chosen |= {name: value for name, value in peek_flags(argv, **chosen).items() if value in TABLES[name]}
    family = family_config(chosen['model'])                       # of a wrong name, the parser tells
    return parse_flags(argv, __doc__, (RunConfig, *data_flags(chosen['dataset']), TrainConfig, family,
                                       LaunchConfig),
                       defaults=getattr(family, 'defaults', {}), elsewhere=partial(elsewhere, **chosen))


def elsewhere(model: str, dataset: str) -> dict[str, str]:
    """For flags of other models and data sets, where they belong."""
    of_data = owners('dataset', dataset, {name: data_flags(name) for name in DATASETS})
    return of_data | owners('model', model, {name: (family_config(name),) for name in MODELS})


# -------------------------------------------------------------------------------------------------------- run

class Trainer:
    """One training run in one process of it."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.run, self.config = read_flags(RunConfig, args), read_flags(TrainConfig, args)
        self.folder = Path(self.run.root) / f'eval-{self.run.save}'
        self.device, self.rank, self.world = launch.device(), launch.rank(), launch.world()
        saved = self._saved()
        self.wandb = start_wandb(self.folder, self.run.wandb_project, vars(args)) \
            if self.run.wandb_project and launch.is_main() else None        # before TensorBoard's first event
        self.log = RunLog(self.folder, active=launch.is_main(), step=saved['step'] if saved else 0)
        # Batches that a process accumulates are those of as many processes: same images, same noise.
        self.shares = self.world * self.config.accumulate
        self.data = self._load_data()
        self.batch_size = min(self.config.batch_size, len(self.data.train) // self.shares)
        self.steps = steps_per_epoch(self.data.train, max(self.batch_size, 1), self.shares)
        self.total = self.steps * self.config.epochs
        self.end = min(self.total, self.config.max_steps or self.total)

        seed_noise(self.run.seed, 'initialization')             # the same weights on every rank
        family = read_flags(family_config(args.model), args)
        self.model = build_model(args.model, self.data.shape, family, self.data.pixels)
        if self.device.type == 'cuda' and self.world > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        place(self.model, self.device)
        if self.config.init_from and not saved:
            start_from(self.model, self.config.init_from)
        self.optimizer = OPTIMIZERS[self.config.optimizer](
            self.model.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay,
            betas=(self.config.beta1, 0.999), foreach=self.config.fast_adamax)
        self.ema = average_of(self.model, self.config.kept(self.batch_size * self.shares),
                              use_buffers=not self.config.ema_bn_batches) if self.config.averages else None
        self.ema_recalibrated = -1              # the step at which that was last done
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.best = math.inf                    # lowest validation figure of best.pt
        if saved:
            self._restore(saved)
        # The figure of the progress bar and of validations: a bound where there is one, else the loss.
        self.figure = 'nelbo' if hasattr(self.model, 'num_groups') else 'loss'
        self.recomputes = self._recomputes()
        if self.recomputes:
            checkpoint_activations(self.model)
        if self.config.cuda_graph:
            check_graph(self.model, self.device, self.world, self.config.accumulate, self.recomputes)
        self.captured = False                   # whether the passes of the network are a CUDA graph
        self.amp = self.config.amp == 'bf16' or (self.config.amp == 'auto' and self.device.type == 'cuda')
        self.stop = 0                           # number of the signal that asked this process to stop

    # ---------------------------------------------------------------------------------- starting and resuming

    def _saved(self) -> dict[str, Any] | None:
        path = self.folder / 'checkpoint.pt'
        goes_on = self.run.cont_training or launch.begun_before()
        if not path.exists():
            return None
        if not goes_on:
            raise UserError(f"{self.folder} already holds a trained model. Go on with it by --cont_training, "
                            f"take another name with --save, or delete the folder.")
        saved = read_checkpoint(path)
        if not {'description', 'optimizer'} <= saved.keys():
            raise UserError(f"{path} is not a checkpoint of a run of this framework: it cannot be continued. "
                            f"Choose another --save.")
        self._compare(saved)
        return saved

    def _compare(self, saved: dict[str, Any]) -> None:
        """Raises UserError if the flags build another model, or read other data, than the run had."""
        fixed = [f.name for f in dataclasses.fields(family_config(self.args.model))]
        fixed += ['model', 'seed', 'optimizer']
        fixed += [f.name for f in dataclasses.fields(DataConfig) if f.name not in FREE_DATA_FLAGS]
        # A family may resolve its flags, a file to what it holds: then that counts, not the name.
        family = read_flags(family_config(self.args.model), self.args)
        before = _plain(saved['args'] | saved['description']['config'])
        now = _plain(vars(self.args) | dataclasses.asdict(family))
        differing = [f"--{name} {before[name]} then, {now[name]} now" for name in fixed
                     if name in before and name in now and before[name] != now[name]]
        if differing:
            raise UserError(f"{self.folder} was started with other flags ({'; '.join(differing)}). "
                            f"Give the same ones, or another --save.")

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved['weights'])
        self.optimizer.load_state_dict(saved['optimizer'])
        for group in self.optimizer.param_groups:               # how to compute is this command's choice
            group['foreach'] = self.config.fast_adamax
        self.step, self.skipped = saved['step'], saved['skipped']
        if (path := self.folder / 'best.pt').exists():
            self.best = read_checkpoint(path)['validation']
        if self.ema is not None:
            self.ema.module.load_state_dict(saved['ema'] or saved['weights'])
            self.ema.n_averaged.fill_(saved['ema_count'])
        joint, before = self.batch_size * self.shares, saved['joint_batch']
        if joint != before:
            self.log.say(f'joint batch {before} before, {joint} now: the run goes on at step {self.step}, '
                         f'but sees other batches than it would have')

    def _recomputes(self) -> bool:
        """Whether activations are to be computed twice; all ranks decide alike."""
        if self.config.checkpoint_activations != 'auto':
            return self.config.checkpoint_activations == 'on'
        need = activation_bytes(self.model, self.data.shape)[0] * self.batch_size * MEMORY_MARGIN
        free = launch.free_memory()
        short = launch.any_rank(need > free)
        if short:
            self.log.say(f'a batch of {self.batch_size} would need {need / 2 ** 30:.1f} GB a process, and '
                         f'{free / 2 ** 30:.1f} GB are free: activations are computed again in the backward '
                         f'pass, which is slower (a smaller --batch_size avoids it)')
        return short

    def _load_data(self) -> Data:
        if self.run.dry_run and not self.args.data:
            return stand_in(read_flags(DataConfig, self.args), self.config.batch_size * self.shares)
        split = self.folder / 'split.json'
        with launch.main_first():                               # reads and caches the files once
            data = load_data(read_flags(DataConfig, self.args), read_json(split) if split.exists() else None)
        if launch.is_main() and not split.exists():
            write_json(split, data.split)
        if self.config.keep_best and not len(data.val):
            raise UserError("--keep_best chooses by a validation part, and there is none: set "
                            "--val_fraction, such as 0.1. The test part is not for choosing.")
        return data

    def _announce(self) -> None:
        say = self.log.say
        say('command: python ' + shlex.join(sys.argv))
        for line in self.data.report:
            say(line)
        number = sum(p.numel() for p in self.model.parameters())
        groups = f'{self.model.num_groups} latent groups, ' if hasattr(self.model, 'num_groups') else ''
        say(f'{self.args.model}: {number / 1e6:.2f} M parameters, {groups}'
            f'images {" x ".join(map(str, self.data.shape))}, {self.data.pixels.likelihood} pixels')
        batches = f'{self.config.accumulate} batches a step, ' if self.config.accumulate > 1 else ''
        say(f'{self.world} process(es) on {self.device.type}, {self.batch_size} images a batch each, '
            f'{batches}{self.steps} steps an epoch, {self.total} steps in all')
        if self.batch_size < self.config.batch_size:
            say(f'the training part has {len(self.data.train)} images, less than a batch of '
                f'{self.config.batch_size} for each of {self.shares} shares of a step: '
                f'batches of {self.batch_size} are used')
        if self.step:
            say(f'going on at step {self.step} of {self.total}')
        if launch.is_main():
            write_json(self.folder / 'args.json', vars(self.args))

    # ----------------------------------------------------------------------------------------------- the loop

    def train(self) -> int:
        """Runs to the end, or to a signal; the exit status."""
        self._announce()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        self._prepare()
        launch.begin()                  # from here on, torchrun may start the run again where it was
        save_every = self.config.save_every or self.steps * math.ceil(self.config.epochs / 100)
        val_every = self.config.val_every or (1 if self.config.epochs <= 50 else 20)
        batches = self._batches(self.run.seed, self.step)
        meter = Meter(self.figure, self.step, self.end)
        stop = False                    # what the ranks agreed on; self.stop is what a signal set on this one
        while self.step < self.end and not stop:
            step_batches = list(islice(batches, self.config.accumulate))
            logs = self._train_step(step_batches)
            meter.update(logs[f'train/{self.figure}_iter'], self.batch_size * self.shares)
            if self.step % self.config.log_every == 0 or self.step == self.end:
                self.log.metrics(self.step, {name: float(v) for name, v in (logs | meter.read()).items()})
            if self.config.image_every and self.step % self.config.image_every == 0:
                self._show_images(step_batches[0])
            stop = launch.any_rank(self.stop > 0)
            if self.step % save_every == 0 or self.step == self.end or stop:
                self._save()
            epoch, within = divmod(self.step, self.steps)
            if within == 0:
                mean = launch.mean_over_ranks(torch.tensor(meter.end_epoch(), device=self.device))
                self.log.metrics(self.step, {f'train/{self.figure}': float(mean), 'train/epoch': epoch})
                if epoch % val_every == 0 and self.step < self.end and not stop:
                    self._validate(epoch)
        meter.close()
        if self.step < self.end:
            self.log.say(f'stopped at step {self.step}, checkpoint written: go on with --cont_training')
            self._close_log()
            return 128 + (self.stop or signal.SIGTERM)          # as shells write it
        self._validate(self.step // self.steps)
        if self.config.image_every:
            self._show_images(next(batches))
        self.log.say(f'done: {self.step} steps, {self.skipped} skipped; {self.folder / "checkpoint.pt"}')
        self._close_log()
        return 0

    def _close_log(self) -> None:
        self.log.close()
        if self.wandb:
            self.wandb.finish()

    def _prepare(self) -> None:
        """What the loop needs besides the model."""
        # Filters of 1 x 1 are in both memory formats at once; DDP notes each as a lost chance to go faster.
        warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
        self.ddp = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.safe = SafeBuffers(self.model)

    def take_step(self) -> None:
        """A step outside the loop, for a dry run."""
        if not hasattr(self, 'ddp'):
            self._prepare()
            self.rehearsed = self._batches(self.run.seed)
        self._train_step(list(islice(self.rehearsed, self.config.accumulate)))

    def _batches(self, seed: int, first_step: int = 0) -> Iterator[Batch]:
        return train_batches(self.data.train, self.batch_size, seed=seed, rank=self.rank, world=self.world,
                             accumulate=self.config.accumulate, first_step=first_step,
                             workers=self.args.num_workers)

    def _train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One update from this process's batches of step `self.step`, which it then counts."""
        images = [batch.x.to(self.device, non_blocking=True) for batch in batches]       # each (B, C, *S)
        if self.step == 0 and hasattr(self.model, 'initialize') and not self.config.init_from:
            seed_noise(self.run.seed, 'initialize', self.rank)
            self.model.initialize(torch.cat(images))
            self.safe.keep()
            if self.ema is not None:                            # it begins where training begins
                self.ema.module.load_state_dict(self.model.state_dict())
        if self.config.cuda_graph and not self.captured:
            self.captured = True
            capture_passes(self.model.train(), images[0], self.amp)
        rate = learning_rate(self.step, self.steps, epochs=self.config.epochs,
                             warmup_epochs=self.config.warmup_epochs, warmup_steps=self.config.warmup_steps,
                             highest=self.config.learning_rate, lowest=self.config.learning_rate_min,
                             schedule=self.config.lr_schedule)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        all_logs = [self._backward(x, share) for share, x in enumerate(images)]
        logs = {name: sum(logs[name] for logs in all_logs) / len(all_logs) for name in all_logs[0]}
        applied, norm = optimizer_step(self.model, self.optimizer, self.safe, self.config.grad_clip)
        every = self.config.reptile_steps
        if applied and self.ema is not None and (self.step + 1) % (every or 1) == 0:
            update_slow_weights(self.ema, self.model, restart=every > 0)
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(f"{MOST_SKIPPED} steps in a row had a loss or gradient that is not finite, up to "
                            f"step {self.step}: the run has diverged. Lower --learning_rate or set "
                            f"--grad_clip; the last checkpoint is kept.")
        self.step += 1
        return logs | {'train/lr': rate, 'train/grad_norm': norm, 'train/skipped': self.skipped}

    def _backward(self, x: Tensor, share: int) -> dict[str, Tensor]:
        """Adds the gradient of batch `share` of this step, x (B, C, *S); returns its logs."""
        number = self.config.accumulate
        seed_noise(self.run.seed, 'train', self.step, self.rank * number + share)
        last = share == number - 1                              # ranks meet in its backward pass alone
        with nullcontext() if last or self.world == 1 else self.ddp.no_sync():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                terms = self.ddp(x)
                loss, logs = self.model.objective(terms, progress=self.step / self.total)
            (loss / number).backward()
        return {'train/loss_iter': loss.detach(), **logs}

    def _ask_to_stop(self, number: int, _: Any) -> None:
        """A first signal ends the run after this step, with a checkpoint; a second Ctrl-C ends it at once."""
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    # --------------------------------------------------------------------------------- checkpoint, validation

    def _recalibrate(self) -> None:
        """Gives the averaged weights batch-norm statistics of their own, once a step."""
        number = self.config.ema_bn_batches
        if not number or self.ema_recalibrated == self.step:
            return

        def images() -> Iterator[Tensor]:
            batches = self._batches(mix_seed(self.run.seed, 'recalibrate'))
            for i, batch in enumerate(islice(batches, number)):
                seed_noise(self.run.seed, 'recalibrate', i, self.rank)
                yield batch.x.to(self.device)

        recalibrate_batch_norm(self.ema.module, images())
        self.ema_recalibrated = self.step

    def _save(self) -> None:
        self._recalibrate()
        if launch.is_main():
            save_checkpoint(self.folder / 'checkpoint.pt', self._model_state() | {
                'optimizer': self.optimizer.state_dict(), 'skipped': self.skipped,
                'joint_batch': self.batch_size * self.shares,
                'ema_count': int(self.ema.n_averaged) if self.ema is not None else 0})

    def _model_state(self) -> dict[str, Any]:
        """What a checkpoint holds for evaluation."""
        return {'description': describe(self.model), 'args': _plain(vars(self.args)), 'step': self.step,
                'weights': self.model.state_dict(), 'torch': str(torch.__version__),
                'ema': self.ema.module.state_dict() if self.ema is not None else None}

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: the average where one is kept."""
        return self.ema.module if self.ema is not None else self.model

    def _validate(self, epoch: int) -> None:
        part = self.data.val if len(self.data.val) else self.data.test
        if not len(part):
            return
        self._recalibrate()
        batches = eval_batches(part, self.batch_size, rank=self.rank, world=self.world)
        if self.figure == 'nelbo':
            result = evaluate_likelihood(
                self.evaluated, batches, num_iw_samples=self.config.val_iw_samples, seed=self.run.seed,
                device=self.device, num_dims=count_dims(self.data.shape, self.data.pixels.padding))
            values = {tag: result[name] for tag, name in VALIDATION_TAGS.items()}
            said = (f"NELBO, nats: {result['nelbo_nats']:.2f} +- {result['nelbo_nats_standard_error']:.2f}, "
                    f"-log p {result['neg_log_p_nats']:.2f}")
        else:
            values = {'val/loss': mean_objective(self.evaluated, batches, self.run.seed, self.device)}
            said = f"loss {values['val/loss']:.6g}"
        if hasattr(self.model, 'diagnose'):
            batches = eval_batches(part, self.batch_size, rank=self.rank, world=self.world)
            for name, each in diagnose(self.evaluated, batches, self.run.seed, self.device).items():
                values[f'val/{name}'] = float(each.mean())
                self.log.histogram(self.step, f'val/{name}', each)
        self.log.metrics(self.step, values)
        self.log.say(f'epoch {epoch}, step {self.step}: validation {said}')
        self._keep_best(values[f'val/{self.figure}'])

    def _keep_best(self, value: float) -> None:
        if self.config.keep_best and value < self.best:
            self.best = value
            if launch.is_main():
                save_checkpoint(self.folder / 'best.pt', self._model_state() | {'validation': value})

    def _show_images(self, batch: Batch) -> None:
        if launch.is_main():
            show_images(self.evaluated, batch.x.to(self.device), self.log, self.step, self.run.seed)


def _plain(args: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(args))


def work(args: argparse.Namespace) -> int:
    return Trainer(args).train()


def dry_run(args: argparse.Namespace) -> int:
    """One step of the run, alone, in a folder that is gone afterwards."""
    wanted = read_flags(LaunchConfig, args)

    def rehearsal(args: argparse.Namespace) -> int:
        trainer = Trainer(args)
        number = DATASETS[args.dataset].num_train if not args.data else 0
        return rehearse(trainer, number or len(trainer.data.train),
                        wanted.num_proc_node * wanted.num_process_per_node)

    with tempfile.TemporaryDirectory() as folder:
        args.root, args.cont_training, args.wandb_project = folder, False, ''
        return launch.launch(rehearsal, args, replace(wanted, **ALONE))


def main() -> int:
    args = parse_args(sys.argv[1:])
    if args.dry_run:
        return dry_run(args)
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
