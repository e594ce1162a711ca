"""Checkpoints: only tensors, numbers, strings and plain containers, written whole or not, loaded safely."""

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from utils import UserError, write_atomically


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically: a kill at any moment leaves the last whole checkpoint in place."""
    path = Path(path)
    for left_by_a_kill in path.parent.glob(f'.{path.name}.*.tmp'):
        left_by_a_kill.unlink(missing_ok=True)
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running code from it (`weights_only=True`, Namespace allowed).

    Raises UserError if the file is missing, damaged, or holds anything but data.
    """
    path = Path(path)
    if path.is_dir():
        path = path / 'checkpoint.pt'
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}. Name the checkpoint.pt of a run.") from None
    except pickle.UnpicklingError as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        what = f"holds a {foreign[1]}, which is code and not data" if foreign else "is damaged"
        raise UserError(f"checkpoint {path} {what}; it is not loaded. Take another copy.") from None
    except Exception as error:      # a damaged file can mislead the reader into any of them
        raise UserError(f"checkpoint {path} cannot be read: it is damaged or no checkpoint "
                        f"({type(error).__name__}: {str(error).split(chr(10))[0][:120]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not the dictionary of a run.")
    return content


def fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that tell these weights from any others."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
