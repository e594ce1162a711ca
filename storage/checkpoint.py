"""Checkpoints: what was saved comes back whole, or the one before it does; nothing in a file is run.

A checkpoint is a zip, as torch.save writes it, whose comment is the SHA-256 of what precedes it.
"""

import argparse
import hashlib
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.limits import FREE_UNPACKED
from utils import UserError, check_regular, sync, temporary_name, write_atomically

if TYPE_CHECKING:       # PyTorch is imported where it is used: a program answers --help without it
    import torch

SEAL = b'sha256 '                            # the comment: this, and 64 hexadecimal digits
SEAL_LENGTH = len(SEAL) + 64
END, END_LENGTH = b'PK\x05\x06', 22          # the last record of a zip; it ends in the length of the comment
BLOCK = 1 << 22


class Damaged(UserError):
    """A checkpoint that is not there or not whole; an older one may be."""


# ------------------------------------------------------------------------------------------------------- save

def save_checkpoint(path: str | Path, content: dict[str, Any], keep: int = 1) -> None:
    """Writes `content` atomically: a kill at any moment leaves the last whole checkpoint in place.

    Of `keep` checkpoints the older ones are named checkpoint-1.pt, checkpoint-2.pt and so on.
    """
    import torch
    path = Path(path)

    def write(temporary: Path) -> None:
        with temporary.open('w+b') as file:      # not by its name: only so a full disk is an OSError
            torch.save(content, file)
            file.flush()
            size = file.seek(0, os.SEEK_END)
            seal = SEAL + _digest(file, size).encode()
            file.seek(size - 2)
            file.write(len(seal).to_bytes(2, 'little') + seal)
        sync(temporary)
        _keep_older(path, keep)
    write_atomically(path, write)


def _keep_older(path: Path, keep: int) -> None:
    """Gives the checkpoints that are there the names of older ones; `path` itself stays until it is replaced.
    """
    names = [path, *(older(path, number) for number in range(1, keep))]
    for new, old in reversed(list(pairwise(names[1:]))):
        if new.exists():
            os.replace(new, old)
    if keep > 1 and path.exists():
        second = path.with_name(temporary_name(path.name))
        try:
            os.link(path, second)
            os.replace(second, names[1])
        except OSError:                          # a file system without links
            os.replace(path, names[1])
        second.unlink(missing_ok=True)           # it stays where both names were those of one file
    for left in copies(path):
        if left not in names:
            left.unlink()


def older(path: Path, number: int) -> Path:
    """The name of the checkpoint that was saved that many before."""
    return path.with_name(f'{path.stem}-{number}{path.suffix}')


def copies(path: Path) -> list[Path]:
    """The checkpoint `path` and the older ones that are kept beside it: those that exist, the newest first.
    """
    found = {int(match[1]): p for p in path.parent.glob('*' + path.suffix)
             if (match := re.fullmatch(re.escape(path.stem) + r'-(\d+)', p.stem))}
    return [p for p in (path, *(found[number] for number in sorted(found))) if p.exists()]


# ------------------------------------------------------------------------------------------------------- read

def read_checkpoint(path: str | Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running code from it (`weights_only=True`, Namespace allowed).

    `path` may be a run folder. In place of a damaged file the one before it is taken, which `say` tells (by
    default on stderr). Raises UserError if there is none, or if it holds anything but data.
    """
    path = Path(path)
    if path.is_dir():
        path = path / 'checkpoint.pt'
    problem: Damaged | None = None
    for one in copies(path) or [path]:
        try:
            content = read_one(one)
        except Damaged as error:
            problem = problem or error
            continue
        if one != path:
            line = f"WARNING: {problem or f'there is no {path}.'} The one before it is used: {one}, step " \
                   f"{content.get('step', '?')}."
            (say or (lambda line: print(line, file=sys.stderr)))(line)
        return content
    raise problem or Damaged(f'there is no {path}.')


def read_one(path: Path) -> dict[str, Any]:
    """As `read_checkpoint`, of this file alone. Raises Damaged, or UserError if it holds code."""
    import torch
    check_regular(path)
    try:
        with path.open('rb') as file:
            if reason := why_damaged(file):
                raise Damaged(f"checkpoint {path} {reason}; it is not loaded. Take another copy.")
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise Damaged(f"there is no checkpoint {path}. Name the folder of a run, or its "
                      f"checkpoint.pt.") from None
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        what = f"holds a {foreign[1]}, which is code and not data" if foreign else "is damaged"
        kind = UserError if foreign else Damaged
        raise kind(f"checkpoint {path} {what}; it is not loaded. Take another copy.") from None
    except Exception as error:      # a damaged file can mislead the reader into any of them
        raise Damaged(f"checkpoint {path} cannot be read: it is damaged or no checkpoint "
                        f"({type(error).__name__}: {str(error).split(chr(10))[0][:120]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not the dictionary of a run.")
    return content


def why_damaged(file: BinaryIO) -> str:
    """What is wrong with the bytes of a checkpoint, as words that go on from its name; '' if nothing is.

    A file without our seal, such as a published one, has the checksums of its zip, if it is one.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    packed = file.read(4) == b'PK\x03\x04'
    if packed and (claimed := _unpacked_size(file)) > FREE_UNPACKED:
        return f'has data that unpack to {claimed:,} bytes, and torch.save packs none: it may be meant to ' \
               f'exhaust memory'
    sealed = size - SEAL_LENGTH
    file.seek(max(0, sealed - END_LENGTH))
    tail = file.read()
    if sealed > END_LENGTH and tail.startswith(END) and tail[END_LENGTH:].startswith(SEAL):
        whole = _digest(file, sealed).encode() == tail[END_LENGTH + len(SEAL):]
        return '' if whole else 'is damaged: its SHA-256 is not that of what was saved'
    if not packed:
        return ''
    if not tail[-END_LENGTH:].startswith(END):                # torch.save writes no comment
        return 'is damaged: its end is missing, or is another one than was saved'
    with zipfile.ZipFile(file) as archive:
        return 'is damaged: its checksums differ' if archive.testzip() else ''


def _unpacked_size(file: BinaryIO) -> int:
    """Bytes that the packed members of a zip claim to unpack to; others are there in the file."""
    with zipfile.ZipFile(file) as archive:
        return sum(member.file_size for member in archive.infolist()
                   if member.compress_type != zipfile.ZIP_STORED)


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of the first `size` bytes of a zip, as if it had no comment."""
    digest, rest = hashlib.sha256(), size - 2
    file.seek(0)
    while rest and (block := file.read(min(rest, BLOCK))):
        digest.update(block)
        rest -= len(block)
    digest.update(b'\0\0')
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- weights

def fingerprint(model: 'torch.nn.Module') -> str:
    """16 hexadecimal digits that tell these weights from any others."""
    import torch
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def not_finite(state: Any, name: str = '') -> str:
    """The name of the first tensor in nested containers with a number that is not finite; '' if all are."""
    import torch
    if isinstance(state, torch.Tensor):
        return '' if not state.is_floating_point() or bool(torch.isfinite(state).all()) else name
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(
        state, list | tuple) else ()
    return next(filter(None, (not_finite(value, f'{name}.{key}'.lstrip('.')) for key, value in items)), '')
