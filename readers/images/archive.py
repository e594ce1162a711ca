"""Data sets that come as a tar: unpacked once, into the cache, and only what is harmless."""

import bz2
import gzip
import lzma
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from readers.cache import cached_files, check_room, stamp
from readers.source import reason
from storage.limits import FREE_UNPACKED, MOST_UNPACKED
from utils import UserError

PACKED = {b'\x1f\x8b': gzip.open, b'BZ': bz2.open, b'\xfd7': lzma.open}       # by how a file begins
FILES = 'files'                          # of a cache folder: what is unpacked, apart from its own files


def unpacked(path: str | Path, cache_dir: str) -> Path:
    """The folder that holds what is in a tar, compressed or not; unpacked anew only if the file has changed.

    Raises UserError if the file is no tar or damaged, and if it holds anything but files and folders that
    stay inside: a name that is absolute or goes up by '..', a link, a device.
    """
    path = Path(path)
    key = {'tar': str(path.resolve()), 'stamp': stamp(path)}

    def make(folder: Path) -> dict:
        try:
            with path.open('rb') as file:
                unpack = PACKED.get(file.read(2), open)
            with unpack(path, 'rb') as file, tarfile.open(fileobj=Limited(file, path), mode='r|') as tar:
                tar.extractall(folder / FILES, filter=harmless)
        except Exception as error:                   # a damaged file can mislead the library into any of them
            if isinstance(error, UserError) or getattr(error, 'errno', None):
                raise                                # not a matter of this file: a full disk
            raise UserError(f"--data: {path} cannot be unpacked ({reason(error)}): it is no tar, or a "
                            f"damaged one. Name a folder, or fetch it again.") from None
        return {}

    return cached_files(cache_dir, key, make, lambda folder, _: folder / FILES)


class Limited:
    """The unpacked bytes of a tar. Raises UserError where they are many more than the file's own."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.left = max(FREE_UNPACKED, MOST_UNPACKED * path.stat().st_size)

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"--data: {self.path} unpacks to more than {MOST_UNPACKED} times its size: it is "
                            f"meant to fill the disk. Do not trust this file.")
        return data


def harmless(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """The member as it may be written below `folder`: without its owner and its permissions to run or share.

    Raises UserError where it is not to be trusted, and OSError where there is no room for it.
    """
    name = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()) or name.is_absolute() or '..' in name.parts:
        raise UserError(f"--data: {member.name!r} in the tar is a link, a device or a path that leads "
                        f"outside: nothing is unpacked. Do not trust this file.")
    check_room(Path(folder).parent, member.size)
    return tarfile.data_filter(member, folder)
