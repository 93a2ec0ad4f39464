"""How far a score would move if the images had been others: bootstrap intervals, and binomial ones.

Each score is, to first order, a mean over images: FD, KD and the Inception score through their influence functions
(`influence.py`), the others as they stand. The bootstrap draws the images with replacement and takes the mean again.
What is kept of it has a fixed size, whatever the number of images. Shapes: N images, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 400
LEVEL = 0.95
DIGITS = 4  # of a deviation in a record


def deviations(contributions: Tensor, total: int | None = None, draws: int = DRAWS) -> list[float]:
    """(N,) what each image contributes -> (R,) deviations of their mean when N of them are drawn with replacement.

    Draw r takes the same numbers wherever N is the same: scores of two models on images of the same numbers (and so of
    the same conditions and seeds) then move together, and their difference has an honest interval.
    total: of so many images these are an even choice; the deviations shrink by sqrt(N / total).
    """
    values = contributions.detach().double().cpu()
    count = len(values)
    if count < 2:
        return []
    values = values - values.mean()
    shrink = math.sqrt(count / total) if total is not None and total > count else 1.0
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(draws):
        chosen = torch.randint(count, (count,), generator=generator)
        result.append(float(f"{shrink * float(values[chosen].mean()):.{DIGITS}g}"))
    return result


def interval(value: float, found: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The middle `level` of value + deviations; None without any."""
    if not found:
        return None
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(list(found), dtype=torch.float64), ends).tolist()
    return value + low, value + high


def difference_interval(
    value: float, found: Sequence[float], other_value: float, other_found: Sequence[float], level: float = LEVEL
) -> tuple[float, float] | None:
    """Of value - other_value: draw r of the one belongs to draw r of the other."""
    if not found or len(found) != len(other_found):
        return None
    return interval(value - other_value, [a - b for a, b in zip(found, other_found, strict=True)], level)


def binomial_interval(successes: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Clopper & Pearson 1934: the shares under which so many successes, or so few, are not rarer than (1 - level)/2.

    Exact and never too narrow, which a handful of answers needs. Nothing asked: [0, 1].
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count}")
    rare = (1 - level) / 2
    low = 0.0 if successes == 0 else _share_where(lambda p: 1 - _at_most(successes - 1, count, p), rare)
    high = 1.0 if successes == count else 1 - _share_where(lambda q: _at_most(successes, count, 1 - q), rare)
    return low, high


def _share_where(grows: object, target: float) -> float:
    """The p in [0, 1] at which a growing function of p reaches the target, by halving."""
    assert callable(grows)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < target else (low, middle)
    return (low + high) / 2


def _at_most(successes: int, count: int, p: float) -> float:
    """P(X <= successes) of a binomial distribution, in logarithms so that thousands of answers do not underflow."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or successes >= count else 0.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * math.log(p)
        + (count - k) * math.log1p(-p)
        for k in range(successes + 1)
    ]  # fmt: skip
    most = max(logs)
    return min(1.0, math.exp(most) * math.fsum(math.exp(v - most) for v in logs))
