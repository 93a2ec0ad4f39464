"""Influence functions against numeric derivatives of the scores, and their spread against scores of sets drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darkroom.evaluation.distances import inception_score, unbiased_mmd
from darkroom.evaluation.influence import frechet_influence, inception_score_influence, kernel_influence
from darkroom.evaluation.intervals import deviations
from darkroom.evaluation.metrics import Moments, frechet_distance


def samples(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed // 1000)).double() / width**0.5
    return torch.randn(count, width, generator=generator).double() @ mix + shift


def weighted(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a weighted set."""
    mean = weights @ x
    centred = x - mean
    return mean, centred.T @ (centred * weights[:, None])


@pytest.mark.parametrize("count", [40, 5])  # more images than features, and fewer
def test_frechet_influence_is_the_derivative_by_the_weight_of_an_image(count: int) -> None:
    x, y = samples(count, 8, 1), samples(60, 8, 2001, 0.3)
    other = weighted(y, torch.full((60,), 1 / 60).double())
    even = torch.full((count,), 1 / count).double()
    found = frechet_influence(x, *weighted(x, even), *other)
    found = found - found.mean()
    step = 1e-5 if count > 8 else 1e-4  # roots of what should be 0 are noise of some 1e-8
    for i in range(0, count, 7):
        toward = torch.zeros(count).double()
        toward[i] = 1.0
        sides = [frechet_distance(*weighted(x, even + s * (toward - even)), *other) for s in (step, -step)]
        assert float(found[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-3, abs=2e-4)


def test_kernel_influence_is_the_derivative_by_the_weight_of_an_image() -> None:
    """Of the statistic without its diagonal: weight moved onto image i counts its pairs with the others twice."""
    x, y = samples(12, 6, 3), samples(15, 6, 2003, 0.5)
    found = kernel_influence(x, y)
    kernel = ((x @ x.T / 6 + 1) ** 3).fill_diagonal_(0)
    across = (x @ y.T / 6 + 1) ** 3
    expected = 2 * (kernel.sum(1) / 11 - across.mean(1))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_inception_score_influence_is_the_derivative() -> None:
    p = torch.softmax(samples(30, 5, 4).double() * 2, 1)
    found = inception_score_influence(p)
    weights = torch.full((30,), 1 / 30).double()

    def score(w: Tensor) -> float:
        marginal = w @ p
        return float((w @ (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(1)).exp())

    assert score(weights) == pytest.approx(inception_score(p, splits=1).mean)
    for i in (0, 11, 29):
        toward = torch.zeros(30).double()
        toward[i] = 1.0
        sides = [score(weights + s * (toward - weights)) for s in (1e-5, -1e-5)]
        assert float(found[i]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-6)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    found = Moments(x.shape[1])
    found.update(x)
    return found.mean, found.covariance


def test_the_spread_is_that_of_sets_drawn_anew() -> None:
    """Sixty sets of one distribution scatter as the influence of one of them says."""
    width, count = 6, 400
    reference = samples(2000, width, 9, 0.4)
    other = moments(reference)
    sets = [samples(count, width, 5000 + i) for i in range(60)]
    for score, influence in (
        (lambda x: frechet_distance(*moments(x), *other), lambda x: frechet_influence(x, *moments(x), *other)),
        (lambda x: unbiased_mmd(x, reference[:500]), lambda x: kernel_influence(x, reference[:500])),
    ):
        drawn = torch.tensor([score(x) for x in sets])
        said = torch.tensor(deviations(influence(sets[0]))).std()
        assert float(said) == pytest.approx(float(drawn.std()), rel=0.35)
