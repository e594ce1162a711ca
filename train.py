"""Trains a model on normal images: flags -> data -> model -> loop -> checkpoint.

    python train.py --dataset covid --data FOLDER --root runs --save chest ...
    python train.py ... --cont_training        resumes the run where it stopped; starts it if there is none
    python train.py ... --dry_run              one step: parameters, memory, speed, time; needs no --data

In <root>/eval-<save>/ it leaves checkpoint.pt, args.json, split.json, log.txt, metrics.jsonl and events for
TensorBoard.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import tempfile
import time
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from command_line.parser import owners, parse_flags, peek_flags, with_config
from datasets import DATASETS, data_flags
from distributed import launch
from distributed.launch import LaunchConfig
from model import MODELS, family_config
from training.config import RunConfig, TrainConfig
from utils import read_flags, run_program, seed_noise

if TYPE_CHECKING:
    from torch import Tensor

    from training.trainer import Trainer

TABLES = {'model': MODELS, 'dataset': DATASETS}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of the model and the data set that the command names; no others are known."""
    chosen = {'model': 'nvae', 'dataset': 'mnist'}
    peeked = peek_flags(argv, **chosen | {'model': ''})
    chosen |= {name: value for name, value in peeked.items() if value in TABLES[name]}
    suited = {} if peeked['model'] else suited_defaults(argv, chosen['dataset'])
    chosen['model'] = suited.get('model', chosen['model'])
    family = family_config(chosen['model'])                       # of a wrong name, the parser tells
    return parse_flags(argv, __doc__, (RunConfig, *data_flags(chosen['dataset']), TrainConfig, family,
                                       LaunchConfig), elsewhere=partial(elsewhere, **chosen),
                       defaults=getattr(family, 'defaults', {}) | suited)


def suited_defaults(argv: list[str], dataset: str) -> dict[str, Any]:
    """The defaults of a data set for a command that names no model. With flags of NVAE there are none: such a
    command is for NVAE, as published ones are.
    """
    defaults = dict(DATASETS[dataset].defaults)
    of_nvae, of_model = ({field.name for field in fields(family_config(name))}
                         for name in ('nvae', defaults.get('model', 'nvae')))
    given = {word.partition('=')[0].removeprefix('--').removeprefix('no-') for word in with_config(argv)}
    return {} if given & (of_nvae - of_model) else defaults


def elsewhere(model: str, dataset: str) -> dict[str, str]:
    """For flags of other models and data sets, where they belong."""
    of_data = owners('dataset', dataset, {name: data_flags(name) for name in DATASETS})
    return of_data | owners('model', model, {name: (family_config(name),) for name in MODELS})


def work(args: argparse.Namespace) -> int:
    """Trains in one process of the run, to its end or to a signal; returns the exit status."""
    from training.run_folder import alone_in
    from training.trainer import Trainer
    gc.freeze()                               # modules stay: later searches for garbage leave them out
    gc.enable()

    with alone_in(read_flags(RunConfig, args).folder):
        started = time.perf_counter()
        trainer = Trainer(args)
        trainer.announce()
        folder, optimization = trainer.folder, trainer.optimization
        stop, read = [], time.perf_counter()
        with launch.on_signals((signal.SIGINT, *launch.ENDING), partial(note_signal, stop, os.getpid())):
            loop(trainer, stop)
            folder.say(f'reading took {read - started:.0f} s, training {time.perf_counter() - read:.0f} s')
            if finished := optimization.step >= trainer.schedule.end:
                trainer.validate()
                folder.say(f'done: {optimization.step} steps, {optimization.skipped} skipped; '
                           f'{folder.folder / "checkpoint.pt"}')
            else:
                folder.say(f'stopped at step {optimization.step}, checkpoint written: continue with '
                           f'--cont_training')
        folder.close()
    return 0 if finished else 128 + [signal.SIGTERM, *stop][-1]          # as shells write it


def loop(trainer: Trainer, stop: list[int]) -> None:
    """Steps up to the end of the schedule, or to a signal; then the last one is in the checkpoint."""
    from training.recovery import go_back
    from training.run_folder import Progress

    folder, schedule, optimization = trainer.folder, trainer.schedule, trainer.optimization
    if optimization.step and trainer.owes_validation():
        trainer.validate()
    steps = trainer.steps(optimization.step, trainer.run.seed)
    progress = Progress(trainer.metric, optimization.step, schedule.end)
    unsaved = stopping = False              # stopping: all agree, as a signal may have reached only some
    while optimization.step < schedule.end and not stopping:
        images = next(steps)                                    # batches of this process, each (B, C, *S)
        logs = train_step(trainer, images)
        progress.update(logs, schedule.joint_batch)
        stopping = launch.any_rank(bool(stop))
        step, due = optimization.step, schedule.due(optimization.step)
        if 'log' in due:
            folder.metrics(step, {name: float(value) for name, value in (logs | progress.read()).items()})
        last, unsaved = stopping or step == schedule.end, unsaved or 'save' in due or stopping
        ready = unsaved and (last or not optimization.skipped_in_a_row)    # after a skipped step, the next
        if ready or 'validate' in due:
            trainer.recalibrate()
        if optimization.diverged or (ready and not trainer.save()):
            go_back(optimization, folder, images, trainer.run.seed)
            steps, unsaved = trainer.steps(optimization.step, trainer.run.seed), False
            progress.go_back(optimization.step)
            continue
        unsaved = unsaved and not ready
        if 'epoch' in due:
            folder.metrics(step, progress.end_epoch() | {'train/epoch': step // schedule.steps})
        if 'validate' in due and not stopping:
            trainer.validate()
        if 'show' in due or (step == schedule.end and trainer.config.image_every):
            trainer.show(images[0])
    progress.bar.close()


def train_step(trainer: Trainer, images: list[Tensor]) -> dict[str, Any]:
    """One update of the weights by the mean gradient of these batches (B, C, *S); returns what is logged."""
    import torch

    model, optimization, all_logs = trainer.model, trainer.optimization, []
    step, progress = optimization.step, optimization.step / trainer.schedule.total
    trainer.start_step(images)
    for index, x in enumerate(images):
        seed_noise(trainer.run.seed, 'train', step, launch.rank() * len(images) + index)
        optimization.network.require_backward_grad_sync = x is images[-1]     # processes meet in the last one
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=trainer.amp):
            loss, logs = model.objective(optimization.network(x), progress)
        (loss / len(images)).backward()
        all_logs.append({'train/loss_iter': loss.detach(), **logs})
    logs = {name: sum(logs[name] for logs in all_logs) / len(all_logs) for name in all_logs[0]}
    return logs | optimization.update()     # clips gradients, skips those that are not finite


def note_signal(stop: list[int], process: int, number: int, _: Any) -> None:
    """SIGTERM and its like, or Ctrl-C, end the run after the step at hand, with a checkpoint; a second Ctrl-C
    ends it at once. `stop` gets the signal as that of the two which it is like.
    """
    if launch.is_main() and not stop and os.getpid() == process:                            # no loader worker
        os.write(2, b'\nstopping after this step, with a checkpoint; Ctrl-C ends the run at once\n')
    stop.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def dry_run(args: argparse.Namespace) -> int:
    """The first steps of the run in one process, in a folder that is gone afterwards."""
    from training.dry_run import report

    processes = args.num_proc_node * args.num_process_per_node
    alone = LaunchConfig(device=args.device, deterministic=args.deterministic, num_threads=args.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        args.root, args.cont_training = folder, False
        args.wandb_project = args.mlflow_experiment = ''
        return launch.launch(partial(report, train_step, processes), args, alone)


def main() -> int:
    args = parse_args(sys.argv[1:])
    if args.dry_run:
        return dry_run(args)
    gc.disable()                              # until `work` has imported all: searching takes 0.3 s
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
