"""Frechet Inception Distance (Heusel et al. 2017): how far drawn images are from real ones.

B images of a batch, C channels, H x W pixels; D features of an image; mu (D,) and sigma (D, D) the mean and
the covariance of the features of a set of images. All images are compared at 8 bits; the ranks share them.
"""

import hashlib
import io
import json
import shlex
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from datasets import Data, DataConfig
from distributed import launch
from distributed.progress import progress
from evaluation.config import FidConfig, NetworkConfig
from evaluation.run import Evaluation
from evaluation.sampling import SAMPLE_BATCH, prepare, samples
from readers.batches import eval_batches
from readers.parts import Part
from storage.arrays import read_npz
from utils import UserError, write_npz

INCEPTION_URL = ('https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
                 'weights-inception-2015-12-05-6726825d.pth')
MAX_REFERENCE = 50000         # images that the reference is made of, and that are drawn, as published
PROBES = 3                    # images that a network is tried on before the work begins
PROBE_TOLERANCE = 1e-3        # of the largest feature: what rounding may change in a batch of another size
GREY_LEVELS = {'likelihood': 'discretized', 'num_x_bits': 8}            # data flags of any reference
SPLIT_FLAGS = ('fit', 'normal_classes', 'anomalous_classes', 'val_fraction', 'test_fraction', 'split_seed')


# --------------------------------------------------------------------------------------------- the networks

@dataclass(frozen=True)
class Features:
    """A feature network in eval mode: call it with images (B, C, H, W) in [0, 1] for features (B, D)."""
    network: Callable[[Tensor], Tensor]       # (B, C, H, W) uint8 -> (B, D)
    kind: str
    sha256: str                               # of its file: with `kind`, its identity
    path: str
    device: torch.device
    dimensions: int = 0                       # D

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features (B, D) float64. Raises UserError if the images or the features are not finite."""
        if not torch.isfinite(x).all():
            raise UserError("the images have values that are not finite: the model draws without bounds. Try "
                            "a lower --temp, or leave --readjust_bn out.")
        images = (x.to(self.device).clamp(0, 1) * 255).round().to(torch.uint8)
        try:
            features = self.network(images)
        except Exception as error:            # a network of the user may fail in any way
            told = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
            raise UserError(f"{self.path} fails on images (B, C, H, W) = {tuple(x.shape)}: "
                            f"{type(error).__name__}: {told[-1][:160]}. It must take any B, and C, H, W as "
                            f"the model draws them.") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x) \
                or self.dimensions not in (0, features.shape[1]):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{self.path} turns images (B, C, H, W) = {tuple(x.shape)} into {shape}: "
                            f"expected ({len(x)}, {self.dimensions or 'D'}), a row of features an image.")
        features = features.double()
        if not torch.isfinite(features).all():
            raise UserError(f"{self.path} gives features that are not finite, on images that are. Take "
                            f"another copy, or another network.")
        return features

    @property
    def identity(self) -> dict[str, Any]:
        return {'kind': self.kind, 'sha256': self.sha256, 'dimensions': self.dimensions}


def load_features(config: NetworkConfig, shape: tuple[int, ...], device: torch.device,
                  folder: str = '') -> Features:
    """The network that the flags name, tried on noise of the `shape` (C, H, W) of the model's images.

    Without a flag it is the Inception network in `folder`, --fid_dir, if it is there. Nothing is downloaded.
    Raises UserError if the file is missing or of another kind, or if the network does not give each image its
    own row of finite features.
    """
    kept = Path(folder, INCEPTION_URL.rpartition('/')[2])
    if folder and kept.is_file() and not config.fid_features:
        config = replace(config, inception_weights=config.inception_weights or str(kept))
    given = [name for name in NETWORKS if getattr(config, name)]
    if len(given) != 1:
        place = f', or put that into {folder}' if folder else ''
        raise UserError(f"FID needs one network, {len(given)} are given: --inception_weights FILE, with the "
                        f"file from {INCEPTION_URL}{place}, or --fid_features FILE, your own.")
    path = getattr(config, given[0])
    try:
        content = Path(path).read_bytes()     # read once: what is hashed is what is loaded
    except OSError as error:
        hint = f" Get it from {INCEPTION_URL}." if given[0] == 'inception_weights' else ''
        raise UserError(f"--{given[0]} {path} cannot be read ({error.strerror}).{hint}") from None
    kind, network = NETWORKS[given[0]](content, path, device)
    features = Features(network, kind, hashlib.sha256(content).hexdigest(), path, device)
    noise = torch.rand(PROBES, *shape, generator=torch.Generator().manual_seed(0))
    together, alone = features(noise), features(noise[:1])
    if together.shape[1] != alone.shape[1] \
            or (together[:1] - alone).abs().max() > PROBE_TOLERANCE * together.abs().max():
        raise UserError(f"{path} gives an image other features in another batch: save the network in eval "
                        f"mode, without dropout or batch statistics.")
    return replace(features, dimensions=together.shape[1])


def _inception(content: bytes, path: str, device: torch.device) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The Inception-v3 of TensorFlow's 2015 release, 2048 features, as torch-fidelity has it."""
    expected = f"Expected the weights from {INCEPTION_URL}."
    try:
        weights = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:                # a damaged file can mislead the reader into any of them
        raise UserError(f"{path} is damaged or holds more than weights ({type(error).__name__}); it is not "
                        f"loaded. {expected}") from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"{path} is not a dictionary of weights. {expected}")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # The library unpickles whatever it is given, and downloads where it is given nothing.
    checked = io.BytesIO()
    torch.save(weights, checked)
    checked.seek(0)
    try:
        network = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'], checked).to(device).eval()
    except RuntimeError as error:
        raise UserError(f"{path} holds weights of another network: {' '.join(str(error).split())[:200]}. "
                        f"{expected}") from None

    def run(images: Tensor) -> Tensor:
        return network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)[0]
    return 'inception-v3-compat', run


def _own(content: bytes, path: str, device: torch.device) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A network that was saved with its code."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError(f"--fid_features {path} is damaged, or neither TorchScript nor torch.export: see "
                        f"docs/fid.md on how to make one.")
    names = [Path(name).name for name in zipfile.ZipFile(io.BytesIO(content)).namelist()]
    kind = 'torch.export' if 'archive_format' in names else 'TorchScript'
    try:
        network = FORMATS[kind](io.BytesIO(content), device)
    except Exception as error:                # a damaged file can mislead the reader into any of them
        raise UserError(f"--fid_features {path} cannot be read as {kind} ({type(error).__name__}): see "
                        f"docs/fid.md on how to make one.") from None
    return kind, lambda images: network(images.float() / 255)


def _torch_script(file: io.BytesIO, device: torch.device) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)         # deprecated, but people have such files
        return torch.jit.load(file, map_location=device).eval()


def _torch_export(file: io.BytesIO, device: torch.device) -> torch.nn.Module:
    from torch.export.passes import move_to_device_pass
    return move_to_device_pass(torch.export.load(file), str(device)).module()


FORMATS = {'TorchScript': _torch_script, 'torch.export': _torch_export}
NETWORKS = {'inception_weights': _inception, 'fid_features': _own}           # by flag


# ----------------------------------------------------------------------------------------------- the moments

@dataclass(frozen=True)
class Statistics:
    """Mean mu (D,) and unbiased covariance sigma (D, D) of features, float64 on the CPU."""
    mu: Tensor
    sigma: Tensor
    num_images: int | None                                     # None = not known, as in published files
    source: str                                                # for metrics.json and messages
    notes: list[str] = field(default_factory=list)             # what the user should know
    network: str = 'same'                                      # 'unknown' in published files


class Moments:
    """Mean and scatter of features, updated batch by batch (Chan et al. 1983), float64 on the device.

    Deviations from the mean are summed, never squares: nothing is lost where means are large.
    """

    def __init__(self, dimensions: int, device: torch.device):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)      # (D,)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Takes in the features (B, D) of a batch."""
        batch_mean = features.mean(0)
        deviation, shift = features - batch_mean, batch_mean - self.mean
        total = self.count + len(features)
        self.scatter += deviation.T @ deviation
        self.scatter += torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def pooled(self) -> tuple[Tensor, Tensor, int]:
        """Mean (D,), covariance (D, D) and number of the images of all ranks together, as of one set.

        Ranks may have seen unequal numbers, or none. Raises UserError for fewer than 2 in all.
        """
        number = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        total = launch.sum_over_ranks(number)
        if total < 2:
            raise UserError(f"{int(total)} image: FID compares spreads, which takes at least 2 of each kind.")
        mean = launch.sum_over_ranks(self.mean * number) / total
        shift = self.mean - mean
        scatter = launch.sum_over_ranks(self.scatter + torch.outer(shift, shift) * number)
        return mean.cpu(), (scatter / (total - 1)).cpu(), int(total)


def measure(batches: Iterable[Tensor], features: Features, source: str) -> Statistics:
    """Statistics of the images (B, C, H, W) in [0, 1] of all ranks; `batches` are this rank's."""
    moments = Moments(features.dimensions, features.device)
    for x in batches:
        moments.add(features(x))
    mu, sigma, number = moments.pooled()
    return Statistics(mu, sigma, number, source, _too_few(number, features.dimensions, source))


def _too_few(number: int, dimensions: int, source: str) -> list[str]:
    """A note if there are too few images for a covariance of full rank."""
    return [f"{number} images for {dimensions} features ({source}): too few for a stable FID, which gets "
            f"larger the fewer there are."] if number <= dimensions else []


class _Spread(Dataset):
    """`number` images of a part, evenly spaced over its order, in which classes may follow one another."""

    def __init__(self, part: Part, number: int):
        self.part, self.number = part, min(number, len(part))

    def __len__(self) -> int:
        return self.number

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        return self.part.__getitems__([(draw, i * len(self.part) // self.number) for draw, i in keys])


def measure_part(data: Data, features: Features, batch_size: int, number: int = MAX_REFERENCE) -> Statistics:
    """Statistics of at most `number` training images of `data`, read with GREY_LEVELS."""
    part = _Spread(data.train, number)
    batches = eval_batches(part, batch_size, workers=data.config.num_workers)
    return measure(_progress((batch.x for _, batch in batches), len(part), batch_size, 'reference'), features,
                   'train part')


def measure_samples(model: Any, features: Features, number: int, batch_size: int, temperature: float, *,
                    seed: int, mean: bool) -> Statistics:
    """Statistics of `number` images that the model draws; the same numbers on one process or many.

    The model is not trained on a border that was added to the images: it gets the zeros that the data have.
    """
    drawn = samples(model, number, batch_size, temperature, seed=seed, mean=mean)
    p = model.pixels.padding
    images = (F.pad(x[..., p:-p, p:-p], (p,) * 4) if p else x for _, x in drawn)
    return measure(_progress(images, number, batch_size, 'samples'), features, 'samples')


def _progress(batches: Iterable[Tensor], number: int, batch_size: int, title: str) -> Iterator[Tensor]:
    return progress(batches, title, -(-number // (batch_size * launch.world())))


# -------------------------------------------------------------------------------------------- their distance

def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), the squared distance of two normals.

    mu (D,), sigma (D, D), computed in float64. The last trace is the sum of the singular values of F1^T F2
    for any factors sigma = F F^T; with those of `_factor` it is accurate for singular covariances too.
    """
    f1, f2 = _factor(sigma1), _factor(sigma2)
    spread = f1.square().sum() + f2.square().sum() - 2 * torch.linalg.svdvals(f1.T @ f2).sum()
    return float((mu1.double() - mu2.double()).square().sum() + spread.clamp(min=0))


def distance(drawn: Statistics, reference: Statistics) -> dict[str, Any]:
    """The FID of two sets, for metrics.json, with how many images are behind it."""
    value = frechet_distance(drawn.mu, drawn.sigma, reference.mu, reference.sigma)
    return {'fid': value, 'num_images': drawn.num_images, 'num_reference': reference.num_images,
            'reference': reference.source, 'reference_network': reference.network}


def _factor(sigma: Tensor) -> Tensor:
    """F (D, rank) with F F^T = sigma, without the directions whose variance is only rounding.

    Below the threshold that is usual for ranks, D * eps * the largest eigenvalue, eigenvalues are noise of
    either sign; the roots of the positive ones would add up to a visible error.
    """
    values, vectors = torch.linalg.eigh(sigma.double())                 # ascending
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


# ---------------------------------------------------------------------------------- statistics that were kept

def statistics_file(folder: str | Path, dataset: str) -> Path:
    return Path(folder) / f'{dataset}.npz'


def write_statistics(path: Path, statistics: Statistics, features: Features, data: Data) -> None:
    """Writes mu and sigma as the published files have them, and what they were made of; atomically."""
    config = data.config
    made_of = {'features': features.identity, 'num_images': statistics.num_images, 'part': 'train', 'bits': 8,
               'dataset': config.dataset, 'shape': list(data.shape), 'num_train': len(data.train),
               'flags': {name: getattr(config, name) for name in SPLIT_FLAGS}}
    write_npz(path, mu=statistics.mu.numpy(), sigma=statistics.sigma.numpy(), made_of=json.dumps(made_of))


def read_statistics(folder: str, config: DataConfig, features: Features, shape: tuple[int, ...]
                    ) -> Statistics:
    """The statistics of a data set, for `features` and images of `shape` (C, H, W).

    Raises UserError if the file is missing or damaged, or was made with another network or of other images.
    Published files say neither: that is noted.
    """
    path = statistics_file(folder, config.dataset)
    try:
        stored = read_npz(path)
        mu, sigma = (torch.from_numpy(np.asarray(stored[name], np.float64)) for name in ('mu', 'sigma'))
        made_of = json.loads(str(stored['made_of'])) if 'made_of' in stored else {}
    except FileNotFoundError:
        raise UserError(f"there is no {path}. Make it: {_command(folder, config, features)}") from None
    except Exception as error:                # a damaged file can mislead the reader into any of them
        raise UserError(f"{path} is damaged or no file of statistics ({type(error).__name__}). Make it "
                        f"again: {_command(folder, config, features)}") from None
    d = features.dimensions
    if mu.shape != (d,) or sigma.shape != (d, d) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path} holds mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}: expected finite "
                        f"ones of ({d},) and ({d}, {d}), the features of {features.path}.")
    if not made_of:
        note = f"{path} does not say which network and images it is of: FID is right if they are yours."
        return Statistics(mu, sigma, None, str(path), [note], network='unknown')
    if made_of['features'] != features.identity:
        raise UserError(f"{path} was made with another network, {made_of['features']['kind']} "
                        f"{made_of['features']['sha256'][:12]}, than {features.kind} {features.sha256[:12]}. "
                        f"Make it again: {_command(folder, config, features)}")
    if made_of['shape'] != list(shape):
        raise UserError(f"{path} was made of images of shape {tuple(made_of['shape'])}, the model draws "
                        f"{tuple(shape)}. Make it again with --image_size and --channels as in training.")
    mine = json.loads(json.dumps({name: getattr(config, name) for name in SPLIT_FLAGS}))
    unlike = [f"--{name} {made_of['flags'][name]} (here {mine[name]})" for name in SPLIT_FLAGS
              if made_of['flags'][name] != mine[name]]
    notes = _too_few(made_of['num_images'], d, str(path))
    notes += [f"{path} was made of other images: {', '.join(unlike)}."] if unlike else []
    return Statistics(mu, sigma, made_of['num_images'], str(path), notes)


def _command(folder: str, config: DataConfig, features: Features) -> str:
    """The command that makes these statistics, with the data flags that are not the usual ones."""
    network = 'inception_weights' if features.kind == 'inception-v3-compat' else 'fid_features'
    words = ['python', 'scripts/precompute_fid_statistics.py', '--fid_dir', folder, f'--{network}',
             features.path, '--dataset', config.dataset]
    for name in ('data', 'image_size', 'channels', *SPLIT_FLAGS):
        value = getattr(config, name)
        if value != getattr(DataConfig(), name):
            words += [f'--{name}', *(value if isinstance(value, tuple) else [value])]
    return shlex.join(map(str, words))


# --------------------------------------------------------------------------------------------------- the mode

def evaluate_fid(run: Evaluation) -> None:
    """Frechet distance between the features of drawn images and of training images."""
    config = run.flags(FidConfig)
    batch_size = config.batch_size or SAMPLE_BATCH
    features = load_features(config, run.model.shape, launch.device(), config.fid_dir)
    if config.fid_dir:
        reference = read_statistics(config.fid_dir, run.data_config, features, run.model.shape)
    else:
        reference = measure_part(run.data(**GREY_LEVELS), features, batch_size)
    at = prepare(run, config)
    # Binary models are drawn as probabilities, which are means.
    images = 'mean' if run.model.pixels.likelihood == 'bernoulli' else config.fid_images
    drawn = measure_samples(run.model, features, config.num_samples, batch_size, at, seed=config.seed,
                            mean=images == 'mean')
    if not launch.is_main():
        return                                              # the distance takes one process
    for line in reference.notes + drawn.notes:
        run.say(line)
    result = distance(drawn, reference) | {
        'images': images, 'temperature': at, 'readjust_bn': config.readjust_bn, 'batch_size': batch_size,
        'seed': config.seed, 'features': features.identity}
    run.write_metrics('fid', result)
    run.say(f"FID {result['fid']:.4f} of {result['num_images']} images at temperature {at} to "
            f"{result['num_reference'] or 'an unknown number of'} of {reference.source}")
