"""Kills runs, damages files, fills disks and stops processes, and checks that nothing is lost unreported.

    python tests/torture.py                                   100 kills, and 20 of each other kind
    python tests/torture.py --kills 10 --damaged 5 --full 2 --lost 2 --seed 3

Every process is forked from this one, which has imported PyTorch, so a start takes a fraction of a second.
Full disks are small tmpfs, which only root can mount. Prints a table, keeps the logs of what was lost in
--keep, and ends with status 1 if anything was.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
os.environ['OMP_NUM_THREADS'] = '1'

import torch
from conftest import TINY_NVAE, make_images

import evaluate
import train
import utils
from distributed.environment import free_port
from storage import run_log
from storage.checkpoint import copies, not_finite, read_one
from utils import read_line

LONGEST = 300.0                      # seconds of any run: more than processes wait for one that was killed
# What every run imports; it forks from a process that has done so.
IMPORTED = ('torch._dynamo', 'torch.distributed', 'torch.utils.tensorboard', 'scipy.ndimage',
            'training.trainer', 'training.recovery', 'evaluation.sampling')
STATES = ('weights', 'optimizer', 'ema')
KEPT_LOGS = 6                        # of the last starts, where something was lost


class Torture:
    """A small data set, and runs on it that are never disturbed, by the number of their processes."""

    def __init__(self, folder: Path, seed: int, keep: Path):
        self.folder, self.random, self.number, self.lost = folder, random.Random(seed), 0, []
        self.keep, self.starts = keep, 0
        make_images(folder / 'data' / 'normal', 50, seed=0)
        make_images(folder / 'data' / 'spot', 10, seed=1, spot=True)
        self.flags = [*TINY_NVAE, *f'''--dataset folder --data {folder / 'data'}
            --cache_dir {folder / 'cache'} --image_size 16 --warmup_epochs 1 --num_threads 1
            --log_every 1 --image_every 0 --device cpu
            --val_iw_samples 2 --checkpoint_activations off --epochs 6 --save_every 2 --val_every 1
            --ema_decay 0.9 --keep_best --timeout 2'''.split()]
        self.whole: dict[int, tuple[Path, float]] = {}

    def train_flags(self, world: int, root: Path) -> list[str]:
        return [*self.flags, '--batch_size', str(12 // world), '--root', str(root), '--cont_training']

    def undisturbed(self, world: int) -> tuple[Path, float]:
        """The folder of such a run, and how many seconds it took."""
        if world not in self.whole:
            root, since = self.folder / f'whole{world}', time.monotonic()
            statuses, log = self.end(self.start(train.main, self.train_flags(world, root), world))
            assert statuses == [0] * world, log
            self.whole[world] = root / 'eval-exp', time.monotonic() - since
        return self.whole[world]

    def start(self, main: Callable[[], int], words: list[str], world: int = 1,
              before: Callable[[], None] = lambda: None) -> list[int]:
        """Forks the processes of a program; returns their numbers. What they say goes to the file `log`."""
        port = free_port()
        self.starts += 1
        self.log = self.folder / f'log{self.starts}'
        self.log.write_bytes(b'')
        children = []
        for rank in range(world):
            if child := os.fork():
                children.append(child)
                continue
            status = 1
            try:
                output = os.open(self.log, os.O_WRONLY | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(rank),
                               'LOCAL_WORLD_SIZE': str(world), 'MASTER_PORT': str(port)} if world > 1 else {}
                sys.argv = ['program', *words]
                before()
                utils.run_program(main)
            except SystemExit as end:
                status = end.code or 0
            finally:
                os._exit(status)
        return children

    def end(self, children: list[int]) -> tuple[list[int], str]:
        """Exit statuses, -9 after SIGKILL, and what was said. What does not end in time is lost."""
        until, statuses = time.monotonic() + LONGEST, {}
        while len(statuses) < len(children):
            for child in children:
                if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                    statuses[child] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > until:
                self.lose('a process did not end')
                for child in children:
                    if child not in statuses:
                        os.kill(child, signal.SIGKILL)
                until += LONGEST
            time.sleep(0.01)
        return [statuses[child] for child in children], self.log.read_text(errors='replace')

    def lose(self, what: str) -> None:
        """Notes it, and keeps what the last starts said."""
        self.lost.append(what)
        print(f'LOST: {what}', flush=True)
        self.keep.mkdir(parents=True, exist_ok=True)
        for number in range(max(1, self.starts - KEPT_LOGS + 1), self.starts + 1):
            shutil.copy(self.folder / f'log{number}', self.keep / f'{len(self.lost)}-log{number}')
        (self.keep / f'{len(self.lost)}').write_text(what)

    # ---------------------------------------------------------------------------------------- what is checked

    def step(self, folder: Path) -> int:
        """The step of the newest checkpoint, which must be whole and finite; 0 if there is none yet."""
        found = copies(folder / 'checkpoint.pt')
        if not found:
            return 0
        try:
            content = read_one(found[0])
            if name := not_finite({key: content[key] for key in STATES}):
                self.lose(f'{found[0]}: {name} is not finite')
            return content['step']
        except utils.UserError as error:
            self.lose(str(error))
            return 0

    def compare(self, folder: Path, world: int) -> None:
        """Whether a run has ended as the undisturbed one, bit for bit on one or two processes."""
        for name in ('checkpoint.pt', 'best.pt'):
            a, b = (read_one(place / name) for place in (folder, self.undisturbed(world)[0]))
            for key in STATES:
                same = close if world > 2 else torch.equal
                if key in b and not equal(a.get(key), b[key], same):
                    self.lose(f'{folder / name}: {key} differ from the undisturbed run')
        lines = [read_line(line) for line in (folder / 'metrics.jsonl').read_bytes().splitlines(True)]
        steps = [line['step'] for line in lines if line and 'train/lr' in line]
        if None in lines or steps != sorted(set(steps)):
            self.lose(f'{folder}: steps are logged twice, or not at all')
        if left := [p.name for p in folder.iterdir() if p.name.startswith('.')]:
            self.lose(f'{folder}: {left} were left')


def equal(a: Any, b: Any, same: Callable[[Any, Any], bool]) -> bool:
    if isinstance(b, torch.Tensor):
        return same(a, b)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], same) for key in b)
    return a == b if not isinstance(b, list | tuple) else all(map(lambda x, y: equal(x, y, same), a, b))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- tortures

def kills(torture: Torture, number: int, world: int) -> None:
    """SIGKILL at a random moment to one process of a run, which then goes on, as often as it takes."""
    _, seconds = torture.undisturbed(world)
    done = 0
    while done < number:
        torture.number += 1
        root, before = torture.folder / f'killed{torture.number}', 0
        while True:
            children = torture.start(train.main, torture.train_flags(world, root), world)
            if done < number:
                time.sleep(torture.random.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(torture.random.choice(children), signal.SIGKILL)
            statuses, log = torture.end(children)
            done += -signal.SIGKILL in statuses
            step = torture.step(root / 'eval-exp')
            if step < before:
                torture.lose(f'step {before} was saved, {step} is there')
            before = step
            if statuses == [0] * world:
                break
            if -signal.SIGKILL not in statuses:
                torture.lose(f'ended with {statuses}: {log[-500:]}')
                break
        torture.compare(root / 'eval-exp', world)
        shutil.rmtree(root)


def kills_of_evaluations(torture: Torture, number: int) -> None:
    """SIGKILL while results are replaced by those of another seed: the folder holds one or the other."""
    run, out, whole, seconds = torture.undisturbed(1)[0], torture.folder / 'out', {}, 1.0

    def start(seed: int) -> list[int]:
        return torture.start(evaluate.main, [
            '--checkpoint', str(run), '--eval_mode', 'sample', '--num_samples', '40', '--batch_size', '4',
            '--save', str(out), '--seed', str(seed), '--device', 'cpu', '--num_threads', '1'])
    for seed in (1, 2):
        since = time.monotonic()
        statuses, log = torture.end(start(seed))
        assert statuses == [0], log
        whole[seed], seconds = contents(out), time.monotonic() - since
    done, last = 0, 2
    while done < number:
        children = start(3 - last)
        time.sleep(torture.random.uniform(0, 1.1 * seconds))
        os.kill(children[0], signal.SIGKILL)
        done += torture.end(children)[0] == [-signal.SIGKILL]
        found = contents(out)
        if found not in whole.values():
            torture.lose(f'an evaluation that was killed left {sorted(found)}')
        last = next((seed for seed in whole if whole[seed] == found), last)
    assert torture.end(start(1))[0] == [0]
    if left := [p.name for p in out.parent.glob('.out*')]:
        torture.lose(f'{left} were left')


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else {}


def damaged(torture: Torture, number: int, world: int = 1) -> None:
    """The newest checkpoint cut off, or with a bit flipped: the run goes on from the one before it."""
    for _ in range(number):
        root = torture.folder / 'damaged'
        statuses, log = torture.end(torture.start(
            train.main, [*torture.train_flags(world, root), '--max_steps', '10'], world))
        path = root / 'eval-exp' / 'checkpoint.pt'
        content, place = bytearray(path.read_bytes()), torture.random.randrange(path.stat().st_size)
        if torture.random.random() < 0.5:
            content[place] ^= 1 << torture.random.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)
        statuses, log = torture.end(torture.start(train.main, torture.train_flags(world, root), world))
        if statuses != [0] * world or 'WARNING: checkpoint' not in log:
            torture.lose(f'damaged at {place}: {statuses} {log[-300:]}')
        torture.compare(root / 'eval-exp', world)
        shutil.rmtree(root)


def wait_for_room(seconds: float) -> None:
    run_log.WAIT_FOR_ROOM, run_log.ROOM_PAUSE = seconds, 0.1


def full(torture: Torture, number: int) -> None:
    """A disk that is full at a random moment. Every other time room is made, and the run goes on by itself;
    else it ends with one line, and goes on when it is started again.
    """
    _, seconds = torture.undisturbed(1)
    for index in range(number):
        disk = torture.folder / 'disk'
        disk.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(disk)], check=True)
        try:
            words, patience = torture.train_flags(1, disk), 60.0 if index % 2 == 0 else 0.5
            children = torture.start(train.main, words, before=partial(wait_for_room, patience))
            time.sleep(torture.random.uniform(0, seconds))
            with contextlib.suppress(OSError), (disk / 'filler').open('wb') as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
            time.sleep(2.0)
            if index % 2 == 0:
                (disk / 'filler').unlink()
            statuses, log = torture.end(children)
            torture.step(disk / 'eval-exp')
            if statuses != [0]:
                lines = [line for line in log.splitlines() if line.startswith(('error', 'Traceback'))]
                if statuses != [2] or len(lines) != 1 or 'Make room' not in lines[0]:
                    torture.lose(f'a full disk ended the run with {statuses}: {log[-500:]}')
                (disk / 'filler').unlink(missing_ok=True)
                statuses, log = torture.end(torture.start(train.main, words))
                if statuses != [0]:
                    torture.lose(f'after a full disk: {statuses} {log[-500:]}')
            (disk / 'filler').unlink(missing_ok=True)
            torture.compare(disk / 'eval-exp', 1)
        finally:
            subprocess.run(['umount', '-l', str(disk)], check=True)
            disk.rmdir()


def lost(torture: Torture, number: int, world: int = 2) -> None:
    """One process of a run killed or stopped: the others say so and end; the run goes on when started again.
    """
    _, seconds = torture.undisturbed(world)
    for index in range(number):
        root = torture.folder / 'lost'
        children = torture.start(train.main, [*torture.train_flags(world, root), '--timeout', '0.2'], world)
        time.sleep(torture.random.uniform(0.2, 1) * seconds)
        victim = torture.random.choice(children)
        os.kill(victim, signal.SIGKILL if index % 2 else signal.SIGSTOP)
        others = [child for child in children if child != victim]
        statuses, log = torture.end(others)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        torture.end([victim])
        if any(status not in (0, 75) for status in statuses) or (75 in statuses and 'lost touch' not in log):
            torture.lose(f'a lost process ended the others with {statuses}: {log[-500:]}')
        statuses, log = torture.end(torture.start(train.main, torture.train_flags(world, root), world))
        if statuses != [0] * world:
            torture.lose(f'after a lost process: {statuses} {log[-500:]}')
        torture.compare(root / 'eval-exp', world)
        shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('kills', 100), ('damaged', 20), ('full', 20), ('lost', 20), ('seed', 0)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--keep', type=Path, default=Path('torture-losses'), help='where logs of losses go')
    args = parser.parse_args()
    quarter, rest = divmod(args.kills, 4)
    rows = [('SIGKILL, 1 process', quarter + rest, lambda t, n: kills(t, n, 1)),
            ('SIGKILL, 2 processes', quarter, lambda t, n: kills(t, n, 2)),
            ('SIGKILL, 3 processes', quarter, lambda t, n: kills(t, n, 3)),
            ('SIGKILL, evaluation', quarter, kills_of_evaluations),
            ('damaged checkpoint', args.damaged, damaged), ('lost or stopped process', args.lost, lost),
            ('full disk', args.full if os.geteuid() == 0 else 0, full)]
    for name in IMPORTED:
        import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        torture, table = Torture(Path(folder), args.seed, args.keep), []
        for name, number, run in rows:
            since, before = time.monotonic(), len(torture.lost)
            if number:
                run(torture, number)
            table.append((name, number, len(torture.lost) - before, time.monotonic() - since))
            print(json.dumps(dict(zip(('torture', 'number', 'lost', 'seconds'), table[-1]))), flush=True)
    print('\n| torture | number | lost | seconds |\n|---|---|---|---|\n' + '\n'.join(
        f'| {name} | {number} | {failed} | {seconds:.0f} |' for name, number, failed, seconds in table))
    return int(bool(torture.lost))


if __name__ == '__main__':
    sys.exit(main())
