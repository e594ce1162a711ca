"""One process or many: who this process is, where its group meets, and which device it computes on.

Processes are started by this module (`--num_process_per_node`, the published way), by torchrun, mpirun or
srun. Their environment is read; flags that are given win; what contradicts is refused.
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import UserError, flag

PUBLISHED_PORT = 6020        # where the nodes of a published run meet
USER_ERROR_STATUS = 2
LOOPBACK = ('127.0.0.1', 'localhost')
ENDED_ON_REQUEST = (143, 130, -signal.SIGTERM, -signal.SIGINT)
LONGEST_MESSAGE = 4000       # characters: the pipe to the parent is read at the end, and must not fill
GRACE = 30                   # seconds for processes to end by themselves after one has failed
MEETING_TIME = timedelta(minutes=10)
LONGEST_WAIT = timedelta(hours=2)        # of a process for another, which may be decoding the data set


@dataclass(frozen=True)
class LaunchConfig:
    """Processes and devices"""
    num_proc_node: int = flag(1, 'number of nodes')
    node_rank: int = flag(0, 'index of this node')
    num_process_per_node: int = flag(1, 'processes to start on this node, one a GPU')
    world_size: int = flag(1, 'number of processes, if each is started by hand with its own --global_rank')
    global_rank: int = flag(0, 'with --world_size: index of this process among all')
    local_rank: int = flag(0, 'with --world_size: index of this process on its node; enough on a single node')
    master_address: str = flag('127.0.0.1', 'address of node 0, where processes meet')
    master_port: int = flag(0, f'port there; 0 = a free one on a single node, {PUBLISHED_PORT} on several')
    device: str = flag('auto', 'where to compute; auto = CUDA where there is any, else the CPU',
                       choices=('auto', 'cpu', 'cuda'))
    num_threads: int = flag(0, 'CPU threads of a process; 0 = $OMP_NUM_THREADS, else an even share of cores')


@dataclass(frozen=True)
class Topology:
    """This process among all. `spawn` processes are still to be started here, with ranks from `rank` up."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = '127.0.0.1'
    port: int = 0
    spawn: int = 0


@dataclass(frozen=True)
class _Launcher:
    name: str
    rank: str
    world: str
    local_rank: str
    local_world: str


LAUNCHERS = (   # environment variables, the innermost launcher first
    _Launcher('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    _Launcher('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK',
              'OMPI_COMM_WORLD_LOCAL_SIZE'),
    _Launcher('mpirun', 'PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS'),
    _Launcher('srun', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS', 'SLURM_LOCALID', 'SLURM_STEP_TASKS_PER_NODE'),
    _Launcher('RANK and WORLD_SIZE', 'RANK', 'WORLD_SIZE', '', ''),      # set by hand or by Kubernetes
)


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, '')
    return int(text) if text.isdigit() else default


def _numbers(text: str) -> list[int]:
    """Slurm's 4(x2),3 is [4, 4, 3]; a plain number is itself."""
    return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def resolve(config: LaunchConfig, env: Mapping[str, str] = os.environ) -> Topology:
    """Where this process stands. Raises UserError if flags and environment contradict each other."""
    _check(config)
    launcher = next((x for x in LAUNCHERS if x.rank in env and (x.local_rank in env or not x.local_rank)
                     and _integer(env, x.world, 1) > 1), None)
    if config.world_size > 1:
        return _by_hand(config, launcher, env)
    if config.global_rank or config.local_rank:
        raise UserError(f"--global_rank {config.global_rank} and --local_rank {config.local_rank} need "
                        f"--world_size, the number of processes. (--num_process_per_node starts them all.)")
    if launcher is not None:
        return _launched(config, launcher, env)
    nodes, per_node, node = config.num_proc_node, config.num_process_per_node, config.node_rank
    if not 0 <= node < nodes:
        raise UserError(f"--node_rank {node} with --num_proc_node {nodes}: it must be 0 to {nodes - 1}. "
                        f"(A single node needs neither flag.)")
    _need_address(config)
    port = config.master_port or (PUBLISHED_PORT if nodes > 1 else free_port() if per_node > 1 else 0)
    return Topology(node * per_node, nodes * per_node, 0, per_node, config.master_address, port,
                    spawn=per_node if per_node > 1 else 0)


def _need_address(config: LaunchConfig) -> None:
    if config.num_proc_node > 1 and config.master_address in LOOPBACK:
        raise UserError(f"--num_proc_node {config.num_proc_node} needs --master_address, the address of node "
                        f"0 that all nodes reach.")


def _check(config: LaunchConfig) -> None:
    least_of = {'num_proc_node': 1, 'num_process_per_node': 1, 'world_size': 1, 'num_threads': 0}
    for name, least in least_of.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: it must be at least {least}.")
    if not 0 <= config.master_port < 2 ** 16:
        raise UserError(f"--master_port {config.master_port}: a port is 1 to 65535, or 0 to choose one.")


def _launched(config: LaunchConfig, launcher: _Launcher, env: Mapping[str, str]) -> Topology:
    """A process that `launcher` started. One that is alone on its node may start others, as published."""
    world, rank = _integer(env, launcher.world, 1), _integer(env, launcher.rank, 0)
    address, port = _meeting_point(config, launcher, env)
    if launcher.local_rank:
        counts = _numbers(env.get(launcher.local_world, '')) or [world]
        local_world = counts[min(_integer(env, 'SLURM_NODEID', 0), len(counts) - 1)]
        local_rank = _integer(env, launcher.local_rank, 0)
    else:                                                  # all on this machine, or one a machine
        local_rank, local_world = (rank, world) if address in LOOPBACK else (0, 1)
    if local_world == world and 'MASTER_ADDR' not in env:
        address = config.master_address
    nodes, per_node, node = config.num_proc_node, config.num_process_per_node, config.node_rank
    started = f"{launcher.name} started {world} processes, {local_world} on this node"
    if rank >= world or local_rank >= local_world:
        raise UserError(f"{started}, but calls this one number {rank}, {local_rank} here: both count from 0.")
    if local_world > 1 and per_node not in (1, local_world):
        raise UserError(f"{started}, and --num_process_per_node asks for {per_node}. Leave the flag "
                        f"out, or start one process a node.")
    if nodes > 1 and nodes * local_world != world:
        raise UserError(f"{started}, but --num_proc_node is {nodes}. Leave the flag out.")
    if not 0 <= node < max(nodes, world // local_world) or (local_world == 1 and node not in (0, rank)):
        raise UserError(f"{started}, and this one is number {rank}, but --node_rank is {node}. Leave "
                        f"it out, or name the hosts to {launcher.name} in the order of --node_rank.")
    if local_world < world and address in LOOPBACK:
        raise UserError(f"{started}: the others need --master_address, the address of the node of process 0.")
    if per_node > 1 and local_world == 1:
        return Topology(rank * per_node, world * per_node, 0, per_node, address, port, spawn=per_node)
    return Topology(rank, world, local_rank, local_world, address, port)


def _by_hand(config: LaunchConfig, launcher: _Launcher | None, env: Mapping[str, str]) -> Topology:
    """A process that the user started with --world_size and its rank."""
    world, nodes = config.world_size, config.num_proc_node
    rank = config.global_rank or (config.local_rank if nodes == 1 else 0)
    if config.num_process_per_node > 1 or world % nodes:
        raise UserError(f"--world_size {world} with --num_process_per_node {config.num_process_per_node} and "
                        f"--num_proc_node {nodes}: --world_size is for processes started by hand, the same "
                        f"number on each node.")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} with --world_size {world}: it must be 0 to {world - 1}.")
    local_world = world // nodes
    node, local_rank = divmod(rank, local_world)
    if config.local_rank not in (0, local_rank) or config.node_rank not in (0, node):
        raise UserError(f"process {rank} of --world_size {world} is number {local_rank} on node {node} of "
                        f"{nodes}, but --local_rank is {config.local_rank} and --node_rank "
                        f"{config.node_rank}. Count --global_rank node by node.")
    _need_address(config)
    if launcher is not None and (env[launcher.rank], env[launcher.world]) != (str(rank), str(world)):
        raise UserError(f"{launcher.name} started this process as {env[launcher.rank]} of "
                        f"{env[launcher.world]}, but the flags say {rank} of {world}. Leave --world_size, "
                        f"--global_rank and --local_rank out.")
    return Topology(rank, world, local_rank, local_world, config.master_address,
                    config.master_port or PUBLISHED_PORT)


def _meeting_point(config: LaunchConfig, launcher: _Launcher, env: Mapping[str, str]) -> tuple[str, int]:
    """Address of process 0 and port: what the flags say, the launcher's word, or Slurm's first node."""
    if 'TORCHELASTIC_RUN_ID' in env and not config.master_port:          # torchrun already listens there
        return env['MASTER_ADDR'], int(env['MASTER_PORT'])
    job = _integer(env, 'SLURM_JOB_ID', 0)                 # one port for a job, another for the next
    port = config.master_port or _integer(env, 'MASTER_PORT', 0) or (10000 + job % 50000 if job
                                                                     else PUBLISHED_PORT)
    if config.master_address not in LOOPBACK:
        return config.master_address, port
    if 'MASTER_ADDR' in env:
        return env['MASTER_ADDR'], port
    nodes = env.get('SLURM_STEP_NODELIST', '') if launcher.name == 'srun' else ''
    nodes = nodes or env.get('SLURM_JOB_NODELIST', '')
    return _first_host(nodes) if nodes else config.master_address, port


def _first_host(nodes: str) -> str:
    """Of Slurm's lists: node[003-007,012] -> node003; a,b[1-2] -> a."""
    prefix, numbers, suffix = re.match(r'([^,\[]*)(?:\[([^\]]*)\]([^,]*))?', nodes).groups(default='')
    return prefix + re.split('[-,]', numbers)[0] + suffix


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------------- starting to work

_here = Topology()
_device = torch.device('cpu')


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
        with _member(topology, config):
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


def _explain(code: int, messages: Any) -> int:
    """Says on stderr why processes failed, and returns the exit status."""
    told: list[tuple[bool, str]] = []
    while not messages.empty():
        told.append(messages.get())
    if lines := sorted({text for is_users, text in told if is_users}):
        for line in lines:
            print(f'error: {line}', file=sys.stderr)
        return USER_ERROR_STATUS
    if code < 0:
        print(f'error: a process was ended by {signal.Signals(-code).name}; the others were stopped. '
              f'(SIGKILL often means that memory ran out.)', file=sys.stderr)
    elif told:                          # the first failure; the others follow from it
        print(told[0][1], file=sys.stderr)
    return code if code > 0 else 128 - code


def _child(index: int, work: Callable[[Any], int | None], argument: Any, first: Topology,
           config: LaunchConfig, messages: Any) -> None:
    topology = replace(first, rank=first.rank + index, local_rank=index, spawn=0)
    try:
        with _member(topology, config):
            status = work(argument) or 0
    except UserError as error:
        messages.put((True, str(error)))
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        status = 130
    except Exception:
        messages.put((False, f'process {topology.rank} failed:\n{traceback.format_exc()[-LONGEST_MESSAGE:]}'))
        status = 1
    # A process that failed must not wait at exit for the ones it left behind.
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)


@contextmanager
def _member(topology: Topology, config: LaunchConfig):
    """Makes this process a member of the run; the group exists only where there is more than one."""
    global _here, _device
    _here, _device = topology, choose_device(config.device, topology)
    torch.set_num_threads(config.num_threads or _share_of_cores(topology))
    if _device.type == 'cuda':
        torch.cuda.set_device(_device)
    if topology.world > 1:
        _join_group(topology)
    try:
        yield
        if topology.world > 1:      # not after an error: the others may never come
            dist.barrier()          # process 0 serves the meeting point, so none leaves before all are done
            dist.destroy_process_group()
    finally:
        _here, _device = Topology(), torch.device('cpu')


def _share_of_cores(topology: Topology) -> int:
    wanted = _integer(os.environ, 'OMP_NUM_THREADS', 0)
    if wanted and 'TORCHELASTIC_RUN_ID' not in os.environ:               # torchrun sets it to 1 unasked
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // topology.local_world)


def _join_group(topology: Topology) -> None:
    """Meets the other processes. Raises UserError if they do not come, or if the port is taken."""
    where = f'{topology.address}:{topology.port}'
    if os.environ.get('MASTER_PORT') != str(topology.port):
        os.environ.pop('TORCHELASTIC_USE_AGENT_STORE', None)            # torchrun does not listen at our port
    try:
        store, *_ = next(dist.rendezvous(f'tcp://{where}', topology.rank, topology.world,
                                         timeout=MEETING_TIME))
    except (dist.DistError, OSError) as error:
        raise UserError(f"process {topology.rank} of {topology.world} cannot meet the others at {where} "
                        f"({str(error).splitlines()[0][:200]}). Check --master_address and --master_port, "
                        f"and that all processes were started.") from None
    store.set_timeout(LONGEST_WAIT)
    dist.init_process_group('nccl' if _device.type == 'cuda' else 'gloo', store=store, rank=topology.rank,
                            world_size=topology.world, timeout=LONGEST_WAIT,
                            device_id=_device if _device.type == 'cuda' else None)


# -------------------------------------------------------------------------------------- talking to the others

def barrier() -> None:
    """Waits for all processes."""
    if _here.world > 1:
        dist.barrier()


def gather(items: list) -> list:
    """The items of all processes, in order of rank, on every process."""
    if _here.world == 1:
        return items
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


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over processes; the tensor itself where there is one."""
    if _here.world == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / _here.world


@contextmanager
def main_first():
    """The main process runs the block before the others, which then find what it left on disk.

    If it fails there, the others go in and meet the same failure, so nobody waits for ever.
    """
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()
