"""Files of drawn data sets: written once, whole or not at all."""

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from distributed.progress import progress
from readers.config import FINISHED
from utils import UserError, temporary_name, write_atomically, write_json


def write_set(root: Path, parameters: dict, note: str, files: Mapping[str, Callable[[Path], None]],
              table: Callable[[], None] = lambda: None) -> Path:
    """Makes a folder of drawn files: each path below `root` by a function that is given it, then a `table`
    of them. A killed run goes on where it was; a finished one is left alone. Programs that start at the same
    time share the work. Raises UserError where the folder cannot be written.
    """
    finished = root / FINISHED
    if finished.exists():
        return root
    # Each program takes the files in an order of its own, and leaves those that another has written. No lock
    # is needed: a file depends on its name alone and appears whole, so that writing it twice does no harm.
    names = list(files)
    random.Random(os.getpid()).shuffle(names)
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / 'README.txt', lambda p: p.write_text(note))
        for name in progress(names, 'drawing synthetic phantoms', len(names), 'phantom'):
            if not (root / name).exists():
                files[name](root / name)
        table()
        if hasattr(os, 'sync'):                # once for all files: a file at a time takes as long as drawing
            os.sync()
        write_json(finished, parameters)
    except OSError as error:
        raise UserError(f"the phantoms cannot be written to {root} ({error.strerror or error}): "
                        f"name another folder with --data.") from None
    return root


def write_png(path: Path, image: np.ndarray, **texts: str) -> None:
    """Writes values in [0, 1] as an 8-bit gray PNG with `texts` in its header: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    temporary = path.with_name(temporary_name(path.name))
    levels = Image.fromarray(np.rint(np.asarray(image, np.float32) * 255).astype(np.uint8))
    levels.save(temporary, 'PNG', pnginfo=info)
    os.replace(temporary, path)
