"""Metrics as pure functions of tensors. Nothing here knows a model, a file or a protocol.

Images are (B, C, H, W) in [-1, 1], so that their data range is 2. Shapes: B batch, C channels, H W size, N samples,
D width of features. What is summed over many images is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.features.psnr import DATA_RANGE, check_pair, psnr

__all__ = [
    "Moments",
    "codes_used",
    "frechet_distance",
    "gradient_energy",
    "gradient_energy_ratio",
    "psnr",
    "ssim",
]

WINDOW, SIGMA = 11, 1.5  # of SSIM
K1, K2 = 0.01, 0.03


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,) float64: structural similarity (Wang et al. 2004, eq. 13), 1 for equal images.

        (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)),  c = (K * 2)^2

    Means, variances and covariance are weighted by a Gaussian window of 11x11 with standard deviation 1.5. Edges:
    only windows that lie wholly inside the image count, as in the authors' program; the mean is over those and over
    the channels. scikit-image's `structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=2)` is the same number.
    """
    check_pair(image, other)
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {tuple(image.shape[-2:])}")
    # float32 rounds E[x^2] - E[x]^2 to about 1e-6 of the range, which c2 = 0.0036 hides; float64 leaves no question.
    x, y = image.double(), other.double()
    planes = _window_means(torch.stack([x, y, x * x, y * y, x * y]))
    mx, my = planes[0], planes[1]
    vx, vy, cov = planes[2] - mx * mx, planes[3] - my * my, planes[4] - mx * my
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


def _window_means(x: Tensor) -> Tensor:
    """(..., H, W) -> (..., H-10, W-10): Gaussian means over each window, first along the columns, then along rows."""
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-places.square() / (2 * SIGMA**2))
    weights: list[float] = (window / window.sum()).tolist()
    for dim in (-2, -1):
        length = x.shape[dim] - WINDOW + 1
        # One pass over memory for each weight; torch's convolution of single channels in float64 is slower.
        total = x.narrow(dim, 0, length) * weights[0]
        for place in range(1, WINDOW):
            total.add_(x.narrow(dim, place, length), alpha=weights[place])
        x = total
    return x


def gradient_energy(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,) float64: mean squared difference of neighbours, along columns plus along rows.

    The share of it that a reconstruction keeps tells sharp from blurred where PSNR does not: see
    `gradient_energy_ratio`.
    """
    x = image.double()
    down, right = x.diff(dim=-2), x.diff(dim=-1)
    return down.square().flatten(1).mean(1) + right.square().flatten(1).mean(1)


def gradient_energy_ratio(reconstructions: Tensor, originals: Tensor) -> float:
    """(N,) energies twice -> sum of the one over sum of the other: 1 as sharp, below blurred, above noisy.

    A ratio of sums, because the ratio of one nearly flat image says nothing. Nothing to compare (all flat): 1 when both
    are, infinite otherwise.
    """
    kept, whole = float(reconstructions.double().sum()), float(originals.double().sum())
    return kept / whole if whole > 0 else 1.0 if kept == 0 else float("inf")


class Moments:
    """Mean and covariance of features, streamed in float64 around the mean so far (Chan, Golub & LeVeque 1983)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add (N, D) samples."""
        x = features.detach().double().cpu()
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {tuple(x.shape)}, expected (N, {len(self.mean)})")
        if len(x):
            mean = x.mean(0)
            centred = x - mean
            self._join(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add what another one has seen."""
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by N - 1 as is usual for Frechet distances; zero for fewer than two samples."""
        return self._scatter / max(1, self.count - 1)

    @property
    def std(self) -> Tensor:
        """(D,) standard deviations."""
        return self.covariance.diagonal().clamp_min(0).sqrt()


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017):

        |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

    (D,), (D, D), (D,), (D, D) -> a number, float64. The matrix under the last root is symmetric and positive, so that
    its eigenvalues give the trace: no root of a product without symmetry, no complex parts to drop.
    """
    m1, s1, m2, s2 = (t.detach().double().cpu() for t in (mean, covariance, other_mean, other_covariance))
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ s2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    cross = eigenvalues.clamp_min(0).sqrt().sum()
    distance = (m1 - m2).square().sum() + s1.diagonal().sum() + s2.diagonal().sum() - 2 * cross
    return max(0.0, float(distance))


def codes_used(counts: Tensor) -> float:
    """(K,) occurrences -> share of the codes that occur at all."""
    return float((counts > 0).double().mean())
