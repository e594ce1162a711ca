"""Pairs of anomalous and normal test images of the same exposure and frame: what scores tell without these.

Classes that differ in exposure are told apart by it, and a high AUROC is then no evidence of disease. Between
images of the same exposure it does not help. n normal and m anomalous images; D numbers of each.
"""

from typing import NamedTuple

import numpy as np
import torch

from anomaly.density import Mahalanobis

CALIPER = 0.9              # share of normal images with another one within the largest distance in a pair
LEAST_PAIRS = 10           # below this many an AUROC says nothing


class Group(NamedTuple):
    """Test images that are judged against each other, (N,) bool each."""
    normal: np.ndarray
    anomalous: np.ndarray
    of: str = ''               # the class whose images with a partner these are; '' = not of matched images

    @property
    def name(self) -> str:
        return f'{self.of} (matched)'

    @property
    def normal_name(self) -> str:
        """Name of the group of its normal images."""
        return f'normal like {self.of}' if self.of else 'normal'


def pairs(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many pairs as there are, no image in two: the rows of the normal (n, D) and of the anomalous (m, D)
    features, (p,) each.

    The images of a pair are closer than the caliper, where the features of normal images have unit
    covariance. Among all matchings of that size, this one has the smallest total distance.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    from sklearn.neighbors import NearestNeighbors
    density = Mahalanobis().fit(normal)
    normal, anomalous = (density.whitened(torch.from_numpy(rows)).numpy() for rows in (normal, anomalous))
    own, _ = NearestNeighbors(n_neighbors=1).fit(normal).kneighbors()          # each but itself
    caliper = np.quantile(own, CALIPER)
    distances = cdist(normal, anomalous)                                                              # (n, m)
    near = distances <= caliper
    rows, columns = (np.flatnonzero(near.any(axis)) for axis in (1, 0))
    never = caliper * (len(rows) + len(columns)) + 1                   # more than all pairs together
    cost = np.where(near, distances, never)[np.ix_(rows, columns)]
    first, second = linear_sum_assignment(cost)
    paired = cost[first, second] < never
    return rows[first[paired]], columns[second[paired]]


def match(features: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> list[Group]:
    """For each anomalous class its images with a normal partner, and these partners, maybe none; from the
    features (N, D), labels (N,), 0 = normal, and classes (N,) of test images.
    """
    normal, groups = np.flatnonzero(labels == 0), []
    for name in dict.fromkeys(classes[labels == 1]):
        anomalous = np.flatnonzero((labels == 1) & (classes == name))
        found = pairs(features[normal], features[anomalous]) if len(normal) >= LEAST_PAIRS else ([], [])
        members = np.zeros((2, len(labels)), bool)
        for mask, places, chosen in zip(members, (normal, anomalous), found):
            mask[places[chosen]] = True
        groups.append(Group(*members, of=name))
    return groups
