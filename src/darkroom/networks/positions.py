"""Where a token lies in the picture: two-dimensional sine and cosine embeddings at any size and aspect ratio.

Source: Vaswani et al. 2017, sec. 3.5, per axis; the table of Dosovitskiy et al. 2021 as DiT and Stable Diffusion 3 use
it. An axis is embedded alone: a table is nothing but all pairs of a row and a column.

Shapes: h w rows and columns of tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PositionFit = Literal["stretch", "crop"]


def axis_embedding(coordinates: Tensor, width: int) -> Tensor:
    """(n,) -> (n, width) float64: [sin(x f_i), cos(x f_i)] with f_i = 10000^(-i/half), half = width / 2."""
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=coordinates.device) / half)
    angles = coordinates.double()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_table(rows: Tensor, columns: Tensor, width: int, device: torch.device | None = None) -> Tensor:
    """Coordinates (h,) and (w,) -> (1, h*w, width) float32, row by row; the column fills the first half of the width.

    Column first: the official code of DiT builds its grid with "w goes first", and SD 3 inherited the order.
    device: where the result is wanted, if not where the coordinates are; some have no float64.
    """
    y, x = (axis_embedding(axis, width // 2).float().to(device or axis.device) for axis in (rows, columns))
    h, w = len(rows), len(columns)
    table = torch.cat([x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)], dim=-1)
    return table.reshape(1, h * w, width)


def square_table(side: int, base: float, width: int) -> Tensor:
    """(1, side*side, width): the coordinates 0 .. side-1 shrunk to 0 .. base."""
    coordinates = torch.arange(side, dtype=torch.float64) * (base / side)
    return position_table(coordinates, coordinates, width)


def fitted_table(table: Tensor, side: int, base: float, size: tuple[int, int], fit: PositionFit) -> Tensor:
    """The embedding (1, h*w, D) of a grid of `size` = (h, w), given the stored table of `square_table(side, base)`.

    stretch: the grid spans the same coordinates as the table, whatever its size: "left" stays left, and places in
             between get values in between. A grid of the table's own size gets the table.
    crop:    the grid is a window in the middle of the table at unchanged spacing (Esser et al. 2024, App. B), which
             what was trained at several sizes wants. Beyond the table the formula goes on in all directions.
    """
    h, w = size
    # Stored values where there are any: a checkpoint's own table is what its network was trained with.
    if fit == "stretch":
        if h == w == side:
            return table
        rows, columns = (torch.arange(n, dtype=torch.float64) * (base / n) for n in (h, w))
    else:
        top, left = (side - h) // 2, (side - w) // 2
        if h <= side and w <= side:
            return table.unflatten(1, (side, side))[:, top : top + h, left : left + w].flatten(1, 2)
        rows, columns = (
            torch.arange(start, start + n, dtype=torch.float64) * (base / side) for start, n in ((top, h), (left, w))
        )
    return position_table(rows, columns, table.shape[-1], table.device).to(table.dtype)
