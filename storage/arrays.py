"""Files of named arrays: npz."""

import zipfile
from pathlib import Path

import numpy as np

from storage.limits import excess
from utils import UserError, check_regular


def read_npz(path: str | Path, prefix: str = '') -> dict[str, np.ndarray]:
    """The arrays of an npz file whose names begin with `prefix`; none of objects, which could be code.

    Raises UserError if it is damaged, or claims more memory than --max_gb, and FileNotFoundError.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as packed:
            if words := excess(sum(member.file_size for member in packed.infolist())):
                raise UserError(f"{path} {words}.")
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files if name.startswith(prefix)}
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:      # a damaged file can mislead the reader into any of them
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is damaged, or no npz file of arrays ({reason}).") from None
