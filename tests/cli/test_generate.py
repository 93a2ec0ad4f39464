"""`darkroom generate`: files, settings inside them, exact repetition, and every kind of bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import darkroom
from darkroom.cli.seeds import parse_seeds
from darkroom.errors import DarkroomError
from darkroom.png_settings import parse_parameters, read_png_text, read_settings


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """The image with other values at the top of its record."""
    record = {**json.loads(read_png_text(source)["darkroom"]), **changes}
    text = PngImagePlugin.PngInfo()
    text.add_text("darkroom", json.dumps(record))
    Image.open(source).save(target, pnginfo=text)
    return target


@pytest.fixture(autouse=True)
def keep_thread_count() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_seeds() -> None:
    assert parse_seeds(["1", "4,7", "0..3", "2..2,9"]) == [1, 4, 7, 0, 1, 2, 3, 2, 9]
    for bad in ("-1", "a", "1..", "..3", "5..2", "1.5", "", "0..99999999999"):
        with pytest.raises(DarkroomError):
            parse_seeds([bad])


def test_folder_of_images_equals_the_python_interface(run: Any, models: Path, tmp_path: Path) -> None:
    status, out, error = run("generate", "a red fox", "A blue/snail", "-m", models / "text", "--seed", 3, 5, "8..9")
    assert status == 0 and error == ""
    names = sorted(os.listdir("generated"))
    assert names[:2] == ["0000-seed3-a-red-fox.png", "0001-seed5-a-red-fox.png"]
    assert names[7] == "0007-seed9-a-blue-snail.png" and len(names) == 8
    assert out.splitlines() == [f"generated/{name}" for name in names]
    result = darkroom.load(models / "text", device="cpu").generate(
        ["a red fox"] * 4 + ["A blue/snail"] * 4, seed=[3, 5, 8, 9] * 2
    )
    for name, image in zip(names, result.images, strict=True):
        assert np.array_equal(pixels(f"generated/{name}"), image)
    # Nothing is overwritten: the next run goes on with the numbers.
    run("generate", "a red fox", "-m", models / "text")
    assert sorted(os.listdir("generated"))[-1] == "0008-seed0-a-red-fox.png"
    assert list(tmp_path.rglob("*.tmp")) == []


def test_one_file_several_files_grid(run: Any, models: Path) -> None:
    model = ("-m", models / "class")
    assert run("generate", "--class", "coat", *model, "--seed", "4", "-o", "a/one.png")[1] == "a/one.png\n"
    assert run("generate", "--class", "coat", *model, "-n", 3, "--seed", 4, "-o", "many.png")[1].split() == [
        f"many-00{i}-seed{4 + i}.png" for i in range(3)
    ]
    assert np.array_equal(pixels("a/one.png"), pixels("many-000-seed4.png"))
    arguments = ("--class", "coat", "--class", "0", *model, "--count", 3, "--seed", 4, "--grid", "--batch-size", 2)
    assert run("generate", *arguments, "-o", "grid.png")[1] == "grid.png\n"
    assert pixels("grid.png").shape == (16 * 2 + 2, 16 * 3 + 4, 3)  # a row per class, a column per seed
    assert np.array_equal(pixels("grid.png")[:16, 36:52], pixels("many-002-seed6.png"))
    run("generate", *arguments)
    assert os.listdir("generated") == ["0000-grid.png"]


def test_unconditional_model_and_size(run: Any, models: Path) -> None:
    assert run("generate", "-m", models / "none", "--width", 32, "-o", "a.png")[0] == 0
    assert pixels("a.png").shape == (16, 32, 3)


def test_a_model_of_prompts_without_one_says_so(run: Any, models: Path) -> None:
    status, _, error = run("generate", "-m", models / "text")
    assert status == 0
    assert error == "note: nothing was asked for (a prompt): the pictures are of anything the model knows\n"


def test_seed_takes_words_up_to_the_next_that_is_none(run: Any, models: Path) -> None:
    run("generate", "--seed", 1, 2, "7 samurai", "-m", models / "text", "-o", "a")
    assert sorted(os.listdir("a")) == ["0000-seed1-7-samurai.png", "0001-seed2-7-samurai.png"]
    run("generate", "--seed", 1, "-m", models / "text", "-o", "b", "--", "2")
    assert os.listdir("b") == ["0000-seed1-2.png"]


def test_settings_in_the_file(run: Any, models: Path) -> None:
    run(
        *("generate", 'a "red" fox, really: yes\nSteps: 5, a: b, c: d', "-m", models / "text", "-o", "a.png"),
        *("--seed", 2**62, "--steps", 4, "--cfg-scale", 2.5, "--solver", "ddim", "--eta", 0.5),
        *("--negative-prompt", "naïve, ☃"),
    )
    table = parse_parameters(read_png_text("a.png")["parameters"])
    assert table["Prompt"] == 'a "red" fox, really: yes\nSteps: 5, a: b, c: d'
    assert table["Negative prompt"] == "naïve, ☃" and table["Steps"] == "4" and table["Sampler"] == "ddim"
    assert table["CFG scale"] == "2.5" and table["Seed"] == str(2**62) and table["Size"] == "16x16"
    record = read_settings("a.png")
    assert record["request"]["eta"] == 0.5 and record["model"]["name"] == "tiny" and record["index"] == 0
    assert str(models) not in read_png_text("a.png")["darkroom"]  # images are posted: no absolute path in them


def test_from_repeats_the_batch_exactly(run: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    out = models / "out"
    arguments = (
        "a red fox",
        "a snail",
        "-m",
        "text",
        "--seed",
        "0..4",
        "--batch-size",
        4,
        "--solver",
        "ddim",
        "--eta",
        1,
    )
    run("generate", *arguments, "-o", out)
    first = sorted(out.iterdir())
    assert [len(read_settings(p)["request"]["seeds"]) for p in first] == [4] * 8 + [2] * 2  # its own batch only
    status, _, error = run("generate", "--from", first[5], "-o", models / "again")
    assert status == 0 and error == ""
    again = sorted((models / "again").iterdir())
    assert len(again) == 4
    for one, other in zip(first[4:8], again, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    run("generate", "--from", first[9], "-o", models / "single.png")
    assert np.array_equal(pixels(models / "single.png"), pixels(first[9]))
    # A grid repeats as a grid, over all its batches.
    run("generate", *arguments, "--grid", "-o", models / "grid.png")
    assert run("generate", "--from", models / "grid.png", "-o", models / "grid2.png")[0] == 0
    assert (models / "grid.png").read_bytes() == (models / "grid2.png").read_bytes()


def test_alone_or_in_another_batch_pixels_differ_by_at_most_one(run: Any, models: Path) -> None:
    run("generate", "a red fox", "-m", models / "text", "-n", 7, "-o", "batch", "--steps", 10)
    run("generate", "a red fox", "-m", models / "text", "-n", 7, "-o", "alone", "--steps", 10, "--batch-size", 1)
    run("generate", "a snail", "a red fox", "-m", models / "text", "-n", 7, "-o", "other", "--steps", 10)
    for i in range(7):
        name = f"seed{i}-a-red-fox.png"
        batch = pixels(f"batch/000{i}-{name}")
        assert np.abs(batch - pixels(f"alone/000{i}-{name}")).max() <= 1
        assert np.abs(batch - pixels(f"other/{7 + i:04d}-{name}")).max() <= 1


def test_from_says_what_is_not_as_it_was(run: Any, models: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    run("generate", "a fox", "-m", models / "text", "-o", "a.png", "--threads", 1)
    assert "add -m MODEL" in refused("generate", "--from", "a.png", "-o", "b.png")  # the model's place is not recorded
    assert run("generate", "--from", "a.png", "-m", models / "text", "-o", "b.png")[2] == ""
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    old = edited(tmp_path / "a.png", tmp_path / "old.png", version="0.0.1", threads=2, torch="1.0")
    notes = run("generate", "--from", old, "-m", models / "text", "-o", "c.png", "--threads", 1)[2]
    assert [line.split(" was ")[0] for line in notes.splitlines()] == [
        f"note: {x}" for x in ("Darkroom", "torch", "thread count")
    ]
    other = edited(tmp_path / "a.png", tmp_path / "other.png", model={"sha256": "0" * 64})
    assert "note: model was 0000000000" in run("generate", "--from", other, "-m", models / "text", "-o", "c.png")[2]
    assert "leave out --cfg-scale" in refused("generate", "--from", "a.png", "--cfg-scale", 3)
    assert "leave out a prompt" in refused("generate", "a cat", "--from", "a.png")
    request = read_settings("a.png")["request"]
    for change, words in (
        ({"format": 2}, "newer version"),
        ({"request": 5}, "damaged"),
        ({"request": {**request, "stepz": 3}}, "stepz"),
        ({"request": {**request, "steps": "many"}}, "steps"),
        ({"request": {**request, "seeds": []}}, "seed"),
        ({"request": {**request, "prompts": ["a", "b", "c"], "seeds": [1, 2]}}, "one for each"),
        ({"threads": "x"}, "cannot be read"),
        ({"model": 7}, "cannot be read"),
    ):
        broken = edited(tmp_path / "a.png", tmp_path / "broken.png", **change)
        assert words in refused("generate", "--from", broken, "-m", models / "text", "-o", "c.png")


def test_a_bundled_model_is_the_default(
    run: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("darkroom.model_folder", "darkroom.model_io"):
        monkeypatch.setattr(f"{module}.BUNDLED", tmp_path / "bundled")
    darkroom.load(models / "text").save(tmp_path / "bundled" / "emoji")
    assert run("generate", "a fox", "-o", "a.png")[0] == 0
    assert run("generate", "--from", "a.png", "-o", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_bad_input_is_one_line_and_status_2(
    refused: Callable[..., str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, classes = ("-m", models / "text"), ("-m", models / "class")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("no such file or folder", ("x", "-m", "absent")),
        ("empty folder", ("x", "-m", "empty")),
        ("is not a model", ("x", "-m", "notes.txt")),
        ("'coat'", ("--class", "caot", *classes)),  # the nearest names
        ("classes 0 to 2", ("--class", "17", *classes)),
        ("does not take a prompt", ("x", *classes)),
        ("does not take a prompt", ("x", "-m", models / "none")),
        ("does not take a class", ("--class", "boot", *text)),
        ("negative prompt needs", ("--class", "boot", "--negative-prompt", "x", *classes)),
        ("not both", ("x", "--class", "boot", *classes)),
        ("multiples of", ("x", "--width", 17, *text)),
        ("multiples of", ("x", "--height", 1, *text)),
        ("not known", ("x", "--solver", "eular", *text)),
        ("--eta", ("x", "--eta", 2, *text)),
        ("finite", ("x", "--cfg-scale", "nan", *text)),
        ("--steps", ("x", "--steps", 0, *text)),
        ("--seed -1", ("x", "--seed=-1", *text)),
        ("2^63-1", ("x", "--seed", 2**63, *text)),
        ("not both", ("x", "--seed", 1, 2, "--count", 2, *text)),
        ("--device", ("x", "--device")),
        ("not available", ("x", "--device", "toaster", *text)),
        ("written as .png", ("x", "-o", "a.jpg", *text)),
        ("is a file", ("x", "-o", "notes", *text)),
        ("not a folder", ("x", "-o", "plain.png/deeper/a.png", *text)),
        ("not a folder", ("x", "-o", "plain.png/deeper", *text)),
        ("first stage only", ("x", "-m", models / "fs")),
        ("no first stage", ("x", "-m", models / "bare")),
        ("not UTF-8", ("bad \udcff", *text)),
        ("does not exist", ("--from", "absent.png")),
        ("not an image", ("--from", "notes.txt")),
        ("is a JPEG", ("--from", "photo.jpg")),
        ("holds no settings", ("--from", "plain.png")),
        ("is a folder", ("--from", "empty")),
    ]
    (tmp_path / "notes").write_text("x")
    before = {path.name for path in tmp_path.iterdir()}
    for words, arguments in cases:
        assert words in refused("generate", *arguments), arguments
    assert {path.name for path in tmp_path.iterdir()} == before


def test_truncated_and_hostile_models(refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
    import pickle
    import shutil

    shutil.copytree(models / "text", tmp_path / "cut")
    weights = tmp_path / "cut" / "denoiser" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused("generate", "x", "-m", "cut")

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    assert "posix.system" in refused("generate", "x", "-m", "evil.ckpt")
    torch.save({"state_dict": {"w": torch.ones(1)}, "hook": Evil()}, tmp_path / "evil2.ckpt")
    assert "posix.system" in refused("generate", "x", "-m", "evil2.ckpt")
    assert not (tmp_path / "mark").exists()


def test_a_full_disk_leaves_nothing_half_written(
    refused: Callable[..., str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import full_disk

    full_disk(monkeypatch, str(tmp_path))
    assert "No space left on device" in refused("generate", "x", "-m", models / "text", "-o", tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_guidance_options(run: Any, models: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    ask = ("generate", "a red fox", "-m", "text", "--steps", 2, "--cfg-scale", 2)
    status, _, error = run(
        *ask, "--guidance", "text=5", "--guidance-interval", 0.1, 50, "--guidance-rescale", 0.5, "-o", "a.png"
    )
    assert (status, error) == (0, "")
    record = read_settings("a.png")["request"]
    assert record["guidance"] == {"text": 5.0} and record["guidance_interval"] == [0.1, 50.0]
    assert run("generate", "--from", "a.png", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    # A second model: it is recorded and found again.
    assert run(*ask, "--guide", "text", "-o", "c.png")[0] == 0
    assert read_settings("c.png")["guide"]["source"] == "text"
    assert run("generate", "--from", "c.png", "-o", "d.png")[0] == 0
    assert np.array_equal(pixels("c.png"), pixels("d.png"))
    assert "NAME=SCALE" in refused(*ask, "--guidance", "text")
    assert "leave out --guidance" in refused("generate", "--from", "a.png", "--guidance", "text=2")
    assert "first stage only" in refused(*ask, "--guide", "fs")
