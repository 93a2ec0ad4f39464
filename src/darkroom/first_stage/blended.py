"""The usual fast tiling: overlapping tiles go through the network one by one and are blended linearly.

Not equal to the whole image: each norm takes the statistics, and each attention the positions, of one tile only. Tones
of large even areas may differ from tile to tile; docs/large-images.md measures it. `tiling.py` is exact.
Shapes: B batch, C channels, h w latent size; i, o: input and output positions per latent position along each side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from darkroom.errors import DarkroomError

Range = tuple[int, int]


@torch.no_grad()
def blend_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: tuple[int, int]
) -> Tensor:
    """function(x) by tiles: (B, C, h*i, w*i) -> (B, C', h*o, w*o), scale = (i, o).

    Tiles are `tile` latent positions high and wide and share at least `overlap` with their neighbours. The result is a
    weighted mean with weights that sum to 1, so that the order of the tiles makes no difference.
    """
    if not 0 <= 2 * overlap <= tile:
        raise DarkroomError(f"tiles of {tile} latent positions overlap by 0 to {tile // 2}, not by {overlap}")
    i, o = scale
    height, width = x.shape[-2] // i, x.shape[-1] // i
    rows, columns = tile_ranges(height, tile, overlap), tile_ranges(width, tile, overlap)
    row_weights, column_weights = (tile_weights(ranges, overlap, o) for ranges in (rows, columns))
    out: Tensor | None = None
    for (top, bottom), down in zip(rows, row_weights, strict=True):
        band: Tensor | None = None  # the tiles of one row, blended from left to right
        for (left, right), across in zip(columns, column_weights, strict=True):
            y = function(x[:, :, top * i : bottom * i, left * i : right * i])
            if band is None:
                band = y.new_zeros(*y.shape[:3], width * o)
            band[..., left * o : right * o] += y * across.to(y)
        assert band is not None
        if out is None:
            out = band.new_zeros(*band.shape[:2], height * o, width * o)
        out[:, :, top * o : bottom * o] += band * down.to(band)[:, None]
    assert out is not None
    return out


def tile_ranges(length: int, tile: int, overlap: int) -> list[Range]:
    """(start, stop) of the fewest tiles that cover `length`, evenly spread."""
    if length <= tile:
        return [(0, length)]
    steps = -(-(length - tile) // (tile - overlap))
    starts = [i * (length - tile) // steps for i in range(steps + 1)]
    return [(start, start + tile) for start in starts]


def tile_weights(ranges: Sequence[Range], overlap: int, o: int) -> list[Tensor]:
    """(n*o,) for each tile: the share of its output positions. It falls linearly over `overlap` towards an edge where
    another tile goes on, and the shares of all tiles sum to 1 everywhere."""
    total = torch.zeros(ranges[-1][1] * o, dtype=torch.float64)
    weights = []
    for start, stop in ranges:
        from_edge = torch.arange((stop - start) * o, dtype=torch.float64) + 0.5
        weight = torch.ones_like(from_edge)
        if overlap and start > 0:
            weight = torch.minimum(weight, from_edge / (overlap * o))
        if overlap and stop < ranges[-1][1]:
            weight = torch.minimum(weight, from_edge.flip(0) / (overlap * o))
        weights.append(weight)
        total[start * o : stop * o] += weight
    return [weight / total[start * o : stop * o] for weight, (start, stop) in zip(weights, ranges, strict=True)]
