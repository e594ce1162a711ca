"""The process group of a run: how its processes find each other, and notice that one of them is lost.

Collectives and their timeouts are those of torch.distributed. But a process may rightly wait for another that
decodes a data set or writes a report. Such waits have no limit; a heartbeat ends them if a process is lost.
"""

import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distributed.environment import LOOPBACK, Environment
from utils import UserError

MEETING_TIME = 120.0         # seconds that processes may start apart, if --timeout is shorter
NAME_TIME = 30.0             # seconds in which a name server may come to know the host of process 0
CLIENT_TIME = 30.0           # seconds in which a store that was just reached lets a process in
PAUSE = 0.1                  # seconds between two looks at what is awaited
PULSE = 5.0                  # seconds between two heartbeats, at most
NO_LIMIT = timedelta(days=365)
NCCL_GRACE = 60              # seconds: NCCL ends a process with pages of text, so the heartbeat speaks first


@contextmanager
def process_group(here: Environment, device: torch.device, timeout: float,
                  give_up: Callable[[str], None]) -> Iterator[dist.ProcessGroup]:
    """Makes the default group, whose collectives fail after `timeout` seconds; yields one without a limit.

    All leave together. If a process is lost, `give_up` is called, perhaps in another thread, with a line that
    says so. It does not return.
    """
    most = max(timeout, MEETING_TIME)
    store = join_store(here, most)
    on_gpu, limit = device.type == 'cuda', timedelta(seconds=timeout)
    if interface := gloo_interface(here):
        os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
    try:
        with deadline(most, give_up):           # gloo tries each connection for five times its timeout
            dist.init_process_group('nccl' if on_gpu else 'gloo', store=store, rank=here.rank,
                                    world_size=here.world, device_id=device if on_gpu else None,
                                    timeout=limit + timedelta(seconds=NCCL_GRACE * on_gpu))
            beating = dist.new_group(backend='gloo', timeout=limit)
        with heartbeat(beating, min(PULSE, timeout / 4), give_up):
            # Within the heartbeat, as it waits without a limit for processes that may be lost meanwhile.
            patient = dist.new_group(backend='gloo', timeout=NO_LIMIT)
            dist.barrier(patient)       # process 0 serves the store: it must not leave while others connect
            yield patient
        dist.destroy_process_group()
    except BaseException as error:
        if line := lost_connection(error):
            give_up(line)
        raise


def lost_connection(error: BaseException) -> str:
    """What an error in talking to the other processes means; '' for any other error."""
    if not isinstance(error, RuntimeError) or not (
            isinstance(error, dist.DistError) or re.search('gloo/|caused pair closure', str(error))):
        return ''
    return lost(re.sub(r'^\[\S*\] ', '', str(error).splitlines()[0]).split('. ')[0][:200])


def lost(reason: str) -> str:
    return f'lost touch with the other processes ({reason}): one of them has ended or hangs, or the ' \
           f'network is down. The last checkpoint is kept: training goes on from it with --cont_training.'


@contextmanager
def deadline(seconds: float, give_up: Callable[[str], None]) -> Iterator[None]:
    """Calls `give_up` from another thread if the block takes longer."""
    timer = threading.Timer(seconds, give_up, [lost(f'no connection within {seconds:.0f} s')])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def heartbeat(group: dist.ProcessGroup, pulse: float, give_up: Callable[[str], None]) -> Iterator[None]:
    """Every `pulse` seconds all processes meet here, until all leave; calls `give_up` if that fails."""
    leaving, failed = threading.Event(), threading.Event()

    def beat() -> None:
        all_leave = torch.zeros(())
        while not all_leave:
            leaving.wait(pulse)
            if failed.is_set():
                return
            all_leave.fill_(leaving.is_set())
            try:
                dist.all_reduce(all_leave, dist.ReduceOp.MIN, group)
            except RuntimeError as error:
                give_up(lost_connection(error))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        failed.set()
        raise
    finally:
        leaving.set()
        thread.join(pulse if failed.is_set() else None)      # after a failure the others may never come


# ------------------------------------------------------------------------------------------------ rendezvous

def join_store(here: Environment, most: float) -> dist.Store:
    """The key-value store of this start of the run. Raises UserError for processes that do not come within
    `most` seconds.

    torchrun's store outlives the processes that it restarts and holds keys of earlier starts. So every
    process calls with a word of its own until process 0, which first deletes old calls, answers with the list
    of all words. That list is the prefix of the keys of this start.
    """
    word, calls = uuid.uuid4().hex[:8], [f'call/{rank}' for rank in range(here.world)]
    try:
        store, since = connect(here, most), time.monotonic()
        for call in calls if here.rank == 0 else ():
            store.delete_key(call)
        while not store.check(['all']) or word not in store.get('all').decode():
            store.set(calls[here.rank], word)
            if here.rank == 0 and store.check(calls):
                store.set('all', b','.join(store.multi_get(calls)))
            if time.monotonic() - since > most:
                missing = [rank for rank in range(here.world) if not store.check([calls[rank]])]
                raise TimeoutError(f"process {(missing or [0])[0]} did not come")
            time.sleep(PAUSE)
        return dist.PrefixStore(store.get('all').decode(), store)
    except (OSError, dist.DistError) as error:
        raise UserError(f"process {here.rank} of {here.world} cannot meet the others at {here.address}:"
                        f"{here.port} ({str(error).splitlines()[0][:200]}). Check --master_address and "
                        f"--master_port, and that all processes were started.") from None


def connect(here: Environment, most: float) -> dist.Store:
    """The store at the address of process 0, which serves it unless torchrun does; or OSError, DistError."""
    by_torchrun = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' \
        and os.environ.get('MASTER_PORT') == str(here.port)
    limit, since = timedelta(seconds=most), time.monotonic()
    if here.rank == 0 and not by_torchrun:                  # the address may be one that only the others know
        return dist.TCPStore(LOOPBACK[0], here.port, is_master=True, wait_for_workers=False, timeout=limit)
    while True:                             # TCPStore would wait as well, but its failure is pages of text
        try:
            socket.create_connection((here.address, here.port), timeout=10).close()
            # Process 0 may be killed at this moment, and TCPStore tries for much longer than its timeout.
            store = dist.TCPStore(here.address, here.port, is_master=False, wait_for_workers=False,
                                  timeout=timedelta(seconds=min(most, CLIENT_TIME)))
            store.set_timeout(limit)
            return store
        except (OSError, dist.DistError) as error:
            if time.monotonic() - since > (NAME_TIME if isinstance(error, socket.gaierror) else most):
                raise
            time.sleep(PAUSE)


def gloo_interface(here: Environment) -> str:
    """The network interface on the route to process 0; '' leaves the choice to gloo.

    gloo takes the one of the host's name, which Debian sets to 127.0.1.1, where no other host is.
    """
    table = Path('/proc/net/route')        # IPv4: [0] interface, [1] destination, ..., [6] metric, [7] mask
    if not table.exists():
        return ''
    if here.local_world == here.world:
        return 'lo'
    try:
        packed = socket.inet_aton(socket.gethostbyname(here.address))
    except OSError:
        packed = bytes(4)                  # an unknown host is where the default route leads
    address = int.from_bytes(packed, sys.byteorder)
    routes = [line.split() for line in table.read_text().splitlines()[1:]]
    fitting = [(int(route[7], 16).bit_count(), -int(route[6]), route[0]) for route in routes
               if address & int(route[7], 16) == int(route[1], 16)]
    return max(fitting, default=(0, 0, ''))[2]             # the most specific, then the cheapest
