"""Reads an LMDB for another process, so that a damaged file ends this process and not that one.

LMDB keeps no checksums of its pages: liblmdb follows a damaged page number out of the file and is killed.
`python lmdb_child.py PATH` answers each key, one a line on stdin, with a status, a length and as many bytes
on stdout. An empty line asks for the number of entries. It imports lmdb alone: it has to start in no time.
"""

import os
import signal
import struct
import sys

import lmdb

FOUND, ABSENT, ERROR = b'v', b'n', b'e'
HEAD = struct.Struct('<cQ')                      # status, length


def answer(environment: lmdb.Environment, key: bytes, most: int) -> tuple[bytes, bytes]:
    """Status and value of a key; `most` bytes are in the whole file."""
    with environment.begin(buffers=True) as transaction:
        if not key:
            return FOUND, str(transaction.stat()['entries']).encode()
        value = transaction.get(key)
        if value is None:
            return ABSENT, b''
        if len(value) > most:
            return ERROR, f'it claims {len(value)} bytes'.encode()
        return FOUND, bytes(value)


def main(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's affair
    folder = os.path.isdir(path)
    most = os.path.getsize(os.path.join(path, 'data.mdb') if folder else path)
    environment, problem = None, ''
    try:
        environment = lmdb.open(path, subdir=folder, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        problem = str(error)
    for line in sys.stdin.buffer:
        status, value = ERROR, problem.encode()
        if environment:
            try:
                status, value = answer(environment, line.rstrip(b'\n'), most)
            except lmdb.Error as error:
                status, value = ERROR, str(error).encode()
        sys.stdout.buffer.write(HEAD.pack(status, len(value)) + value)
        sys.stdout.buffer.flush()


if __name__ == '__main__':
    main(sys.argv[1])
