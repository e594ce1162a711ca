"""Meeting, waiting, and noticing that somebody is gone: in threads of this process that share a store."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from distributed import launch
from distributed import rendezvous as meeting
from distributed.rendezvous import Meeting, fresh_prefix, gloo_interface
from distributed.topology import Topology, free_port
from utils import UserError


@pytest.fixture
def meet(monkeypatch):
    """meet(world, timeout=...) is the meetings of `world` processes, and a dict of what each gave up for."""
    made = []

    def make(world, timeout=60.0):
        store, told = HashStore(), {}
        monkeypatch.setattr(meeting, 'connect', lambda topology: store)
        with ThreadPoolExecutor(world) as pool:
            made.extend(pool.map(lambda rank: Meeting(
                Topology(rank, world), timeout, lambda text: told.setdefault(rank, text)), range(world)))
        return made[-world:], told

    yield make
    for one in made:
        one.leaving.set()


def together(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(call) for call in calls]]


def wait_for(condition, seconds=10):
    assert meeting.poll(condition, seconds)


def test_a_start_has_a_prefix_of_its_own_in_a_store_that_remembers(monkeypatch):
    """As torchrun's store after a restart: keys of the processes before are still there."""
    monkeypatch.setattr(meeting, 'MEETING_TIME', 5.0)
    store, prefixes = HashStore(), []
    for _ in range(3):
        found = together(*(lambda rank=rank: fresh_prefix(store, Topology(rank, 3)) for rank in range(3)))
        assert len(set(found)) == 1
        prefixes.append(found[0])
    assert len(set(prefixes)) == 3
    # A process that called and died is called again, and its answer does not count for the new one.
    store.set('call/1', 'a word of the dead')
    assert together(*(lambda rank=rank: fresh_prefix(store, Topology(rank, 2)) for rank in range(2)))[1] \
        not in prefixes


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(meeting, 'MEETING_TIME', 0.3)
    with pytest.raises(UserError, match='1 did not come, process 1 the first'):
        fresh_prefix(HashStore(), Topology(0, 2))
    with pytest.raises(UserError, match='process 1 of 2 does not meet the others'):
        fresh_prefix(HashStore(), Topology(1, 2))
    with pytest.raises(UserError, match=r'process 1 of 2 cannot meet process 0 at 127.0.0.1:\d+ .*refused'):
        meeting.connect(Topology(1, 2, 1, 2, '127.0.0.1', free_port()))
    monkeypatch.setattr(meeting, 'NAME_TIME', 0.0)
    with pytest.raises(UserError, match='does not know the host no'):
        meeting.connect(Topology(1, 2, 1, 2, 'no.such.host.invalid', 6020))


def test_a_taken_port_is_one_line():
    with socket.socket() as s:
        s.bind(('', 0))
        s.listen()
        with pytest.raises(UserError, match='--master_port'):
            meeting.connect(Topology(0, 2, 0, 2, '127.0.0.1', s.getsockname()[1]))


def test_all_wait_for_the_last_however_late(meet):
    (a, b, c), told = meet(3, timeout=0.4)              # one that works for longer than that still lives
    passed = []
    threads = [threading.Thread(target=lambda one=one: (one.assemble(), passed.append(one)))
               for one in (a, b)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    assert not passed and not told
    c.assemble()
    for thread in threads:
        thread.join(5)
    assert len(passed) == 2
    together(a.assemble, b.assemble, c.assemble)
    assert not a.store.check(['meeting/1']), "keys of past meetings are cleared up"


def test_one_that_is_silent_is_gone(meet):
    (_, b), told = meet(2, timeout=0.6)
    time.sleep(0.3)
    b.leaving.set()                                       # as if its host were down
    since = time.monotonic()
    wait_for(lambda: 0 in told)
    assert told[0].startswith('process 1 of 2 gave no sign of life for 0.01 minutes')
    assert '--cont_training' in told[0]
    assert 0.3 < time.monotonic() - since < 5


def test_one_that_failed_says_so(meet):
    (a, _), told = meet(2, timeout=8.0)
    a.leave(failed=True)
    wait_for(lambda: 1 in told)
    assert told[1].startswith('process 0 of 2 has ended with an error') and 0 not in told


def test_who_left_gives_nobody_up(meet):
    (a, b), told = meet(2, timeout=0.4)
    a.leave()
    b.leave()
    time.sleep(1)
    assert not told and not a.watch.is_alive()


def test_gloo_takes_the_interface_that_leads_to_the_meeting_point(monkeypatch):
    assert gloo_interface(Topology(0, 2, 0, 2, '127.0.0.1', 6020)) == 'lo'
    assert gloo_interface(Topology(0, 2, 0, 2, 'localhost', 6020)) == 'lo'
    # Several hosts never meet on the loopback, which is where Debian has the name of the host itself.
    assert gloo_interface(Topology(0, 2, 0, 1, '127.0.1.1', 6020)) != 'lo'
    assert gloo_interface(Topology(0, 2, 0, 1, 'no.such.host.invalid', 6020)) != 'lo'
    monkeypatch.setattr(meeting.sys, 'platform', 'darwin')
    assert gloo_interface(Topology(0, 2, 0, 2, '127.0.0.1', 6020)) == ''


def test_the_mark_of_a_run_under_way_is_that_of_one_torchrun(tmp_path, monkeypatch):
    """It stands beside the logs of all attempts, so a restart finds it, and another torchrun does not."""
    monkeypatch.delenv('TORCHELASTIC_ERROR_FILE', raising=False)
    assert meeting.begun_mark() is None and not meeting.begun_here()
    folder = tmp_path / 'none_abc'
    folder.mkdir()
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(folder / 'attempt_0' / '1' / 'error.json'))
    assert not meeting.begun_here()
    launch.begin()
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(folder / 'attempt_1' / '0' / 'error.json'))
    assert meeting.begun_here()
    other = tmp_path / 'none_xyz' / 'attempt_0' / '0' / 'error.json'
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(other))
    assert not meeting.begun_here()


def test_a_host_that_is_new_hears_that_the_run_was_under_way(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(meeting, 'connect', lambda topology: store)
    host = threading.local()
    monkeypatch.setattr(meeting, 'begun_here', lambda: host.rank == 1)

    def come(rank):
        host.rank = rank
        one = Meeting(Topology(rank, 2), 60.0, print)
        one.leave()
        return one.begun_before
    assert together(lambda: come(0), lambda: come(1)) == [True, True]
