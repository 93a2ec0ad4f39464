"""Positions of tokens: the official tables, a slow formula, and any size and aspect ratio."""

from __future__ import annotations

import math

import pytest
import torch
from parity_data import weights

from darkroom.networks.positions import axis_embedding, fitted_table, position_table, square_table


def slow(row: float, column: float, width: int) -> list[float]:
    """The embedding of one place, number by number."""
    half, quarter = width // 2, width // 4
    values = []
    for axis in (column, row):
        angles = [axis / 10_000 ** (2 * i / half) for i in range(quarter)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return values


@pytest.mark.parametrize(
    ("width", "grid", "coord_scale"), [(64, 12, 0.5), (192, 16, 0.5), (32, 5, 1.0), (48, 9, 1 / 3)]
)
def test_the_stored_table_is_the_official_one(width: int, grid: int, coord_scale: float) -> None:
    recipe = {"kind": "sincos_2d", "dim": width, "grid": grid, "coord_scale": coord_scale}
    expected = torch.from_numpy(weights().derived_tensor(recipe))
    torch.testing.assert_close(square_table(grid, grid * coord_scale, width), expected, atol=1e-6, rtol=0)


def test_table_is_the_formula_at_any_coordinates() -> None:
    rows, columns = torch.tensor([-1.5, 0.0, 7.0]), torch.tensor([0.25, 30.0])
    expected = torch.tensor([[slow(float(r), float(c), 24) for r in rows for c in columns]])
    torch.testing.assert_close(position_table(rows, columns, 24), expected, atol=1e-6, rtol=0)


def test_axes_do_not_mix() -> None:
    table = position_table(torch.arange(3), torch.arange(4), 32)[0].unflatten(0, (3, 4))
    columns, rows = table.chunk(2, dim=-1)
    assert torch.equal(columns[0], columns[2]) and torch.equal(rows[:, 0], rows[:, 3])
    assert axis_embedding(torch.arange(3), 16).dtype == torch.float64


SIDE, WIDTH = 8, 16
TABLE = square_table(SIDE, 4, WIDTH)  # coordinates 0, 0.5, ..., 3.5


def places(rows: list[float], columns: list[float]) -> torch.Tensor:
    return torch.tensor([[slow(r, c, WIDTH) for r in rows for c in columns]])


def test_a_table_of_the_same_size_is_itself() -> None:
    """Whatever values a checkpoint stored: they are used, not the formula."""
    own = torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(0))
    for fit in ("stretch", "crop"):
        assert torch.equal(fitted_table(own, SIDE, 4, (SIDE, SIDE), fit), own)


def test_crop_takes_the_middle_of_what_is_stored() -> None:
    own = torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(0))
    got = fitted_table(own, SIDE, 4, (3, 6), "crop").unflatten(1, (3, 6))
    assert torch.equal(got, own.unflatten(1, (SIDE, SIDE))[:, 2:5, 1:7])


@pytest.mark.parametrize("size", [(8, 12), (11, 8), (9, 15), (4, 30)])
def test_crop_goes_on_beyond_the_table(size: tuple[int, int]) -> None:
    """The same window of the endless formula, part of which the table stores."""
    starts = [(SIDE - n) // 2 for n in size]
    rows, columns = ([0.5 * (start + i) for i in range(n)] for start, n in zip(starts, size, strict=True))
    torch.testing.assert_close(fitted_table(TABLE, SIDE, 4, size, "crop"), places(rows, columns), atol=1e-6, rtol=0)


def test_what_goes_on_beyond_the_table_holds_the_table() -> None:
    inside = fitted_table(TABLE, SIDE, 4, (10, 10), "crop").unflatten(1, (10, 10))[:, 1:9, 1:9].flatten(1, 2)
    torch.testing.assert_close(inside, TABLE, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (6, 13), (1, 8)])
def test_stretch_spans_the_same_coordinates(size: tuple[int, int]) -> None:
    rows, columns = ([4 * i / n for i in range(n)] for n in size)
    got = fitted_table(TABLE, SIDE, 4, size, "stretch")
    torch.testing.assert_close(got, places(rows, columns), atol=1e-6, rtol=0)


def test_stretch_of_the_double_holds_the_table() -> None:
    double = fitted_table(TABLE, SIDE, 4, (2 * SIDE, 2 * SIDE), "stretch").unflatten(1, (2 * SIDE, 2 * SIDE))
    torch.testing.assert_close(double[:, ::2, ::2].flatten(1, 2), TABLE, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("size", [(16, 4), (3, 21)])
def test_places_stay_told_apart(fit: str, size: tuple[int, int]) -> None:
    table = fitted_table(TABLE, SIDE, 4, size, fit)[0]  # type: ignore[arg-type]
    distances = torch.cdist(table, table) + 10 * torch.eye(len(table))
    assert float(distances.min()) > 0.05
