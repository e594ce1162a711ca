"""OMNIGLOT as the importance-weighted autoencoder has it: chardata.mat of github.com/yburda/iwae.

`data` and `testdata` (784, N) hold a character a column, 28 x 28 in [0, 1], written column by column;
`target` and `testtarget` (50, N) are 1 at its alphabet. Gray levels are rounded to 8 bits, where the
published reader cuts them off: they differ by 1 of 255 at most.
"""

from pathlib import Path

import numpy as np

from readers.config import DataSet, ReaderConfig
from readers.published.arrays import Parts, find_files, read_arrays
from readers.source import Source
from utils import UserError

FILE = 'chardata.mat'
KEYS = {'train': ('data', 'target'), 'test': ('testdata', 'testtarget')}
ALPHABETS = 50
SIDE = 28


def read_omniglot(config: ReaderConfig, row: DataSet) -> Source:
    """The characters of the chosen alphabets, '0' to '49'. One file holds both parts."""
    path, = find_files(config, row, [FILE], ('', 'omniglot'))
    return read_arrays(config, row, 'OMNIGLOT', lambda: read_chardata(path), [path],
                       [str(i) for i in range(ALPHABETS)])


def read_chardata(path: Path) -> Parts:
    """Images (N, 28, 28) uint8 and alphabets of both parts. Raises UserError naming a damaged file."""
    import scipy.io
    try:
        file = scipy.io.loadmat(path)
        parts = {}
        for part, (images, alphabets) in KEYS.items():
            x = np.asarray(file[images], np.float64)                                    # (784, N)
            if not (x.min() >= 0 and x.max() <= 1):
                raise ValueError(f'{images} is not within [0, 1]')
            x = np.rint(255 * x.T).astype(np.uint8).reshape(-1, SIDE, SIDE).transpose(0, 2, 1)
            names = [str(i) for i in np.asarray(file[alphabets]).argmax(0).tolist()]
            if len(names) != len(x):
                raise ValueError(f'{images} has {len(x)} characters, {alphabets} {len(names)}')
            parts[part] = x, names                                                      # (N, 28, 28)
        return parts
    except Exception as error:                           # on damaged bytes SciPy raises anything
        reason = f'no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise UserError(f"{path} is not {FILE} ({reason}): fetch it again.") from None
