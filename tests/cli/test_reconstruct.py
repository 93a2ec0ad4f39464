"""`darkroom reconstruct`, and `generate` of models that do not make 8-bit colour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from tiny_models import tiny_model

from darkroom.build import build_first_stage
from darkroom.data.image_files import image_bytes, read_samples
from darkroom.model_io import save
from darkroom.pixel_format import PixelFormat
from darkroom.png_settings import read_settings

SMALL = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8, "z_channels": 3, "embed_dim": 3}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models grey16 (unconditional, 16-bit grey) and bands6 (six bands in floating point)."""
    folder = tmp_path_factory.mktemp("deep")
    for name, channels, pixels in (
        ("grey16", 1, PixelFormat.of("uint16")),
        ("bands6", 6, PixelFormat.of("float32", (0, 0.8))),
    ):
        torch.manual_seed(0)
        widths = {"in_channels": channels, "out_channels": channels, "pixels": pixels.to_dict()}
        model = tiny_model(None)
        model.first_stage = build_first_stage(SMALL | widths)
        model.save(folder / name)
        save(model.first_stage, folder / f"{name}-fs")
    return folder


def test_grey16_in_grey16_out(run: Run, deep: Path, tmp_path: Path) -> None:
    values = np.arange(19 * 15).reshape(19, 15, 1).astype(np.uint16) * 200
    (tmp_path / "a.png").write_bytes(image_bytes(values, ".png"))
    status, out, _ = run("reconstruct", deep / "grey16", "a.png", "-o", "b.png")
    assert status == 0 and "15x19, 16 bits, 0 to 65535" in out and "PSNR" in out
    with Image.open("b.png") as image:
        assert image.mode == "I;16" and image.size == (15, 19)
    status, out, _ = run("reconstruct", deep / "grey16-fs", "a.png", "--tile", "none")
    assert status == 0 and out.startswith("a-reconstructed.png")
    assert Path("a-reconstructed.png").read_bytes() == Path("b.png").read_bytes()


def test_bands(run: Run, deep: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((8, 10, 6)).astype(np.float32)  # some above 0.8
    (tmp_path / "a.tif").write_bytes(image_bytes(values, ".tif"))
    status, _, error = run("reconstruct", deep / "bands6", "a.tif", "-o", "b.npy")
    assert status == 0 and "clipped" in error
    back = np.load("b.npy")
    assert back.shape == values.shape and back.dtype == np.float32 and back.min() >= 0 and back.max() <= 0.8


def test_convert(run: Run, refused: Callable[..., str], deep: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(np.zeros((8, 8, 3), np.uint8), ".png"))
    line = refused("reconstruct", deep / "grey16", "a.png")
    assert "has 3 channels of uint8, the model takes 1 channel of uint16" in line and "--convert" in line
    assert run("reconstruct", deep / "grey16", "a.png", "--convert")[0] == 0
    with Image.open("a-reconstructed.png") as image:
        assert image.mode == "I;16"


def test_errors(refused: Callable[..., str], deep: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(np.zeros((8, 8, 1), np.uint16), ".png"))
    (tmp_path / "text.png").write_text("hello")
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 6), np.float32))
    assert "no such file" in refused("reconstruct", deep / "grey16", "none.png")
    assert "not a picture" in refused("reconstruct", deep / "grey16", "text.png")
    assert "--tile" in refused("reconstruct", deep / "grey16", "a.png", "--tile", "big")
    assert "image itself" in refused("reconstruct", deep / "grey16", "a.png", "-o", "a.png")
    assert "PNG cannot hold 6-channel float32" in refused("reconstruct", deep / "bands6", "b.npy", "-o", "x.png")
    for more in ((), ("--convert",)):  # nobody knows the range of floats
        line = refused("reconstruct", deep / "grey16", "b.npy", "-o", "x.png", *more)
        assert "has 6 channels of float32, the model takes 1 channel of uint16; save it as uint16" in line


@pytest.mark.parametrize(
    ("model", "suffix"), [("grey16", ".png"), ("grey16", ".tif"), ("bands6", ".tif"), ("bands6", ".npy")]
)
def test_generate_in_a_type_that_holds_it(run: Run, deep: Path, model: str, suffix: str) -> None:
    status, _, error = run("generate", "-m", deep / model, "--steps", 2, "-o", f"x{suffix}")
    assert status == 0, error
    values = read_samples(Path(f"x{suffix}").read_bytes(), 6 if model == "bands6" else 1).values
    assert values.shape == ((16, 16, 6) if model == "bands6" else (16, 16, 1))
    assert str(values.dtype) == ("float32" if model == "bands6" else "uint16")
    record = read_settings(f"x{suffix}")
    assert record["request"]["steps"] == 2
    if suffix == ".npy":
        assert json.loads(Path("x.json").read_text())["parameters"].startswith("\n") or Path("x.json").is_file()
    assert run("generate", "--from", f"x{suffix}", "-m", deep / model, "-o", f"again{suffix}")[0] == 0
    again = read_samples(Path(f"again{suffix}").read_bytes(), values.shape[2]).values
    assert np.array_equal(values, again)


def test_generate_chooses_and_refuses(run: Run, refused: Callable[..., str], deep: Path) -> None:
    assert "PNG cannot hold" in refused("generate", "-m", deep / "bands6", "--steps", 1, "-o", "x.png")
    assert "a grid is written as .png" in refused("generate", "-m", deep / "bands6", "--grid", "-o", "x.tif")
    assert "images are written as" in refused("generate", "-m", deep / "bands6", "-o", "x.jpg")
    assert run("generate", "-m", deep / "bands6", "--steps", 1, "-o", "out")[0] == 0
    assert [p.suffix for p in Path("out").iterdir()] == [".tif"]
    assert run("generate", "-m", deep / "bands6", "--steps", 1, "-n", 4, "--grid", "-o", "grid.png")[0] == 0
    with Image.open("grid.png") as image:
        assert image.mode == "RGB"  # the first three bands, 8 bits


def test_info_tells_the_format(run: Run, deep: Path) -> None:
    assert "images of 16 bits, 0 to 65535" in run("info", deep / "grey16")[1]
    run("generate", "-m", deep / "bands6", "--steps", 1, "-o", "x.tif")
    out = run("info", "x.tif")[1]
    assert "6 channels of float32" in out and "darkroom generate --from" in out


def test_data_build_and_inspect(run: Run) -> None:
    assert run("data", "build", "phantoms16", "-o", "phantoms", "-n", 3, "--size", 32)[0] == 0
    out = run("data", "inspect", "phantoms", "--size", 32)[1]
    assert "in 16 bits; 1 channel" in out and "data.pixels is uint16" in out
    assert run("data", "build", "bands6", "-o", "bands", "-n", 3, "--size", 32)[0] == 0
    out = run("data", "inspect", "bands", "--size", 32)[1]
    assert "in 32 float bits; 6 channels" in out and "set data.channels to 6" in out
    assert "drawn on demand" in run("data", "inspect", "bands6", "--size", 32)[1]
