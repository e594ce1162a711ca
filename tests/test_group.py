"""How processes find each other, in threads that share a store; and real ones that wait, fail and hang."""

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import end, start
from torch.distributed import HashStore

from distributed import group, launch
from distributed.environment import Environment, LaunchConfig, free_port
from distributed.group import gloo_interface, join_store, lost_connection
from utils import UserError, run_program


@pytest.fixture
def store(monkeypatch):
    """A store that remembers, as that of torchrun does."""
    store = HashStore()
    monkeypatch.setattr(group, 'connect', lambda *_: store)
    return store


def together(world):
    """The prefixes of the stores that `world` processes join at the same time."""
    with ThreadPoolExecutor(world) as pool:
        ranks = [Environment(rank, world) for rank in range(world)]
        return [found.get('mine') for found in pool.map(marked_store, ranks)]


def marked_store(here):
    """Its store, in which process 0 leaves a word of its own; the others wait for it."""
    found = join_store(here, 60.0)
    if here.rank == 0:
        found.set('mine', os.urandom(8).hex())
    return found


def test_a_start_has_keys_of_its_own_in_a_store_that_remembers(store):
    """As torchrun's store after a restart: keys of the processes before are still there."""
    starts = [together(3) for _ in range(3)]
    assert all(len(set(start)) == 1 for start in starts)
    assert len({start[0] for start in starts}) == 3
    # The call of a process that died does not count for the one that comes in its place.
    store.set('call/1', 'of the dead')
    assert len(set(together(2))) == 1


def test_who_does_not_come_is_named(store):
    with pytest.raises(UserError, match=r'process 0 of 3 cannot meet the others .*process 1 did not come'):
        join_store(Environment(0, 3), 0.3)
    with pytest.raises(UserError, match=r'process 1 of 2 cannot meet the others .*process 0 did not come'):
        join_store(Environment(1, 2), 0.3)


def test_a_server_that_is_not_there_and_a_port_that_is_taken_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r'process 1 of 2 cannot meet the others at 127.0.0.1:\d+ .*refused'):
        join_store(Environment(1, 2, 1, 2, '127.0.0.1', free_port()), 0.3)
    monkeypatch.setattr(group, 'NAME_TIME', 0.0)
    with pytest.raises(UserError, match=r'at no.such.host.invalid:6020 .* --master_address'):
        join_store(Environment(1, 2, 1, 2, 'no.such.host.invalid', 6020), 0.3)
    with socket.socket() as s:
        s.bind(('', 0))
        s.listen()
        with pytest.raises(UserError, match='--master_port'):
            join_store(Environment(0, 2, 0, 2, '127.0.0.1', s.getsockname()[1]), 0.3)


def test_the_store_waits_no_longer_than_processes_do():
    """PyTorch's own limit is 5 minutes."""
    port = free_port()
    stores = [group.connect(Environment(rank, 2, rank, 2, '127.0.0.1', port), 7.0) for rank in (0, 1)]
    assert [store.timeout for store in stores] == [timedelta(seconds=7)] * 2


def test_groups_that_are_not_formed_in_time_are_given_up(store, monkeypatch):
    """gloo would try each connection to a process that was killed for five times its timeout."""
    lines, told = [], threading.Event()

    def forming(*_, **__):
        raise SystemExit(75 if told.wait(20) else 0)
    monkeypatch.setattr(torch.distributed, 'init_process_group', forming)
    monkeypatch.setattr(group, 'MEETING_TIME', 0.2)
    with pytest.raises(SystemExit, match='75'), group.process_group(
            Environment(0, 1), torch.device('cpu'), 0.1, lambda line: (lines.append(line), told.set())):
        pass
    line, = lines
    assert line.startswith('lost touch with the other processes (no connection within 0 s)')
    with group.deadline(0.1, lines.append):
        pass
    time.sleep(0.2)
    assert len(lines) == 1, 'what is done in time is not given up'


def test_a_server_that_is_killed_while_others_connect_is_not_waited_for_longer(monkeypatch):
    """It takes the first connection, which looks whether it is there, and then it is gone."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        ThreadPoolExecutor(1).submit(lambda: (server.accept()[0].close(), server.close()))
        monkeypatch.setattr(group, 'CLIENT_TIME', 0.5)
        since = time.monotonic()
        with pytest.raises(OSError):
            group.connect(Environment(1, 2, 1, 2, '127.0.0.1', server.getsockname()[1]), 4.0)
    assert time.monotonic() - since < 7


# ------------------------------------------------------------------------------------------- real processes

def work(name):
    """What two processes do that were started by hand with a `--timeout` of a second."""
    if launch.rank() == 1:
        time.sleep(3 * (name == 'late'))
        if name == 'stopped':
            os.kill(os.getpid(), signal.SIGSTOP)
        if name == 'failed':
            raise UserError('a folder is missing')
    elif name == 'failed':
        time.sleep(60)                                      # busy, and not in a collective operation
    order = launch.gather([launch.rank()])
    assert order == [0, 1]


def killed_at(number):
    """From now on the process is killed where it forms its group of this number, counted from 0."""
    formed = []

    def forming(real):
        def form(*args, **kwargs):
            if len(formed) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            formed.append(1)
            return real(*args, **kwargs)
        return form
    for name in ('init_process_group', 'new_group'):
        setattr(torch.distributed, name, forming(getattr(torch.distributed, name)))


def by_hand(name, folder):
    """The two processes."""
    port = str(free_port())
    return [start([sys.executable, __file__, name], folder / str(rank), PYTHONPATH=str(ROOT), RANK=str(rank),
                  WORLD_SIZE='2', MASTER_PORT=port, **launch.QUIET) for rank in range(2)]


def test_all_wait_for_the_last_however_late(tmp_path):
    """A process that works for longer than `--timeout` still lives."""
    assert end(*by_hand('late', tmp_path)) == [0, 0], (tmp_path / '0').read_text()
    assert (tmp_path / '0').read_text() == (tmp_path / '1').read_text() == ''


def test_one_that_is_silent_is_lost(tmp_path):
    first, second = by_hand('stopped', tmp_path)
    assert end(first) == [launch.LOST_STATUS]
    second.kill()
    told = (tmp_path / '0').read_text()
    assert told.count('\n') == 1 and told.startswith('error: lost touch with the other processes (')
    assert '--cont_training' in told


def test_one_that_is_killed_while_groups_are_formed_is_lost(tmp_path):
    """One group has no time limit: if it came before the heartbeat, process 0 would wait for ever. With
    process 0 the store is lost.
    """
    for number, killed in ((1, 1), (2, 1), (2, 0)):
        (folder := tmp_path / f'{number}{killed}').mkdir()
        statuses = end(*by_hand(f'killed{number}{killed}', folder))
        assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] == launch.LOST_STATUS, number
        told, = (folder / str(1 - killed)).read_text().splitlines()
        assert told.startswith('error: lost touch with the other processes ('), told


def test_pytorch_does_not_warn_of_a_lost_process_too(monkeypatch):
    monkeypatch.setattr(os, 'environ', {'RANK': '0', 'WORLD_SIZE': '1'})
    launch.launch(lambda _: None, None, LaunchConfig(device='cpu'))
    assert os.environ['TORCH_CPP_LOG_LEVEL'] == 'ERROR'
    monkeypatch.setattr(os, 'environ', {'TORCH_CPP_LOG_LEVEL': 'INFO'})
    launch.launch(lambda _: None, None, LaunchConfig(device='cpu'))
    assert os.environ['TORCH_CPP_LOG_LEVEL'] == 'INFO'


def test_one_that_failed_ends_the_others_at_once_whatever_they_do(tmp_path):
    since = time.monotonic()
    assert end(*by_hand('failed', tmp_path)) == [launch.LOST_STATUS, 2]
    assert time.monotonic() - since < 50, 'process 0 was busy for longer than that'
    assert (tmp_path / '1').read_text() == 'error: a folder is missing\n'
    assert (tmp_path / '0').read_text().startswith('error: lost touch with the other processes (')


@pytest.mark.parametrize('text, told', [
    ('[/a/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:99: Connection reset by peer. Often so.',
     '(Read error [10.0.0.2]:99: Connection reset by peer)'),
    ('[/a/gloo/transport/tcp/b.cc:78] Timed out waiting 12000ms for recv operation to complete',
     '(Timed out waiting 12000ms for recv operation to complete)'),
    ('[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:5', '[10.0.0.1]:5)'),
    ('Application timeout caused pair closure', '(Application timeout caused pair closure)')])
def test_errors_of_the_connection_are_told_from_bugs(text, told):
    error = RuntimeError(text)
    assert told in lost_connection(error)
    assert lost_connection(torch.distributed.DistBackendError('NCCL error'))
    assert not lost_connection(RuntimeError('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)'))
    assert not lost_connection(OSError(text))


def test_gloo_takes_the_interface_that_leads_to_the_meeting_point(monkeypatch):
    assert gloo_interface(Environment(0, 2, 0, 2, '127.0.0.1', 6020)) == 'lo'
    assert gloo_interface(Environment(0, 2, 0, 2, 'localhost', 6020)) == 'lo'
    # Several hosts never meet on the loopback, which is where Debian has the name of the host itself.
    assert gloo_interface(Environment(0, 2, 0, 1, '127.0.1.1', 6020)) != 'lo'
    assert gloo_interface(Environment(0, 2, 0, 1, 'no.such.host.invalid', 6020)) != 'lo'
    monkeypatch.setattr(group, 'Path', lambda name: Path('/no/such/folder') / name[1:])           # not Linux
    assert gloo_interface(Environment(0, 2, 0, 2, '127.0.0.1', 6020)) == ''


def test_gloo_takes_the_most_specific_route_then_the_cheapest(monkeypatch, tmp_path):
    """Addresses of the table of Linux are in the order of its processor: 10.1.2.0 is 0002010A."""
    table = tmp_path / 'route'
    table.write_text('''Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
wlan 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0
eth0 00000000 0101000A 0003 0 0 100 00000000 0 0 0
ib0 0000010A 00000000 0001 0 0 0 0000FFFF 0 0 0
ib1 0002010A 00000000 0001 0 0 0 00FFFFFF 0 0 0
''')
    monkeypatch.setattr(group, 'Path', lambda name: table)
    for address, interface in (('10.1.2.7', 'ib1'), ('10.1.3.7', 'ib0'), ('192.0.2.1', 'eth0'),
                               ('127.0.1.1', 'eth0'), ('no.such.host.invalid', 'eth0')):
        assert gloo_interface(Environment(0, 2, 0, 1, address, 6020)) == interface


if __name__ == '__main__':
    if sys.argv[1].startswith('killed') and os.environ['RANK'] == sys.argv[1][-1]:
        killed_at(int(sys.argv[1][-2]))
    config = LaunchConfig(device='cpu', num_threads=1, timeout=1 / 60)
    run_program(lambda: launch.launch(work, sys.argv[1], config))
