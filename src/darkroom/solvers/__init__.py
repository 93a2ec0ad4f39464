"""Numerical methods that carry x from noise to data: stateless functions over a grid of levels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from darkroom.solvers.ddim import ddim

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
}
