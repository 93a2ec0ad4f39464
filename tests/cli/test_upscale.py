"""`darkroom upscale`: what people have on their disks, and what becomes of it."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from condition_models import make_model
from photo_files import MODES, PROFILE, numbers, save_mode
from PIL import Image

from darkroom.data.degradations import LowResolution, degrade
from darkroom.data.image_files import image_bytes
from darkroom.pixel_format import PixelFormat

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_model("low_resolution", low_resolution={"noise_levels": 0})
    made.info |= {"name": "tiny-sr", "defaults": {"size": [32, 32], "steps": 1, "solver": "ddim"}}
    folder = tmp_path_factory.mktemp("sr") / "model"
    made.save(folder, card="# tiny\n")
    return str(folder)


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def test_a_photo_beside_which_the_result_is_written(run: Run, model: str) -> None:
    Path("pictures").mkdir()
    Image.fromarray(numbers((9, 14, 3))).save("pictures/photo.jpg", icc_profile=PROFILE)
    status, out, error = run("upscale", "pictures/photo.jpg", "-m", model, "--seed", 5, "--steps", 2)
    assert status == 0 and error == "" and out.strip() == "pictures/photo-upscaled.png"
    picture = opened(out.strip())
    assert picture.size == (56, 36) and picture.mode == "RGB" and picture.info["icc_profile"] == PROFILE
    record = json.loads(picture.info["darkroom"])
    assert record["request"]["seeds"] == [5] and record["request"]["steps"] == 2
    assert record["upscale"]["factor"] == 4 and record["upscale"]["input_size"] == [14, 9]
    assert record["model"]["name"] == "tiny-sr" and "source" not in record["model"]  # an absolute path
    assert "Steps: 2" in picture.info["parameters"] and "Size: 56x36" in picture.info["parameters"]
    assert str(Path.cwd()) not in str(picture.info)
    first = Path(out.strip()).read_bytes()
    run("upscale", "pictures/photo.jpg", "-m", model, "--seed", 5, "--steps", 2, "--overwrite")
    assert Path(out.strip()).read_bytes() == first
    status, _, error = run("upscale", "pictures/photo.jpg", "-m", model, "--steps", 1, "-o", "a.npy")
    assert status == 0 and "only .png and .tif keep the colour profile of pictures/photo.jpg" in error
    told = run("info", out.strip())[1]
    assert "made by darkroom upscale: repeat that command" in told and "input size: [14, 9]" in told


def test_a_recipe_is_no_model(refused: Refused) -> None:
    Image.fromarray(numbers((8, 8, 3))).save("a.png")
    told = refused("upscale", "a.png", "-m", "clothing-deblur")
    assert "it is a recipe; darkroom train clothing-deblur --data FOLDER makes a model of it" in told


def test_what_is_there_is_not_lost(run: Run, refused: Refused, model: str) -> None:
    Image.fromarray(numbers((8, 8, 3))).save("a.png")
    Path("out.png").write_bytes(b"mine")
    assert "out.png is there already" in refused("upscale", "a.png", "-m", model, "-o", "out.png")
    assert Path("out.png").read_bytes() == b"mine"
    assert "that is the photo itself" in refused("upscale", "a.png", "-m", model, "-o", "a.png", "--overwrite")
    assert run("upscale", "a.png", "-m", model, "-o", "out.png", "--overwrite")[0] == 0
    assert "made by `darkroom upscale`" in refused("generate", "--from", "out.png", "-o", "again.png")


@pytest.mark.parametrize(("mode", "channels", "kept"), MODES)
def test_modes(run: Run, model: str, mode: str, channels: int, kept: str) -> None:
    name = save_mode(mode, 8, 8, channels)
    assert run("upscale", name, "-m", model, "-o", "b.png")[0] == 0
    result = opened("b.png")
    assert result.size == (32, 32) and result.mode == kept


def test_opacity_is_enlarged_by_bicubic(run: Run, model: str) -> None:
    values = numbers((6, 8, 4))
    Image.fromarray(values).save("a.png")
    run("upscale", "a.png", "-m", model, "-o", "b.png")
    ours = np.asarray(opened("b.png"))[..., 3]
    theirs = Image.fromarray(values[..., 3].astype(np.float32)).resize((32, 24), Image.Resampling.BICUBIC)
    low, high = values[..., 3].min(), values[..., 3].max()
    assert np.abs(ours - np.rint(np.clip(np.asarray(theirs), low, high))).max() <= 1


def test_sixteen_bits(run: Run, model: str) -> None:
    Path("a.png").write_bytes(image_bytes(numbers((8, 8, 3), np.uint16), ".png"))
    assert run("upscale", "a.png", "-m", model, "-o", "b.png")[0] == 0
    data = Path("b.png").read_bytes()
    assert (data[24], data[25]) == (16, 2)


def test_turned_animated_and_tiny(run: Run, model: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(numbers((4, 6, 3))).save("turned.jpg", exif=exif)
    run("upscale", "turned.jpg", "-m", model, "-o", "b.png")
    assert opened("b.png").size == (16, 24) and opened("b.png").getexif().get(274, 1) == 1
    frames = [Image.new("L", (8, 8), k) for k in (9, 99)]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    status, _, error = run("upscale", "moving.gif", "-m", model)
    assert status == 0 and "has 2 frames, of which the first is taken" in error
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert run("upscale", "dot.png", "-m", model)[0] == 0 and opened("dot-upscaled.png").size == (4, 4)


def claims(width: int, height: int) -> bytes:
    """A PNG that says that it is so large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_bad_input_is_one_line(refused: Refused, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("huge.png").write_bytes(claims(20_000, 20_000))
    assert "pixels; cut it into parts or scale it down" in refused("upscale", "huge.png", "-m", model)
    Path("text.png").write_text("hello")
    assert "not a picture that can be read (unknown format)" in refused("upscale", "text.png", "-m", model)
    assert "no such file" in refused("upscale", "absent.png", "-m", model)
    Image.fromarray(numbers((8, 8, 3))).save("a.png")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:60])
    assert "not a picture that can be read" in refused("upscale", "cut.png", "-m", model)
    assert "images are written as" in refused("upscale", "a.png", "-m", model, "-o", "b.jpg")
    assert "is not a folder" in refused("upscale", "a.png", "-m", model, "-o", "text.png/b.png")
    Path("empty").mkdir()
    assert "no pictures in this folder" in refused("upscale", "empty", "-m", model)
    assert "for several pictures name a folder" in refused("upscale", "a.png", "text.png", "-m", model, "-o", "a.png")
    np.save("float.npy", np.ones((8, 8, 3), np.float32))
    assert "float32 numbers, the model was trained with 8 bits" in refused("upscale", "float.npy", "-m", model)
    np.save("bands.npy", numbers((8, 8, 6)))
    assert "has 6 channels, the model works on 3" in refused("upscale", "bands.npy", "-m", model)
    monkeypatch.setattr("darkroom.upscaling.upscaler.available_memory", lambda device: 1.5e9)
    assert "8x8 becomes 32x32, which needs about" in refused("upscale", "a.png", "-m", model)
    assert sorted(p.name for p in Path().iterdir() if p.name.startswith(("b.", "."))) == []


def test_a_folder_without_permission(refused: Refused, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(numbers((8, 8, 3))).save("a.png")
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may write everywhere
    assert "no permission to write" in refused("upscale", "a.png", "-m", model, "-o", "closed/b.png")


def test_the_photo_is_never_the_output_however_it_is_spelt(
    run: Run, refused: Refused, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in").mkdir()
    Image.fromarray(numbers((8, 8, 3))).save("in/a.png")
    Path("link.png").symlink_to("in/a.png")
    before = Path("in/a.png").read_bytes()
    for photo, output in (("in/../in/a.png", "in/a.png"), ("in/a.png", "link.png"), ("in", "in/../in")):
        assert "that is the photo itself" in refused("upscale", photo, "-m", model, "-o", output, "--overwrite")
    monkeypatch.chdir("in")
    status, out, _ = run("upscale", ".", "-m", model)
    assert status == 0 and Path(out.strip()) == Path.cwd().parent / "in-upscaled" / "a.png"
    assert Path("a.png").read_bytes() == before
    assert "no folder can lie beside it" in refused("upscale", "/", "-m", model)


def test_floating_point_goes_where_it_can_be_held(run: Run, refused: Refused, tmp_path: Path) -> None:
    made = make_model("low_resolution", pixels=PixelFormat("float32", 0, 4), low_resolution={"noise_levels": 0})
    made.info |= {"defaults": {"size": [32, 32], "steps": 1, "solver": "ddim"}}
    model = made.save(tmp_path / "float" / "model")
    Path("in").mkdir()
    Path("in/a.tif").write_bytes(image_bytes(numbers((8, 8, 3)).astype(np.float32) / 64, ".tif"))
    before = Path("in/a.tif").read_bytes()
    assert run("upscale", "in", "-m", model, "-o", "out")[1].split() == ["out/a.tif"]
    status, _, error = run("upscale", "in", "-m", model, "-o", "out")
    assert status == 0 and "1 of 1 are there already" in error
    _, _, error = run("upscale", "in", "-m", model, "-o", "in", "--overwrite")
    assert "in/a.tif: that is the photo itself" in error and Path("in/a.tif").read_bytes() == before
    assert run("upscale", "in/a.tif", "-m", model)[1].split() == ["in/a-upscaled.tif"]
    assert "in/a-upscaled.tif is there already" in refused("upscale", "in/a.tif", "-m", model)
    Path("b.json").write_text("mine")
    assert "b.json is there already" in refused("upscale", "in/a.tif", "-m", model, "-o", "b.npy")
    assert Path("b.json").read_text() == "mine"
    Path("b.json").unlink()
    assert run("upscale", "in/a.tif", "-m", model, "-o", "b.npy")[0] == 0 and Path("b.json").is_file()


def test_a_folder_into_itself(run: Run, model: str) -> None:
    """What is read is not taken for a result that is there."""
    Path("in").mkdir()
    Path("in/a.tif").write_bytes(image_bytes(numbers((8, 8, 3)), ".tif"))
    assert run("upscale", "in", "-m", model, "-o", "in")[1].split() == ["in/a.png"]


def test_grey_with_opacity_in_a_tiff(run: Run, model: str) -> None:
    Image.fromarray(numbers((8, 8, 2)), "LA").save("a.png")
    assert run("upscale", "a.png", "-m", model, "-o", "b.tif")[0] == 0
    assert run("upscale", "b.tif", "-m", model, "-o", "c.png")[0] == 0
    assert opened("c.png").mode == "LA"


def test_other_models_are_refused(refused: Refused, models: Path) -> None:
    Image.fromarray(numbers((8, 8, 3))).save("a.png")
    assert "does not enlarge pictures (it was trained with text)" in refused("upscale", "a.png", "-m", models / "text")
    assert "is a first stage only" in refused("upscale", "a.png", "-m", models / "fs")


def test_a_folder_of_photos(run: Run, model: str) -> None:
    Path("in").mkdir()
    for k in range(3):
        Image.fromarray(numbers((8, 8 + k, 3))).save(f"in/{k}.png")
    Path("in/notes.txt").write_text("no picture")
    Path("in/broken.jpg").write_bytes(b"\xff\xd8\xff")
    status, out, error = run("upscale", "in", "-m", model)
    assert status == 2 and sorted(out.split()) == [f"in-upscaled/{k}.png" for k in range(3)]
    assert "left out: in/broken.jpg is not a picture" in error and "1 of 4 pictures could not be upscaled" in error
    Path("in/broken.jpg").unlink()
    Path("in-upscaled/1.png").unlink()
    status, out, error = run("upscale", "in", "-m", model)
    assert status == 0 and out.split() == ["in-upscaled/1.png"] and "2 of 3 are there already" in error
    status, out, _ = run("upscale", "in", "-m", model)
    assert status == 0 and out == ""
    status, out, _ = run("upscale", "in/0.png", "in/2.png", "-m", model, "-o", "other", "--threads", 1)
    assert status == 0 and out.split() == ["other/0.png", "other/2.png"] and opened("other/2.png").size == (40, 32)
    Image.fromarray(numbers((8, 8, 3))).save("in/0.bmp")
    assert "would both become" in run("upscale", "in", "-m", model, "--overwrite")[2]


def test_masks_are_no_photos_and_a_file_is_no_folder(run: Run, refused: Refused, model: str) -> None:
    Path("in").mkdir()
    for name in ("a.png", "a_mask.png", "b.png", "b.mask.png", "her_mask.png"):
        Image.fromarray(numbers((8, 8, 3))).save(f"in/{name}")
    status, out, error = run("upscale", "in", "-m", model)
    assert status == 0 and [Path(line).name for line in out.split()] == ["a.png", "b.png", "her_mask.png"]
    assert "2 masks of other pictures are left out" in error
    for photos in (("in",), ("in/a.png", "in/b.png")):
        assert "two.PNG is a file; for several" in refused("upscale", *photos, "-m", model, "-o", "two.PNG")
    assert not Path("two.PNG").exists()


def test_consistency_from_the_command_line(run: Run, model: str) -> None:
    import torch

    truth = torch.nn.functional.avg_pool2d(torch.from_numpy(numbers((60, 60, 3))).permute(2, 0, 1).float(), 5, 1)
    small = degrade(truth.to(torch.uint8), LowResolution(4))
    Image.fromarray(small.permute(1, 2, 0).numpy()).save("a.png")
    status, _, error = run("upscale", "a.png", "-m", model, "-o", "b.png", "--consistency")
    assert status == 0 and error == ""
    result = torch.from_numpy(np.array(opened("b.png"))).permute(2, 0, 1)
    assert torch.equal(degrade(result, LowResolution(4)), small)
    dots = np.zeros((8, 8, 3), np.uint8)
    dots[::3, ::3] = 255
    Image.fromarray(dots).save("dots.png")
    status, _, error = run("upscale", "dots.png", "-m", model, "--consistency")
    assert status == 0 and "made smaller, the result differs from it by up to" in error
