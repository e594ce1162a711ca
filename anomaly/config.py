"""Flags of the modes that score images. Imports no PyTorch: programs read flags before they load it."""

from utils import flag, flags


@flags
class SegmentationConfig:
    """Segmentations of volumes"""
    seg_erosion: float = flag(2.0, 'erosion in voxels of the body, inside which lesions may start; with '
                                   '--body_mask 0 the body is all above the darkest value', least=0, most=1e6)
    seg_min_voxels: int = flag(3, 'smallest component in voxels (18 neighbors); smaller ones are removed',
                               least=1)
    seg_dilation: float = flag(1.0, 'radius in voxels of the final dilation; 0 = none', least=0, most=1e6)


@flags
class MapConfig(SegmentationConfig):
    """Anomaly maps"""
    map_smoothing: float = flag(0.0, 'standard deviation of a Gaussian filter in pixels; 0 = no smoothing',
                                least=0, most=1e6)
    body_mask: float = flag(0.0, 'gray level in [0, 1] above which a pixel belongs to the body; holes are '
                                 'filled, and maps are 0 and not judged outside it; 0 = no body mask',
                            least=0, below=1)


@flags
class Judging:
    """Thresholds and metrics"""
    target_fpr: float = flag(0.05, 'false-positive rate on normal images that sets the thresholds', above=0,
                             below=1, basic=True)
    target_pixel_fpr: float = flag(0.005, 'false-positive rate on pixels of normal images that sets the '
                                          'thresholds of maps', above=0, below=1)
    density_images: str = flag('auto', 'normal images on which densities (dose, kl_knn, ...) are fitted: '
                                       'val = validation images; auto = also training images, if the model '
                                       'scores both alike', choices=('auto', 'val'))
    max_train_images: int = flag(1000, 'number of training images on which the baselines, and densities that '
                                       'may learn from training images, are fitted', least=3)
    match: bool = flag(False, 'also judge each anomalous class on matched pairs: its test images against '
                              'normal ones of similar exposure and frame')
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
    audit_images: int = flag(100, 'number of images of each class and part that the audit measures; '
                                  '0 = no audit', least=0)


@flags
class OutOfDistribution:
    """Images from elsewhere"""
    ood: tuple = flag((), 'further sets of images, each an anomalous class NAME, brought to the shape of '
                          'the run. NAME is a data set of --dataset, whose test part is '
                          "used, or any name with a folder of images or an LMDB; PATH 'test' is the run's "
                          'own normal test images. A CHANGE is rot90, rot180, rot270, flip, invert, lesion, '
                          'tumour, of labeled test images enhanced, or inlier: the set takes the place of '
                          "the run's normal test images", metavar='NAME=PATH[:CHANGE]')
    max_ood: int = flag(0, 'largest number of images of each set of --ood, drawn by --seed; 0 = all', least=0,
                        needs='ood')


@flags
class PredictConfig:
    """Predictions for new images"""
    data: str = flag('', 'new images or volumes: a folder, searched at any depth, or one file', basic=True)
    num_overlays: int = flag(50, 'number of images drawn with reconstruction and anomaly map, the most '
                                 'anomalous by the primary score; for volumes also written as NIfTI map and '
                                 'segmentation; -1 = all, 0 = none', least=-1, basic=True)
    dicom_seg: bool = flag(False, 'write the segmentation of each drawn DICOM image also as a DICOM '
                                  'segmentation object, which names its patient (needs highdicom)')
    thresholds: str = flag('', "thresholds.json of an anomaly evaluation; '' = that of the last evaluation "
                               "of the run")


@flags
class CompareConfig:
    """Comparison"""
    compare: tuple = flag((), 'run folders or checkpoints of two or more runs, whose anomaly scores are '
                              'compared on the test images that all have', metavar='RUN', basic=True)
