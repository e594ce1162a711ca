"""Devices; and real processes that end well, badly, and not at all."""

import os
import signal
import threading
import time
from multiprocessing import SimpleQueue

import pytest
import torch

from distributed import launch
from distributed.launch import FAILURE, LOST, MISTAKE
from distributed.topology import LaunchConfig as Flags
from distributed.topology import Topology, free_port
from utils import UserError


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


def test_a_gpu_without_memory_is_said_in_one_line():
    def work(_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...')
    told = r'the GPU has not enough memory \(CUDA out of memory\). Give a smaller --batch_size'
    with pytest.raises(UserError, match=told):
        launch.launch(work, None, Flags(device='cpu', num_threads=1))


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
    assert time.monotonic() - since < 150, "it waited for the one that hangs"
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
    """A user's mistake before all else, once; then the first traceback, and not what follows from it."""
    told = SimpleQueue()
    for message in ((LOST, 'touch lost'), (MISTAKE, 'wrong folder'), (MISTAKE, 'wrong folder')):
        told.put(message)
    assert launch._explain(75, told) == 2 and capfd.readouterr().err == 'error: wrong folder\n'
    for message in ((LOST, 'touch lost'), (FAILURE, 'a bug'), (FAILURE, 'another')):
        told.put(message)
    assert launch._explain(75, told) == 1 and capfd.readouterr().err == 'a bug\n'
    for message in ((LOST, 'touch lost'), (LOST, 'gone')):
        told.put(message)
    assert launch._explain(75, told) == 75 and capfd.readouterr().err == 'error: touch lost\n'
    assert launch._explain(-9, told) == 137 and 'SIGKILL' in capfd.readouterr().err


def alone(rank, port, folder):
    """A process that was started by hand; rank 1 takes longer."""
    def slowly(_):
        time.sleep(2 * rank)
        (folder / f'worked{rank}').touch()

    launch.launch(slowly, None, Flags(world_size=2, global_rank=rank, master_port=port, device='cpu',
                                      num_threads=1))
    (folder / f'left{rank}').write_text(str((folder / 'worked1').exists()))


def test_nobody_leaves_before_all_are_done(tmp_path):
    """Process 0 serves the meeting point: it must outlast the others."""
    torch.multiprocessing.spawn(alone, (free_port(), tmp_path), nprocs=2)
    assert (tmp_path / 'left0').read_text() == (tmp_path / 'left1').read_text() == 'True'


@pytest.mark.parametrize('text, told', [
    ('[/a/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:99: Connection reset by peer. Often so.',
     'Read error [10.0.0.2]:99: Connection reset by peer'),
    ('[/a/gloo/transport/tcp/b.cc:78] Timed out waiting 12000ms for recv operation to complete',
     'Timed out waiting 12000ms for recv operation to complete')])
def test_errors_of_the_group_are_told_from_bugs(text, told):
    error = RuntimeError(text)
    assert launch._of_the_group(error) and launch._reason(error) == told
    assert launch._of_the_group(torch.distributed.DistBackendError('NCCL error'))
    assert not launch._of_the_group(RuntimeError('shape')) and not launch._of_the_group(OSError(text))


@pytest.mark.parametrize('text, lost', [
    ('[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:5', True),
    ('Application timeout caused pair closure', True),
    ('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)', False)])
def test_errors_of_the_connection_are_told_from_others(text, lost):
    assert launch._of_the_group(RuntimeError(text)) is lost
