"""Bootstrap intervals against theory and repeated draws, binomial intervals against SciPy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta

from darkroom.evaluation.intervals import DRAWS, binomial_interval, deviations, difference_interval, interval


def test_deviations_of_a_mean_have_its_standard_error() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 3 + 7
    found = torch.tensor(deviations(values))
    assert len(found) == DRAWS
    assert float(found.std()) == pytest.approx(float(values.std()) / math.sqrt(2000), rel=0.1)
    low, high = interval(5.0, found.tolist())  # type: ignore[misc]
    assert low == pytest.approx(5 - 1.96 * 3 / math.sqrt(2000), abs=0.03) and low < 5 < high


def test_deviations_of_a_choice_are_those_of_the_whole() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole, choice = torch.tensor(deviations(values)), torch.tensor(deviations(values, 4000))
    assert torch.allclose(choice, whole / 2, rtol=1e-3)
    assert torch.equal(torch.tensor(deviations(values, 10)), whole)  # more are never fewer


def test_nothing_to_draw_gives_no_interval() -> None:
    assert deviations(torch.ones(1)) == [] and interval(1.0, []) is None
    assert difference_interval(1.0, [0.1], 2.0, [0.1, 0.2]) is None


def test_the_difference_of_scores_on_the_same_images_is_paired() -> None:
    """Two models whose images differ little have a difference that is surer than either score."""
    one = torch.randn(500, generator=torch.Generator().manual_seed(3))
    other = one + 0.05 + 0.01 * torch.randn(500, generator=torch.Generator().manual_seed(4))
    first, second = deviations(one), deviations(other)
    low, high = difference_interval(float(other.mean()), second, float(one.mean()), first)  # type: ignore[misc]
    assert 0.04 < low < 0.05 < high < 0.06
    alone = interval(float(one.mean()), first)
    assert alone is not None and alone[1] - alone[0] > 10 * (high - low)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (7, 10), (30, 40), (1, 1), (612, 1500)])
def test_binomial_intervals_are_those_of_scipy(successes: int, count: int) -> None:
    low, high = binomial_interval(successes, count)
    assert low == pytest.approx(beta.ppf(0.025, successes, count - successes + 1) if successes else 0.0, abs=1e-9)
    assert high == pytest.approx(
        beta.ppf(0.975, successes + 1, count - successes) if successes < count else 1.0, abs=1e-9
    )


def test_no_answers_say_nothing() -> None:
    assert binomial_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        binomial_interval(3, 2)
