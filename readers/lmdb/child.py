"""Reads an LMDB for another process, so that a damaged file ends this process and not that one.

LMDB keeps no checksums of its pages: liblmdb follows a damaged page number out of the file and is killed.
`python child.py PATH` answers each request with a pickle on stdout, or with a text that says why it cannot.
Requests are pickles on stdin, the name of a method of Reader and its arguments: ('get', key). It imports lmdb
and little else: it has to start in no time.
"""

import itertools
import os
import pickle
import signal
import sys

import lmdb


class Reader:
    def __init__(self, path: str):
        folder = os.path.isdir(path)
        self.most = os.path.getsize(os.path.join(path, 'data.mdb') if folder else path)
        self.environment = lmdb.open(path, subdir=folder, readonly=True, lock=False, readahead=False)

    def get(self, key: bytes) -> bytes | str | None:
        """The value of a key; None if it is not there."""
        with self.environment.begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is not None and len(value) > self.most:
                return f'it claims {len(value)} bytes'
            return None if value is None else bytes(value)

    def length(self) -> int:
        """The number of entries."""
        return self.environment.stat()['entries']

    def check_whole(self) -> None:
        """Raises lmdb.Error if the file ends before its last page."""
        expected = (self.environment.info()['last_pgno'] + 1) * self.environment.stat()['psize']
        if self.most < expected:
            raise lmdb.Error(f'it is cut off: it has {self.most:,} of {expected:,} bytes')

    def keys(self) -> list[bytes]:
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            return list(itertools.islice(cursor.iternext(values=False), self.length()))


def main(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's affair
    reader = None
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reader = reader or Reader(path)
            answer = getattr(reader, name)(*arguments)
        except lmdb.Error as error:
            answer = str(error)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == '__main__':
    main(sys.argv[1])
