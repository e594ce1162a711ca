"""What tests of many processes share: starting programs side by side, by any launcher and on any host."""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from multiprocessing import set_forkserver_preload
from multiprocessing.reduction import DupFd

import pytest
import torch
from conftest import ROOT

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
MPIRUN = ['mpirun', '--allow-run-as-root', '--oversubscribe', '--bind-to', 'none']
LONGEST = 300.0                  # seconds that any of these may take on a busy machine


def has_open_mpi():
    return shutil.which('mpirun') is not None and b'Open MPI' in subprocess.run(
        ['mpirun', '--version'], capture_output=True).stdout


needs_mpirun = pytest.mark.skipif(not has_open_mpi(), reason='needs mpirun of Open MPI (apt: openmpi-bin)')


def start(words, log, host='', **env):
    """Starts a program, on a host if one is named; what it says goes to the file `log`."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(('OMPI', 'PMI', 'SLURM'))}
    words = [*(('ip', 'netns', 'exec', host) if host else ()), *map(str, words)]
    with log.open('a') as file:
        return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file,
                                env={**clean, 'OMP_NUM_THREADS': '1', **env})


def end(*processes):
    """Exit statuses of the processes, which are killed if they do not end."""
    until = time.monotonic() + LONGEST
    try:
        return [process.wait(max(0.0, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def fork_processes(patch):
    """`launch` forks its processes from one that has imported PyTorch; programs still spawn theirs."""
    set_forkserver_preload(['torch._dynamo', 'torch.distributed', 'torch.utils.tensorboard', 'torchvision',
                            'scipy.ndimage', 'sklearn.metrics'])
    forked = partial(torch.multiprocessing.start_processes, start_method='forkserver')
    patch.setattr(torch.multiprocessing, 'start_processes', lambda work, *args, **kwargs: forked(
        AtHome(work), *args, **kwargs))


class AtHome:
    """A function for a forked process, which takes it with the output and environment of this process."""

    def __init__(self, work):
        self.work = work

    def __reduce__(self):
        return at_home, (self.work, dict(os.environ), DupFd(1), DupFd(2))


def at_home(work, environment, *outputs):
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.detach(), number)
    return work


def wait_for_step(folder, step, *processes):
    """Waits until a run, started with `--log_every 1`, has taken a step; returns how far it is."""
    path = folder / 'metrics.jsonl'
    until = time.monotonic() + LONGEST
    while True:
        done = path.read_text().count('train/nelbo_iter') if path.exists() else 0
        if done >= step:
            return done
        assert time.monotonic() < until and all(process.poll() is None for process in processes), done
        time.sleep(0.02)


def saved(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)
