"""One process or many: starting them, this one's device, and talking to the others.

Who a process is, topology.py finds out; how processes meet and notice that one is gone, rendezvous.py.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.util import _run_finalizers
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed.rendezvous import GO_ON, Meeting, begun_here, begun_mark, gloo_interface
from distributed.topology import LaunchConfig, Topology, integer, resolve
from utils import UserError

USER_ERROR_STATUS = 2
LOST_STATUS = 75             # another process is gone: EX_TEMPFAIL, worth another try
GLOO_WORDS = ('gloo/transport', 'caused pair closure')       # what its errors say of a connection that broke
ENDED_ON_REQUEST = (143, 130, -signal.SIGTERM, -signal.SIGINT)
LONGEST_MESSAGE = 4000       # characters: the pipe to the parent is read at the end, and must not fill
GRACE = 30                   # seconds for processes to end by themselves after one has failed
NCCL_GRACE = 60              # seconds: NCCL ends a process with pages of text, so the meeting speaks first
MISTAKE, FAILURE, LOST = range(3)        # what a process tells at its end; the user hears of the first kind


# ------------------------------------------------------------------------------------------- starting to work

_here = Topology()
_device = torch.device('cpu')
_meeting: Meeting | None = None
_begun_before = False


def rank() -> int:
    return _here.rank


def world() -> int:
    return _here.world


def device() -> torch.device:
    return _device


def free_memory() -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's available memory."""
    if _device.type == 'cuda':
        return torch.cuda.mem_get_info(_device)[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
    except (OSError, StopIteration):                       # not Linux: half of the physical memory
        available = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    return available // _here.local_world


def is_main() -> bool:
    """True in the one process that writes files."""
    return _here.rank == 0


def choose_device(name: str, topology: Topology) -> torch.device:
    """Raises UserError if CUDA is asked for and absent, or if the node has more processes than GPUs."""
    available = torch.cuda.is_available()
    if name == 'cuda' and not available:
        raise UserError("--device cuda, but PyTorch sees no CUDA device. Use --device cpu, or install "
                        "a driver.")
    if name == 'cpu' or not available:
        return torch.device('cpu')
    count = torch.cuda.device_count()
    if topology.local_world > count:
        # Slurm and users may show each process a GPU of its own, which then is number 0.
        if count == 1 and not topology.spawn and 'CUDA_VISIBLE_DEVICES' in os.environ:
            return torch.device('cuda', 0)
        raise UserError(f"{topology.local_world} processes on this node but only {count} GPU(s): one process "
                        f"a GPU. Use --num_process_per_node {count}, or --device cpu.")
    return torch.device('cuda', topology.local_rank)


def launch(work: Callable[[Any], int | None], argument: Any, config: LaunchConfig) -> int:
    """Runs work(argument) in every process of the run and returns the exit status.

    Where processes are started here, one that fails ends the others; SIGTERM and SIGINT reach them all.
    """
    topology = resolve(config)
    choose_device(config.device, topology)               # a wrong device is said once, before anything starts
    if not topology.spawn:
        with _member(topology, config, _tell_user):
            return work(argument) or 0
    messages = mp.get_context('spawn').SimpleQueue()
    processes = mp.start_processes(_child, (work, argument, topology, config, messages), topology.spawn,
                                   join=False, start_method='spawn').processes
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        if len(asked) > 2:         # they do not hear it
            for process in processes:
                process.kill()
        _terminate(processes)  # not SIGINT: Ctrl-C has reached them already, and a second one means "at once"

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = _wait(processes, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and code in ENDED_ON_REQUEST:
        return 128 + asked[0]
    return _explain(code, messages) if code else 0


def _wait(processes: list, asked: list[int]) -> int:
    """Waits for all processes; the first that fails ends the others. Returns its exit code."""
    alive, code, deadline = {p.sentinel: p for p in processes}, 0, None
    while alive:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = [alive.pop(sentinel) for sentinel in wait(list(alive), left)]
        if not ended:
            for process in alive.values():
                process.kill()      # stuck in a collective operation, it does not hear SIGTERM
            deadline = None
        for process in ended:
            process.join()
        code = code or min((p.exitcode for p in ended), key=lambda code: (code == 0, code), default=0)
        if code and deadline is None and ended and not (asked and code in ENDED_ON_REQUEST):
            deadline = time.monotonic() + GRACE
            _terminate(alive.values())
    return code


def _terminate(processes: Iterable) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()


def _tell_user(kind: int, text: str) -> None:
    print(f'error: {text}' if kind != FAILURE else text, file=sys.stderr)


def _explain(code: int, messages: Any) -> int:
    """Says on stderr why processes failed, and returns the exit status."""
    told: list[tuple[int, str]] = []
    while not messages.empty():
        told.append(messages.get())
    if lines := sorted({text for kind, text in told if kind == MISTAKE}):
        for line in lines:
            _tell_user(MISTAKE, line)
        return USER_ERROR_STATUS
    if code < 0:
        print(f'error: a process was ended by {signal.Signals(-code).name}; the others were stopped. '
              f'(SIGKILL often means that memory ran out.)', file=sys.stderr)
    elif told:                          # the first failure; the others follow from it
        kind, text = min(told, key=lambda message: message[0])
        _tell_user(kind, text)
        return LOST_STATUS if kind == LOST else 1
    return code if code > 0 else 128 - code


def _child(index: int, work: Callable[[Any], int | None], argument: Any, first: Topology,
           config: LaunchConfig, messages: Any) -> None:
    topology = replace(first, rank=first.rank + index, local_rank=index, spawn=0)
    tell = lambda kind, text: messages.put((kind, text))
    try:
        with _member(topology, config, tell):
            status = work(argument) or 0
    except UserError as error:
        tell(MISTAKE, str(error))
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        status = 130
    except Exception:
        tell(FAILURE, f'process {topology.rank} failed:\n{traceback.format_exc()[-LONGEST_MESSAGE:]}')
        status = 1
    if status:
        _leave_at_once(status)


def _leave_at_once(status: int) -> None:
    """A process that failed must not wait at exit for the ones it left behind."""
    sys.stdout.flush()
    sys.stderr.flush()
    _run_finalizers(0)                  # gives semaphores back, which Python would complain of later
    os._exit(status)


@contextmanager
def _member(topology: Topology, config: LaunchConfig, tell: Callable[[int, str], None]):
    """Makes this process a member of the run; the group exists only where there is more than one.

    If another process is lost, this one says so by `tell` and ends on the spot.
    """
    global _here, _device, _meeting, _begun_before

    def give_up(text: str) -> None:
        tell(LOST, text)
        _leave_at_once(LOST_STATUS)

    _here, _device = topology, choose_device(config.device, topology)
    torch.set_num_threads(config.num_threads or _share_of_cores(topology))
    if _device.type == 'cuda':
        _set_up_cuda(config.deterministic)
    try:
        if topology.world > 1:
            _meeting = Meeting(topology, config.timeout * 60, give_up)
            _join_group(topology, config.timeout * 60)
        _begun_before = _meeting.begun_before if _meeting else begun_here()
        yield
        if _meeting:                    # not after an error: the others may never come
            _meeting.assemble()
            _meeting.leave()
            dist.barrier()              # process 0 serves the meeting point: it leaves when nobody needs it
            dist.destroy_process_group()
    except BaseException as error:
        if _meeting:
            lost = _of_the_group(error)
            if not lost:
                _meeting.leave(failed=True)
            if lost:
                give_up(f'lost touch with the other processes ({_reason(error)}): one of them has ended, or '
                        f'the network is down. {GO_ON}')
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"the GPU has not enough memory ({_reason(error)}). Give a smaller --batch_size; "
                            f"in training add --accumulate, or --checkpoint_activations on.") from error
        raise
    finally:
        _here, _device = Topology(), torch.device('cpu')
        _meeting, _begun_before = None, False


def _set_up_cuda(deterministic: bool) -> None:
    torch.cuda.set_device(_device)
    torch.backends.cudnn.allow_tf32 = False         # else PyTorch rounds what it convolves to 10 bits
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')         # read at the first matrix product
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def _reason(error: BaseException) -> str:
    """The first sentence of an error of the process group, without the place in its source."""
    return re.sub(r'^\[\S*\] ', '', str(error).splitlines()[0]).split('. ')[0][:200]


def _of_the_group(error: BaseException) -> bool:
    """Whether an error comes from talking to the other processes."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and any(words in str(error) for words in GLOO_WORDS))


def _share_of_cores(topology: Topology) -> int:
    wanted = integer(os.environ, 'OMP_NUM_THREADS', 0)
    if wanted and 'TORCHELASTIC_RUN_ID' not in os.environ:               # torchrun sets it to 1 unasked
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // topology.local_world)


def _join_group(topology: Topology, timeout: float) -> None:
    """Makes the process group; its operations wait `timeout` seconds at most."""
    on_gpu = _device.type == 'cuda'
    chosen = not on_gpu and 'GLOO_SOCKET_IFNAME' not in os.environ and gloo_interface(topology)
    if chosen:
        os.environ['GLOO_SOCKET_IFNAME'] = chosen
    try:
        dist.init_process_group('nccl' if on_gpu else 'gloo', store=_meeting.store, rank=topology.rank,
                                world_size=topology.world, device_id=_device if on_gpu else None,
                                timeout=timedelta(seconds=timeout + NCCL_GRACE * on_gpu))
    finally:
        if chosen:
            del os.environ['GLOO_SOCKET_IFNAME']


# -------------------------------------------------------------------------------------- talking to the others

# `barrier`, `gather` and `main_first` wait for as long as the others live, whatever they are busy with. The
# others are for the loop, where all are equally busy: they fail after `--timeout` minutes.

def barrier() -> None:
    """Waits for all processes."""
    if _meeting:
        _meeting.assemble()


def gather(items: list) -> list:
    """The items of all processes, in order of rank, on every process."""
    if _here.world == 1:
        return items
    barrier()
    parts: list = [None] * _here.world
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def any_rank(value: bool) -> bool:
    """True if it is true on any process: ranks agree before one of them leaves a loop."""
    if _here.world == 1:
        return value
    flag_tensor = torch.tensor(float(value), device=_device)
    dist.all_reduce(flag_tensor, op=dist.ReduceOp.MAX)
    return bool(flag_tensor.item())


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over processes; the tensor itself where there is one."""
    if _here.world == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over processes; the tensor itself where there is one."""
    if _here.world == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / _here.world


@contextmanager
def main_first():
    """The main process runs the block before the others, which then find what it left on disk; all leave it
    together.

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


# ------------------------------------------------------------------------------------- starts after a failure

def begin() -> None:
    """Notes that the run is under way, for those whom torchrun starts again after a failure."""
    if mark := begun_mark():
        mark.touch()


def begun_before() -> bool:
    """Whether torchrun started this run before, and it was under way then."""
    return _begun_before
