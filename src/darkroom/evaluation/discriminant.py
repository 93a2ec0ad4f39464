"""A classifier for class accuracy where no published one fits: linear discriminant analysis on an extractor's features.

It is fitted in closed form on real images, streamed; how often it is right about held-out real images is stated beside
how often it is right about generated ones. Shapes: N images, D width of an embedding, K classes. float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.evaluation.metrics import Moments

SHRINKAGE = 0.05  # share of the mean variance in the covariance: fewer images than features still give a classifier


class LinearDiscriminant:
    """`update(features (N, D), labels (N,))` as often as there are images, then `scores(features) -> (N, K)`.

    Each class is a Gaussian with a mean of its own and one covariance for all, so that the logarithm of its density is
    linear: w_k.x - w_k.m_k / 2 with w_k = S^-1 m_k. All classes are taken to be equally frequent: what a model is asked
    for decides, not what the data has more of.
    """

    def __init__(self, width: int, classes: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums = torch.zeros(classes, width, dtype=torch.float64)
        self.moments = Moments(width)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Images without a class (not a number) are left out."""
        known = labels.isfinite()
        x, numbers = features[known].double().cpu(), labels[known].long().cpu()
        self.counts += torch.bincount(numbers, minlength=len(self.counts)).double()
        self.sums.index_add_(0, numbers, x)
        self.moments.update(x)

    def fit(self) -> None:
        """Decide on the planes between the classes."""
        count = max(1.0, float(self.counts.sum()))
        means = self.sums / self.counts.clamp_min(1)[:, None]
        centre = self.moments.mean
        # Within = total - between: one pass over the images is enough.
        total = self.moments.covariance * (self.moments.count - 1) / count
        offsets = (means - centre) * (self.counts / count).sqrt()[:, None]
        within = total - offsets.T @ offsets
        width = len(centre)
        ridge = SHRINKAGE * within.diagonal().mean().clamp_min(1e-12)
        within = (1 - SHRINKAGE) * within + ridge * torch.eye(width, dtype=torch.float64)
        self._centre = centre
        self._weights = torch.linalg.solve(within, (means - centre).T)
        self._biases = -0.5 * ((means - centre) * self._weights.T).sum(1)
        self._biases[self.counts == 0] = -torch.inf  # never seen, never said

    def scores(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K) logits."""
        return (features.double().cpu() - self._centre) @ self._weights + self._biases
