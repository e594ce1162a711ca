"""Files of drawn data sets: written once, whole or not at all."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from readers.config import FINISHED
from storage.locks import locked
from utils import UserError, write_atomically, write_json


def write_set(root: Path, parameters: dict, note: str, files: Mapping[str, Callable[[Path], None]]) -> Path:
    """Makes a folder of drawn files: each path below `root` by a function that is given it. A killed run goes
    on where it was; a finished one is left alone. Raises UserError where the folder cannot be written.
    """
    finished = root / FINISHED
    if finished.exists():
        return root
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / '.lock'):
            if finished.exists():
                return root
            write_atomically(root / 'README.txt', lambda p: p.write_text(note))
            for name, write in tqdm(files.items(), 'drawing synthetic phantoms', disable=None, leave=False):
                if not (root / name).exists():
                    write(root / name)
            write_json(finished, parameters)
    except OSError as error:
        raise UserError(f"the phantoms cannot be written to {root} ({error.strerror or error}): "
                        f"name another folder with --data.") from None
    return root


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes values in [0, 1] as an 8-bit gray PNG: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    Image.fromarray(np.rint(np.asarray(image, np.float32) * 255).astype(np.uint8)).save(temporary, 'PNG')
    os.replace(temporary, path)
