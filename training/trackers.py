"""Where a run is shown besides metrics.jsonl: TensorBoard, and tracking services, rows of TRACKERS."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from utils import UserError, write_atomically

CURVES = {     # tags in TensorBoard -> what they are
    'train/loss_iter, train/nelbo_iter': 'of one batch, at the step',
    'train/loss, train/nelbo': 'mean over the batches of an epoch; nelbo in nats an image',
    'val/nelbo, val/loss': 'of normal validation images, with the averaged weights where the run keeps some',
    'val/neg_log_p': 'importance-weighted bound on -log p(x) of validation images, nats',
    'val/bpd_elbo, val/bpd_log_p': 'the same two in bits per dimension',
    'kl_vals/*, kl/active_*': 'KL of a latent group from the top (0) down, nats; its channels in use',
    'kl_coeff/*': 'weight of the KL, and how it is balanced between groups',
    'train/lr, train/grad_norm': 'learning rate; norm of the gradient before it is clipped',
    'monitor/*': 'AUROC on test images (--monitor_anomalies): for the eye alone, nothing is chosen by it'}
MOST_TEXT, MOST_PARAMETERS = 500, 100            # characters of a parameter, and parameters a call, of MLflow


class Tracker(NamedTuple):
    """A run on a tracking service."""
    id: str                                                      # with which a resumed run goes on
    metrics: Callable[[int, Mapping[str, float]], None]          # logs values of a step
    finish: Callable[[], None]


def weights_and_biases(wandb: Any, folder: Path, flags: dict[str, Any], known: str | None) -> Tracker:
    """Passes on the events of TensorBoard, so it is started before the first of them."""
    run = wandb.init(project=flags['wandb_project'], name=folder.name, dir=str(folder), config=flags,
                     sync_tensorboard=True, id=known, resume='allow')
    return Tracker(run.id, lambda step, values: None, run.finish)


def ml_flow(mlflow: Any, folder: Path, flags: dict[str, Any], known: str | None) -> Tracker:
    """Logs to the server of MLFLOW_TRACKING_URI, or where the library does without."""
    mlflow.set_experiment(flags['mlflow_experiment'])
    run = mlflow.start_run(run_id=known, run_name=folder.name)
    texts = [(name, str(value)[:MOST_TEXT]) for name, value in flags.items()]
    for first in range(0, len(texts), MOST_PARAMETERS) if known is None else ():     # may be logged only once
        mlflow.log_params(dict(texts[first:first + MOST_PARAMETERS]))
    return Tracker(run.info.run_id, lambda step, values: mlflow.log_metrics(
        {name: value for name, value in values.items() if math.isfinite(value)}, step=step), mlflow.end_run)


# the flag that names a project -> the library, and what starts a run on its service
TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
    'wandb_project': ('wandb', weights_and_biases), 'mlflow_experiment': ('mlflow', ml_flow)}


def start_trackers(folder: Path, flags: dict[str, Any]) -> dict[str, Tracker]:
    """Those that the flags of the command ask for, by their library. Raises UserError where it is not
    installed.
    """
    started = {}
    for flag, (name, start) in TRACKERS.items():
        if not flags.get(flag):
            continue
        try:
            library = import_module(name)
        except ImportError:
            raise UserError(f"--{flag} needs a library: pip install {name}. Or leave it out: TensorBoard and "
                            f"metrics.jsonl get the same.") from None
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f'{name}_id.txt'                 # a resumed run goes on with the same id
        known = file.read_text().strip() if file.exists() else None
        started[name] = tracker = start(library, folder, flags, known)
        write_atomically(file, lambda path, kept=tracker.id: path.write_text(kept))
    return started


def end_events_quietly() -> None:
    """From here on the thread that writes events for TensorBoard ends without a traceback where the disk is
    full: RunLog says so.
    """
    if getattr(threading.excepthook, 'func', None) is not _print_unless_of_events:
        threading.excepthook = partial(_print_unless_of_events, threading.excepthook)


def _print_unless_of_events(print_it: Callable[[Any], Any], error: Any) -> None:
    of_events = type(error.thread).__module__.startswith('tensorboard.')
    if not (of_events and isinstance(error.exc_value, OSError)):
        print_it(error)


def describe_run(writer: Any, flags: dict[str, Any], metrics: Iterable[str]) -> None:
    """Tells TensorBoard of a new run: its flags, as text and as hyper-parameters to compare runs by, and what
    the curves are.
    """
    from torch.utils.tensorboard.summary import hparams
    rows = lambda table: '\n'.join(['| | |', '|---|---|', *(f'| `{a}` | {b} |' for a, b in table.items())])
    writer.add_text('flags', rows(flags))
    writer.add_text('curves', rows(CURVES))
    simple = {name: value if isinstance(value, int | float | str) else str(value)
              for name, value in flags.items() if value is not None}
    for summary in hparams(simple, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
