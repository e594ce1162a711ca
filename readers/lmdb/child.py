"""Reads an LMDB for another process, so that a damaged file ends this process and not that one.

LMDB keeps no checksums of its pages: liblmdb follows a damaged page number out of the file and is killed.
`python child.py PATH` answers each key, one a line on stdin, with a pickle on stdout: the value, None if it
is not there, or as text why it cannot be read. An empty line asks for the number of entries. It imports lmdb
and little else: it has to start in no time.
"""

import os
import pickle
import signal
import sys

import lmdb


def answer(environment: lmdb.Environment, key: bytes, most: int) -> bytes | str | None:
    """The value of a key; `most` bytes are in the whole file."""
    with environment.begin(buffers=True) as transaction:
        if not key:
            return str(transaction.stat()['entries']).encode()
        value = transaction.get(key)
        if value is None:
            return None
        return bytes(value) if len(value) <= most else f'it claims {len(value)} bytes'


def main(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's affair
    folder, environment = os.path.isdir(path), None
    most = os.path.getsize(os.path.join(path, 'data.mdb') if folder else path)
    for line in sys.stdin.buffer:
        try:
            environment = environment or lmdb.open(path, subdir=folder, readonly=True, lock=False,
                                                   readahead=False)
            value = answer(environment, line.rstrip(b'\n'), most)
        except lmdb.Error as error:
            value = str(error)
        pickle.dump(value, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == '__main__':
    main(sys.argv[1])
