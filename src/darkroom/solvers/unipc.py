"""UniPC: a multistep predictor, and a corrector that uses the next evaluation without one of its own."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.solvers.common import Callback, Denoise, Noise, step_towards


def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Tensor:
    """Zhao et al. 2023 (UniPC), alg. 5-8, on x0. x (B, ...) at grid[0] -> x at grid[-1], one evaluation per step.

    Each evaluation first corrects the x it was made at, starting again from the x before, and then serves to predict
    the next. First order, without a correction, where half log-SNR is infinite: from pure noise and to the data.
    variant: B(h) = h or e^h - 1. lower_order_final: the order falls to 1 over the last steps.
    """
    del noise
    history: list[tuple[float, Tensor]] = []  # (half log-SNR, x0) of the steps before, newest first
    start: tuple[Tensor, NoiseLevel, int] | None = None  # x, level and order of the step that led here
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        now, following = float(here.half_log_snr), float(there.half_log_snr)
        if start is not None:
            x_start, level, used = start
            x = _step(x_start, history[:used], level, here, variant, (now, x0))
        # Where nothing lies between two levels (pure noise twice, `quad` grids) no slope can be taken.
        usable = now > -math.inf and (not history or now > history[0][0])
        history = [(now, x0), *(history if usable else [])][:order]
        used = min(len(history), grid.steps - i if lower_order_final else order)
        if not (now > -math.inf and now < following < math.inf):
            used = 1
            start = None
        else:
            start = (x, here, used)
        x = _step(x, history[:used], here, there, variant)
        if now == -math.inf:
            history = []
    return x


def _step(
    x: Tensor,
    history: list[tuple[float, Tensor]],
    here: NoiseLevel,
    there: NoiseLevel,
    variant: str,
    ahead: tuple[float, Tensor] | None = None,
) -> Tensor:
    """x at `here` -> x at `there` from the estimates at `here` and before (newest first), and with `ahead` also at
    `there`:  x' = (s'/s) x + (a' - a s'/s) x0 - a' B(h) sum_k rho_k (x0_k - x0) / r_k,  r_k = (l_k - l)/h."""
    (now, x0), *others = history
    points = others if ahead is None else [*others, ahead]
    moved = step_towards(x, x0, here, there)
    if not points:
        return moved
    h = float(there.half_log_snr) - now
    ratios = [(then - now) / h for then, _ in points]
    weights = _weights(ratios, h, variant)
    scale = -h if variant == "bh1" else math.expm1(-h)
    bend = sum(w / r * (value - x0) for w, r, (_, value) in zip(weights, ratios, points, strict=True))
    return moved - float(there.alpha) * scale * bend


def _weights(ratios: list[float], h: float, variant: str) -> list[float]:
    """rho: sum_k rho_k r_k^(n-1) = n! f_(n+1) / B(h) for n = 1..len(ratios); f_(n+1) = (f_n - 1/n!) / z with f_1 =
    e^z - 1, z = -h, times z; Zhao et al. 2023, eq. 5-8. With a single point 1/2, its limit for small h, as the
    official code."""
    if len(ratios) == 1:
        return [0.5]
    z = -h
    scale = z if variant == "bh1" else math.expm1(z)
    f, factorial, right = math.expm1(z) / z - 1, 1.0, []
    for n in range(1, len(ratios) + 1):
        right.append(f * factorial / scale)
        factorial *= n + 1
        f = f / z - 1 / factorial
    matrix = torch.tensor([[r**n for r in ratios] for n in range(len(ratios))], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
