"""One process or many: who this process is, where its group meets, and which device it computes on.

Processes are started by this module (`--num_process_per_node`, the published way), by torchrun, mpirun or srun. Their
environment is read; flags that are given win; what contradicts is refused.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import UserError, flag

PUBLISHED_PORT = 6020        # where the nodes of a published run meet
USER_ERROR_STATUS = 2


@dataclass(frozen=True)
class LaunchConfig:
    """Processes and devices"""
    num_proc_node: int = flag(1, 'number of nodes')
    node_rank: int = flag(0, 'index of this node')
    num_process_per_node: int = flag(1, 'processes to start on this node, one a GPU')
    world_size: int = flag(1, 'number of processes, where each is started by hand with its own --global_rank')
    global_rank: int = flag(0, 'with --world_size: index of this process among all')
    local_rank: int = flag(0, 'with --world_size: index of this process on its node; on a single node this is enough')
    master_address: str = flag('127.0.0.1', 'address of node 0, where processes meet')
    master_port: int = flag(0, f'port there; 0 = a free one on a single node, {PUBLISHED_PORT} on several')
    device: str = flag('auto', 'where to compute; auto = CUDA where there is any, else the CPU',
                       choices=('auto', 'cpu', 'cuda'))
    num_threads: int = flag(0, 'CPU threads of a process; 0 = the cores shared out evenly')


@dataclass(frozen=True)
class Topology:
    """This process among all. `spawn` processes are still to be started here, with ranks from `rank` up; 0 = none."""
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
)


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, '')
    digits = text.split('(')[0].split(',')[0]              # Slurm writes 4(x2) or 4,2
    return int(digits) if digits.isdigit() else default


def resolve(config: LaunchConfig, env: Mapping[str, str] = os.environ) -> Topology:
    """Where this process stands. Raises UserError if flags and environment contradict each other or themselves."""
    nodes, per_node, node = config.num_proc_node, config.num_process_per_node, config.node_rank
    if min(nodes, per_node) < 1:
        raise UserError(f"--num_proc_node {nodes}, --num_process_per_node {per_node}: both must be at least 1.")
    if config.world_size > 1:
        return _by_hand(config)
    if config.global_rank or config.local_rank:
        raise UserError(f"--global_rank {config.global_rank} and --local_rank {config.local_rank} need --world_size, the "
                        f"number of processes. (--num_process_per_node starts them for you.)")
    launcher = next((x for x in LAUNCHERS if x.rank in env and _integer(env, x.world, 1) > 1), None)
    if launcher is not None:
        world, rank = _integer(env, launcher.world, 1), _integer(env, launcher.rank, 0)
        local_rank = _integer(env, launcher.local_rank, 0)
        local_world = _integer(env, launcher.local_world, world)
        address = config.master_address if config.master_address != '127.0.0.1' else _address(env)
        port = config.master_port or _integer(env, 'MASTER_PORT', 0) or _port_of_job(env)
        if per_node > 1 and local_world == 1:              # one launcher a node, which starts the others: as published
            if nodes not in (1, world):
                raise UserError(f"{launcher.name} started {world} processes, one a node, but --num_proc_node is "
                                f"{nodes}. Make them equal.")
            nodes, node = world, node or rank
            config = replace(config, master_address=address, master_port=port)
        elif per_node > 1 and per_node != local_world:
            raise UserError(f"{launcher.name} already started {local_world} processes on this node, and "
                            f"--num_process_per_node asks for {per_node}. Leave the flag out, or start one process a node.")
        elif nodes > 1 and nodes * local_world != world:
            raise UserError(f"{launcher.name} started {world} processes, {local_world} on this node, but "
                            f"--num_proc_node is {nodes}. Leave the flag out.")
        else:
            return Topology(rank, world, local_rank, local_world, address, port)
    if not 0 <= node < nodes:
        raise UserError(f"--node_rank {node} with --num_proc_node {nodes}: it must be 0 to {nodes - 1}. "
                        f"(A single node needs neither flag.)")
    if nodes > 1 and config.master_address == '127.0.0.1':
        raise UserError(f"--num_proc_node {nodes} needs --master_address, the address of node 0 that all nodes reach.")
    port = config.master_port or (PUBLISHED_PORT if nodes > 1 else free_port() if per_node > 1 else 0)
    return Topology(node * per_node, nodes * per_node, 0, per_node, config.master_address, port,
                    spawn=per_node if per_node > 1 else 0)


def _by_hand(config: LaunchConfig) -> Topology:
    rank, world = config.global_rank or config.local_rank, config.world_size
    if config.num_process_per_node > 1 or world % config.num_proc_node:
        raise UserError(f"--world_size {world} with --num_process_per_node {config.num_process_per_node} and --num_proc_node "
                        f"{config.num_proc_node}: --world_size is for processes started by hand, the same number on each node.")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} with --world_size {world}: it must be 0 to {world - 1}.")
    return Topology(rank, world, config.local_rank, world // config.num_proc_node, config.master_address,
                    config.master_port or PUBLISHED_PORT)


def _address(env: Mapping[str, str]) -> str:
    """Where rank 0 is: the launcher's word, Slurm's first node, or this machine."""
    nodes = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_JOB_NODELIST')
    if 'MASTER_ADDR' in env or not nodes or 'SLURM_PROCID' not in env:
        return env.get('MASTER_ADDR', '127.0.0.1')
    first, _, ranges = nodes.partition('[')                # node[003-007,012] -> node003; a,b -> a
    return first + ranges.split(']')[0].split(',')[0].split('-')[0] if ranges and ',' not in first \
        else nodes.split(',')[0]


def _port_of_job(env: Mapping[str, str]) -> int:
    """One port for all processes of a job, a different one for the next job."""
    job = _integer(env, 'SLURM_JOB_ID', 0)
    return 10000 + job % 50000 if job else PUBLISHED_PORT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


# -------------------------------------------------------------------------------------------------- starting to work

_here = Topology()
_device = torch.device('cpu')


def rank() -> int:
    return _here.rank


def world() -> int:
    return _here.world


def device() -> torch.device:
    return _device


def is_main() -> bool:
    """True in the one process that writes files."""
    return _here.rank == 0


def choose_device(name: str, topology: Topology) -> torch.device:
    """Raises UserError if CUDA is asked for and absent, or if there are more processes than GPUs on the node."""
    available = torch.cuda.is_available()
    if name == 'cuda' and not available:
        raise UserError("--device cuda, but PyTorch sees no CUDA device here. Use --device cpu or install a driver.")
    if name == 'cpu' or not available:
        return torch.device('cpu')
    count = torch.cuda.device_count()
    if topology.local_world > count:
        raise UserError(f"{topology.local_world} processes on this node but only {count} GPU(s): one process a GPU. "
                        f"Use --num_process_per_node {count}, or --device cpu.")
    return torch.device('cuda', topology.local_rank)


def launch(work: Callable[[Any], int | None], argument: Any, config: LaunchConfig) -> int:
    """Runs work(argument) in every process of the run and returns the exit status.

    Where processes are started here, one that dies ends the others; SIGTERM and SIGINT are passed on to them.
    """
    topology = resolve(config)
    choose_device(config.device, topology)                 # a wrong device is said once, before anything starts
    if not topology.spawn:
        with _member(topology, config):
            return work(argument) or 0
    context = mp.get_context('spawn')
    errors = context.SimpleQueue()
    processes = mp.start_processes(_child, (work, argument, topology, config, errors), topology.spawn, join=False,
                                   start_method='spawn')
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _pass_on(processes.processes, number))
    status = 0
    try:
        while not processes.join():
            continue
    except mp.ProcessExitedException as death:
        status = death.exit_code if death.exit_code > 0 else 128 - death.exit_code
        if death.signal_name:
            print(f'error: process {death.error_index} was ended by {death.signal_name}; the others were stopped.',
                  file=sys.stderr)
    lines = set()
    while not errors.empty():
        lines.add(errors.get())
    for line in sorted(lines):
        print(f'error: {line}', file=sys.stderr)
    return status


def _pass_on(processes: list, number: int) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _child(index: int, work: Callable[[Any], int | None], argument: Any, first: Topology, config: LaunchConfig,
           errors: Any) -> None:
    topology = replace(first, rank=first.rank + index, local_rank=index, spawn=0)
    status = 0
    try:
        with _member(topology, config):
            status = work(argument) or 0
    except UserError as error:
        errors.put(str(error))
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        status = 130
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, cores // topology.local_world))
    if _device.type == 'cuda':
        torch.cuda.set_device(_device)
    if topology.world > 1:
        dist.init_process_group('nccl' if _device.type == 'cuda' else 'gloo', rank=topology.rank,
                                world_size=topology.world, timeout=timedelta(hours=2),
                                init_method=f'tcp://{topology.address}:{topology.port}')
    try:
        yield
    finally:
        # After an error the others may never come: destroy_process_group would not return on NCCL.
        if topology.world > 1 and sys.exc_info()[0] is None:
            dist.destroy_process_group()
        _here, _device = Topology(), torch.device('cpu')


# ------------------------------------------------------------------------------------------------ talking to the others

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
