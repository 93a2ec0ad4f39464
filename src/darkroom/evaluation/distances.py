"""How far two sets of pictures lie apart, as pure functions of what a feature network sees in them.

All sums are float64, whatever the features are. Nothing here knows a network, a file or a protocol.

Memory: `frechet` needs the moments alone, which are streamed (`metrics.Moments`: D^2 numbers). The others look at
pairs, so that their features must be kept: N * D * 4 bytes in float32, 410 MB for 50 000 pictures and the 2048 features
of Inception; of the N^2 pairs those of some rows exist at a time. `NeighbourSearch` keeps one side alone.

Shapes: N real samples, M generated samples, D width of the features, K classes, k neighbours.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from darkroom.evaluation.metrics import Moments, frechet_distance

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, in every library that has it
SPLITS = 10  # of the Inception score (Salimans et al. 2016)
BLOCK = 1 << 18  # numbers in a block of distances: 2 MB
LEAST = 64  # rows of a block, however long they are: reading the other set again for each row would take longer
COLUMNS = 256  # of a block are made at a time
# Distances of float64 products are exact to about 1e-16 of the lengths of the vectors. What lies nearer is a copy, and
# what differs by less than a TIE is as far: whether a sample lies on the edge of another one's ball is not luck.
COPY, TIE = 1e-13, 1e-9


class MeanAndSpread(NamedTuple):
    """A mean over subsets or splits, and their standard deviation (divided by their number)."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


class Neighbours(NamedTuple):
    """Of each of Q samples the k nearest, nearest first: distance (Q, k) float64; number (Q, k) int64, its place."""

    distance: Tensor
    number: Tensor


def frechet(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of the normal distributions with these moments; see `frechet_distance`."""
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


# ------------------------------------------------------------------------------------------------------------- kernels


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> MeanAndSpread:
    """(N, D), (M, D) -> the squared maximum mean discrepancy of the cubic polynomial kernel, mean over random subsets.

    KID, where the features are Inception's (Binkowski et al. 2018, sec. 4): unbiased, so that few samples make it
    noisier but not larger, and a little below zero for equal distributions. Subsets are drawn without repetition by
    `seed`; they are no larger than the smaller of the two sets.
    """
    _check_features(real, generated)
    size = min(subset_size, len(real), len(generated))
    if size < 2 or subsets < 1:
        raise ValueError(f"a kernel distance needs 2 samples of each set and 1 subset, got {size} and {subsets}")
    draw = torch.Generator().manual_seed(seed)
    found = torch.tensor(
        [unbiased_mmd(_subset(real, size, draw), _subset(generated, size, draw)) for _ in range(subsets)],
        dtype=torch.float64,
    )
    return MeanAndSpread(float(found.mean()), float(found.std(correction=0)))


def unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """(m, D), (n, D) -> the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3):

    sum_{i != j} k(x_i, x_j) / m(m-1) + sum_{i != j} k(y_i, y_j) / n(n-1) - 2 sum_{ij} k(x_i, y_j) / mn
    """
    x, y = x.double(), y.double()
    within = 0.0
    for samples in (x, y):
        own = (samples.square().sum(1) / samples.shape[1] + 1.0) ** 3  # each with itself: left out
        within += (_kernel_sum(samples, samples) - float(own.sum())) / (len(samples) * (len(samples) - 1))
    return within - 2.0 * _kernel_sum(x, y) / (len(x) * len(y))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(m, D), (n, D) -> (m, n) float64: (x.y / D + 1)^3, of which only one such matrix is made."""
    return (x.double() @ y.double().T).div_(x.shape[1]).add_(1.0).pow_(3)


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """(m, D), (n, D) -> the sum of k(x_i, y_j) over all pairs, some rows at a time."""
    return float(sum(cubic_kernel(rows, y).sum() for rows in x.split(_rows(len(y)))))


def _subset(x: Tensor, size: int, draw: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=draw)[:size].to(x.device)]


# ------------------------------------------------------------------------------------------------------ Inception score


def inception_score(probabilities: Tensor, *, splits: int = SPLITS, seed: int | None = 0) -> MeanAndSpread:
    """(M, K) class probabilities -> exp of the mean KL divergence from their mean (Salimans et al. 2016, sec. 4):

        exp( mean_i sum_c p_ic (log p_ic - log mean_j p_jc) ),  at most K

    of each of `splits` parts of the samples, which are shuffled by `seed` first (None: taken as they come), because
    pictures are often made class by class.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(f"{splits} splits of probabilities of shape {tuple(probabilities.shape)}, expected (M, K)")
    p = probabilities.double()
    if seed is not None:
        p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed)).to(p.device)]
    borders = [i * len(p) // splits for i in range(splits + 1)]
    found = []
    for start, stop in pairwise(borders):
        part = p[start:stop]
        # x log y is 0 for x = 0, whatever y: classes that no sample has add nothing.
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        found.append(divergence.sum(1).mean().exp())
    scores = torch.stack(found)
    return MeanAndSpread(float(scores.mean()), float(scores.std(correction=0)))


# ---------------------------------------------------------------------------------------------------------- neighbours


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """(N, D), (M, D) -> improved precision and recall (Kynkaanniemi et al. 2019, sec. 2).

    Around each sample of a set lies a ball that reaches its k-th neighbour in that set; together the balls are the
    set's manifold. Precision: share of the generated samples in the real manifold. Recall: share of the real ones in
    the generated manifold.
    """
    _check_features(real, generated)
    return PrecisionRecall(
        precision=float(inside(generated, real, neighbour_radii(real, k)).double().mean()),
        recall=float(inside(real, generated, neighbour_radii(generated, k)).double().mean()),
    )


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> DensityCoverage:
    """(N, D), (M, D) -> density and coverage (Naeem et al. 2020, eq. 5 and 6), with the balls of the real samples.

    Density: in how many balls a generated sample lies, mean, divided by k; it counts what precision only asks, so that
    one stray real sample adds little, and may be above 1. Coverage: share of the balls with a generated sample inside.
    What lies on the edge of a ball is outside, as in the authors' program.
    """
    balls, covered = density_hits(real, generated, k)
    return DensityCoverage(float(balls.mean()), float(covered.double().mean()))


def density_hits(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `density_coverage` takes the means of: (M,) float64, in how many balls each generated sample lies divided by
    k, and (N,) bool, which balls have a generated sample inside."""
    _check_features(real, generated)
    radii = neighbour_radii(real, k).square() * (1 - TIE)
    balls: list[Tensor] = []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in generated.split(_rows(len(real))):
        hits = squared_distances(rows, real) < radii
        balls.append(hits.sum(1).double() / k)
        covered |= hits.any(0)
    return torch.cat(balls), covered


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """(N, D) -> (N,) float64: how far each sample's k-th neighbour in the set is. Copies of a sample count."""
    if not 1 <= k < len(x):
        raise ValueError(f"{len(x)} samples have no {k}-th neighbour")
    found = []
    first = 0
    for rows in x.split(_rows(len(x))):
        squared = squared_distances(rows, x)
        own = torch.arange(len(rows), device=x.device)
        squared[own, first + own] = 0.0  # whatever rounding makes of a sample's distance from itself
        found.append(squared.kthvalue(k + 1, dim=1).values)
        first += len(rows)
    return torch.cat(found).sqrt()


def inside(samples: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(n, D), (N, D), (N,) -> (n,) bool: which samples lie in a ball around one of the centres, or on its edge."""
    reach = radii.square() * (1 + TIE)
    rows = samples.split(_rows(len(centres)))
    return torch.cat([(squared_distances(part, centres) <= reach).any(1) for part in rows])


class NeighbourSearch:
    """Of each query (Q, D) the k nearest samples of a set that streams by: memory is that of the queries and a block.

    `update(samples)` adds samples, which are numbered in the order they come; `result()` says what has been found.
    """

    def __init__(self, queries: Tensor, k: int = 1) -> None:
        if queries.ndim != 2 or k < 1:
            raise ValueError(f"{k} neighbours of queries of shape {tuple(queries.shape)}, expected (Q, D)")
        self.queries, self.k, self.seen = queries, k, 0
        shape = (len(queries), 0)
        self._squared = torch.zeros(shape, device=queries.device)
        self._number = torch.zeros(shape, dtype=torch.int64, device=queries.device)

    def update(self, samples: Tensor) -> None:
        """Add (n, D) samples."""
        _check_features(self.queries, samples)
        for block in samples.split(_rows(len(self.queries))):
            numbers = torch.arange(self.seen, self.seen + len(block), device=self.queries.device)
            # Kept in float32: products differ in their last digits with the size of a block. What differs by less is as
            # near, and of samples equally near the first one counts (the sort is stable), however the stream is cut.
            distances = squared_distances(self.queries, block.to(self.queries.device)).float()
            squared = torch.cat([self._squared, distances], 1)
            number = torch.cat([self._number, numbers.expand(len(self.queries), -1)], 1)
            order = squared.argsort(dim=1, stable=True)[:, : self.k]
            self._squared, self._number = squared.gather(1, order), number.gather(1, order)
            self.seen += len(block)

    def result(self) -> Neighbours:
        if self.seen < self.k:
            raise ValueError(f"{self.seen} samples have no {self.k} neighbours to give")
        return Neighbours(self._squared.double().sqrt(), self._number)


def nearest_neighbours(queries: Tensor, samples: Tensor, k: int = 1) -> Neighbours:
    """(Q, D), (N, D) -> of each query the k nearest samples, and how far they are (Euclidean)."""
    search = NeighbourSearch(queries, k)
    search.update(samples)
    return search.result()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(m, D), (n, D) -> (m, n) float64: |x|^2 + |y|^2 - 2 x.y, and 0 for copies. Only so many of y are float64 at a
    time that little exists beside the result."""
    x = x.double()
    own = x.square().sum(1)[:, None]
    result = torch.empty(len(x), len(y), dtype=torch.float64, device=x.device)
    for part, block in zip(result.split(COLUMNS, 1), y.split(COLUMNS), strict=True):
        block = block.double()
        lengths = own + block.square().sum(1)[None, :]
        part.copy_(torch.addmm(lengths, x, block.T, alpha=-2.0))
        part.masked_fill_(part <= lengths.mul_(COPY), 0.0)
    return result


def _rows(columns: int) -> int:
    """So many rows of that many columns make a block."""
    return max(LEAST, BLOCK // max(1, columns))


def _check_features(one: Tensor, other: Tensor) -> None:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise ValueError(f"features of shapes {tuple(one.shape)} and {tuple(other.shape)}, expected (N, D) and (M, D)")
