"""Evaluates a trained model: anomaly scores, predictions for new images, likelihoods, samples, latents.

    python evaluate.py --checkpoint runs/eval-chest/checkpoint.pt --eval_mode anomaly --save OUT
    python evaluate.py --compare runs/eval-a runs/eval-b --save OUT
    python evaluate.py --eval_mode MODE --help        the flags of a mode; with --checkpoint, those of its run

Reads what train.py and the published NVAE, HVAE, LVAE and BIVA leave. The data set, its split and the flags
of the model are those of the run; data flags given here win (--help_all). Writes OUT/metrics.json and what
the mode adds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from anomaly.config import (
    Audit,
    CompareConfig,
    Judging,
    MapConfig,
    OutOfDistribution,
    PredictConfig,
    SegmentationConfig,
    Showing,
)
from anomaly.scores import Scoring, Selection
from command_line.parser import owners, parse_flags, peek_flags
from datasets import DATASETS, DataConfig, data_flags
from distributed import launch
from distributed.launch import LaunchConfig
from evaluation import config
from evaluation.config import run_folder
from model import MODELS, family_config
from utils import UserError, flag, flags, read_flags, read_json, run_program

ONLY_FOR_TRAINING = ('flip', 'augment')                  # data flags that change nothing here
OF_VOLUMES = tuple(field.name for field in fields(SegmentationConfig))


# ------------------------------------------------------------------------------------------------------ modes

@dataclass(frozen=True)
class Mode:
    """What evaluate.py can do: a row of MODES."""
    run: str                             # 'module:function', imported when it runs, and PyTorch with it
    help: str
    flags: tuple[type, ...]
    needs: tuple[str, ...] = ()          # capabilities of the model
    data: bool = True                    # it reads the data of the run, and takes data flags
    samples: bool = False                # it takes the sampling flags that the model's family has


SCORED = (Selection, Scoring, MapConfig, Judging, OutOfDistribution, config.Batches, config.Noise)
MODES = {
    'anomaly': Mode('evaluation.anomaly:anomaly', 'anomaly scores, thresholds, metrics and report',
                    (*SCORED, Showing, Audit)),
    'predict': Mode('anomaly.predict:predict', 'scores and overlays of new images, without labels',
                    (PredictConfig, Selection, config.Batches), data=False),
    'compare': Mode('evaluation.anomaly:compare', 'several runs on the same test images',
                    (CompareConfig, *SCORED)),
    'export': Mode('evaluation.export:export', 'a program of score and map that runs without this '
                   'project', (config.ExportConfig,), data=False),
    'evaluate': Mode('evaluation.likelihood:evaluate', 'NELBO and importance-weighted bound',
                     (config.Likelihood,), needs=('num_groups',)),
    'evaluate_fid': Mode('evaluation.fid:evaluate_fid', 'FID between samples and training images',
                         (config.FidConfig,), needs=('sample',), samples=True),
    'sample': Mode('evaluation.sampling:sample', 'images drawn from the prior', (config.Samples,),
                   needs=('sample',), data=False, samples=True),
    'reconstruct': Mode('evaluation.reconstruction:reconstruct', 'images beside their reconstructions',
                        (config.Reconstruction,), needs=('reconstruct',)),
    'latents': Mode('evaluation.latent_space:latents', 'posterior means of all groups, as files',
                    (config.Latents,), needs=('latents',)),
    'decode': Mode('evaluation.latent_space:decode', 'images of such files, as they are or edited',
                   (config.Decoding,), needs=('decode',), data=False),
    'interpolate': Mode('evaluation.latent_space:interpolation', 'walks from image to image',
                        (config.Interpolation,), needs=('latents', 'decode')),
    'traverse': Mode('evaluation.latent_space:traversal', 'walks along single latent channels',
                     (config.Traversal,), needs=('latents', 'decode', 'num_groups')),
}
MODES_HELP = '\n'.join(['modes:', *(f'  {name:14}{mode.help}' for name, mode in MODES.items())])


# ------------------------------------------------------------------------------------------------------ flags

@flags
class EvalConfig:
    """Evaluation"""
    checkpoint: tuple = flag((), 'checkpoint.pt of a run, or its folder; or what the published NVAE, HVAE, '
                                 'LVAE and BIVA leave; with --eval_mode anomaly several, whose primary '
                                 'scores are added up', metavar='RUN', basic=True)
    eval_mode: str = flag('sample', 'what to do, one of the modes', choices=tuple(MODES), metavar='MODE',
                          basic=True)
    save: str = flag('', "folder for the results; '' = one named after the mode in the run folder, or "
                         "'comparison' beside the first of several runs", basic=True)
    no_ema: bool = flag(False, 'use the last weights even if the run kept an average')


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of the mode and of the run that the command names; no others are known.

    Raises UserError for any other flag, and for values that make no sense.
    """
    peeked = peek_flags(argv, eval_mode='', checkpoint=(), compare=(), dataset='', config='')
    name = peeked['eval_mode'] or ('compare' if peeked['compare'] else 'sample')
    mode = MODES.get(name, MODES['sample'])                       # of a wrong name, the parser tells
    run_flags = read_run_flags(''.join((*peeked['checkpoint'], *peeked['compare'])[:1]))
    run = {'model': run_flags.get('model', ''), 'dataset': peeked['dataset'] or run_flags.get('dataset', '')}
    idle = ONLY_FOR_TRAINING if has_volumes(run['dataset']) else ONLY_FOR_TRAINING + OF_VOLUMES
    about = __doc__ if peeked['eval_mode'] else f'{__doc__}\n{MODES_HELP}'
    args = parse_flags(argv, about, (EvalConfig, *mode.flags, LaunchConfig),
                       stored=stored_flags(mode, **run), defaults={'eval_mode': name},
                       without=idle, elsewhere=partial(elsewhere, name, **run))
    if bool(args.checkpoint) == (name == 'compare'):
        raise UserError("give --checkpoint, the checkpoint.pt of a run, or --compare, several runs.")
    named = any(word.partition('=')[0] == '--save' for word in argv)
    if Path(peeked['config']).name == 'args.json' and not named:
        args.save = ''                                   # of a run's own flags, it is the name of the run
    for one in mode.flags:
        read_flags(one, args)                            # wrong combinations are told before any work
    args.together = args.checkpoint if len(args.checkpoint) > 1 else ()
    args.checkpoint = args.checkpoint[0] if args.checkpoint else ''
    if args.together and name != 'anomaly':
        raise UserError(f"--eval_mode {name} is for one run, {len(args.together)} are given: name one with "
                        f"--checkpoint. Several are for --eval_mode anomaly, and for --compare.")
    if args.together and not args.save:
        args.save = str(run_folder(args.checkpoint).parent / 'together')
    if name == 'compare' and not args.save:
        args.save = str(run_folder(args.compare[0]).parent / 'comparison')
    return args


def read_run_flags(checkpoint: str) -> dict[str, Any]:
    """The flags of the run, from args.json beside its checkpoint; none if it is not there, or not ours."""
    path = run_folder(checkpoint) / 'args.json'
    found = read_json(path) if checkpoint and path.exists() else {}
    return found if isinstance(found, dict) and found.get('model') in MODELS else {}


def stored_flags(mode: Mode, model: str, dataset: str) -> list[type]:
    """Classes of flags for which the values of the run hold: those of its data, and of how it draws samples.

    All that there are for a model or a data set that is not known.
    """
    data = (data_flags(dataset) if dataset in DATASETS else (DataConfig,)) if mode.data else ()
    families = [family_config(name) for name in ([model] if model else MODELS)] if mode.samples else ()
    return [*data, *{family.Sampling: None for family in families if hasattr(family, 'Sampling')}]


def has_volumes(dataset: str) -> bool:
    """Whether a data set has volumes, or may have them, as it is not known."""
    return dataset not in DATASETS or DATASETS[dataset].dims == 3


def elsewhere(mode: str, model: str, dataset: str) -> dict[str, str]:
    """For flags of other modes, models and data sets, where they belong."""
    of_modes = {name: (*row.flags, *stored_flags(row, '', '')) for name, row in MODES.items()}
    of_models = {name: stored_flags(MODES[mode], name, dataset) for name in MODELS}
    of_data = {name: [*stored_flags(MODES[mode], model, name),
                      *([SegmentationConfig] if has_volumes(name) else [])] for name in DATASETS}
    return {**owners('dataset', dataset, of_data), **owners('model', model, of_models),
            **owners('eval_mode', mode, of_modes), **dict.fromkeys(ONLY_FOR_TRAINING, 'train.py')}


# ---------------------------------------------------------------------------------------------------- program

def work(args: argparse.Namespace) -> int:
    """Runs the mode in one process; returns the exit status."""
    from evaluation.run import Evaluation
    run, mode = Evaluation(args), MODES[args.eval_mode]
    run.need(*mode.needs)
    with run.whole_results():
        return resolve_name(mode.run)(run) or 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
