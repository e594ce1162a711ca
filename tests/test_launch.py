"""Who a process is among many, as a table; and real processes that end well, badly, and not at all."""

import os
import signal
import socket
import threading
import time
from multiprocessing import SimpleQueue

import pytest
import torch

import launch
from launch import LaunchConfig as Flags
from launch import Topology, resolve
from utils import UserError

TORCHRUN = {'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '4', 'MASTER_ADDR': 'n0',
            'MASTER_PORT': '29500', 'TORCHELASTIC_RUN_ID': 'none'}
SLURM = {'SLURM_PROCID': '3', 'SLURM_STEP_NUM_TASKS': '6', 'SLURM_LOCALID': '1',
         'SLURM_STEP_TASKS_PER_NODE': '2(x3)', 'SLURM_STEP_NODELIST': 'node[003-007,012]',
         'SLURM_JOB_ID': '123456', 'SLURM_NODEID': '1'}


def mpirun(rank, world, local_rank, local_world):
    return {'OMPI_COMM_WORLD_RANK': str(rank), 'OMPI_COMM_WORLD_SIZE': str(world),
            'OMPI_COMM_WORLD_LOCAL_RANK': str(local_rank), 'OMPI_COMM_WORLD_LOCAL_SIZE': str(local_world)}


@pytest.mark.parametrize('flags, env, expected', [
    # one process, no group
    (Flags(), {}, Topology(0, 1, 0, 1, '127.0.0.1', 0)),
    (Flags(), {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}, Topology(0, 1, 0, 1, '127.0.0.1', 0)),
    # started here
    (Flags(num_process_per_node=2, master_port=7000), {}, Topology(0, 2, 0, 2, '127.0.0.1', 7000, 2)),
    (Flags(num_process_per_node=8, node_rank=2, num_proc_node=3, master_address='A'), {},
     Topology(16, 24, 0, 8, 'A', 6020, 8)),
    # one GPU a node: the published code trained three models here
    (Flags(node_rank=1, num_proc_node=3, master_address='A'), {}, Topology(1, 3, 0, 1, 'A', 6020)),
    (Flags(node_rank=1, num_proc_node=3, master_address='A'), mpirun(1, 3, 0, 1),
     Topology(1, 3, 0, 1, 'A', 6020)),
    # torchrun
    (Flags(), TORCHRUN, Topology(5, 8, 1, 4, 'n0', 29500)),
    (Flags(num_process_per_node=4), TORCHRUN, Topology(5, 8, 1, 4, 'n0', 29500)),
    (Flags(master_address='A'), TORCHRUN, Topology(5, 8, 1, 4, 'n0', 29500)),    # it listens there, not at A
    (Flags(master_address='A', master_port=7), TORCHRUN, Topology(5, 8, 1, 4, 'A', 7)),
    # mpirun, one process a slot
    (Flags(), mpirun(1, 2, 1, 2), Topology(1, 2, 1, 2, '127.0.0.1', 6020)),
    (Flags(master_address='A'), mpirun(3, 4, 1, 2), Topology(3, 4, 1, 2, 'A', 6020)),
    (Flags(), {'PMI_RANK': '1', 'PMI_SIZE': '2', 'MPI_LOCALRANKID': '1', 'MPI_LOCALNRANKS': '2'},
     Topology(1, 2, 1, 2, '127.0.0.1', 6020)),
    # the published command: mpirun -npernode 1, each starts 8
    (Flags(num_process_per_node=8, node_rank=2, num_proc_node=3, master_address='A'), mpirun(2, 3, 0, 1),
     Topology(16, 24, 0, 8, 'A', 6020, 8)),
    (Flags(num_process_per_node=8, num_proc_node=3, master_address='A'), mpirun(2, 3, 0, 1),
     Topology(16, 24, 0, 8, 'A', 6020, 8)),
    (Flags(num_process_per_node=8, master_address='A'), mpirun(0, 3, 0, 1),
     Topology(0, 24, 0, 8, 'A', 6020, 8)),
    # srun; port 10000 + job % 50000
    (Flags(), SLURM, Topology(3, 6, 1, 2, 'node003', 33456)),
    (Flags(), SLURM | {'PMI_RANK': '3', 'PMI_SIZE': '6'}, Topology(3, 6, 1, 2, 'node003', 33456)),
    (Flags(), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '4,2', 'SLURM_PROCID': '5'},
     Topology(5, 6, 1, 2, 'node003', 33456)),
    (Flags(), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '6', 'SLURM_NODEID': '0'},
     Topology(3, 6, 1, 6, '127.0.0.1', 33456)),
    (Flags(num_process_per_node=4), SLURM | {'SLURM_STEP_TASKS_PER_NODE': '1(x6)', 'SLURM_LOCALID': '0'},
     Topology(12, 24, 0, 4, 'node003', 33456, 4)),
    # a batch script of Slurm without srun is one process
    (Flags(), {'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'SLURM_NTASKS': '8'},
     Topology(0, 1, 0, 1, '127.0.0.1', 0)),
    # RANK and WORLD_SIZE alone: a container a node, or by hand on one machine
    (Flags(), {'RANK': '2', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'pod0', 'MASTER_PORT': '23456'},
     Topology(2, 4, 0, 1, 'pod0', 23456)),
    (Flags(num_process_per_node=2), {'RANK': '2', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'pod0'},
     Topology(4, 8, 0, 2, 'pod0', 6020, 2)),
    (Flags(), {'RANK': '1', 'WORLD_SIZE': '2'}, Topology(1, 2, 1, 2, '127.0.0.1', 6020)),
    # by hand
    (Flags(world_size=4, global_rank=3), {}, Topology(3, 4, 3, 4, '127.0.0.1', 6020)),
    (Flags(world_size=4, local_rank=3), {}, Topology(3, 4, 3, 4, '127.0.0.1', 6020)),
    (Flags(world_size=4, global_rank=3, num_proc_node=2, master_address='A'), {},
     Topology(3, 4, 1, 2, 'A', 6020)),
    (Flags(world_size=8, global_rank=5), TORCHRUN, Topology(5, 8, 5, 8, '127.0.0.1', 6020)),
])
def test_where_a_process_stands(flags, env, expected):
    assert resolve(flags, env) == expected


@pytest.mark.parametrize('flags, env, told', [
    (Flags(num_process_per_node=0), {}, '--num_process_per_node 0'),
    (Flags(num_proc_node=-1), {}, '--num_proc_node -1'),
    (Flags(world_size=0), {}, '--world_size 0'),
    (Flags(num_threads=-1), {}, '--num_threads -1'),
    (Flags(master_port=70000), {}, '--master_port 70000'),
    (Flags(node_rank=1), {}, '--node_rank 1 with --num_proc_node 1'),
    (Flags(node_rank=3, num_proc_node=3, master_address='A'), {}, '0 to 2'),
    (Flags(num_proc_node=2), {}, '--master_address'),
    (Flags(num_proc_node=2, num_process_per_node=8), {}, '--master_address'),
    (Flags(global_rank=1), {}, '--world_size'),
    (Flags(local_rank=1), {}, '--world_size'),
    (Flags(world_size=4, global_rank=4), {}, '0 to 3'),
    (Flags(world_size=4, global_rank=1, local_rank=2), {}, '--local_rank is 2'),
    (Flags(world_size=4, num_proc_node=2, local_rank=1, master_address='A'), {}, '--local_rank is 1'),
    (Flags(world_size=4, num_proc_node=2, global_rank=1), {}, '--master_address'),
    (Flags(world_size=4, num_process_per_node=2), {}, 'started by hand'),
    (Flags(world_size=4, num_proc_node=3), {}, 'same number on each node'),
    (Flags(world_size=8), TORCHRUN, 'torchrun started this process as 5 of 8'),
    (Flags(num_process_per_node=3), TORCHRUN, 'torchrun started 8 processes, 4 on this node'),
    (Flags(num_proc_node=3), TORCHRUN, '--num_proc_node is 3'),
    (Flags(num_process_per_node=8, num_proc_node=2, master_address='A'), mpirun(0, 3, 0, 1),
     '--num_proc_node is 2'),
    # hosts in another order than --node_rank: two processes would both be number 1
    (Flags(num_process_per_node=8, node_rank=1, num_proc_node=2, master_address='A'), mpirun(0, 2, 0, 1),
     '--node_rank is 1'),
    (Flags(node_rank=2, num_proc_node=3, master_address='A'), mpirun(1, 3, 0, 1), '--node_rank is 2'),
    (Flags(node_rank=5), TORCHRUN, '--node_rank is 5'),
    (Flags(), mpirun(2, 4, 0, 2), 'need --master_address'),
    (Flags(), TORCHRUN | {'RANK': '8'}, 'count from 0'),
])
def test_what_contradicts_is_refused(flags, env, told):
    with pytest.raises(UserError, match=told):
        resolve(flags, env)


def test_a_free_port_on_one_node():
    ports = {resolve(Flags(num_process_per_node=2), {}).port for _ in range(8)}
    assert len(ports) > 1 and all(1024 <= port < 65536 for port in ports)
    with socket.socket() as s:
        s.bind(('127.0.0.1', ports.pop()))


@pytest.mark.parametrize('nodes, first', [
    ('node[003-007,012]', 'node003'), ('a,b[1-2]', 'a'), ('b[1-2],a', 'b1'), ('gpu7', 'gpu7'),
    ('rack-2-[10,12]-ib,x', 'rack-2-10-ib'), ('n[9]', 'n9'),
])
def test_first_host_of_a_slurm_list(nodes, first):
    assert launch._first_host(nodes) == first


def test_devices_of_processes(monkeypatch):
    """Answers for a machine with 2 GPUs, and for one that Slurm shows as 1 GPU to each of 4 tasks."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    choose = launch.choose_device
    assert choose('auto', Topology(1, 2, 1, 2)) == torch.device('cuda', 1)
    assert choose('cpu', Topology(1, 2, 1, 2)) == torch.device('cpu')
    with pytest.raises(UserError, match='only 2 GPU'):
        choose('auto', Topology(0, 4, 0, 4))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    assert choose('auto', Topology(3, 4, 3, 4)) == torch.device('cuda', 0)
    with pytest.raises(UserError, match='only 1 GPU'):
        choose('auto', Topology(0, 4, 0, 4, spawn=4))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='no CUDA device'):
        choose('cuda', Topology())


def test_one_process_has_no_group_and_its_device_is_given_back():
    def work(value):
        assert not torch.distributed.is_initialized() and launch.world() == 1 and launch.is_main()
        assert launch.gather([1]) == [1] and launch.any_rank(True) and not launch.any_rank(False)
        with launch.main_first():
            launch.barrier()
        return value
    assert launch.launch(work, 7, Flags(device='cpu', num_threads=1)) == 7
    assert launch.launch(work, None, Flags(device='cpu', num_threads=1)) == 0


# ------------------------------------------------------------------------------------------- real processes

def work(task):
    """What the processes of the tests below do; the others wait in a barrier, or deaf to SIGTERM."""
    name, folder = task
    if name == 'asked':
        order = launch.gather([(launch.rank(), launch.world())])
        assert order == [(0, 2), (1, 2)], order
        assert launch.any_rank(launch.rank() == 1) and not launch.any_rank(False)
        assert launch.mean_over_ranks(torch.tensor(float(launch.rank()))).item() == 0.5
        with launch.main_first():
            (folder / f'{launch.rank()}').write_text(f'{sorted(p.name for p in folder.iterdir())}')
    if name == 'mistake' and launch.is_main():
        raise UserError('the data folder is missing')
    if name == 'killed':
        if launch.is_main():
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)                 # as one in a collective on a GPU
        time.sleep(60)
    if name == 'asked':
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        signal.signal(signal.SIGINT, lambda *_: stop.append(1))
        (folder / f'ready{launch.rank()}').touch()
        while not launch.any_rank(bool(stop)):
            time.sleep(0.02)
        time.sleep(0.5 * (launch.rank() == 0))                        # a checkpoint takes its time
        (folder / f'saved{launch.rank()}').touch()
        return 143
    launch.barrier()
    return 0


TWO = Flags(num_process_per_node=2, device='cpu', num_threads=1)


@pytest.mark.parametrize('name, status, told', [('mistake', 2, 'error: the data folder is missing\n'),
                                                ('killed', 137, 'ended by SIGKILL')])
def test_a_process_that_fails_takes_the_others_with_it(name, status, told, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, 'GRACE', 1)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    since = time.monotonic()
    assert launch.launch(work, (name, tmp_path), TWO) == status
    assert time.monotonic() - since < 40
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    errors = capfd.readouterr().err
    assert told in errors
    if name == 'mistake':
        assert errors == told                                         # one line, no traceback of a neighbour


def test_two_processes_agree_and_a_signal_reaches_both_who_end_in_their_own_time(tmp_path):
    def ask():
        until = time.monotonic() + 60
        while time.monotonic() < until and len(list(tmp_path.glob('ready*'))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    assert launch.launch(work, ('asked', tmp_path), TWO) == 143
    thread.join()
    assert {p.name for p in tmp_path.glob('saved*')} == {'saved0', 'saved1'}
    assert (tmp_path / '0').read_text() == "[]" and (tmp_path / '1').read_text() == "['0']"   # main first


def test_what_is_said_of_failures(capfd):
    """A user's mistake before all else, once; else the first traceback, and not those that follow from it."""
    told = SimpleQueue()
    for message in ((False, 'connection lost'), (True, 'wrong folder'), (True, 'wrong folder')):
        told.put(message)
    assert launch._explain(1, told) == 2 and capfd.readouterr().err == 'error: wrong folder\n'
    for message in ((False, 'a bug'), (False, 'connection lost')):
        told.put(message)
    assert launch._explain(1, told) == 1 and capfd.readouterr().err == 'a bug\n'
    assert launch._explain(-9, told) == 137 and 'SIGKILL' in capfd.readouterr().err


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as s:
        s.bind(('', 0))
        s.listen()
        topology = Topology(0, 2, 0, 2, '127.0.0.1', s.getsockname()[1])
        with pytest.raises(UserError, match='--master_port'):
            launch._join_group(topology)


def test_nobody_comes_is_said(monkeypatch):
    monkeypatch.setattr(launch, 'MEETING_TIME', launch.timedelta(seconds=1))
    with pytest.raises(UserError, match='process 0 of 2 cannot meet the others'):
        launch._join_group(Topology(0, 2, 0, 2, '127.0.0.1', launch.free_port()))
