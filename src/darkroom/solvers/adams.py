"""Adams-Bashforth methods: the derivative is a polynomial through the last evaluations.

PLMS has the textbook coefficients on the noise estimate; LMS integrates the polynomial over the uneven levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.prediction import epsilon_from_x0, x0_from_epsilon
from darkroom.solvers.common import Callback, Denoise, Noise, framed, in_flow_frame, step_towards

# Weights of the newest and of older noise estimates, by how many there are; Liu et al. 2022 (PNDM), eq. 12.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    first, *others = (weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    return sum(others, first)


def plms(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Liu et al. 2022 (PNDM), as in the official LDM code: fourth order, N + 1 evaluations in N steps.
    x (B, ...) at grid[0] -> x at grid[-1].

    A DDIM step with the extrapolated noise. The first one takes the mean of the estimates at its two ends, where the
    end has noise. At alpha = 0 the noise estimate says nothing: such a step is plain DDIM and is forgotten.
    """
    del noise
    estimates: list[Tensor] = []
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        if float(here.alpha) == 0:
            x = step_towards(x, x0, here, there)
            continue
        estimates = [epsilon_from_x0(x, x0, here), *estimates][:4]
        if len(estimates) > 1:
            epsilon = weighted_sum(ADAMS_BASHFORTH[len(estimates)], estimates)
        elif float(there.sigma) > 0:
            ahead = step_towards(x, x0, here, there)
            epsilon = 0.5 * (estimates[0] + epsilon_from_x0(ahead, denoise(ahead, there), there))
        else:
            epsilon = estimates[0]
        x = step_towards(x, x0_from_epsilon(x, epsilon, here), here, there)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    order: int = 4,
    frame: Literal["edm", "flow"] | None = None,
) -> Tensor:
    """k-diffusion's linear multistep method: dy/dS = (y - x0)/S of y = x/k, extrapolated by a polynomial in S.
    x (B, ...) at grid[0] -> x at grid[-1]. frame: see `in_flow_frame`; order: how many evaluations are used."""
    del noise
    flow_frame = in_flow_frame(grid, frame)
    history: list[tuple[float, Tensor]] = []
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        (k, s), (k_next, s_next) = framed(here, flow_frame), framed(there, flow_frame)
        if not math.isfinite(s) or (history and s >= history[0][0]):
            # Pure noise in the EDM frame, or a level that is repeated: no polynomial goes through it.
            x, history = step_towards(x, x0, here, there), []
            continue
        history = [(s, (x / k - x0) / s), *history][:order]
        weights = lagrange_integrals([s for s, _ in history], s_next)
        x = k_next * (x / k + weighted_sum(weights, [slope for _, slope in history]))
    return x


def lagrange_integrals(nodes: list[float], end: float) -> list[float]:
    """For each node j the integral from nodes[0] to `end` of its Lagrange polynomial, which is 1 at node j and 0 at the
    others: Gauss-Legendre, exact for up to eight nodes."""
    start, half = nodes[0], (end - nodes[0]) / 2
    result = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        values = (
            weight * math.prod((start + half * (1 + t) - other) / (node - other) for other in others)
            for t, weight in GAUSS_LEGENDRE
        )
        result.append(half * sum(values))
    return result


# (place in [-1, 1], weight) of the rule with four points, exact up to degree 7; Abramowitz & Stegun, table 25.4.
_INNER, _OUTER = (math.sqrt(3 / 7 + sign * 2 / 7 * math.sqrt(6 / 5)) for sign in (-1, 1))
_HEAVY, _LIGHT = ((18 + sign * math.sqrt(30)) / 36 for sign in (1, -1))
GAUSS_LEGENDRE = ((-_OUTER, _LIGHT), (-_INNER, _HEAVY), (_INNER, _HEAVY), (_OUTER, _LIGHT))
