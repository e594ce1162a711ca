"""Who a process is among all, as a table."""

import socket
from functools import partial

import pytest

from distributed import environment
from distributed.environment import Environment, LaunchConfig, resolve
from utils import UserError

TORCHRUN = {'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '4', 'MASTER_ADDR': 'n0',
            'MASTER_PORT': '29500', 'TORCHELASTIC_RUN_ID': 'none'}
SLURM = {'SLURM_PROCID': '3', 'SLURM_STEP_NUM_TASKS': '6', 'SLURM_LOCALID': '1',
         'SLURM_STEP_TASKS_PER_NODE': '2(x3)', 'SLURM_STEP_NODELIST': 'node[003-007,012]',
         'SLURM_JOB_ID': '123456', 'SLURM_NODEID': '1'}


def given(**flags):
    """Made in the test: a value outside its limits is refused there."""
    return partial(LaunchConfig, **flags)


def mpirun(rank, world, local_rank, local_world):
    return {'OMPI_COMM_WORLD_RANK': str(rank), 'OMPI_COMM_WORLD_SIZE': str(world),
            'OMPI_COMM_WORLD_LOCAL_RANK': str(local_rank), 'OMPI_COMM_WORLD_LOCAL_SIZE': str(local_world)}


@pytest.mark.parametrize('flags, env, expected', [
    # one process, no group
    (given(), {}, Environment(0, 1, 0, 1, '127.0.0.1', 0)),
    (given(), {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}, Environment(0, 1, 0, 1, '127.0.0.1', 0)),
    # started here
    (given(num_process_per_node=2, master_port=7000), {}, Environment(0, 2, 0, 2, '127.0.0.1', 7000, 2)),
    (given(num_process_per_node=8, node_rank=2, num_proc_node=3, master_address='A'), {},
     Environment(16, 24, 0, 8, 'A', 6020, 8)),
    # one GPU a node: the published code trained three models here
    (given(node_rank=1, num_proc_node=3, master_address='A'), {}, Environment(1, 3, 0, 1, 'A', 6020)),
    (given(node_rank=1, num_proc_node=3, master_address='A'), mpirun(1, 3, 0, 1),
     Environment(1, 3, 0, 1, 'A', 6020)),
    # torchrun
    (given(), TORCHRUN, Environment(5, 8, 1, 4, 'n0', 29500)),
    (given(num_process_per_node=4), TORCHRUN, Environment(5, 8, 1, 4, 'n0', 29500)),
    (given(master_address='A'), TORCHRUN, Environment(5, 8, 1, 4, 'A', 29500)),    # the same host
    (given(master_address='A', master_port=7), TORCHRUN, Environment(5, 8, 1, 4, 'A', 7)),
    # mpirun, one process a slot
    (given(), mpirun(1, 2, 1, 2), Environment(1, 2, 1, 2, '127.0.0.1', 6020)),
    (given(master_address='A'), mpirun(3, 4, 1, 2), Environment(3, 4, 1, 2, 'A', 6020)),
    (given(), {'PMI_RANK': '1', 'PMI_SIZE': '2', 'MPI_LOCALRANKID': '1', 'MPI_LOCALNRANKS': '2'},
     Environment(1, 2, 1, 2, '127.0.0.1', 6020)),
    # the published command: mpirun -npernode 1, each starts 8
    (given(num_process_per_node=8, node_rank=2, num_proc_node=3, master_address='A'), mpirun(2, 3, 0, 1),
     Environment(16, 24, 0, 8, 'A', 6020, 8)),
    (given(num_process_per_node=8, num_proc_node=3, master_address='A'), mpirun(2, 3, 0, 1),
     Environment(16, 24, 0, 8, 'A', 6020, 8)),
    (given(num_process_per_node=8, master_address='A'), mpirun(0, 3, 0, 1),
     Environment(0, 24, 0, 8, 'A', 6020, 8)),
    # srun; port 10000 + job % 50000
    (given(), SLURM, Environment(3, 6, 1, 2, 'node003', 33456)),
    (given(), SLURM | {'PMI_RANK': '3', 'PMI_SIZE': '6'}, Environment(3, 6, 1, 2, 'node003', 33456)),
    (given(), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '4,2', 'SLURM_PROCID': '5'},
     Environment(5, 6, 1, 2, 'node003', 33456)),
    (given(), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '6', 'SLURM_NODEID': '0'},
     Environment(3, 6, 1, 6, '127.0.0.1', 33456)),
    (given(num_process_per_node=4), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '1(x6)', 'SLURM_LOCALID': '0'},
     Environment(12, 24, 0, 4, 'node003', 33456, 4)),
    # a batch script of Slurm without srun is one process
    (given(), {'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'SLURM_NTASKS': '8'},
     Environment(0, 1, 0, 1, '127.0.0.1', 0)),
    # RANK and WORLD_SIZE alone: a container a node, or by hand on one machine
    (given(), {'RANK': '2', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'pod0', 'MASTER_PORT': '23456'},
     Environment(2, 4, 0, 1, 'pod0', 23456)),
    (given(num_process_per_node=2), {'RANK': '2', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'pod0'},
     Environment(4, 8, 0, 2, 'pod0', 6020, 2)),
    (given(), {'RANK': '1', 'WORLD_SIZE': '2'}, Environment(1, 2, 1, 2, '127.0.0.1', 6020)),
    # flags that agree with the launcher change nothing
    (given(global_rank=5, local_rank=1), TORCHRUN, Environment(5, 8, 1, 4, 'n0', 29500)),
])
def test_where_a_process_stands(flags, env, expected):
    assert resolve(flags(), env) == expected


@pytest.mark.parametrize('flags, env, told', [
    (given(num_process_per_node=0), {}, '--num_process_per_node 0'),
    (given(num_proc_node=-1), {}, '--num_proc_node -1'),
    (given(num_threads=-1), {}, '--num_threads -1'),
    (given(timeout=0), {}, '--timeout 0'),
    (given(master_port=70000), {}, '--master_port 70000'),
    (given(node_rank=1), {}, '--node_rank 1 with --num_proc_node 1'),
    (given(node_rank=3, num_proc_node=3, master_address='A'), {}, '0 to 2'),
    (given(num_proc_node=2), {}, '--master_address'),
    (given(num_proc_node=2, num_process_per_node=8), {}, '--master_address'),
    (given(global_rank=1), {}, '--global_rank is 1, but the command line counts 1 processes'),
    (given(local_rank=1), {}, '--local_rank is 1'),
    (given(global_rank=4), TORCHRUN, '--global_rank is 4.* this one is number 5'),
    (given(num_process_per_node=3), TORCHRUN, 'torchrun counts 8 processes, 4 on this node'),
    (given(num_proc_node=3), TORCHRUN, '--num_proc_node is 3'),
    (given(num_process_per_node=8, num_proc_node=2, master_address='A'), mpirun(0, 3, 0, 1),
     '--num_proc_node is 2'),
    # hosts in another order than --node_rank: two processes would both be number 1
    (given(num_process_per_node=8, node_rank=1, num_proc_node=2, master_address='A'), mpirun(0, 2, 0, 1),
     '--node_rank is 1'),
    (given(node_rank=2, num_proc_node=3, master_address='A'), mpirun(1, 3, 0, 1), '--node_rank is 2'),
    (given(node_rank=5), TORCHRUN, '--node_rank is 5'),
    (given(), mpirun(2, 4, 0, 2), 'need --master_address'),
    (given(), TORCHRUN | {'RANK': '8'}, 'RANK 8 with WORLD_SIZE 8: it must be 0 to 7'),
])
def test_what_contradicts_is_refused(flags, env, told):
    with pytest.raises(UserError, match=told):
        resolve(flags(), env)


def test_a_free_port_on_one_node():
    ports = {resolve(LaunchConfig(num_process_per_node=2), {}).port for _ in range(8)}
    assert len(ports) > 1 and all(1024 <= port < 65536 for port in ports)
    with socket.socket() as s:
        s.bind(('127.0.0.1', ports.pop()))


@pytest.mark.parametrize('nodes, first', [
    ('node[003-007,012]', 'node003'), ('a,b[1-2]', 'a'), ('b[1-2],a', 'b1'), ('gpu7', 'gpu7'),
    ('rack-2-[10,12]-ib,x', 'rack-2-10-ib'), ('n[9]', 'n9'),
])
def test_first_host_of_a_slurm_list(nodes, first):
    assert environment._first_host(nodes) == first


# As Slurm 23.02 sets them for `srun` in a job of 2 nodes with 4 GPUs each, `--ntasks-per-node 4`.
SLURM_JOB = {
    'SLURM_JOB_ID': '4711', 'SLURM_JOBID': '4711', 'SLURM_JOB_NODELIST': 'gpu[07-08]',
    'SLURM_JOB_NUM_NODES': '2', 'SLURM_NNODES': '2', 'SLURM_NTASKS': '8', 'SLURM_NPROCS': '8',
    'SLURM_NTASKS_PER_NODE': '4', 'SLURM_TASKS_PER_NODE': '4(x2)', 'SLURM_CPUS_PER_TASK': '8',
    'SLURM_GPUS_ON_NODE': '4', 'SLURM_GPUS_PER_NODE': '4', 'SLURM_SUBMIT_DIR': '/home/user/nvae',
    'SLURM_STEP_ID': '0', 'SLURM_STEP_NODELIST': 'gpu[07-08]', 'SLURM_STEP_NUM_NODES': '2',
    'SLURM_STEP_NUM_TASKS': '8', 'SLURM_STEP_TASKS_PER_NODE': '4(x2)', 'SLURM_STEP_LAUNCHER_PORT': '40123',
    'SLURM_LAUNCH_NODE_IPADDR': '10.1.0.7', 'SLURM_SRUN_COMM_HOST': '10.1.0.7', 'SLURMD_NODENAME': 'gpu07',
    'SLURM_MPI_TYPE': 'pmix', 'PMIX_RANK': '0', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}


def test_a_slurm_job_of_two_nodes_with_four_gpus():
    """Every process has its rank, its GPU, and the same meeting point: the first node of the job."""
    seen = []
    for task in range(8):
        node, local = divmod(task, 4)
        env = SLURM_JOB | {'SLURM_PROCID': str(task), 'SLURM_LOCALID': str(local), 'SLURM_NODEID': str(node),
                           'PMIX_RANK': str(task), 'SLURMD_NODENAME': f'gpu0{7 + node}'}
        seen.append(resolve(LaunchConfig(), env))
    assert seen == [Environment(task, 8, task % 4, 4, 'gpu07', 14711) for task in range(8)]
    config = LaunchConfig(master_address='10.1.0.7', master_port=6020)
    assert resolve(config, env).address == '10.1.0.7'
    batch_script = {name: value for name, value in SLURM_JOB.items() if 'STEP' not in name}
    batch_script |= {'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
    assert resolve(LaunchConfig(), batch_script) == Environment()
