"""Devices; and real processes that end well, badly, and not at all."""

import os
import platform
import resource
import signal
import threading
import time

import pytest
import torch

from distributed import launch
from distributed.environment import Environment, free_port
from distributed.environment import LaunchConfig as Flags
from utils import UserError, run_program


def test_devices_of_processes(monkeypatch):
    """Answers for a machine with 2 GPUs, and for one that Slurm shows as 1 GPU to each of 4 tasks."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    choose = launch.choose_device
    assert choose('auto', Environment(1, 2, 1, 2)) == torch.device('cuda', 1)
    assert choose('cpu', Environment(1, 2, 1, 2)) == torch.device('cpu')
    with pytest.raises(UserError, match='only 2 GPU'):
        choose('auto', Environment(0, 4, 0, 4))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    assert choose('auto', Environment(3, 4, 3, 4)) == torch.device('cuda', 0)
    with pytest.raises(UserError, match='only 1 GPU'):
        choose('auto', Environment(0, 4, 0, 4, spawn=4))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='no CUDA device'):
        choose('cuda', Environment())


def test_one_process_has_no_group_and_its_device_is_given_back():
    def work(value):
        assert not torch.distributed.is_initialized() and launch.world() == 1 and launch.is_main()
        assert launch.gather([1]) == [1] and launch.any_rank(True) and not launch.any_rank(False)
        with launch.main_first():
            launch.barrier()
        return value
    assert launch.launch(work, 7, Flags(device='cpu', num_threads=1)) == 7
    assert launch.launch(work, None, Flags(device='cpu', num_threads=1)) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a matter of glibc')
def test_freed_memory_is_kept_for_the_next_step():
    def faults(_):
        """Pages that a step of 234 MB, whose tensors go in reverse order, fetches from the system."""
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            kept = [torch.ones(n << 17) for n in (*range(1, 25), 168)]
            while kept:
                kept.pop()
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    counts = []
    launch.launch(faults, None, Flags(device='cpu'))
    assert sum(counts[-3:]) < 2000                   # of 60,000 pages of 4 KB a step, once the heap has grown


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
    if name == 'mistakes' or (name == 'mistake' and launch.is_main()):
        raise UserError('the data folder is missing')
    if name == 'bug' and not launch.is_main():
        raise RuntimeError('of ours')
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
                                                ('mistakes', 2, 'error: the data folder is missing\n'),
                                                ('bug', 1, 'RuntimeError: of ours\n'),
                                                ('killed', 137, 'ended by SIGKILL')])
def test_a_process_that_fails_takes_the_others_with_it(name, status, told, tmp_path, capfd):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    since = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: launch.launch(work, (name, tmp_path), TWO))
    assert ended.value.code == status
    assert time.monotonic() - since < 150, "it waited for the one that hangs"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    errors = capfd.readouterr().err
    assert told in errors and 'lost touch' not in errors              # the cause, not what follows from it
    if status == 2:
        assert errors == told                                         # one line, no traceback of a neighbour
    if name == 'bug':
        assert 'Process 1 terminated' in errors and errors.count('Traceback') == 1


class SlowGroups:
    """An argument that, once unpickled in a child process, makes groups slow to form in process 1."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__.update(state)
        new_group = torch.distributed.new_group

        def slow(*args, **kwargs):
            group = new_group(*args, **kwargs)
            if torch.distributed.get_rank() == 1:
                time.sleep(0.5)
                (self.folder / f'group{len(list(self.folder.iterdir()))}').touch()
            return group
        torch.distributed.new_group = slow


def fail_at_once(slow):
    raise UserError(f'{len(list(slow.folder.iterdir()))} groups')


def test_no_process_leaves_before_all_are_connected(tmp_path):
    """Process 0 serves the store: if it leaves early, the others print pages of C++ for one line of error."""
    with pytest.raises(UserError, match='2 groups'):
        launch.launch(fail_at_once, SlowGroups(tmp_path), TWO)


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


def alone(rank, port, folder):
    """A process that was started by hand; rank 1 takes longer."""
    def slowly(_):
        time.sleep(2 * rank)
        (folder / f'worked{rank}').touch()

    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_PORT=str(port))
    launch.launch(slowly, None, Flags(device='cpu', num_threads=1))
    (folder / f'left{rank}').write_text(str((folder / 'worked1').exists()))


def test_signals_have_a_handler_within_the_block_but_those_that_are_ignored():
    caught, before = [], [signal.getsignal(number) for number in launch.ENDING]
    with launch.on_signals([signal.SIGUSR2], signal.SIG_IGN), \
            launch.on_signals([*launch.ENDING, signal.SIGUSR2], lambda number, _: caught.append(number)):
        for number in (*launch.ENDING, signal.SIGUSR2):
            signal.raise_signal(number)
    assert caught == [number for number, handler in zip(launch.ENDING, before) if handler != signal.SIG_IGN]
    assert {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} == {*launch.ENDING}
    assert [signal.getsignal(number) for number in launch.ENDING] == before


def test_nobody_leaves_before_all_are_done(tmp_path):
    """Process 0 serves the meeting point: it must outlast the others."""
    torch.multiprocessing.spawn(alone, (free_port(), tmp_path), nprocs=2)
    assert (tmp_path / 'left0').read_text() == (tmp_path / 'left1').read_text() == 'True'


def test_flags_and_programs_are_read_without_pytorch(program):
    program('-c', "import sys, distributed.launch; assert not {'torch', 'numpy'} & sys.modules.keys()")

