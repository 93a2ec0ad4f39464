"""Blended tiles: weights sum to one, what is local stays exact, and the error elsewhere is small."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_autoencoders import make_autoencoder

from darkroom.errors import DarkroomError
from darkroom.first_stage import tiling
from darkroom.first_stage.blended import blend_tiles, tile_ranges, tile_weights
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.tiling import Tiling


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(5, 8, 2), (8, 8, 4), (9, 8, 4), (100, 16, 4), (37, 6, 3), (7, 1, 0), (33, 16, 0)]
)
def test_tiles_cover_everything_and_weights_sum_to_one(length: int, tile: int, overlap: int) -> None:
    ranges = tile_ranges(length, tile, overlap)
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    for (_, stop), (start, _) in itertools.pairwise(ranges):
        assert overlap <= stop - start
    total = torch.zeros(3 * length, dtype=torch.float64)
    for (start, stop), weights in zip(ranges, tile_weights(ranges, overlap, 3), strict=True):
        assert (weights > 0).all()
        total[3 * start : 3 * stop] += weights
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)


def test_weights_are_linear_across_an_overlap() -> None:
    left, right = tile_weights([(0, 8), (4, 12)], 4, 1)
    expected = torch.tensor([1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125], dtype=torch.float64)
    torch.testing.assert_close(left, expected)
    torch.testing.assert_close(right, expected.flip(0))


@pytest.mark.parametrize("scale", [(1, 1), (1, 2), (2, 1)])
def test_a_network_that_looks_at_single_positions_is_exact(scale: tuple[int, int]) -> None:
    i, o = scale
    x = torch.randn(2, 3, 11 * i, 23 * i, dtype=torch.float64)

    def network(x: torch.Tensor) -> torch.Tensor:
        return x[:, :2, ::i, ::i].square().repeat_interleave(o, 2).repeat_interleave(o, 3)

    torch.testing.assert_close(blend_tiles(network, x, 5, 2, scale), network(x))


def test_too_much_overlap() -> None:
    with pytest.raises(DarkroomError, match="0 to 4, not by 5"):
        blend_tiles(lambda x: x, torch.zeros(1, 1, 20, 20), 8, 5, (1, 1))


@pytest.mark.parametrize("name", ["kl", "vq"])
@torch.no_grad()
def test_blended_autoencoder_is_near_the_whole(name: str) -> None:
    first_stage = FirstStage(make_autoencoder(name))
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 6).double() * 2 - 1, (45, 61), mode="bicubic")
    whole = first_stage.encode(image)
    tiles = Tiling(32, mode="blended", overlap=16)
    blended = first_stage.encode(image, tiles)
    assert blended.mean.shape == whole.mean.shape
    error = (blended.mean - whole.mean).square().mean().sqrt() / whole.mean.std()
    assert 1e-6 < error < 0.5
    decoded = first_stage.decode(whole.mode(), tiles, size=(61, 45))
    expected = first_stage.decode(whole.mode(), size=(61, 45))
    assert decoded.shape == image.shape
    assert 1e-6 < (decoded - expected).square().mean().sqrt() / expected.std() < 0.5
    torch.testing.assert_close(first_stage.encode(image, Tiling(256, mode="blended")).mean, whole.mean)


@torch.no_grad()
def test_blended_is_whole_where_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = make_autoencoder("kl")
    latent = torch.randn(1, 2, 9, 9).double()
    auto = tiling.decode(autoencoder, latent, Tiling(mode="blended"))
    assert torch.equal(auto, autoencoder.decode(latent))
    monkeypatch.setattr(tiling, "DEFAULT_TILE", 8)
    monkeypatch.setattr(tiling, "available_memory", lambda device: 0)
    assert not torch.equal(tiling.decode(autoencoder, latent, Tiling(mode="blended")), auto)
