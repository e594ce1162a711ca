"""Who a process is among all of a run: from our flags, and from the environment that a launcher made."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from storage.limits import DEFAULT_GB
from utils import UserError, flag, flags

PUBLISHED_PORT = 6020        # where the nodes of a published run meet
LOOPBACK = ('127.0.0.1', 'localhost')
LAUNCHERS = (   # the innermost first: name; rank, world size; local rank, local world size
    ('torchrun', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    ('mpirun', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK',
     'OMPI_COMM_WORLD_LOCAL_SIZE'),
    ('mpirun', 'PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS'),
    ('srun', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS', 'SLURM_LOCALID', 'SLURM_STEP_TASKS_PER_NODE'),
    ('the environment', 'RANK', 'WORLD_SIZE'),                      # set by hand or by Kubernetes
    ('the command line', '--node_rank', '--num_proc_node'),         # as published: one command a node
)


@flags
class LaunchConfig:
    """Processes and devices"""
    device: str = flag('auto', 'where to compute; auto = CUDA if it is available, else the CPU',
                       choices=('auto', 'cpu', 'cuda'), basic=True)
    num_process_per_node: int = flag(1, 'processes to start on this node, one per GPU', least=1, basic=True)
    num_proc_node: int = flag(1, 'number of nodes', least=1)
    node_rank: int = flag(0, 'index of this node', least=0)
    global_rank: int = flag(0, 'index of this process among all; launchers set it', least=0)
    local_rank: int = flag(0, 'index of this process on its node; launchers set it', least=0)
    master_address: str = flag('127.0.0.1', 'address of node 0, as the other nodes reach it')
    master_port: int = flag(0, f'port of node 0; 0 = a free one on a single node, else {PUBLISHED_PORT}',
                            least=0, most=65535)
    timeout: float = flag(10.0, 'minutes without an answer after which a process counts as lost', above=0)
    max_gb: float = flag(DEFAULT_GB, 'GB of memory that one input file may take, by what its header claims',
                         above=0)
    deterministic: bool = flag(False, 'GPU: the same command gives the same bits; slower')
    num_threads: int = flag(0, 'CPU threads per process; 0 = $OMP_NUM_THREADS, else an even share', least=0)


@dataclass(frozen=True)
class Environment:
    """This process among all. `spawn` processes are still to be started here, with ranks from `rank` up."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = '127.0.0.1'       # of process 0
    port: int = 0
    spawn: int = 0


def resolve(config: LaunchConfig, env: Mapping[str, str] = os.environ) -> Environment:
    """Raises UserError if flags contradict the environment or each other."""
    numbers = {**env, **{f'--{name}': str(value) for name, value in asdict(config).items()}}
    launcher, rank_name, world_name, *local_names = next(
        (row for row in LAUNCHERS if all(name in numbers for name in row[1:4])
         and integer(numbers, row[2]) > 1), LAUNCHERS[-1])
    rank, world = integer(numbers, rank_name), integer(numbers, world_name)
    if rank >= world:
        raise UserError(f"{rank_name} {rank} with {world_name} {world}: it must be 0 to {world - 1}.")
    address, port, local_rank, local_world = config.master_address, config.master_port or PUBLISHED_PORT, 0, 1
    if rank_name in env:
        address, port = _master(config, launcher, env)
        if address in LOOPBACK:
            local_rank, local_world = rank, world
    if local_names:
        local_rank, counts = integer(env, local_names[0]), _counts(env.get(local_names[1], str(world)))
        local_world = counts[min(integer(env, 'SLURM_NODEID'), len(counts) - 1)]
    if local_world == world and 'MASTER_ADDR' not in env:
        address = config.master_address
    spawn = config.num_process_per_node if local_world == 1 else 1
    here = Environment(rank, world, local_rank, local_world, address, port)
    _refuse_other_flags(config, launcher, spawn, here)
    if local_world < world and address in LOOPBACK:
        raise UserError(f"{world} processes, {local_world} on this node: the others need --master_address, "
                        f"the address of the node of process 0.")
    if spawn == 1:
        return here if world > 1 else Environment()
    if world == 1:
        port = config.master_port or free_port()
    return Environment(rank * spawn, world * spawn, 0, spawn, address, port, spawn)


def _refuse_other_flags(config: LaunchConfig, launcher: str, spawn: int, here: Environment) -> None:
    """Raises UserError for a flag that was given and differs from what the launcher says."""
    right = {'global_rank': here.rank, 'local_rank': here.local_rank,
             'num_proc_node': here.world // here.local_world, 'node_rank': here.rank // here.local_world,
             'num_process_per_node': max(spawn, here.local_world)}
    for field in fields(config):
        given = getattr(config, field.name)
        if given not in (field.default, right.get(field.name, given)):
            raise UserError(f"--{field.name} is {given}, but {launcher} counts {here.world} processes, "
                            f"{here.local_world} on this node, and this one is number {here.rank}. Leave the "
                            f"flag out.")


def _master(config: LaunchConfig, launcher: str, env: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of process 0: those of the flags, of the launcher, or of Slurm's first node."""
    job = integer(env, 'SLURM_JOB_ID')                    # one port for a job, another for the next
    port = config.master_port or integer(env, 'MASTER_PORT') or (
        10000 + job % 50000 if job else PUBLISHED_PORT)
    nodes = (launcher == 'srun' and env.get('SLURM_STEP_NODELIST')) or env.get('SLURM_JOB_NODELIST', '')
    if config.master_address not in LOOPBACK:
        return config.master_address, port
    return env.get('MASTER_ADDR') or _first_host(nodes) or config.master_address, port


def _first_host(nodes: str) -> str:
    """The first of Slurm's list: node[003-007,012] -> node003; a,b[1-2] -> a."""
    prefix, numbers, suffix = re.match(r'([^,\[]*)(?:\[([^\]]*)\]([^,]*))?', nodes).groups(default='')
    return prefix + re.split('[-,]', numbers)[0] + suffix


def _counts(text: str) -> list[int]:
    """Slurm's 4(x2),3 is [4, 4, 3]; a plain number is itself."""
    return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def integer(env: Mapping[str, str], name: str) -> int:
    """A number of the environment; 0 if it is not there."""
    return int(env[name]) if env.get(name, '').isdigit() else 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
