"""`darkroom edit`: what people have on their disks, and what becomes of it."""

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
from tiny_models import full_disk

from darkroom.cli.edit import parse_expand
from darkroom.data.image_files import image_bytes, read_samples
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_model("masked_image")
    made.info |= {"name": "tiny-inpaint", "defaults": {"size": [32, 32], "steps": 1, "solver": "ddim"}}
    return str(made.save(tmp_path_factory.mktemp("inpaint") / "model", card="# tiny\n"))


def write_mask(path: str | Path, height: int, width: int) -> np.ndarray:
    """A hole in the middle; gives where it is."""
    mask = np.zeros((height, width), bool)
    mask[height // 3 : height // 3 * 2 + 1, width // 3 : width // 3 * 2 + 1] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return mask


def values_of(path: str | Path) -> np.ndarray:
    return read_samples(Path(path).read_bytes()).values


def assert_kept(before: str | Path, after: str | Path, mask: np.ndarray) -> None:
    one, two = values_of(before), values_of(after)
    assert one.shape == two.shape and one.dtype == two.dtype
    assert np.array_equal(one[~mask], two[~mask]) and not np.array_equal(one[mask], two[mask])


def test_a_photo_and_its_mask(run: Run, model: str) -> None:
    Path("pictures").mkdir()
    Image.fromarray(numbers((40, 50, 3))).save("pictures/photo.jpg", icc_profile=PROFILE)
    mask = write_mask("mask.png", 40, 50)
    status, out, error = run("edit", "pictures/photo.jpg", "-m", model, "--mask", "mask.png", "--seed", 5)
    assert status == 0 and error == "" and out.strip() == "pictures/photo-edited.png"
    assert_kept("pictures/photo.jpg", out.strip(), mask)
    with Image.open(out.strip()) as picture:
        info = dict(picture.info)
    assert info["icc_profile"] == PROFILE
    record = json.loads(info["darkroom"])
    assert record["request"]["seeds"] == [5] and record["edit"]["input_size"] == [50, 40]
    assert "Size: 50x40" in info["parameters"]  # of the picture, whatever the model was shown of it
    assert record["model"]["name"] == "tiny-inpaint" and "source" not in record["model"]  # an absolute path
    assert str(Path.cwd()) not in str(info)
    first = Path(out.strip()).read_bytes()
    run("edit", "pictures/photo.jpg", "-m", model, "--mask", "mask.png", "--seed", 5, "--overwrite")
    assert Path(out.strip()).read_bytes() == first
    told = run("info", out.strip())[1]
    assert "made by darkroom edit: repeat that command" in told
    assert f"mask: {record['edit']['mask']}" in told and f"image: {record['edit']['image']}" in told


def test_what_is_there_is_not_lost(run: Run, refused: Refused, model: str) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    write_mask("m.png", 32, 32)
    Path("out.png").write_bytes(b"mine")
    command = ("edit", "a.png", "-m", model, "--mask", "m.png")
    assert "out.png is there already" in refused(*command, "-o", "out.png")
    write_mask("small.png", 9, 9)
    assert "small.png: " in refused(*command[:-1], "small.png", "-o", "out.png")  # the mistake is told first
    assert Path("out.png").read_bytes() == b"mine"
    for name in ("a.png", "m.png"):
        before = Path(name).read_bytes()
        assert "the photo or the mask itself" in refused(*command, "-o", name, "--overwrite")
        assert Path(name).read_bytes() == before
    assert run(*command, "-o", "out.png", "--overwrite")[0] == 0
    assert "made by `darkroom edit`" in refused("generate", "--from", "out.png", "-o", "again.png")


@pytest.mark.parametrize(("mode", "channels", "kept"), MODES)
def test_modes(run: Run, model: str, mode: str, channels: int, kept: str) -> None:
    name = save_mode(mode, 32, 36, channels)
    mask = write_mask("m.png", 32, 36)
    assert run("edit", name, "-m", model, "--mask", "m.png", "-o", "b.png")[0] == 0
    assert_kept(name, "b.png", mask)
    with Image.open("b.png") as result:
        assert result.mode == kept


def test_opacity_stays_as_it_was(run: Run, model: str) -> None:
    values = numbers((32, 32, 4))
    Image.fromarray(values).save("a.png")
    write_mask("m.png", 32, 32)
    run("edit", "a.png", "-m", model, "--mask", "m.png", "-o", "b.png")
    assert np.array_equal(values_of("b.png")[..., 3], values[..., 3])
    run("edit", "a.png", "-m", model, "--expand", "4,0,0,2", "-o", "c.png")
    wide = values_of("c.png")
    assert np.array_equal(wide[:32, 4:], values) and (wide[:, :4, 3] == 255).all() and wide.shape == (34, 36, 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits(run: Run, model: str, channels: int) -> None:
    Path("a.png").write_bytes(image_bytes(numbers((33, 47, channels), np.uint16), ".png"))
    mask = write_mask("m.png", 33, 47)
    assert run("edit", "a.png", "-m", model, "--mask", "m.png", "-o", "b.png")[0] == 0
    assert Path("b.png").read_bytes()[24] == 16
    assert_kept("a.png", "b.png", mask)


def test_turned_and_animated(run: Run, model: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(numbers((32, 48, 3))).save("turned.jpg", exif=exif)
    mask = write_mask("m.png", 48, 32)
    assert run("edit", "turned.jpg", "-m", model, "--mask", "m.png", "-o", "b.png")[0] == 0
    assert_kept("turned.jpg", "b.png", mask)
    frames = [Image.new("L", (32, 48), k) for k in (9, 99)]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    status, _, error = run("edit", "moving.gif", "-m", model, "--mask", "m.png")
    assert status == 0 and "has 2 frames, of which the first is taken" in error


def test_several_seeds(run: Run, model: str) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    mask = write_mask("m.png", 32, 32)
    status, out, _ = run("edit", "a.png", "-m", model, "--mask", "m.png", "--seed", "0..2", "-o", "out/")
    assert status == 0 and out.split() == [f"out/a-seed{k}.png" for k in range(3)]
    contents = {values_of(name).tobytes() for name in out.split()}
    assert len(contents) == 3
    for name in out.split():
        assert_kept("a.png", name, mask)


def test_things_are_removed_from_a_folder(run: Run, model: str) -> None:
    folder = Path("in")
    folder.mkdir()
    masks = {}
    for name in ("a.png", "b.jpg", "alone.png"):
        Image.fromarray(numbers((36, 40, 3))).save(folder / name)
        if name != "alone.png":
            masks[name] = write_mask(folder / f"{Path(name).stem}_mask.png", 36, 40)
    Image.fromarray(numbers((8, 8, 3))).save(folder / "wrong.png")
    write_mask(folder / "wrong_mask.png", 9, 9)
    status, out, error = run("edit", "in", "-m", model, "-o", "out")
    assert status == 2 and out.split() == ["out/a.png", "out/b.png"]
    assert "1 of 4 pictures have no mask, the first is alone.png" in error
    assert "1 of 3 pictures could not be edited" in error and "the mask is 9x9, the picture 8x8" in error
    for name, mask in masks.items():
        assert_kept(f"in/{name}", f"out/{Path(name).stem}.png", mask)
    before = Path("out/a.png").read_bytes()
    Path("out/b.png").unlink()
    status, out, error = run("edit", "in", "-m", model, "-o", "out")
    assert out.split() == ["out/b.png"] and "2 of 3 are there already" not in error and "1 of 3 are there" in error
    assert Path("out/a.png").read_bytes() == before
    assert sorted(p.name for p in Path("in").iterdir()) == [
        "a.png", "a_mask.png", "alone.png", "b.jpg", "b_mask.png", "wrong.png", "wrong_mask.png"
    ]  # fmt: skip


def test_variations_of_a_photo(run: Run, models: Path) -> None:
    Image.fromarray(numbers((40, 40, 4))).save("a.png")
    status, out, error = run("edit", "a.png", "a red fox", "-m", models / "text", "--strength", 0.5, "--seed", 1, 2)
    assert status == 0 and out.split() == ["a-edited-seed1.png", "a-edited-seed2.png"]
    made = values_of("a-edited-seed1.png")
    assert made.shape == (32, 32, 4) and "have 32x32 pixels" in error
    alpha = Image.fromarray(numbers((40, 40, 4))[..., 3].astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(made[..., 3] - np.clip(np.asarray(alpha), 0, 255)).max() < 2
    with Image.open("a-edited-seed1.png") as picture:
        record = json.loads(picture.info["darkroom"])
    assert record["request"]["prompts"] == ["a red fox", "a red fox"] and record["edit"]["strength"] == 0.5


def test_masks_with_opacity_and_colour(run: Run, model: str) -> None:
    """What is see-through in a mask is kept, whatever its colour."""
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    mask = np.full((32, 32, 4), 255, np.uint8)
    mask[..., 3] = 0
    mask[4:12, 4:12, 3] = 255
    mask[8:12, 4:12, :3] = (90, 90, 90)
    Image.fromarray(mask).save("m.png")
    hole = np.zeros((32, 32), bool)
    hole[4:8, 4:12] = True
    assert run("edit", "a.png", "-m", model, "--mask", "m.png", "-o", "b.png")[0] == 0
    assert_kept("a.png", "b.png", hole)


def huge_png(path: str, side: int = 20_000) -> None:
    """A header that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.png", "--mask", "other.png"), "other.png: the mask is 9x9, the picture 32x32"),
        (("a.png", "--mask", "black.png"), "black.png: the mask is black everywhere"),
        (("a.png", "--mask", "white.png"), "white.png: the mask is white everywhere"),
        (("dot.png", "--mask", "dot.png", "-o", "b.png"), "dot.png: the mask is"),
        (("huge.png", "--mask", "m.png"), "huge.png is not a picture that can be read (has more than"),
        (("words.png", "--mask", "m.png"), "words.png is not a picture that can be read (unknown format)"),
        (("cut.png", "--mask", "m.png"), "cut.png is not a picture that can be read"),
        (("a.png", "--mask", "words.png"), "words.png is not a picture that can be read"),
        (("missing.png", "--mask", "m.png"), "missing.png: no such file"),
        (("a.png", "--mask", "missing.png"), "missing.png: no such file"),
        (("a.png", "--mask", "m.png", "-o", "b.jpg"), "b.jpg: images are written as .png"),
        (("a.png", "--mask", "m.png", "-o", "a.png/b.png"), "cannot save in a.png: "),
        (("a.png", "--mask", "m.png", "--expand", "1,2,3"), "--expand 1,2,3: give the pixels to add"),
        (("a.png", "--mask", "m.png", "--expand", "-3"), "--expand -3: give the pixels to add"),
        (("a.png", "--mask", "m.png", "--strength", "0"), "strength is 0: it must be above 0"),
        (("a.png", "--mask", "m.png", "--strength", "nan"), "strength is nan"),
        (("a.png",), "this model repaints what is masked"),
        (("a.png", "a fox", "--mask", "m.png"), "does not take a prompt"),
        (("a.png", "--mask", "m.png", "--class", "coat"), "does not take a class"),
        (("a.png", "--mask", "m.png", "--solver", "none"), 'solver "none" is not known'),
        (("a.png", "--mask", "m.png", "--seed", "1..0"), "the range ends before it begins"),
        (("folder", "--mask", "m.png"), "folder is a folder, whose masks lie in it"),
        (("folder",), "folder: no picture has a mask beside it"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(refused: Refused, model: str, arguments: tuple, message: str) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    Image.new("RGB", (1, 1), "white").save("dot.png")
    write_mask("m.png", 32, 32)
    write_mask("other.png", 9, 9)
    for name, level in (("black", 0), ("white", 255)):
        Image.new("L", (32, 32), level).save(f"{name}.png")
    huge_png("huge.png")
    Path("words.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:400])
    Path("folder").mkdir()
    Image.new("L", (8, 8)).save("folder/x.png")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert message in refused("edit", *arguments, "-m", model)
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_a_folder_without_permission(refused: Refused, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    write_mask("m.png", 32, 32)
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may write everywhere
    assert "no permission" in refused("edit", "a.png", "-m", model, "--mask", "m.png", "-o", "closed/b.png")


def test_the_photo_is_never_the_output_however_it_is_spelt(refused: Refused, model: str) -> None:
    Path("in").mkdir()
    Image.fromarray(numbers((32, 32, 3))).save("in/a.png")
    write_mask("in/a_mask.png", 32, 32)
    Path("link.png").symlink_to("in/a.png")
    before = {p: p.read_bytes() for p in Path("in").iterdir()}
    for photo, output in (("in/../in/a.png", "in/a.png"), ("in/a.png", "link.png"), ("link.png", "in/a_mask.png")):
        command = ("edit", photo, "-m", model, "--mask", "in/a_mask.png", "-o", output, "--overwrite")
        assert "the photo or the mask itself" in refused(*command)
    assert "the photo or the mask itself" in refused("edit", "in", "-m", model, "-o", "in/../in", "--overwrite")
    assert {p: p.read_bytes() for p in Path("in").iterdir()} == before


def test_a_seed_that_is_named_twice_is_made_once(run: Run, model: str) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    write_mask("m.png", 32, 32)
    status, out, _ = run("edit", "a.png", "-m", model, "--mask", "m.png", "--seed", "1", "1", "0..1")
    assert status == 0 and out.split() == ["a-edited-seed1.png", "a-edited-seed0.png"]


def test_only_what_is_missing_in_a_folder_is_made(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several seeds; the folder is the working one, and masks are named as in training."""
    Path("in").mkdir()
    Image.fromarray(numbers((32, 32, 3))).save("in/a.png")
    write_mask("in/a.mask.png", 32, 32)
    monkeypatch.chdir("in")
    status, out, _ = run("edit", ".", "-m", model, "--seed", "0", "1")
    written = [Path(line) for line in out.split()]
    assert status == 0 and [p.name for p in written] == ["a-seed0.png", "a-seed1.png"]
    assert written[0].parent == Path.cwd().parent / "in-edited"
    made = written[1].read_bytes()
    written[0].write_bytes(b"mine")
    written[1].unlink()
    status, out, error = run("edit", ".", "-m", model, "--seed", "0", "1")
    assert status == 0 and out.split() == [str(written[1])] and "already" not in error
    assert written[0].read_bytes() == b"mine" and values_of(written[1]).tobytes() == read_samples(made).values.tobytes()
    write_mask("a_mask.png", 32, 32)
    assert "are masks of one picture" in run("edit", ".", "-m", model)[2]


def test_a_folder_of_floating_point(run: Run, refused: Refused, tmp_path: Path) -> None:
    made = make_model("masked_image", pixels=PixelFormat("float32", 0, 4))
    made.info |= {"defaults": {"size": [32, 32], "steps": 1, "solver": "ddim"}}
    model = made.save(tmp_path / "float" / "model")
    Path("in").mkdir()
    Path("in/a.tif").write_bytes(image_bytes(numbers((32, 32, 3)).astype(np.float32) / 64, ".tif"))
    mask = write_mask("in/a_mask.png", 32, 32)
    assert run("edit", "in", "-m", model, "-o", "out")[1].split() == ["out/a.tif"]
    assert_kept("in/a.tif", "out/a.tif", mask)
    assert "1 of 1 are there already" in run("edit", "in", "-m", model, "-o", "out")[2]
    before = Path("in/a.tif").read_bytes()
    _, _, error = run("edit", "in", "-m", model, "-o", "in", "--overwrite")
    assert "in/a.tif: that is the photo or the mask itself" in error and Path("in/a.tif").read_bytes() == before
    Path("in/a-seed1.tif").write_bytes(before)  # a photo of its own, named as the second image of another
    write_mask("in/a-seed1_mask.png", 32, 32)
    _, _, error = run("edit", "in", "-m", model, "-o", "in", "--seed", 0, 1, "--overwrite")
    assert "in/a-seed1.tif: that is the photo or the mask itself" in error
    assert Path("in/a-seed1.tif").read_bytes() == before
    Path("out/a.tif").write_bytes(b"mine")
    single = ("edit", "in/a.tif", "-m", model, "--mask", "in/a_mask.png", "-o", "out/")
    assert "out/a.tif is there already" in refused(*single)
    assert run(*single[:-1], "out/a.npy")[0] == 0
    assert "Steps: 1" in json.loads(Path("out/a.json").read_text())["parameters"]
    Path("file").write_text("")
    for name in ("file", "res.png"):
        assert "for several pictures name a folder" in refused("edit", "in", "-m", model, "-o", name)


def test_models_that_cannot(refused: Refused, models: Path) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    write_mask("m.png", 32, 32)
    assert "is a first stage only" in refused("edit", "a.png", "--mask", "m.png", "-m", models / "fs")


def test_borders_to_add() -> None:
    assert parse_expand(None) == (0, 0, 0, 0) and parse_expand("7") == (7, 7, 7, 7)
    assert parse_expand("1,2, 3,0") == (1, 2, 3, 0)
    for wrong in ("", "1,2", "a", "1.5", "-1", "99999"):
        with pytest.raises(DarkroomError, match="--expand"):
            parse_expand(wrong)


def test_a_full_disk_leaves_nothing_half_written(refused: Refused, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(numbers((32, 32, 3))).save("a.png")
    write_mask("m.png", 32, 32)
    full_disk(monkeypatch, "b.png")
    assert "b.png" in refused("edit", "a.png", "-m", model, "--mask", "m.png", "-o", "b.png")
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "m.png"]
