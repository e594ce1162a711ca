"""Weights & Biases, on request: a run there gets what TensorBoard gets."""

from pathlib import Path
from types import ModuleType
from typing import Any

from utils import UserError, write_atomically

ID = 'wandb_id.txt'                   # in the run folder: a run that goes on goes on there too


def wandb() -> ModuleType:
    """The library, which is needed only here. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_project needs a library: pip install wandb. Or leave it out: TensorBoard "
                        "and metrics.jsonl get the same.") from None
    return wandb


def start_wandb(folder: Path, project: str, args: dict[str, Any]) -> Any:
    """A run in `project`, the one of this run folder if it has begun; call its `finish()` at the end.

    To be called before the first event is written to TensorBoard: all of these are passed on.
    """
    library, path = wandb(), folder / ID
    folder.mkdir(parents=True, exist_ok=True)
    known = path.read_text().strip() if path.exists() else None
    run = library.init(project=project, name=folder.name, id=known, resume='allow', dir=str(folder),
                       config=args, sync_tensorboard=True)
    if not known:
        write_atomically(path, lambda p: p.write_text(run.id))
    return run
