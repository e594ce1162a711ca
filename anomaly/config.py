"""Flags of the modes that score images. Imports no PyTorch: programs read flags before they load it."""

import importlib.util
from typing import Any

from utils import UserError, flag, flags

NOISES = ('separate', 'shared')
MSMA_SCHEDULES = ('geometric', 'linear', 'thinned')
MSMA_MAPS = ('none', 'gradient', 'gradient_input', 'guided', 'gradcam')
NEED_CAPTUM = ('guided', 'gradcam')


def check_captum(way: str) -> None:
    """Raises UserError if this way of making maps needs captum and it is not installed."""
    if way in NEED_CAPTUM and importlib.util.find_spec('captum') is None:
        raise UserError(f"--msma_map {way} needs captum: pip install -r requirements-medical.txt. Without "
                        f"it there are gradient and gradient_input.")


@flags
class Selection:
    """Anomaly scores"""
    scores: tuple = flag((), "scores to compute: 'all', rows of the table such as nelbo, llr or complexity, "
                             "or one member of a row such as llr_2 or kl_1 (1 = top group); 'all' excludes "
                             "the slow scores regret, ode_nll, inpainting and restoration (default: all; "
                             "with --compare the primary scores)", basic=True)
    primary_score: str = flag('', "score shown in the figures, to be chosen before looking at any anomaly; "
                                  "'' = the score the model was published with, else nelbo, else the first "
                                  "computed", basic=True)



@flags
class Scoring:
    """Computation of the scores"""
    num_draws: int = flag(4, 'draws of the latents over which every sampled score averages', least=1,
                          basic=True)
    num_iw_samples: int = flag(16, 'iw: importance samples per image', least=1)
    iw_samples_elbo: int = flag(1, 'llr: importance samples for each draw of L; 1 = the ELBO', least=1)
    iw_samples_lk: int = flag(1, 'llr, lk: importance samples for each draw of L>k; 1 = the ELBO', least=1)
    llr_noise: str = flag('separate', 'llr: noise of L and of L>k: separate, as published, or shared',
                          choices=NOISES)
    regret_steps: int = flag(20, 'regret: Adam steps on the encoder for each image', least=1)
    regret_learning_rate: float = flag(1e-4, 'regret: learning rate of Adam', above=0)
    msma_levels: int = flag(20, 'msma: number of noise levels', least=1)
    msma_min_timestep: float = flag(0.01, 'msma: time of the lowest noise level, 0 to 1', above=0, most=1)
    msma_max_timestep: float = flag(1.0, 'msma: time of the highest noise level, 0 to 1', above=0, most=1)
    msma_schedule: str = flag('geometric', "msma: spacing of the noise levels; thinned = a subset of the "
                                           "sampler's steps", choices=MSMA_SCHEDULES)
    msma_denoise: bool = flag(False, 'msma: remove the finest noise from the image first')
    msma_map: str = flag('none', "msma: anomaly map: magnitude of the gradient of the density's score with "
                                 "respect to the image, gradient times image, guided backpropagation, or "
                                 "GradCAM (the last two need captum); none = no map", choices=MSMA_MAPS)

    def __post_init__(self):
        check_captum(self.msma_map)
        if not self.msma_min_timestep < self.msma_max_timestep:
            raise UserError(f"--msma_min_timestep {self.msma_min_timestep} --msma_max_timestep "
                            f"{self.msma_max_timestep}: the first must be below the second.")

    @property
    def msma(self) -> dict[str, Any]:
        """What a model's `score_norms` is asked for."""
        return {'number': self.msma_levels, 'min_timestep': self.msma_min_timestep,
                'max_timestep': self.msma_max_timestep, 'schedule': self.msma_schedule,
                'denoised': self.msma_denoise}


@flags
class MapConfig:
    """Anomaly maps and segmentations"""
    map_smoothing: float = flag(0.0, 'maps: standard deviation of a Gaussian filter in pixels; '
                                     '0 = no smoothing', least=0, most=1e6)
    body_mask: float = flag(0.0, 'maps: gray level in [0, 1] above which a pixel belongs to the body; holes '
                                 'are filled, and maps are 0 and not judged outside it; 0 = no body mask',
                            least=0, below=1)
    seg_erosion: float = flag(2.0, 'segmentations of volumes: erosion in voxels of the body, inside which '
                                   'lesions may start; with --body_mask 0 the body is all above the darkest '
                                   'value', least=0, most=1e6)
    seg_min_voxels: int = flag(3, 'segmentations of volumes: smallest component in voxels (18 neighbors); '
                                  'smaller ones are removed', least=1)
    seg_dilation: float = flag(1.0, 'segmentations of volumes: radius in voxels of the final dilation; '
                                    '0 = none', least=0, most=1e6)


@flags
class Judging:
    """Thresholds and metrics"""
    target_fpr: float = flag(0.05, 'false-positive rate on normal images that sets the thresholds', above=0,
                             below=1, basic=True)
    target_pixel_fpr: float = flag(0.005, 'false-positive rate on pixels of normal images that sets the '
                                          'thresholds of maps', above=0, below=1)
    max_train_images: int = flag(1000, 'number of training images on which the baselines (mean image, PCA) '
                                       'are fitted', least=2)
    num_bootstrap: int = flag(1000, 'bootstrap resamples for the 95 % intervals', least=1)


@flags
class Showing:
    """Report"""
    num_cases: int = flag(6, 'number of most anomalous and of least anomalous test images in '
                             'figures/cases.png; 0 = none', least=0)
    num_gallery: int = flag(60, "number of test images in the report's gallery: extremes, likely false "
                                "positives and negatives, and others evenly spaced by rank, at most 20 for "
                                "volumes; 0 = only those of --num_cases", least=0)


@flags
class Audit:
    """Audit of the data"""
    audit_images: int = flag(100, 'images of each class and part that the audit in the report measures; '
                                  '0 = no audit', least=0)


@flags
class OutOfDistribution:
    """Images from elsewhere"""
    ood: tuple = flag((), 'sets of images to tell from the normal ones, each a class NAME, brought to the '
                          'shape of the run. NAME is a data set of --dataset, of which the test part is '
                          "taken, or any name with a folder of images or an LMDB; PATH 'test' is the run's "
                          'own normal test images. A CHANGE is rot90, rot180, rot270, flip, invert, lesion, '
                          'tumour, or, of labeled test images, enhanced', metavar='NAME=PATH[:CHANGE]')
    max_ood: int = flag(0, 'largest number of images of each set of --ood, drawn by --seed; 0 = all', least=0,
                        needs='ood')


@flags
class PredictConfig:
    """Predictions for new images"""
    data: str = flag('', 'new images or volumes: a folder, searched at any depth, or one file', basic=True)
    num_overlays: int = flag(50, 'number of images drawn with reconstruction and anomaly map, the most '
                                 'anomalous by the primary score; for volumes also written as NIfTI map and '
                                 'segmentation; -1 = all, 0 = none', least=-1, basic=True)
    thresholds: str = flag('', "thresholds.json of an anomaly evaluation; '' = that of the last evaluation "
                               "of the run")


@flags
class CompareConfig:
    """Comparison"""
    compare: tuple = flag((), 'run folders or checkpoints of two or more runs, whose anomaly scores are '
                              'compared on the test images that all have', metavar='RUN', basic=True)


@flags
class ScoreConfig(Selection, Scoring, MapConfig, Judging, Showing):
    """All flags of the mode anomaly in one: to be taken apart by its users."""

    def __post_init__(self):
        Scoring.__post_init__(self)
