"""Flags of the modes of evaluate.py. Imports no PyTorch: the program reads flags before it loads it.

Classes with one title stand in one group of the help page.
"""

from __future__ import annotations

from pathlib import Path

from utils import UserError, flag, flags


def run_folder(checkpoint: str) -> Path:
    """The folder of a run, from what --checkpoint names: the folder, or a file in it."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


@flags
class Noise:
    """Evaluation"""
    seed: int = flag(1, 'seed of all noise', basic=True)


@flags
class Batches:
    """Evaluation"""
    batch_size: int = flag(0, 'images in a batch; 0 = as in training, and 100 to draw samples', least=0,
                           basic=True)


@flags
class Images:
    """Evaluation"""
    eval_on_train: bool = flag(False, 'take the training images instead of the test images')


@flags
class Likelihood(Images, Batches, Noise):
    """Likelihood"""
    num_iw_samples: int = flag(1000, 'importance samples per image', least=1, basic=True)
    iw_batch: int = flag(0, 'images that pass at once, each repeated for several importance samples; 0 = as '
                            'suits the device', least=0)
    max_images: int = flag(0, 'number of images to evaluate, rounded up to whole batches; 0 = all',
                           least=0, basic=True)


@flags
class Sampling(Batches, Noise):
    """Samples"""
    temp: float | None = flag(None, 'temperature of the prior (default: 0.7; 1 for --model score, whose '
                                    'noise it scales)', type=float, least=0, basic=True)
    readjust_bn: bool = flag(False, 'fit the batch norms to the temperature first', basic=True)
    save_bn: bool = flag(False, 'keep the model with these batch norms as checkpoint.pt', needs='readjust_bn')


@flags
class Samples(Sampling):
    """Samples"""
    num_samples: int = flag(64, 'number of images to draw', least=1, basic=True)


@flags
class NetworkConfig:
    """FID"""
    inception_weights: str = flag('', 'weights of the Inception network of torch-fidelity (docs/fid.md)',
                                  metavar='FILE', basic=True)
    fid_features: str = flag('', 'in place of Inception: your own network, TorchScript or torch.export, '
                                 '(B, C, H, W) in [0, 1] -> (B, D)', metavar='FILE')


@flags
class FidConfig(NetworkConfig, Sampling):
    """FID"""
    num_samples: int = flag(50000, 'number of images to draw', least=1, basic=True)
    fid_dir: str = flag('', "folder of <dataset>.npz, made by scripts/precompute_fid_statistics.py; '' = "
                            "measure the run's training images now", metavar='FOLDER', basic=True)
    fid_images: str = flag('mean', 'the mean of p(x|z), as published, or a sample of it',
                           choices=('mean', 'sample'))


@flags
class Reconstruction(Images, Batches):
    """Reconstructions"""
    num_samples: int = flag(64, 'number of images', least=1, basic=True)
    keep_groups: tuple = flag((), 'keep this many latent groups from the top, and take the others at their '
                                  'prior means; each number gives a column; none given = all groups',
                              type=int, basic=True)


@flags
class Latents(Images, Batches):
    """Latents"""


@flags
class ExportConfig:
    """Export"""
    primary_score: str = flag('', "score to export, of those with a threshold; '' = the primary score of the "
                                  "evaluation", basic=True)
    thresholds: str = flag('', "thresholds.json of an anomaly evaluation; '' = that of the last evaluation "
                               "of the run")


@flags
class Decoding(Batches, Noise):
    """Latents"""
    latents: str = flag('', 'npz file written by the mode latents, as it is or edited, or a folder of such '
                            'files', basic=True)
    temp: float | None = flag(None, 'temperature of groups that the files leave out (default: 0.7)',
                              type=float, least=0, basic=True)

    def __post_init__(self):
        if not self.latents:
            raise UserError("--latents is missing: decode needs the file or folder that the mode latents "
                            "wrote.")


@flags
class Interpolation(Images):
    """Walk through the latents"""
    num_samples: int = flag(8, 'number of pairs of images', least=1, basic=True)
    num_frames: int = flag(9, 'pictures from one end to the other', least=2, basic=True)


@flags
class Traversal(Images):
    """Walk through the latents"""
    num_samples: int = flag(4, 'number of images', least=1, basic=True)
    num_frames: int = flag(9, 'pictures from one end to the other', least=2, basic=True)
    groups: tuple = flag((), 'groups to walk in, 0 is the top; none given = all', type=int, basic=True)
    channel: int = flag(-1, 'latent channel; -1 = in each group the one that carries most information',
                        least=-1, basic=True)
    reach: float = flag(3.0, 'largest shift of the channel, to both sides', basic=True)
