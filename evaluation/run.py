"""What the modes of evaluate.py work with: a trained run, its model, its data, and where results go."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from datasets import DATASETS, Data, DataConfig, load_data
from distributed import launch
from distributed.progress import progress
from distributions import Pixels
from evaluation.config import run_folder
from model import Model, open_model, place
from readers.batches import eval_batches
from readers.cache import is_cache
from readers.config import FINISHED, phantom_place
from readers.parts import Batch
from readers.split import read_split, why_other_split
from storage.outputs import whole_folder
from utils import UserError, read_flags, read_json, write_json

T = TypeVar('T')


@dataclass
class Evaluation:
    """A run under evaluation, by the flags of the command. Its model is opened when it is needed."""
    args: Namespace
    workshop: Path | None = None         # where `out` is made, within the block `whole_results`

    def flags(self, config: type[T]) -> T:
        """The flags of this class that the command has."""
        return read_flags(config, self.args)

    def say(self, line: str) -> None:
        """Prints a line, from the main process alone. It names results where they will be."""
        if launch.is_main():
            print(line.replace(str(self.out), str(self.final)))

    @cached_property
    def opened(self) -> tuple[Model, dict[str, Any]]:
        """The model, on the CPU, and the flags that the run was trained with."""
        return open_model(self.args.checkpoint, ema=not self.args.no_ema)

    @cached_property
    def model(self) -> Model:
        """The model on the device of this process."""
        return place(self.opened[0], launch.device())

    @property
    def run_folder(self) -> Path:
        return run_folder(self.args.checkpoint)

    @property
    def final(self) -> Path:
        """Folder of the results."""
        return Path(self.args.save) if self.args.save else self.run_folder / self.args.eval_mode

    @property
    def out(self) -> Path:
        """The folder to write them to, on every process."""
        return self.workshop or self.final

    @contextmanager
    def whole_results(self) -> Iterator[None]:
        """What the block writes to `out` is in `final` when it ends well: all of it, or nothing."""
        try:
            with whole_folder(self.final) if launch.is_main() else nullcontext('') as place:
                self.workshop = Path(launch.gather([str(place)])[0])
                yield
                launch.barrier()
        finally:
            self.workshop = None
        launch.barrier()

    @property
    def batch_size(self) -> int:
        return self.args.batch_size or int(self.opened[1].get('batch_size', 100))

    @property
    def part(self) -> str:
        return 'train' if getattr(self.args, 'eval_on_train', False) else 'test'

    @property
    def data_config(self) -> DataConfig:
        """The run's data flags; those of this command win.

        A checkpoint may come from anybody: it makes this program write to no folder, but for what is a cache
        of this user already.
        """
        stored = self.opened[1]
        if not is_cache(stored.get('cache_dir', '')):
            stored = stored | {'cache_dir': ''}
        config = read_flags(DataConfig, stored | vars(self.args))
        folder, number = phantom_place(config.data, config.dataset), DATASETS[config.dataset].phantoms
        drawn = folder.glob(f'synthetic-{config.num_phantoms or number}-*/{FINISHED}')
        if number and 'data' not in vars(self.args) and not any(drawn):
            raise UserError(f"there are no phantoms in {folder}, where the run had them: name the folder in "
                            f"which to draw them with --data.")
        return config

    def data(self, **changes: Any) -> Data:
        """The run's data set and split, in the pixels that the model knows, but for `changes` of flags.

        Raises UserError if the data do not fit the model.
        """
        config, model = replace(self.data_config, **changes), self.opened[0]
        path = self.run_folder / 'split.json'
        split = read_split(path)
        with launch.main_first():
            # The split says nothing of another data set.
            data = load_data(config, split if split and split['dataset'] == config.dataset else None)
        if not changes and (digest := self.opened[1].get('split', '')):
            for line in why_other_split(split, data.split, digest):
                self.say(f'WARNING: {line}')
        if tuple(data.shape) != tuple(model.shape):
            raise UserError(f"the model was trained on images of shape {tuple(model.shape)}, the data have "
                            f"{tuple(data.shape)}. Set --image_size and --channels as in training.")
        if not changes and gray_levels(data.pixels) != gray_levels(model.pixels):
            raise UserError(f"the model was trained on {model.pixels}, the data have {data.pixels}. Set "
                            f"--num_x_bits and --dataset as in training.")
        for line in data.report:
            self.say(line)
        return data

    def batches(self, data: Data, most: int = 0) -> Iterator[tuple[int, Batch]]:
        """Numbered batches of the part, those of this process; `most` images in whole batches, 0 = all."""
        part = getattr(data, self.part)
        if not len(part):
            raise UserError(f"the {self.part} part has no images. Set --test_fraction in training, or take "
                            f"--eval_on_train.")
        batches = eval_batches(part, self.batch_size, workers=data.config.num_workers)
        number = min(len(part), most or len(part))
        batches = takewhile(lambda item: item[0] * self.batch_size < number, batches)
        total = -(-number // (self.batch_size * launch.world()))
        return progress(batches, self.part, total)

    def first_images(self, number: int) -> tuple[Tensor, list[str]]:
        """The first images (number, C, *S) of the part, on the device, and their ids."""
        part = getattr(self.data(), self.part)
        if len(part) < number:
            raise UserError(f"{number} images are wanted, the {self.part} part has {len(part)}: lower "
                            f"--num_samples.")
        batch = part.items(range(number))
        return batch.x.to(launch.device()), batch.id

    def need(self, *capabilities: str) -> None:
        """Raises UserError for a model that cannot do what the mode is about."""
        for capability in capabilities:
            if not hasattr(self.model, capability):
                lacks = 'likelihood and no latent groups' if capability == 'num_groups' else f'`{capability}`'
                raise UserError(f"--eval_mode {self.args.eval_mode}: this model has no {lacks}. Choose "
                                f"another mode.")

    def write_metrics(self, key: str, values: dict[str, Any]) -> None:
        """Puts `values` under `key` into metrics.json; what other modes wrote stays."""
        if launch.is_main():
            path = self.out / 'metrics.json'
            write_json(path, (read_json(path) if path.exists() else {}) | {key: values})


def gray_levels(pixels: Pixels) -> Pixels:
    """The same with 1 bit for binary pixels: published checkpoints say 8, which means nothing there."""
    return replace(pixels, bits=1) if pixels.likelihood == 'bernoulli' else pixels
