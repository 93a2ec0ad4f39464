"""DPM-Solver and DPM-Solver++: exponential integrators, exact in x and a polynomial in half log-SNR for the estimate.

One multistep method holds the family: one evaluation per step, order 2 or 3, on x0 (`dpm++...`) or on the noise
(`dpm`, which with the exact integral is also `deis`), with or without fresh noise.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.prediction import epsilon_from_x0
from darkroom.solvers.common import Callback, Denoise, Noise, framed, refreshed, step_towards

Correction = Literal["midpoint", "heun"]


def _slopes(now: float, value: Tensor, history: list[tuple[float, Tensor]], h: float) -> tuple[Tensor, Tensor | None]:
    """(h f', h^2 f''/2) at `now`, of the polynomial through `value` and one or two older ones, newest first."""
    (l1, v1), *older = history
    first = (h / (now - l1)) * (value - v1)
    if not older:
        return first, None
    l2, v2 = older[0]
    bend = first - (h / (l1 - l2)) * (v1 - v2)
    return first + ((now - l1) / (now - l2)) * bend, (h / (now - l2)) * bend


def _curvature(z: float, slope: Tensor, bend: Tensor | None, correction: Correction) -> Tensor:
    """What the polynomial adds to a step, per unit of its scale: Lu et al. 2022 (DPM-Solver++), App. B.

    With f1 = e^z - 1 the term of a slope is f2 = f1/z - 1, the exact integral (`heun` in the official code), or
    its like f1/2 (`midpoint`); that of the bend is f3 = f2/z - 1/2, half the exact one, as in all official codes.
    """
    f1 = math.expm1(z)
    f2 = f1 / z - 1
    if bend is not None:
        return f2 * slope + (f2 / z - 0.5) * bend
    return (f2 if correction == "heun" else 0.5 * f1) * slope


def _kept(sigma_next: float, h: float, eta: float) -> float:
    """sigma' exp(-eta h): the share of the noise that is not drawn anew."""
    return sigma_next * math.exp(-eta * h) if eta > 0 else sigma_next


def dpm_multistep(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    variable: Literal["x0", "epsilon"] = "x0",
    order: Literal[1, 2, 3] = 2,
    correction: Correction = "midpoint",
    eta: float = 0.0,
    noise_scale: float = 1.0,
    frame: Literal["edm", "flow"] = "edm",
    lower_order_final: bool = False,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver; DPM-Solver++, alg. 2). x (B, ...) at grid[0] -> x at grid[-1].

    With h = l' - l, l the half log-SNR, and the step of first order (s'/s) x + (a' - a s'/s) x0:
        x0:       x' = first - a' (f2 D1 + f3 D2) at z = -(1 + eta) h;
        epsilon:  x' = first - s' (f2 D1 + f3 D2) at z = h, D1 and D2 of the noise estimates.
    First order where l is infinite: after a start from pure noise and on arriving at sigma = 0.
    eta: on x0 only; x keeps s' e^(-eta h) of its noise and the rest is drawn, `noise_scale` times it.
    frame: `flow` takes l = -log(sigma / (alpha + sigma)), finite at pure noise: what the official SD3 code does.
    lower_order_final: the order falls to 1 over the last steps, also where they end at sigma > 0.
    """
    history: list[tuple[float, Tensor]] = []
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        now, following = (_log_ratio(level, frame == "flow") for level in (here, there))
        h = following - now
        value = x0 if variable == "x0" else epsilon_from_x0(x, x0, here)
        sigma_next = float(there.sigma)
        kept = _kept(sigma_next, h, eta)
        moved = step_towards(x, x0, here, there, kept)
        known = history[: (min(order, grid.steps - i) if lower_order_final else order) - 1]
        # `quad` grids may repeat a level: no slope can be taken across such a step.
        if known and 0 < h < math.inf and _descending(now, known):
            slope, bend = _slopes(now, value, known, h)
            if variable == "x0":
                scale, _ = framed(there, frame == "flow")
                z = -(1 + eta) * h
            else:
                scale, z = sigma_next, h
            moved = moved - scale * _curvature(z, slope, bend, correction)
        x = refreshed(moved, noise_scale * math.sqrt(max(sigma_next**2 - kept**2, 0.0)), noise, i)
        history = [(now, value), *history][: order - 1] if now > -math.inf else []
    return x


def _log_ratio(level: NoiseLevel, flow_frame: bool) -> float:
    _, s = framed(level, flow_frame)
    return -math.log(s) if s > 0 else math.inf


def _descending(now: float, history: list[tuple[float, Tensor]]) -> bool:
    times = [now, *(then for then, _ in history)]
    return all(a > b for a, b in pairwise(times))


def dpm_plus_plus_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    frame: Literal["edm", "flow"] = "edm",
    correction: Correction = "midpoint",
    lower_order_final: bool = False,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), alg. 2: second order, one evaluation per step. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, frame=frame, correction=correction,
        lower_order_final=lower_order_final,
    )  # fmt: skip


def dpm_plus_plus_3m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    correction: Correction = "midpoint",
    lower_order_final: bool = False,
) -> Tensor:
    """The multistep method with a bend, from the third step on. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, order=3, correction=correction, lower_order_final=lower_order_final
    )


def dpm_plus_plus_2m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    correction: Correction = "midpoint",
) -> Tensor:
    """The stochastic DPM++ 2M of k-diffusion: eta = 0 is `dpm++2m`, eta = 1 the reverse SDE. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, eta=eta, noise_scale=noise_scale, correction=correction
    )


def dpm_plus_plus_3m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """The stochastic DPM++ 3M of k-diffusion; its second step takes the exact integral. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, order=3, eta=eta, noise_scale=noise_scale, correction="heun"
    )


def dpm(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    order: Literal[1, 2, 3] = 2,
    lower_order_final: bool = False,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver), multistep on the noise estimate. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, variable="epsilon", order=order, lower_order_final=lower_order_final
    )


def deis(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """Zhang & Chen 2023 (DEIS), log-rho Adams-Bashforth of order 2: the noise estimate is a line in log(sigma/alpha),
    integrated exactly. See `dpm_multistep`."""
    return dpm_multistep(
        denoise, x, grid, noise, callback=callback, variable="epsilon", correction="heun",
        lower_order_final=lower_order_final,
    )  # fmt: skip
