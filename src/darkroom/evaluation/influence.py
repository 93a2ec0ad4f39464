"""What each image contributes to a score that is no mean: the influence function of the score at the set as it is.

Moving the weight of image i by dw_i moves the score by sum_i influence_i dw_i. It costs one pass where a bootstrap of
the score itself would cost hundreds of eigenvalue problems, and is a mean that can be drawn again cheaply.
Shapes: N images scored, M of the reference, D width of an embedding, K classes. float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.evaluation.distances import cubic_kernel

BLOCK = 256  # rows in memory as float64, and of a kernel matrix


def frechet_influence(
    x: Tensor, mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> Tensor:
    """(N, D) embeddings of images whose set has (mean, covariance) -> (N,).

        2 (m1 - m2).c + c^T (1 - T) c,  c = x - m1,  T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2)

    T is the map that carries the one Gaussian into the other; 1 - T is the derivative of the trace terms of the Frechet
    distance by S1 (Bhatia, Jain & Lim 2019). Where S1 has no extent (fewer images than features), images have none
    either, and the inverse is the pseudo-inverse.
    """
    m1, s1, m2, s2 = (t.double() for t in (mean, covariance, other_mean, other_covariance))
    values, vectors = torch.linalg.eigh(s1)
    seen = values > values.max().clamp_min(0) * len(values) * 1e-14
    roots = torch.where(seen, values, 0.0).sqrt()
    inverse = torch.where(seen, 1 / roots.clamp_min(1e-300), 0.0)
    middle = roots[:, None] * (vectors.T @ s2 @ vectors) * roots[None, :]
    inner_values, inner_vectors = torch.linalg.eigh((middle + middle.T) / 2)
    carried = (inner_vectors * inner_values.clamp_min(0).sqrt()) @ inner_vectors.T
    carried = inverse[:, None] * carried * inverse[None, :]
    result = []
    for part in x.split(BLOCK):
        c = part.double() - m1
        along = c @ vectors
        result.append(2 * c @ (m1 - m2) + c.square().sum(1) - ((along @ carried) * along).sum(1))
    return torch.cat(result)


def kernel_influence(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) scored and (M, D) reference embeddings -> (N,): 2 (mean over the other x of k(x_i, .) - mean over y), with
    the cubic kernel of the kernel distance; the first-order projection of its U-statistic (Binkowski et al. 2018)."""
    count, width = len(x), x.shape[1]
    result = []
    for part in x.split(BLOCK):
        own = (part.double().square().sum(1) / width + 1) ** 3
        inside = sum((cubic_kernel(part, block).sum(1) for block in x.split(BLOCK)), torch.zeros(len(part))) - own
        across = sum((cubic_kernel(part, block).sum(1) for block in y.split(BLOCK)), torch.zeros(len(part)))
        result.append(2 * (inside / max(1, count - 1) - across / len(y)))
    return torch.cat(result)


def inception_score_influence(probabilities: Tensor) -> Tensor:
    """(N, K) -> (N,): exp(mean KL) (KL_i - mean KL), KL_i of the image's classes from the mean of all. How the mean
    moves has no effect of first order."""
    p = probabilities.double()
    marginal = p.mean(0)
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(1)
    return divergence.mean().exp() * (divergence - divergence.mean())
