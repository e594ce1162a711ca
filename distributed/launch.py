"""Starts the processes of a run; tells each of them who and where it is, and lets it talk to the others.

Imports PyTorch when a run starts: a program answers --help without it.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.util import _run_finalizers
from typing import TYPE_CHECKING, Any

from distributed.environment import Environment, LaunchConfig, integer, resolve
from storage.limits import allow
from utils import UserError

if TYPE_CHECKING:
    import torch

READ_ONLY = 'Name a folder that this user may write'
LOST_STATUS = 75             # another process is gone: EX_TEMPFAIL, worth another try
ENDING = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name))
ENDED_ON_REQUEST = (143, 130, -signal.SIGTERM, -signal.SIGINT)
QUIET = {'TORCH_CPP_LOG_LEVEL': 'ERROR'}     # PyTorch's warning of a lost process is a page; ours is a line
CAUSE_FIRST = 1.0            # seconds that a process which lost another waits: the other is seen to end first

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                       # of mallopt(3)

FILE_ERRORS = {errno.ENOSPC: 'Make room there', errno.EDQUOT: 'Make room there', errno.EROFS: READ_ONLY,
               errno.EACCES: READ_ONLY, errno.EPERM: READ_ONLY, errno.EIO: 'Check that disk',
               errno.ENAMETOOLONG: 'Choose a shorter name', errno.EMFILE: 'Raise the limit (ulimit -n)',
               errno.ESTALE: 'Check the file server', errno.ENOTDIR: 'Name another folder'}

_here = Environment()
_device: torch.device | None = None
_group: torch.distributed.ProcessGroup | None = None


def launch(work: Callable[[Any], int | None], argument: Any, config: LaunchConfig) -> int:
    """Runs work(argument) in every process of the run and returns the exit status.

    Where processes are started here, one that fails ends the others; SIGTERM and SIGINT reach them all.
    """
    here = resolve(config)
    os.environ.update(QUIET | os.environ)               # before PyTorch is imported, which reads it then
    choose_device(config.device, here)                  # a wrong device is reported once, before all starts
    if here.spawn:
        return _spawn(work, argument, config, here)
    return _run(work, argument, config, here, lambda line: print(line, file=sys.stderr))


def _spawn(work: Callable, argument: Any, config: LaunchConfig, first: Environment) -> int:
    import torch.multiprocessing as mp
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)    # it would name each that it ends
    asked, losses = [], mp.get_context('spawn').SimpleQueue()
    context = mp.start_processes(_child, (work, argument, config, first, losses), first.spawn, join=False)

    def pass_on(number: int, _: Any) -> None:
        """As SIGTERM: Ctrl-C has reached the processes already, and a second one means "at once"."""
        asked.append(number)
        for process in context.processes:
            process.kill() if len(asked) > 2 else process.terminate()

    try:
        with on_signals((signal.SIGINT, *ENDING), pass_on):
            while not context.join():
                pass
        return 0
    except mp.ProcessRaisedException as error:
        _, user_error, line = str(error).strip().rpartition('\nutils.UserError: ')
        if user_error:
            raise UserError(line) from None
        print(error, file=sys.stderr)
        return 1
    except mp.ProcessExitedException as error:
        code = error.exit_code
    if asked and code in ENDED_ON_REQUEST:
        return 128 + (signal.SIGINT if asked[0] == signal.SIGINT else signal.SIGTERM)
    if code == LOST_STATUS:
        print(losses.get(), file=sys.stderr)
    if code < 0:
        print(f'error: a process was ended by {signal.Signals(-code).name}; the others were stopped. '
              f'(SIGKILL often means that memory ran out.)', file=sys.stderr)
    return code if code > 0 else 128 - code


def _child(index: int, work: Callable, argument: Any, config: LaunchConfig, first: Environment,
           losses: Any) -> None:
    here = replace(first, rank=first.rank + index, local_rank=index, spawn=0)
    try:
        status = _run(work, argument, config, here, losses.put)
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else \
            error.code if isinstance(error, SystemExit) else 1
        atexit.register(os._exit, status)       # it must not wait for the others, as the end of a group may
        if status == 1:
            raise
    sys.exit(status)


def _run(work: Callable, argument: Any, config: LaunchConfig, here: Environment,
         tell: Callable[[str], None]) -> int:
    """The work of one process of the run. If another process is lost, it says so by `tell` and ends."""
    global _here, _device, _group
    import torch

    from distributed.group import process_group

    once = threading.Lock()

    def give_up(text: str) -> None:
        once.acquire()                  # the heartbeat and the main thread may notice at the same time
        tell(f'error: {text}')
        time.sleep(CAUSE_FIRST)
        sys.stdout.flush()
        _run_finalizers(0)              # gives semaphores back, which Python would complain of later
        os._exit(LOST_STATUS)           # at once: this may be another thread, and the main one may hang

    allow(config.max_gb)
    _here, _device = here, choose_device(config.device, here)
    torch.set_num_threads(config.num_threads or _share_of_cores(here))
    keep_freed_memory()
    if _device.type == 'cuda':
        _set_up_cuda(config.deterministic)
    try:
        with on_signals(ENDING, end_at_once), (
                process_group(here, _device, config.timeout * 60, give_up) if here.world > 1
                else nullcontext()) as _group:
            return work(argument) or 0
    except torch.OutOfMemoryError as error:
        reason = str(error).split('. ')[0]
        raise UserError(f"the GPU has not enough memory ({reason}). Give a smaller --batch_size; in "
                        f"training add --accumulate, or --checkpoint_activations on.") from None
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        raise UserError(f"{error.filename or 'a file'}: {error.strerror}. {FILE_ERRORS[error.errno]}; files "
                        f"that were there before are whole.") from None
    finally:
        _here, _device, _group = Environment(), None, None


@contextmanager
def on_signals(numbers: Sequence[int], handler: Any) -> Iterator[None]:
    """Within the block, signals have this handler, but those that are ignored, as nohup does. Only the main
    thread can set it.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers
              if main and signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_at_once(number: int, _: Any) -> None:
    """Ends this process as SIGTERM does, but by an exception, so that what is half done is cleared away."""
    if is_main():
        os.write(2, f'ended by {signal.Signals(number).name}\n'.encode())
    sys.exit(128 + signal.SIGTERM)


def choose_device(name: str, here: Environment) -> torch.device:
    """Raises UserError if CUDA is asked for and absent, or if the node has more processes than GPUs."""
    import torch
    available = torch.cuda.is_available()
    if name == 'cuda' and not available:
        raise UserError("--device cuda, but PyTorch sees no CUDA device. Use --device cpu, or install a "
                        "driver.")
    if name == 'cpu' or not available:
        return torch.device('cpu')
    count = torch.cuda.device_count()
    if count == 1 and not here.spawn and 'CUDA_VISIBLE_DEVICES' in os.environ:
        return torch.device('cuda', 0)          # Slurm and users may show each process a GPU of its own
    if here.local_world > count:
        raise UserError(f"{here.local_world} processes on this node but only {count} GPU(s): one process "
                        f"a GPU. Use --num_process_per_node {count}, or --device cpu.")
    return torch.device('cuda', here.local_rank)


def _set_up_cuda(deterministic: bool) -> None:
    import torch
    torch.cuda.set_device(_device)
    torch.backends.cudnn.allow_tf32 = False     # else PyTorch rounds what it convolves to 10 bits
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # read at the first matrix product
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def keep_freed_memory() -> None:
    """Has glibc keep what tensors leave for those to come, up to the peak that the process has had anyway.

    It would give it back to the system, which clears each page anew: a tenth to a third of a training step on
    a CPU. No tensor has a mapping of its own, which would go back with it.
    """
    if sys.platform == 'linux' and (mallopt := getattr(ctypes.CDLL(None), 'mallopt', None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)                                       # never


def _share_of_cores(here: Environment) -> int:
    wanted = integer(os.environ, 'OMP_NUM_THREADS')
    if wanted and 'TORCHELASTIC_RUN_ID' not in os.environ:              # torchrun sets it to 1 unasked
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // here.local_world)


# ---------------------------------------------------------------------------------------------- this process

def rank() -> int:
    return _here.rank


def world() -> int:
    return _here.world


def is_main() -> bool:
    """True in the one process that writes files."""
    return _here.rank == 0


def device() -> torch.device:
    import torch
    return _device or torch.device('cpu')


def local_world() -> int:
    """How many processes share this node."""
    return _here.local_world


# ------------------------------------------------------------------------------------------- all processes

# `barrier`, `gather` and `main_first` wait for as long as the others live, whatever they are busy with. The
# others are for the loop, where all are equally busy: they fail after `--timeout` minutes.

def barrier() -> None:
    """Waits for all processes."""
    gather([])


def gather(items: list) -> list:
    """The items of all processes, in order of rank, on every process."""
    if _group is None:
        return items
    import torch.distributed as dist
    parts: list = [None] * _here.world
    dist.all_gather_object(parts, items, _group)
    return [item for part in parts for item in part]


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over processes; the tensor itself where there is one."""
    if _group is None:
        return value
    import torch.distributed as dist
    value = value.clone()
    dist.all_reduce(value)
    return value


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over processes; the tensor itself where there is one."""
    return value if _group is None else sum_over_ranks(value) / _here.world


def copy_from_main(values: Iterable[torch.Tensor]) -> None:
    """Sets tensors to those of the main process."""
    if _group is not None:
        import torch.distributed as dist
        for value in values:
            dist.broadcast(value, 0)


def any_rank(value: bool) -> bool:
    """True if it is true on any process: ranks agree before one of them leaves a loop."""
    import torch
    return value if _group is None else bool(sum_over_ranks(torch.tensor(float(value), device=_device)) > 0)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others, which find what it left on disk; all leave together.

    If it fails there, the others go in and meet the same failure, so nobody waits for ever.
    """
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()
    barrier()
