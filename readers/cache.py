"""The cache on disk: filled once, then shared by all runs and processes.

An entry is one folder `<cache_dir>/<key>/` with .npy files and `index`, a SHA-256 and the JSON that it is of.
It appears whole by one rename, so a killed run leaves nothing half done; checksums tell a damaged one, which
is made anew.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from storage.locks import locked, why_not_private
from utils import UserError, finite, write_json

CACHE_VERSION = 6      # raise it when what the readers make of the same files changes
CACHE_NAME = 'medical-anomaly'
MARK = 'CACHEDIR.TAG'  # tells backups, and commands on another user's checkpoint, that this is a cache
MARK_TEXT = 'Signature: 8a477f597d28d172789f06886806bc55\n# Decoded images of the project medical-anomaly.\n'

INDEX = 'index'              # of an entry: what is in it
MADE_OF = 'made_of.json'     # and which files, with their stamps, and the flags that it follows from

T = TypeVar('T')


def stamp(path: str | Path) -> tuple[int, int, int]:
    """Size in bytes and times of the last change of a file, and of what the file system knows of it, which
    nobody can set: a file that replaces another of its size and time differs. Zeros where there is no file.
    """
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    except OSError:
        return 0, 0, 0


def cache_folder(wanted: str) -> Path:
    """`wanted`, or a folder for this project in $XDG_CACHE_HOME, ~/.cache or the temporary folder.

    Raises UserError if it cannot be written, or if others could plant files in it.
    """
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / CACHE_NAME
    spare = Path(tempfile.gettempdir()) / f'{CACHE_NAME}-{os.getuid() if hasattr(os, "getuid") else "cache"}'
    for folder in [Path(wanted)] if wanted else [home, spare]:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if words := why_not_private(folder):
                raise UserError(f"the cache folder {folder} {words}: what is cached there cannot be trusted. "
                                f"Name another with --cache_dir.")
            with tempfile.TemporaryFile(dir=folder):
                mark = folder / MARK
                if not mark.exists():
                    mark.write_text(MARK_TEXT)
                return folder
    raise UserError(f"the cache folder {wanted or home} cannot be written: name another with --cache_dir.")


def is_cache(folder: str) -> bool:
    """Whether a folder is a cache of this project, which nobody else may write."""
    try:
        return (Path(folder, MARK).read_text() == MARK_TEXT) and not why_not_private(Path(folder))
    except (OSError, ValueError):
        return False


def cached_files(cache_dir: str, key: Any, make: Callable[[Path], dict],
                 load: Callable[[Path, dict], T | None]) -> T:
    """`load(folder, fields)` of a cache folder: its .npy files were written by `make(folder)`, which returned
    the JSON `fields`, now or in an earlier run. Where `load` gives None, it is made anew.
    """
    digest = _sha256(json.dumps([CACHE_VERSION, key]))[:32]
    home = cache_folder(cache_dir)
    final = home / digest
    with locked(home / f'{digest}.lock') as alone:
        found = _load(final, load)
        if found is None:
            shutil.rmtree(final, ignore_errors=True)
            if alone:
                _clear(home, digest)
            temporary = Path(tempfile.mkdtemp(prefix=f'{digest}.', suffix='.tmp', dir=home))
            try:
                fields = make(temporary)
                write_json(temporary / MADE_OF, key)
                index = json.dumps(finite(fields | {'files': _contents(temporary)}))
                (temporary / INDEX).write_text(f'{_sha256(index)}\n{index}')
                os.rename(temporary, final)
            except OSError as error:
                if error.filename and not str(error.filename).startswith(str(home)):
                    raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its "
                                    f"permissions.") from None
                if _load(final, load) is None:     # else another process, without locks here, was first
                    raise UserError(f"cannot write the cache folder {home} ({error.strerror or error}): "
                                    f"make room there or name another with --cache_dir.") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            found = _load(final, load)
    if found is None:
        raise UserError(f"what was written to the cache folder {home} reads back wrongly: "
                        f"check that disk, or name another folder with --cache_dir.")
    return found


def _clear(home: Path, own: str) -> None:
    """Removes what killed processes left of the entry `own`, whose lock is held, and of others."""
    for left in home.glob('*.tmp'):
        digest = left.name.partition('.')[0]
        lock = home / f'{digest}.lock'
        with contextlib.nullcontext(True) if digest == own else locked(lock, wait=False) as is_free:
            if is_free:
                shutil.rmtree(left, ignore_errors=True)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError if so much does not fit: a memory map on a full disk ends the process without a word."""
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f'{num_bytes / 2 ** 20:,.0f} MiB do not fit')


def _load(folder: Path, load: Callable[[Path, dict], T | None]) -> T | None:
    """What is kept in `folder`; None if there is nothing, or if a file of it was changed."""
    try:
        digest, _, index = (folder / INDEX).read_text().partition('\n')
        fields = json.loads(index)
        if digest != _sha256(index) or fields.pop('files') != _contents(folder):
            return None
        return load(folder, fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _contents(folder: Path) -> dict[str, int]:
    """The files of an entry: checksums of arrays; sizes of others, which are checked when they are read."""
    return {p.relative_to(folder).as_posix(): _checksum(p) if p.suffix == '.npy' else p.stat().st_size
            for p in sorted(folder.rglob('*')) if p.is_file() and p != folder / INDEX}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open('rb') as f:
        while block := f.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
