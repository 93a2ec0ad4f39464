"""Tiled results equal those of the whole image, whatever the strips, the memory and the place of the maps."""

from __future__ import annotations

import gc
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_autoencoders import AUTOENCODERS, make_autoencoder
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage import maps, tiling
from darkroom.first_stage.autoencoder import Autoencoder
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.maps import FileMap, MemoryMap, Shape, Workspace
from darkroom.first_stage.operations import Attend, Convolution, decoder_operations, encoder_operations, shapes
from darkroom.first_stage.strips import Attended, Statistics, UpsampledConvolved
from darkroom.first_stage.tiling import Tiling, run_strips, untiled_bytes

EXACT = {"atol": 1e-10, "rtol": 0}
PLENTY = 10**9
LATENT = (13, 7)  # height and width


def inputs(autoencoder: Autoencoder, batch: int = 1) -> tuple[Tensor, Tensor]:
    """An image and a latent, float64."""
    g, f, (h, w) = torch.Generator().manual_seed(1), autoencoder.downsampling, LATENT
    image = torch.randn(batch, autoencoder.image_channels, h * f, w * f, generator=g, dtype=torch.float64)
    return image, torch.randn(batch, autoencoder.latent_channels, h, w, generator=g, dtype=torch.float64)


def enough(autoencoder: Autoencoder) -> int:
    """Bytes that hold the keys and values of the largest attention, the strips, and few maps."""
    config, (h, w) = autoencoder.config, LATENT
    f = autoencoder.downsampling
    positions = h * f * w * f if config.attention_levels else h * w if config.bottleneck_attention else 0
    return 40_000 + 3 * 8 * config.channels * max(config.channel_mult) * positions


@pytest.mark.parametrize("place", ["memory", "files", "computed again"])
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_strips_equal_the_whole(name: str, place: str, tmp_path: Path) -> None:
    autoencoder = make_autoencoder(name)
    image, latent = inputs(autoencoder)
    memory = PLENTY if place == "memory" else enough(autoencoder)
    if place == "computed again":
        # Without files the sums of residual blocks must fit, the widest maps need not.
        operations, (h, w) = decoder_operations(autoencoder), LATENT
        memory = max(memory, *(8 * math.prod(shape) for shape in shapes(operations, latent.shape[1], h, w)))
    spill: Any = tmp_path if place == "files" else False
    moments, decoded = autoencoder.moments(image)[0], autoencoder.decode(latent)[0]
    for positions in (None, 1, 60):  # as the memory allows; single rows, lower than any halo; a few rows
        actual = run_strips(encoder_operations(autoencoder), image[0], memory, spill, positions)
        torch.testing.assert_close(actual, moments, **EXACT)
        actual = run_strips(decoder_operations(autoencoder), latent[0], memory, spill, positions)
        torch.testing.assert_close(actual, decoded, **EXACT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spill", [True, False])
def test_memory_is_bounded(spill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = make_autoencoder("kl")
    latent = torch.randn(2, 64, 16, dtype=torch.float64)
    largest = 16 * 128 * 32 * 8  # the map behind upsampling
    most, appended = 0, MemoryMap.append

    def append(self: MemoryMap, rows: Tensor) -> None:
        nonlocal most
        appended(self, rows)
        most = max(most, self._workspace.used)

    monkeypatch.setattr(MemoryMap, "append", append)
    run_strips(decoder_operations(autoencoder), latent, PLENTY)
    assert most > 1.4 * largest, "with plenty of memory everything is kept"
    most = 0
    run_strips(decoder_operations(autoencoder), latent, 1_000_000, spill, positions=128)
    assert most < 1_000_000 < 2 * largest


def test_what_was_spilled_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = make_autoencoder("three levels")
    image, _ = inputs(autoencoder)
    made: list[Workspace] = []
    start = Workspace.__init__

    def note(self: Workspace, *args: Any) -> None:
        start(self, *args)
        made.append(self)

    monkeypatch.setattr(Workspace, "__init__", note)
    for memory, spilled in ((PLENTY, False), (40_000, True)):
        run_strips(encoder_operations(autoencoder), image[0], memory, tmp_path)
        assert (made[-1].spilled > 0) == spilled


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_files_go_when_something_fails(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = make_autoencoder("three levels")
    image, _ = inputs(autoencoder)
    files: list[FileMap] = []
    append = FileMap.append

    def fail_later(self: FileMap, rows: Tensor) -> None:
        append(self, rows)
        files.append(self)
        if len(files) == 20:
            raise error

    monkeypatch.setattr(FileMap, "append", fail_later)
    with pytest.raises(error):
        run_strips(encoder_operations(autoencoder), image[0], 40_000, tmp_path)
    assert len(files) == 20 and all(f._file.closed for f in files)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_spill_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = make_autoencoder("three levels")
    operations, (image, _) = encoder_operations(autoencoder), inputs(autoencoder)
    with pytest.raises(DarkroomError, match=r"no folder .*nowhere"):
        run_strips(operations, image[0], 40_000, tmp_path / "nowhere")
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(maps.tempfile, "TemporaryFile", lambda **_: FileIO("/dev/full", "r+"))
        with pytest.raises(DarkroomError, match=r"full .*larger disk"):
            run_strips(operations, image[0], 40_000, tmp_path)


def test_too_little_memory_is_said() -> None:
    autoencoder = make_autoencoder("attention levels")
    image, _ = inputs(autoencoder)
    with pytest.raises(DarkroomError, match="keys and values: raise memory_gb"):
        run_strips(encoder_operations(autoencoder), image[0], 10_000)
    autoencoder = make_autoencoder("three levels")
    with pytest.raises(DarkroomError, match="does not fit the memory allowed"):
        run_strips(encoder_operations(autoencoder), inputs(autoencoder)[0][0], 10_000, spill=False)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": "big"}, {"mode": "fast"}, {"memory_gb": 0}, {"size": True}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(DarkroomError):
        Tiling(**options)


@torch.no_grad()
def test_auto_takes_the_whole_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = make_autoencoder("kl")
    _, latent = inputs(autoencoder, batch=2)
    runs: list[Any] = []
    monkeypatch.setattr(tiling, "run_strips", lambda *a: runs.append(a) or torch.zeros(3, 26, 14))
    assert torch.equal(tiling.decode(autoencoder, latent, "auto"), autoencoder.decode(latent)) and not runs
    need = 2 * untiled_bytes(decoder_operations(autoencoder), latent.shape[1:], 8)
    monkeypatch.setattr(tiling, "available_memory", lambda device: 2 * need)
    tiling.decode(autoencoder, latent, "auto")
    assert not runs
    monkeypatch.setattr(tiling, "available_memory", lambda device: 2 * need - 2)
    tiling.decode(autoencoder, latent, "auto")
    assert len(runs) == 2 and runs[0][2] == need - 1, "one run for each image, in half of what is free"
    tiling.decode(autoencoder, latent, Tiling("auto", memory_gb=need / 1e9))
    assert len(runs) == 2


def test_available_memory_is_a_sensible_number() -> None:
    assert 2**20 < tiling.available_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("name", ["kl", "vq", "three levels"])
@pytest.mark.parametrize("tile", [None, 8, Tiling(16, memory_gb=1e-4), Tiling(16, memory_gb=2e-4, spill=False), "auto"])
def test_any_size_of_image(name: str, tile: tiling.Tile) -> None:
    first_stage = FirstStage(make_autoencoder(name), shift=0.3, scale=2.0)
    f = first_stage.downsampling
    g = torch.Generator().manual_seed(0)
    for width, height in ((17, 10), (1, 1), (f, 5 * f), (3 * f + 1, f)):
        image = torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)
        padded = image[:, :, [*range(height), *[height - 1] * (-height % f)]]
        padded = padded[..., [*range(width), *[width - 1] * (-width % f)]]
        assert torch.equal(first_stage.pad(image), padded)
        whole = first_stage.normalise_posterior(first_stage.autoencoder.encode(padded))
        posterior = first_stage.encode(image, tile)
        torch.testing.assert_close(posterior.moments, whole.moments, **EXACT)
        decoded = first_stage.decode(whole.mode(), tile, size=(width, height))
        expected = first_stage.autoencoder.decode(first_stage.denormalise(whole.mode()))[..., :height, :width]
        assert decoded.shape == image.shape
        torch.testing.assert_close(decoded, expected, **EXACT)


def test_sizes_that_a_latent_cannot_have() -> None:
    first_stage = FirstStage(make_autoencoder("three levels"))
    latent = torch.zeros(1, 2, 3, 2, dtype=torch.float64)
    for size in ((4, 12), (9, 12), (8, 8), (8, 13)):
        with pytest.raises(DarkroomError, match=r"2x3 is no image .*above 4x8 and at most 8x12"):
            first_stage.decode(latent, size=size)
    with pytest.raises(DarkroomError, match="shape"):
        first_stage.encode(torch.zeros(1, 4, 5, 5, dtype=torch.float64), tile=8)


def test_float32_and_bfloat16() -> None:
    exact = make_autoencoder("attention levels")
    _, latent = inputs(exact)
    expected = exact.decode(latent)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        autoencoder = make_autoencoder("attention levels").to(dtype)
        tile = Tiling(8, memory_gb=1e-3)
        decoded = tiling.decode(autoencoder, latent.to(dtype), tile)
        assert decoded.dtype == dtype
        torch.testing.assert_close(decoded.double(), expected, atol=error, rtol=error)


def test_the_identity_has_nothing_to_tile() -> None:
    first_stage = FirstStage(IdentityAutoencoder(2))
    image = torch.randn(1, 2, 5, 3)
    assert torch.equal(first_stage.decode(first_stage.encode(image, tile=4).mode(), tile="auto"), image)


def test_tiled_results_have_no_graph_and_whole_ones_do() -> None:
    first_stage = FirstStage(make_autoencoder("kl"))
    latent = inputs(make_autoencoder("kl"))[1].requires_grad_()
    assert first_stage.decode(latent).requires_grad
    assert not first_stage.decode(latent, tile=8).requires_grad


# --- parts --------------------------------------------------------------------------------------------------------


def test_statistics_of_strips_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 9, 7) * torch.logspace(-3, 3, 12)[:, None, None] + 300.0
    norm = nn.GroupNorm(3, 12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    statistics = Statistics(12)
    for start, stop in ((0, 1), (1, 6), (6, 9)):
        statistics.add(x[:, start:stop].permute(1, 2, 0))
    scale, offset = statistics.affine(norm)
    expected = norm.double()(x.double()[None])[0]
    actual = x.double() * scale[:, None, None] + offset[:, None, None]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def stored(x: Tensor) -> MemoryMap:
    """(C, H, W)"""
    source = MemoryMap(Shape(x.shape[1], x.shape[2], x.shape[0]), Workspace(PLENTY, None))
    source.append(x.permute(1, 2, 0).contiguous())
    return source


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3)])
@torch.no_grad()
def test_convolution_behind_upsampling(height: int, width: int) -> None:
    torch.manual_seed(0)
    x, conv = torch.randn(4, height, width, dtype=torch.float64), nn.Conv2d(4, 6, 3, padding=1).double()
    expected = conv(nn.functional.interpolate(x[None], scale_factor=2.0, mode="nearest"))[0].permute(1, 2, 0)
    assert UpsampledConvolved.fits(Convolution(conv, (1, 1, 1, 1)))
    source = UpsampledConvolved(stored(x), conv)
    for start in range(2 * height):
        for stop in range(start + 1, 2 * height + 1):
            torch.testing.assert_close(source.compute(start, stop), expected[start:stop], **EXACT)
            (needed,) = source.reads(start)
            assert needed[1] <= max(0, (start - 1) // 2)


@torch.no_grad()
def test_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from darkroom.first_stage import strips

    monkeypatch.setattr(strips, "QUERIES", 4)
    monkeypatch.setattr(strips, "KEYS", 7)
    torch.manual_seed(0)
    attend = Attend(*(nn.Conv2d(6, 6, 1).double() for _ in range(4)))
    x = 5 * torch.randn(6, 5, 3, dtype=torch.float64)
    source = Attended(stored(x), attend)
    expected = attend(x[None])[0].permute(1, 2, 0)
    for start, stop in ((0, 2), (2, 5), (0, 5)):
        torch.testing.assert_close(source.compute(start, stop), expected[start:stop], **EXACT)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_maps_give_back_what_was_written(kind: str, tmp_path: Path) -> None:
    x = torch.randn(9, 4, 3).to(torch.bfloat16)
    with Workspace(PLENTY if kind == "memory" else 0, tmp_path) as workspace:
        made = workspace.make(Shape(9, 4, 3), 2)
        assert isinstance(made, MemoryMap if kind == "memory" else FileMap)
        for start, stop in ((0, 2), (2, 3), (3, 9)):
            made.append(x[start:stop])
        assert torch.equal(made.rows(1, 8), x[1:8]) and torch.equal(torch.cat(list(made.pieces(0, 9))), x)
        made.release(3)
        assert workspace.used == (6 * 4 * 3 * 2 if kind == "memory" else 0)
        assert torch.equal(made.rows(3, 4), x[3:4])
        made.close()
        assert workspace.used == 0
    gc.collect()
    assert not list(tmp_path.iterdir())
