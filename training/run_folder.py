"""What a run leaves behind and shows: log, checkpoints, progress bar."""

import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets import DataConfig
from distributed import launch
from distributed.progress import is_due
from model import describe, family_config
from storage.checkpoint import copies, not_finite, read_checkpoint, save_checkpoint
from storage.locks import clear_leftovers, only_process
from storage.run_log import RunLog, with_room
from training.config import RunConfig
from training.trackers import end_events_quietly, start_trackers
from utils import UserError, read_flags

REMAINS = ('args.json', 'metrics.jsonl', 'log.txt')        # of a run that has begun
STATES = ('weights', 'ema', 'optimizer')                   # of a checkpoint: what must be finite
FREE_DATA_FLAGS = ('data', 'cache_dir', 'num_workers')     # may change when a run is resumed


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError, on every process, if another run is at work in the folder."""
    with only_process(folder) if launch.is_main() else nullcontext('') as other:
        if holder := ''.join(launch.gather([other])):
            raise UserError(f"{folder} is in use by {holder}: wait for that run to end, or choose another "
                            f"--save.")
        if launch.is_main():
            clear_leftovers(folder, all_of_them=True)
        yield


class RunFolder(RunLog):
    """The log and the checkpoints of a run, which only its main process writes. A full disk is waited for."""

    def __init__(self, run: RunConfig, flags: dict[str, Any], step: int = 0, split: str = ''):
        """`flags` are all flags of the command; `step` steps are done; `split` is the hash of split.json."""
        self.flags, self.split = flags, split
        self.trackers = start_trackers(run.folder, flags) if launch.is_main() else {}
        end_events_quietly()
        super().__init__(run.folder, active=launch.is_main(), step=step)

    def save(self, name: str, model: Any, state: dict[str, Any]) -> bool:
        """Writes a checkpoint: `state`, and what builds `model` again. False if a number in it is not
        finite on any process: then none is written.
        """
        if launch.any_rank(bool(not_finite({key: state.get(key) for key in STATES}))):
            return False
        if self.active:
            content = {'description': describe(model), 'args': self.flags, 'torch': str(torch.__version__),
                       'split': self.split, **state}
            with_room(lambda: save_checkpoint(self.folder / name, content, self.flags['keep']))
        return True

    def metrics(self, step: int, values: dict[str, float]) -> None:
        super().metrics(step, values)
        self._each_tracker('metrics', step, values)

    def close(self) -> None:
        super().close()
        self._each_tracker('finish')

    def _each_tracker(self, method: str, *values: Any) -> None:
        """Calls a method of the trackers. One that fails, in whatever way, is left out: the run goes on."""
        for name, tracker in [*self.trackers.items()]:
            try:
                getattr(tracker, method)(*values)
            except Exception as error:
                del self.trackers[name]
                self.say(f'WARNING: nothing more goes to {name} ({error})')


def begun_mark() -> Path | None:
    """A file that exists from when the run is under way, for the processes that torchrun starts again after
    a failure: beside the logs of all its attempts. None without torchrun.
    """
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')                    # FOLDER/attempt_0/0/error.json
    return Path(path).parents[2] / 'begun' if path else None


def read_resumable(run: RunConfig, args: Namespace) -> dict[str, Any] | None:
    """The checkpoint that this command continues; None if there is none yet.

    Raises UserError if the run is not to be continued, or was started with flags of another model or data.
    """
    path, family = run.folder / 'checkpoint.pt', family_config(args.model)
    mark = begun_mark()
    restarted = launch.any_rank(bool(mark and mark.exists()))         # a host that was rebooted lost its mark
    found = 'a trained model' if copies(path) else 'a run without a checkpoint' if any(
        (run.folder / name).exists() for name in REMAINS) else ''
    if found and not (run.cont_training or restarted):
        raise UserError(f"{run.folder} already holds {found}. Continue with --cont_training, choose another "
                        f"--save, or delete the folder.")
    if not copies(path):
        return None
    saved = read_checkpoint(path, say=print if launch.is_main() else lambda line: None)
    if not {'description', 'optimizer'} <= saved.keys():
        raise UserError(f"{path} is not a checkpoint of a run of this framework: choose another --save.")
    fixed = [field.name for config in (family, DataConfig) for field in fields(config)
             if field.name not in FREE_DATA_FLAGS] + ['model', 'seed', 'optimizer']
    # A family may resolve its flags, such as a file to what it holds: then that counts, not the name.
    before = saved['args'] | saved['description']['config']
    now = vars(args) | asdict(read_flags(family, args))
    if changed := [f'--{name} {before[name]} then, {now[name]} now' for name in fixed
                   if name in before and name in now and json.dumps(before[name]) != json.dumps(now[name])]:
        raise UserError(f"{run.folder} was started with other flags ({'; '.join(changed)}). Give the same "
                        f"ones, or another --save.")
    return saved


class Progress:
    """The progress bar, in a log a line a minute; the speed, and the mean of a metric, nelbo or loss, over
    the epoch so far.
    """

    def __init__(self, metric: str, step: int, end: int):
        self.metric, self.values, self.images, self.since = metric, [], 0, time.perf_counter()
        self.step, self.end, self.told, self.means = step, end, time.monotonic(), ''
        self.bar = tqdm(total=end, initial=step, unit='step', dynamic_ncols=True,
                        disable=None if launch.is_main() else True)

    def update(self, logs: dict[str, Any], images: int) -> None:
        """Counts a step of this many images."""
        self.values.append(float(logs[f'train/{self.metric}_iter']))
        self.images += images
        self.step += 1
        words = f'{self.metric} {self.values[-1]:.5g}{self.means}'
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update()
        if launch.is_main() and self.bar.disable and is_due(self.told):
            self.told = time.monotonic()
            print(f'step {self.step:,} of {self.end:,}: {words}', file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: the epoch is counted from there."""
        self.values.clear()
        self.step = self.bar.n = step
        self.bar.refresh()

    def mean(self) -> float:
        """Over the steps of the epoch with a finite value."""
        finite = list(filter(math.isfinite, self.values))
        return sum(finite) / len(finite) if finite else math.nan

    def read(self) -> dict[str, float]:
        """The mean so far, and images a second since the last reading."""
        now = time.perf_counter()
        speed, self.images, self.since = self.images / (now - self.since), 0, now
        self.means = f', mean {self.mean():.5g}, {speed:.0f} images/s'
        return {f'train/{self.metric}_avg': self.mean(), 'train/images_per_second': speed}

    def end_epoch(self) -> dict[str, float]:
        """The mean of the epoch over all processes; starts the next epoch."""
        mean = launch.mean_over_ranks(torch.tensor(self.mean(), device=launch.device()))
        self.values.clear()
        return {f'train/{self.metric}': float(mean)}
