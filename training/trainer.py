"""The parts of a training run, built from its flags."""

import math
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import Data, DataConfig, load_data, stand_in
from distributed import launch
from evaluation.likelihood import count_dims, diagnose, evaluate_likelihood, mean_objective
from evaluation.pictures import show_images
from evaluation.sampling import recalibrate_batch_norm
from model import build_model, family_config, place, start_from
from neural_operations import activation_bytes, checkpoint_activations
from readers.batches import eval_batches, steps_per_epoch, train_batches
from readers.split import read_split, split_digest, why_other_split
from storage.checkpoint import copies, read_checkpoint
from storage.provenance import add_start
from training.config import RunConfig, Schedule, TrainConfig
from training.optimization import Optimization, capture_passes, check_graph, choose_bf16, multiplies_bf16
from training.run_folder import RunFolder, begun_mark, read_resumable
from training.trackers import describe_run
from utils import UserError, mix_seed, read_flags, seed_noise, write_json

MEMORY_MARGIN = 1.3          # gradients and work space, beside what is kept for the backward pass
TAGS = {'val/nelbo': 'nelbo_nats', 'val/neg_log_p': 'neg_log_p_nats',
        'val/bpd_elbo': 'nelbo_bits_per_dim', 'val/bpd_log_p': 'neg_log_p_bits_per_dim'}


def free_memory() -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's available memory."""
    if launch.device().type == 'cuda':
        return torch.cuda.mem_get_info(launch.device())[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
    except (OSError, StopIteration):            # not Linux: half of the physical memory
        available = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    return available // launch.local_world()


class Trainer:
    """One process of a run: its folder, data, schedule, model and optimization."""

    def __init__(self, args: Namespace):
        """Raises UserError for flags that do not fit each other, the data, or the run that is resumed."""
        self.args, self.run, self.config = args, read_flags(RunConfig, args), read_flags(TrainConfig, args)
        saved, self.notes = read_resumable(self.run, args), []
        # Batches that a process accumulates are those of as many processes: same images, same noise.
        batches = launch.world() * self.config.accumulate
        self.data = self._load_data(batches, saved.get('split', '') if saved else '')
        batch_size = min(self.config.batch_size, len(self.data.train) // batches)
        self.schedule = Schedule(self.config, steps_per_epoch(self.data.train, max(batch_size, 1), batches),
                                 batch_size, batch_size * batches)
        self.model = self._build_model(initial=not saved)
        # What progress and validations show: the bound of a likelihood model, the loss of another.
        self.metric = 'nelbo' if hasattr(self.model, 'num_groups') else 'loss'
        # None: the first step chooses. A run that goes on keeps what it has chosen, and so its numbers.
        auto = True if launch.device().type == 'cuda' else saved.get('amp') if saved else None
        self.amp = {'bf16': True, 'off': False, 'auto': auto}[self.config.amp]
        if self.amp is None and not multiplies_bf16():
            self.amp = False
            self.notes.append('--amp auto: float32, as this processor has no instructions for bfloat16')
        self.optimization = Optimization(self.model, self.schedule)
        if saved:
            self.optimization.load_state_dict(saved)
            if (before := saved['joint_batch']) != self.schedule.joint_batch:
                self.notes.append(f'{before} images a step before, {self.schedule.joint_batch} now: the run '
                                  f'sees other batches than it would have')
        self.recomputes = self._recomputes()
        checkpoint_activations(self.model, self.recomputes)
        if self.config.cuda_graph:
            check_graph(self.model, self.config.accumulate, self.recomputes)
        self.monitored = None
        if number := self.config.monitor_anomalies:
            from evaluation.monitoring import choose_monitored
            self.monitored = choose_monitored(self.data, number, self.run.seed)
        self.captured = False                   # whether the passes of the network are a CUDA graph
        # From here on nothing is refused, so that a start that is leaves no trace.
        self.folder = RunFolder(self.run, vars(args), self.optimization.step, self.split)
        self.best = math.inf                    # the lowest validation so far, that of best.pt
        if saved and copies(best := self.run.folder / 'best.pt'):
            self.best = read_checkpoint(best, self.folder.say)['validation']

    def _load_data(self, batches: int, known: str) -> Data:
        """The data, whose split has the hash `known` in the checkpoint that goes on; '' = there is none."""
        config, split = read_flags(DataConfig, self.args), self.run.folder / 'split.json'
        if self.run.dry_run and not config.data:
            self.split = ''
            return stand_in(config, self.config.batch_size * batches)
        with launch.main_first():                               # reads and caches the files once
            stored = read_split(split)
            data = load_data(config, stored)
        self.split = split_digest(stored or data.split)
        lines = why_other_split(stored, data.split, known) if known else []
        if lines and self.split != known:
            raise UserError(lines[0])
        self.notes += lines
        if self.config.keep_best and not len(data.val):
            raise UserError("--keep_best chooses by a validation part, and there is none: set "
                            "--val_fraction, such as 0.1. The test part is not for choosing.")
        return data

    def _build_model(self, initial: bool) -> Any:
        seed_noise(self.run.seed, 'initialization')             # the same weights in every process
        family = read_flags(family_config(self.args.model), self.args)
        model = build_model(self.args.model, self.data.shape, family, self.data.pixels)
        if launch.device().type == 'cuda' and launch.world() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        place(model, launch.device())
        if self.config.init_from and initial:
            start_from(model, self.config.init_from)
        return model

    def _recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass; all processes decide alike."""
        if self.config.checkpoint_activations != 'auto':
            return self.config.checkpoint_activations == 'on'
        need = activation_bytes(self.model, self.data.shape) * self.schedule.batch_size * MEMORY_MARGIN
        recomputes = launch.any_rank(need > free_memory())
        if recomputes:
            self.notes.append(f'a batch would need {need / 2 ** 30:.1f} GB, more than is free: activations '
                              f'are recomputed, which is slower (a smaller --batch_size avoids it)')
        return recomputes

    def announce(self) -> None:
        """Says what is trained, on what and for how long, and keeps the flags."""
        data, schedule, say = self.data, self.schedule, self.folder.say
        for line in (f'command: python {shlex.join(sys.argv)}', *data.report, *self.notes):
            say(line)
        say(f'{self.args.model}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters, '
            f'{getattr(self.model, "num_groups", "no")} latent groups, '
            f'images {" x ".join(map(str, data.shape))}, {data.pixels.likelihood} pixels')
        say(f'{launch.world()} process(es) on {launch.device().type}, {schedule.joint_batch} images per '
            f'step, {schedule.steps} steps per epoch, {schedule.total} steps in total')
        if schedule.batch_size < self.config.batch_size:
            say(f'the training part has {len(data.train)} images, too few for batches of '
                f'{self.config.batch_size}: batches of {schedule.batch_size} are used')
        if self.optimization.step:
            say(f'continuing at step {self.optimization.step} of {schedule.total}')
        if launch.is_main():
            if not self.optimization.step:
                self.folder.show(lambda writer: describe_run(writer, vars(self.args), [f'val/{self.metric}']))
            write_json(self.folder.folder / 'args.json', vars(self.args))
            if not (split := self.folder.folder / 'split.json').exists():
                write_json(split, data.split)
            add_start(self.folder.folder, self.run.seed, data.split, self.optimization.step)
        if mark := begun_mark():
            mark.touch()

    def save(self) -> bool:
        """Writes the checkpoint; False if it would not be finite."""
        state = self.optimization.state_dict() | {'amp': self.amp}
        return self.folder.save('checkpoint.pt', self.model, state)

    def steps(self, first: int, seed: int) -> Iterator[list[Tensor]]:
        """The batches of this process in each step from `first` on, each (B, C, *S)."""
        batches = train_batches(self.data.train, self.schedule.batch_size, seed=seed,
                                accumulate=self.config.accumulate, first_step=first,
                                workers=self.args.num_workers)
        while True:
            yield [batch.x.to(launch.device(), non_blocking=True)
                   for batch in islice(batches, self.config.accumulate)]

    def start_step(self, images: list[Tensor]) -> None:
        """Clears the gradients. Before the first step, initializes from its images and captures passes."""
        if self.optimization.step == 0 and hasattr(self.model, 'initialize') and not self.config.init_from:
            seed_noise(self.run.seed, 'initialize', launch.rank())
            self.model.initialize(torch.cat(images))
            self.optimization.weights_changed()
        self.model.train()
        if self.amp is None:
            seed_noise(self.run.seed, 'precision', launch.rank())
            self.amp, line = choose_bf16(self.model, images[0])
            self.folder.say(line)
        if self.config.cuda_graph and not self.captured:
            self.captured = True
            capture_passes(self.model, images[0], self.amp)
        self.optimization.optimizer.zero_grad(set_to_none=True)

    def validate(self) -> None:
        """Logs what the weights that count attain on the validation part, and keeps the best of them if this
        is asked for. Without that part the test part is measured, by which nothing is chosen.
        """
        if not len(part := self.data.val if len(self.data.val) else self.data.test):
            return
        step, model, seed = self.optimization.step, self.optimization.evaluated, self.run.seed
        batches = partial(eval_batches, part, self.schedule.batch_size)
        if self.metric == 'nelbo':
            num_dims = count_dims(self.data.shape, self.data.pixels.padding)
            result = evaluate_likelihood(model, batches(), num_iw_samples=self.config.val_iw_samples,
                                         num_dims=num_dims, seed=seed)
            values = {tag: result[name] for tag, name in TAGS.items()}
            summary = f"{result['nelbo_nats']:.2f} +- {result['nelbo_nats_standard_error']:.2f} nats"
        else:
            values = {'val/loss': mean_objective(model, batches(), seed)}
            summary = f"{values['val/loss']:.6g}"
        if hasattr(model, 'diagnose'):
            for name, each in diagnose(model, batches(), seed).items():
                values[f'val/{name}'] = float(each.mean())
                self.folder.histogram(step, f'val/{name}', each)
        value = values[f'val/{self.metric}']
        if self.config.keep_best and value < self.best and self.folder.save(
                'best.pt', model, self.optimization.weights() | {'validation': value}):
            self.best = value
        if self.monitored is not None:
            from evaluation.monitoring import monitor
            for name, auroc in monitor(model, self.data, self.monitored, self.schedule.batch_size).items():
                values[f'monitor/auroc_{name}'] = auroc
                summary += f', AUROC of {name} {auroc:.3f} (monitored, nothing is chosen by it)'
        self.folder.metrics(step, values)           # last: while it is missing, a resumed run validates again
        self.folder.say(f'epoch {step // self.schedule.steps}, step {step}: validation {self.metric} '
                        f'{summary}')

    def owes_validation(self) -> bool:
        """Whether the run was ended after the checkpoint that it goes on from, and before its validation."""
        due = 'validate' in self.schedule.due(self.optimization.step)
        return launch.any_rank(launch.is_main() and due and f'val/{self.metric}' not in self.folder.logged)

    def recalibrate(self) -> None:
        """Gives all processes the batch-norm statistics of the main one, as on CPUs each sees a part of the
        batch; and the averaged weights statistics of their own, if this is asked for.
        """
        launch.copy_from_main([*self.model.buffers(), *self.optimization.evaluated.buffers()])
        if self.config.ema_bn_batches:
            batches = chain.from_iterable(self.steps(0, mix_seed(self.run.seed, 'recalibrate')))
            batches = islice(batches, self.config.ema_bn_batches)
            recalibrate_batch_norm(self.optimization.evaluated, batches, self.run.seed)

    def show(self, x: Tensor) -> None:
        if launch.is_main():
            show_images(self.optimization.evaluated, x, self.folder, self.optimization.step, self.run.seed)
