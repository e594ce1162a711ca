r"""Mean and covariance of the features of a data set's training images: evaluate_fid compares with them.

    python scripts/precompute_fid_statistics.py --dataset covid --data FOLDER --fid_dir statistics \
        --inception_weights weights-inception-2015-12-05-6726825d.pth

Writes <fid_dir>/<dataset>.npz. The images are the normal ones of the training part, as gray levels of 8 bits
also where models see them binarized, each once, none flipped; of more than --max_samples, evenly spaced ones.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to be run from any folder

from command_line.parser import parse_flags
from datasets import DataConfig, load_data
from distributed import launch
from distributed.launch import LaunchConfig
from evaluation.config import NetworkConfig
from evaluation.fid import (
    GREY_LEVELS,
    MAX_REFERENCE,
    load_features,
    measure_part,
    statistics_file,
    write_statistics,
)
from utils import UserError, flag, flags, read_flags, run_program


@flags
class StatisticsConfig:
    """Statistics"""
    fid_dir: str = flag('', 'folder to write <dataset>.npz to', basic=True)
    max_samples: int = flag(MAX_REFERENCE, 'largest number of images to use', least=2, basic=True)
    batch_size: int = flag(64, 'images in a batch', least=1, basic=True)

    def __post_init__(self):
        if not self.fid_dir:
            raise UserError("--fid_dir is needed: the folder to write the statistics to.")


NOT_FOR_FID = {'binarize', 'flip', *GREY_LEVELS}


def parse_args(argv: list[str]) -> argparse.Namespace:
    return parse_flags(argv, __doc__, (StatisticsConfig, NetworkConfig, DataConfig, LaunchConfig),
                       without=NOT_FOR_FID)


def work(args: argparse.Namespace) -> int:
    config = read_flags(StatisticsConfig, args)
    path = statistics_file(config.fid_dir, args.dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()                # known now, not after hours
    except OSError as error:
        raise UserError(f"--fid_dir {path.parent} cannot be written ({error.strerror}).") from None
    with launch.main_first():
        data = load_data(replace(read_flags(DataConfig, args), **GREY_LEVELS))
    say = print if launch.is_main() else (lambda line: None)
    for line in data.report:
        say(line)
    features = load_features(read_flags(NetworkConfig, args), data.shape, launch.device(), config.fid_dir)
    statistics = measure_part(data, features, config.batch_size, config.max_samples)
    if launch.is_main():
        write_statistics(path, statistics, features, data)
    for line in statistics.notes:
        say(line)
    say(f"{path}: {statistics.num_images} images, {features.dimensions} features")
    return 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    read_flags(StatisticsConfig, args)                 # a wrong value is said before anything starts
    return launch.launch(work, args, read_flags(LaunchConfig, args))


if __name__ == '__main__':
    run_program(main)
