"""`darkroom generate` with conditions from files: read by the rule of the data, recorded, repeated, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from condition_models import DATA, make_model
from PIL import Image

import darkroom
from darkroom.data.sources import open_dataset
from darkroom.model_io import save
from darkroom.png_settings import read_settings

BOXES = [{"class": "circle", "bbox": [0.1, 0.2, 0.5, 0.75]}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and files: those of example 0 of `shapes`."""
    folder = tmp_path_factory.mktemp("conditions")
    for name, kinds in {
        "layout": ("text", "boxes", "segmentation"),
        "hole": ("masked_image",),
        "low": ("low_resolution",),
        "depth": ("depth",),
        "vector": ("vector",),
    }.items():
        save(make_model(*kinds), folder / name)
    one = open_dataset(DATA)[0]
    (folder / "boxes.json").write_text(json.dumps(BOXES))
    Image.fromarray(one["segmentation"].numpy().astype(np.uint8)).save(folder / "map.png")
    Image.new("L", (32, 32)).save(folder / "map.jpg")
    (folder / "two.json").write_text(json.dumps([BOXES, []]))
    Image.fromarray(one["image"].permute(1, 2, 0).numpy()).save(folder / "image.png")
    Image.fromarray(one["low_resolution"].permute(1, 2, 0).numpy()).save(folder / "low.png")
    Image.fromarray((one["repaint_mask"][0].numpy() * 255).astype(np.uint8)).save(folder / "mask.png")
    np.save(folder / "depth.npy", one["depth"][0].numpy())
    np.save(folder / "vector.npy", np.arange(5.0))
    return folder


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def options(name: str, places: Path) -> tuple[list[Any], dict[str, Any]]:
    """The command line's and Python's way to say the same."""
    one = open_dataset(DATA)[0]
    image = one["image"].permute(1, 2, 0).numpy()
    return {
        "layout": (
            ["a red circle", "--boxes", places / "boxes.json", "--segmentation", places / "map.png"],
            {"prompt": "a red circle", "boxes": BOXES, "segmentation": one["segmentation"]},
        ),
        "hole": (
            ["--image", places / "image.png", "--mask", places / "mask.png"],
            {"image": image, "repaint_mask": one["repaint_mask"]},
        ),
        "low": (
            ["--low-resolution", places / "low.png", "--noise-level", "7"],
            {"low_resolution": one["low_resolution"], "noise_level": 7},
        ),
        "depth": (["--depth", places / "depth.npy"], {"depth": one["depth"]}),
        "vector": (["--condition", f"embedding={places / 'vector.npy'}"], {"embedding": torch.arange(5.0)}),
    }[name]


@pytest.mark.parametrize("name", ["layout", "hole", "low", "depth", "vector"])
def test_files_equal_the_python_interface_and_are_repeated(run: Any, refused: Any, places: Path, name: str) -> None:
    words, arguments = options(name, places)
    status, _, error = run("generate", *words, "-m", places / name, "--seed", 3, "-o", "one.png")
    assert status == 0 and error == ""
    model = darkroom.load(places / name, device="cpu")
    # Sums may be rounded in another order elsewhere in memory, which now and then is a step of the 8 bits.
    same = model.generate(**arguments, seed=3).images[0].astype(int)
    assert abs(pixels("one.png").astype(int) - same).max() <= 1

    record = read_settings("one.png")["request"]["conditions"]
    again = ["generate", "--from", "one.png", "-m", places / name, "-o", "two.png"]
    if name == "layout":
        assert record["boxes"] == [BOXES] and set(record["segmentation"][0]) == {"sha256", "shape"}
        missing = refused(*again)
        assert "not inside it: add --segmentation with the same files" in missing
        assert run(*again, "--segmentation", places / "map.png")[0] == 0
        assert "leave out --boxes" in refused(*again, *words[1:])
    else:
        files = words[:2] if name == "low" else words
        assert run(*again, *files)[0] == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


def test_boxes_alone_are_inside_the_image(run: Any, places: Path) -> None:
    assert run("generate", "--boxes", places / "boxes.json", "-m", places / "layout", "-o", "one.png")[0] == 0
    assert run("generate", "--from", "one.png", "-m", places / "layout", "-o", "two.png")[0] == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


def test_guidance_of_what_takes_no_part_is_told(run: Any, places: Path) -> None:
    words = ["generate", "a red circle", "-m", places / "layout", "-o", "one.png"]
    status, _, error = run(*words, "--guidance", "boxes=3")
    assert status == 0 and "note: boxes was not given: its --guidance changes nothing" in error
    assert run(*words, "--guidance", "text=3")[2] == ""
    depth = ["generate", "--depth", places / "depth.npy", "-m", places / "depth", "--guidance", "depth=3"]
    assert "note: depth is never guided away from" in run(*depth, "-o", "two.png")[2]


def test_a_grid_of_several_batches_is_repeated(run: Any, places: Path) -> None:
    words = ["--boxes", places / "two.json", "--seed", "3..4", "--segmentation", places / "map.png", "--grid"]
    assert run("generate", *words, "--batch-size", 1, "-m", places / "layout", "-o", "one.png")[0] == 0
    assert len(read_settings(Path("one.png"))["request"]["conditions"]["boxes"]) == 2
    again = ["--from", "one.png", "--segmentation", places / "map.png", "-m", places / "layout"]
    status, _, error = run("generate", *again, "-o", "two.png")
    assert status == 0, error
    assert np.array_equal(pixels("one.png"), pixels("two.png"))


def test_another_file_is_noticed(run: Any, refused: Any, places: Path) -> None:
    base = ["generate", "-m", places / "layout"]
    assert run(*base, "--segmentation", places / "map.png", "-o", "one.png")[0] == 0
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("other.png")
    line = refused(*base, "--from", "one.png", "--segmentation", "other.png", "-o", "two.png")
    assert "other.png is not the segmentation that this image was made with" in line


def test_info_tells_conditions_and_how_to_repeat(run: Any, places: Path) -> None:
    words = ["generate", "--boxes", places / "boxes.json", "--segmentation", places / "map.png"]
    more = ["--guidance-interval", 0.3, 5, "--guidance", "boxes=3"]
    assert run(*words, *more, "-m", places / "layout", "-o", "one.png")[0] == 0
    said = run("info", "one.png")[1]
    assert '  boxes: [{"class": "circle", "bbox": [0.1, 0.2, 0.5, 0.75]}]\n' in said
    assert '  guidance: {"boxes": 3.0}\n  guidance interval: [0.3, 5.0]\n' in said
    command = "generate --from one.png -m MODEL --segmentation FILE"
    assert said.endswith(f"darkroom {command}\n")
    again = [{"MODEL": places / "layout", "FILE": places / "map.png"}.get(word, word) for word in command.split()]
    assert run(*again, "-o", "two.png")[0] == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    assert (
        run(
            "generate", "--condition", f"embedding={places / 'vector.npy'}", "-m", places / "vector", "-o", "three.png"
        )[0]
        == 0
    )
    assert run("info", "three.png")[1].endswith("-m MODEL --condition embedding=FILE\n")
    assert (
        run("generate", "a", "b", "-m", places / "layout", "--boxes", places / "two.json", "--grid", "-o", "four.png")[
            0
        ]
        == 0
    )
    assert "[0.1, 0.2, 0.5, 0.75]}] (of the first image)\n" in run("info", "four.png")[1]


def test_the_size_follows_the_picture(run: Any, places: Path) -> None:
    Image.new("RGB", (12, 6), "red").save("low.png")
    assert run("generate", "--low-resolution", "low.png", "-m", places / "low", "-o", "one.png")[0] == 0
    assert pixels("one.png").shape == (24, 48, 3)  # four times
    Image.new("RGB", (40, 24), "red").save("image.png")
    Image.new("L", (80, 48), "white").save("mask.png")
    words = ["--image", "image.png", "--mask", "mask.png", "-m", places / "hole"]
    assert run("generate", *words, "-o", "two.png")[0] == 0 and pixels("two.png").shape == (24, 40, 3)
    assert run("generate", *words, "--width", 32, "-o", "three.png")[0] == 0
    assert pixels("three.png").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("layout", ["--boxes", "none.json"], "--boxes none.json: cannot be read: no such file"),
        ("layout", ["--depth", "{}/depth.npy"], "this model does not take 'depth'"),
        ("layout", ["--condition", "segmentaton={}/map.png"], r"'segmentaton' \(did you mean \"segmentation\"\?\)"),
        ("layout", ["--condition", "boxes={}/boxes.json", "--boxes", "b.json"], "a file for boxes already"),
        ("layout", ["--segmentation", "{}"], "cannot be read: it is a folder"),
        ("layout", ["--segmentation", "{}/map.jpg"], "label map as JPEG"),
        ("layout", ["--segmentation", "{}/depth.npy"], "segmentation holds float32; give whole numbers"),
        ("vector", ["--condition", "embedding={}/boxes.json"], "embedding"),
        ("layout", ["--segmentation", "{}/image.png"], "--segmentation .* label map of mode RGB"),
        ("layout", ["--boxes", "{}/image.png"], "cannot be read: boxes are a .json"),
        ("hole", ["--mask", "{}/mask.png"], "repaint_mask needs image beside it"),
        ("hole", ["--image", "{}/boxes.json", "--mask", "{}/mask.png"], "cannot be read as a picture"),
        ("depth", ["--noise-level", "3"], "trained without noise"),
        ("vector", ["--condition", "embedding"], "give FIELD=FILE"),
        ("vector", ["--condition", "embedding={}/depth.npy"], "this model takes 5 numbers"),
    ],
)
def test_what_cannot_be(refused: Any, places: Path, model: str, words: list[str], message: str) -> None:
    import re

    line = refused("generate", *(w.replace("{}", str(places)) for w in words), "-m", places / model)
    assert re.search(message, line), line
