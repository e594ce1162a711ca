"""Who a process is among many: from flags, and from the environment that a launcher made.

Processes are started by launch.py itself (`--num_process_per_node`, the published way), by torchrun, mpirun
or srun. Their environment is read; flags that are given win; what contradicts is refused.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from utils import UserError, flag

PUBLISHED_PORT = 6020        # where the nodes of a published run meet
LOOPBACK = ('127.0.0.1', 'localhost')


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
    deterministic: bool = flag(False, 'GPU: the same command gives the same bits; slower')
    timeout: float = flag(10.0, 'minutes without a sign of life, then a process is gone and the others end')
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


def integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, '')
    return int(text) if text.isdigit() else default


def _numbers(text: str) -> list[int]:
    """Slurm's 4(x2),3 is [4, 4, 3]; a plain number is itself."""
    return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def resolve(config: LaunchConfig, env: Mapping[str, str] = os.environ) -> Topology:
    """Where this process stands. Raises UserError if flags and environment contradict each other."""
    _check(config)
    launcher = next((x for x in LAUNCHERS if x.rank in env and (x.local_rank in env or not x.local_rank)
                     and integer(env, x.world, 1) > 1), None)
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
    if not config.timeout > 0:
        raise UserError(f"--timeout {config.timeout:g}: it must be above 0 minutes.")
    if not 0 <= config.master_port < 2 ** 16:
        raise UserError(f"--master_port {config.master_port}: a port is 1 to 65535, or 0 to choose one.")


def _launched(config: LaunchConfig, launcher: _Launcher, env: Mapping[str, str]) -> Topology:
    """A process that `launcher` started. One that is alone on its node may start others, as published."""
    world, rank = integer(env, launcher.world, 1), integer(env, launcher.rank, 0)
    address, port = _meeting_point(config, launcher, env)
    if launcher.local_rank:
        counts = _numbers(env.get(launcher.local_world, '')) or [world]
        local_world = counts[min(integer(env, 'SLURM_NODEID', 0), len(counts) - 1)]
        local_rank = integer(env, launcher.local_rank, 0)
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
    if 'TORCHELASTIC_RUN_ID' in env and not config.master_port:
        # torchrun listens there already; its host may be known to the others by another address.
        own = config.master_address in LOOPBACK
        return env['MASTER_ADDR'] if own else config.master_address, int(env['MASTER_PORT'])
    job = integer(env, 'SLURM_JOB_ID', 0)                 # one port for a job, another for the next
    port = config.master_port or integer(env, 'MASTER_PORT', 0) or (10000 + job % 50000 if job
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
