"""Locks between processes, and whose a folder is. A lock ends with the process that holds it."""

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from utils import TEMPORARY

LOCK = '.lock'
NO_LINK = getattr(os, 'O_NOFOLLOW', 0)


def open_lock(path: Path) -> int:
    """The file descriptor of a lock file, made if it is not there. A link is not followed, and whatever the
    file holds stays. Raises OSError.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_LINK, 0o600)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time, where the file system can lock; else, or without `wait` for another process, it
    yields False.
    """
    with contextlib.ExitStack() as stack:
        alone = False
        with contextlib.suppress(ImportError, OSError):    # without a lock work is done twice, never wrongly
            import fcntl
            descriptor = open_lock(path)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        yield alone


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[str]:
    """Yields '' if no other process is at work in `folder`, whose lock this one then holds, or else which one
    is. At the end the lock goes, and so do folders that were made for it and are still empty.

    The lock is a record lock: it ends with its process, on NFS too, and forked processes do not keep it. A
    file system that cannot lock lets everybody in.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor, holder = _take(path)
    try:
        yield holder
    finally:
        if not holder:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        for place in made:
            with contextlib.suppress(OSError):               # it is not empty
                place.rmdir()


def _take(path: Path) -> tuple[int, str]:
    """The descriptor of a lock file, and who holds it; '' = this process does."""
    while True:
        descriptor = open_lock(path)
        try:
            import fcntl
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return descriptor, os.pread(descriptor, 200, 0).decode(errors='replace') or 'another process'
        except (ImportError, OSError):
            return descriptor, ''
        status = os.fstat(descriptor)
        with contextlib.suppress(FileNotFoundError):                    # its holder has just removed it
            if path.stat().st_ino == status.st_ino:
                if status.st_nlink == 1:
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}'.encode())
                return descriptor, ''
        os.close(descriptor)


def why_not_private(folder: Path) -> str:
    """Why others may change what is in a folder, as words that go on from its name; '' if they may not."""
    if not hasattr(os, 'getuid'):
        return ''
    status = folder.stat()
    if status.st_uid != os.getuid():
        return f'belongs to another user (number {status.st_uid})'
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return 'may be written by other users (chmod go-w takes that back)'
    return ''


def clear_leftovers(folder: Path, all_of_them: bool = False) -> None:
    """Removes temporary files and folders that killed processes of this host left, or `all_of_them`: where a
    lock says that no other process is at work.
    """
    for path in folder.glob('.*.tmp'):
        match = TEMPORARY.fullmatch(path.name)
        if match and (all_of_them or (match['host'] == socket.gethostname()[:40]
                                      and not is_alive(int(match['pid'])))):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
