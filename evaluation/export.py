"""The mode `export`: a run as a program that gives score and map of an image without this project.

OUT holds model.pt2 (torch.export), where their packages are installed model.onnx and model.safetensors,
export.json (thresholds, and as data what is done to an image first), thresholds.json, example.py and a
model card. B = 1: the program takes one image (1, C, H, W) in [0, 1].
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anomaly.choice import choose_map, choose_primary
from anomaly.judge import group_title
from anomaly.maps.postprocessing import gaussian_blur
from anomaly.normal import Normal
from anomaly.outputs import Outputs, Terms, as_float64
from anomaly.report.provenance import code_and_date
from anomaly.scores import Score
from datasets import preparation
from distributed import launch
from evaluation.config import ExportConfig
from evaluation.run import Evaluation
from model import save_pretrained
from utils import UserError, finite, read_json, write_atomically, write_json

EXAMPLE, CARD = (Path(__file__).with_name(name) for name in ('export_example.py', 'export_card.md'))


# ------------------------------------------------------------------------------------------------ the program

class Drawn(Exception):
    """A score drew noise, which follows from a hash of the image: no program of tensors repeats it."""


class NoNoise(TorchFunctionMode):
    """Inside, drawing noise raises Drawn."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if function in (torch.randn_like, torch.rand_like):
            raise Drawn
        return function(*args, **(kwargs or {}))


class Differences(TorchFunctionMode):
    """Inside, distances are made of operations that ONNX has too; it lacks torch.cdist."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if function is torch.cdist:
            rows, reference = args
            return torch.linalg.vector_norm(rows[:, None] - reference, dim=2)
        return function(*args, **(kwargs or {}))


class Noiseless(Outputs):
    """Outputs for scores that draw nothing."""

    def noise(self, *purpose: int | str) -> NoNoise:
        return NoNoise()

    def forward(self, numbers: Sequence[int], skip: int = 0) -> Iterator[Terms]:
        with self.noise():
            return iter([as_float64(self.model(self.x, skip=skip)) for _ in numbers])


class Scorer(nn.Module):
    """A score of an image, and the map of a score, as the evaluation computes them."""

    def __init__(self, model: Any, normal: Normal, score: Score, mapped: Score | None):
        super().__init__()
        self.model, self.normal, self.score, self.mapped = model, normal, score, mapped
        self.terms = {one.name: one for one in normal.scores(score.terms or (score.name,), model)}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The score (1,) of an image x (1, C, H, W) in [0, 1], and the map (1, 1, H, W) if there is one."""
        outputs = Noiseless(self.model, x, self.normal.scoring, self.model.pixels.bits)
        value = self.value(self.score, outputs)
        if self.mapped is None:
            return (value,)
        return value, gaussian_blur(self.mapped.map(outputs), self.normal.maps.map_smoothing)

    def value(self, score: Score, outputs: Outputs) -> Tensor:
        if score.terms:
            moments = {name: self.normal.moments(name) for name in score.terms}
            return sum((self.value(self.terms[name], outputs) - mean) / std
                       for name, (mean, std) in moments.items())
        if score.density is not None:
            return self.normal.densities[score.name].energy(score.features(outputs))
        return score.image(outputs).double()


def draws_nothing(model: Any, normal: Normal, score: Score) -> bool:
    """Whether a score is a function of the image alone."""
    try:
        with torch.no_grad():
            Scorer(model, normal, score, None)(probe(model))
    except Drawn:
        return False
    return True


def trace(scorer: Scorer) -> torch.export.ExportedProgram:
    """The program of a score. Raises UserError for a score that is more than operations on tensors."""
    try:
        with torch.no_grad(), Differences():
            return torch.export.export(scorer.eval(), (probe(scorer.model),), strict=False)
    except Exception as error:       # the tracer raises whatever what it cannot follow leads to
        raise UserError(f"--primary_score {scorer.score.name}: PyTorch cannot export it "
                        f"({type(error).__name__}: {str(error).splitlines()[0][:120]}). Name another score."
                        ) from None


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open('wb') as file:            # not by its name: a temporary one lacks the ending
        torch.export.save(program, file)


def probe(model: Any) -> Tensor:
    """An image (1, C, H, W) of noise, always the same."""
    return torch.rand(1, *model.shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- mode

def export(run: Evaluation) -> None:
    """Writes the folder; prints a line for each file that is left out."""
    if not launch.is_main():
        return
    config, model = run.flags(ExportConfig), run.opened[0]
    normal = Normal.load(Path(config.thresholds or run.run_folder / 'thresholds.json'), model,
                         f'python evaluate.py --checkpoint {run.args.checkpoint} --eval_mode anomaly')
    about_input = input_facts(run, normal)
    scores = normal.scores((), model)
    names = [score.name for score in scores]
    score = scores[names.index(choose_primary(config.primary_score, normal.primary_score, names))]
    if not draws_nothing(model, normal, score):
        others = [one.name for one in scores if draws_nothing(model, normal, one)]
        advice = f"Name one that has none with --primary_score: {', '.join(others)}." if others else \
            "Repeat --eval_mode anomaly with a score that has none, such as reconstruction."
        raise UserError(f"score {score.name} averages over random draws, which an exported program cannot "
                        f"repeat. {advice}")
    mapped = choose_map(score.name, scores, model, normal.scoring)
    scorer = Scorer(model, normal, score, mapped)
    program = trace(scorer)
    write_atomically(run.out / 'model.pt2', partial(save_program, program))
    for write in (write_onnx, write_weights):
        run.say(write(run, program))
    facts = finite({
        'score': score.name, 'threshold': normal.thresholds[score.name],
        'map': mapped.name if mapped else None,
        'pixel_threshold': normal.pixel_threshold(mapped.name) if mapped else None,
        'input': about_input, 'target_fpr': normal.judging.target_fpr, **code_and_date()})
    write_json(run.out / 'export.json', facts)
    run.write_metrics('export', facts)
    normal.save(run.out / 'thresholds.json')
    shutil.copyfile(EXAMPLE, run.out / 'example.py')
    card = model_card(run, facts, replace(score, about=score.explained(model, normal.scoring)))
    write_atomically(run.out / 'README.md', lambda path: path.write_text(card, encoding='utf-8'))
    if mapped and normal.maps.body_mask:
        run.say("the program's map is not limited to the body as that of the evaluation is (--body_mask)")
    run.say(f"{score.name} as a program: {run.out}")


def input_facts(run: Evaluation, normal: Normal) -> dict[str, Any]:
    """Preprocessing of an image file as numbers. Raises UserError if numbers alone cannot describe it."""
    model, config = run.opened[0], normal.data_flags(run.data_config)
    if len(model.shape) != 3:
        raise UserError("--eval_mode export is for images: how volumes are resampled takes more than Pillow.")
    if config.dequantize or model.pixels.likelihood == 'bernoulli':
        raise UserError("--eval_mode export: binary and dequantized pixels are drawn at random, which an "
                        "exported program cannot repeat.")
    prepared = preparation(config, model.shape, model.pixels)
    loader, transform = prepared.loader, prepared.transform
    return {'size': loader.size, 'border': loader.border, 'channels': loader.channels, 'fit': loader.fit,
            'depth': loader.depth, 'bits': model.pixels.bits, 'invert': transform.invert}


def write_onnx(run: Evaluation, program: torch.export.ExportedProgram) -> str:
    """Writes model.onnx if it can; returns what to say of it."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        return "no model.onnx: pip install onnx onnxscript"
    try:
        with warnings.catch_warnings(action='ignore'):
            made = torch.onnx.export(program, input_names=['image'], verbose=False)
    except Exception as error:       # an operator that ONNX lacks, in whatever way it is told
        lines = str(error).splitlines()
        reason = next((line for line in lines if 'No ONNX function' in line), lines[0])
        return f"no model.onnx: ONNX cannot express this score ({reason[:200]})"
    write_atomically(run.out / 'model.onnx', lambda path: made.save(str(path)))
    return f"ONNX: {run.out / 'model.onnx'}"


def write_weights(run: Evaluation, program: torch.export.ExportedProgram) -> str:
    """Writes model.safetensors and model.json if it can; returns what to say of it."""
    model, args = run.opened
    try:
        save_pretrained(model, run.out, args)
    except ImportError:
        return "no model.safetensors: pip install safetensors"
    return f"weights: {run.out / 'model.safetensors'}"


# ------------------------------------------------------------------------------------------------------- card

def model_card(run: Evaluation, facts: dict[str, Any], score: Score) -> str:
    """The README.md of the folder."""
    model, args = run.opened
    split_path = run.run_folder / 'split.json'
    classes = read_json(split_path).get('normal_classes', []) if split_path.exists() else []
    number = lambda value: 'none' if value is None or math.isinf(value) else f'{value:.6g}'
    shown = 'none' if facts['map'] is None else \
        f"`{facts['map']}`, threshold of pixels {number(facts['pixel_threshold'])}"
    return CARD.read_text(encoding='utf-8').format(
        family=type(model).__name__, parameters=sum(p.numel() for p in model.parameters()),
        dataset=args.get('dataset', ''), normal=', '.join(classes) or 'not recorded',
        channels=model.shape[0], height=model.shape[1], width=model.shape[2], score=score.name,
        about=score.about, threshold=number(facts['threshold']), fpr=100 * facts['target_fpr'], map=shown,
        commit=facts.get('commit') or 'not recorded', date=facts.get('date', ''),
        metrics=card_metrics(run, score.name, facts['threshold']))


def card_metrics(run: Evaluation, name: str, threshold: float | None) -> str:
    """How well the score did in the last evaluation of the run; '' where another threshold was set since."""
    path = run.run_folder / 'anomaly' / 'metrics.json'
    found = read_json(path).get('anomaly', {}) if path.exists() else {}
    row = found.get('scores', {}).get(name, {})
    if not threshold or row.get('threshold') != threshold:
        return ''
    lines = [f"- {group_title(group)}: {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
             for group, metrics in row['metrics'].items() if (e := metrics['auroc'])['value'] is not None]
    return '\n'.join(['AUROC on the test images of the run, with its 95 % interval:', '', *lines, ''])
