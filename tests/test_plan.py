"""What is decided for images that come without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import darkroom
from darkroom.data.inspection import glimpse
from darkroom.errors import DarkroomError
from darkroom.plan import automatic_recipe
from darkroom.recipe_source import new_recipe
from darkroom.report import about_line
from darkroom.train_job import train
from darkroom.training.recipe import resolve


def folder_of(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> str:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k, (width, height) in enumerate(sizes):
        grey = rng.integers(0, 256, (height, width), dtype=np.uint8)
        image = Image.fromarray(grey).convert(mode)
        if mode == "RGB":
            image.putpixel((0, 0), (200, 10, 10))
        image.save(folder / f"{k}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("sizes", "minutes", "expected"),
    [
        ([(28, 40)] * 5, None, 32),
        ([(32, 32)] * 5, 600, 32),
        ([(63, 300)] * 5, None, 32),
        ([(64, 64)] * 4 + [(10, 10)], None, 64),
        ([(500, 400)] * 5, 30, 64),
        ([(500, 400)] * 5, 180, 128),
        ([(100, 100)] * 5, 180, 64),
    ],
)
def test_the_size_follows_the_median_picture_and_the_time(
    tmp_path: Path, sizes: list[tuple[int, int]], minutes: float | None, expected: int
) -> None:
    recipe = resolve(automatic_recipe(folder_of(tmp_path / "images", sizes), minutes, {}))
    assert recipe.data.width_height == (expected, expected)
    assert recipe.data.channels == 3


def test_what_the_caller_fixed_stays(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "images", [(500, 400)] * 3, "L")
    fixed: dict[str, Any] = {"size": 48, "channels": 3}
    recipe = resolve(automatic_recipe(place, None, fixed))
    assert recipe.data.size == 48 and recipe.data.channels == 3
    assert recipe.first_stage.train is not None and recipe.first_stage.train.autoencoder is not None
    assert recipe.first_stage.train.autoencoder.in_channels == 3


def test_a_gpu_takes_larger_pictures_but_not_more_than_was_asked(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "images", [(500, 400)] * 3)
    assert resolve(automatic_recipe(place, None, {}, gpu=True)).data.size == 128
    small = resolve(automatic_recipe(place, None, {"size": 32}, gpu=True))
    assert small.data.size == 32 and small.first_stage.train is not None
    assert small.first_stage.train.objective.crop is None  # that of 128x128 would not fit
    assert small.expect == {}  # what another recipe reached says nothing here


def test_a_given_first_stage_decides_the_channels(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "images", [(64, 64)] * 3, "L")
    assert new_recipe(place, first_stage="emoji")[0].data.channels == 3
    assert new_recipe(place)[0].data.channels == 1


def test_the_environment_leaves_exact_places_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = folder_of(tmp_path / "set", [(64, 64)] * 3), tmp_path / "other"
    other.mkdir()
    folder_of(other / "set", [(64, 64)] * 3)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: shapes-tiny\ndata:\n  source: {here}\n")
    monkeypatch.setenv("DARKROOM_DATA", str(other))
    assert new_recipe(str(recipe))[0].data.source == here
    assert new_recipe(str(recipe), data=str(other))[0].data.source == [str(other / "set")]


def test_a_glimpse_sees_size_and_colour(tmp_path: Path) -> None:
    found = glimpse(folder_of(tmp_path / "colour", [(10, 20), (30, 40), (50, 60)]))
    assert found is not None and found.short_side == 30 and not found.grey
    for mode in ("L", "1", "LA", "RGBA", "P"):
        found = glimpse(folder_of(tmp_path / mode, [(9, 9)], mode))
        assert found is not None and found.grey, mode
    lab = tmp_path / "lab"
    lab.mkdir()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8), "LAB").save(lab / "a.tiff")
    found = glimpse(str(lab))
    assert found is not None and not found.grey
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(hidden / "a.png")  # red, but nobody can see it
    (hidden / "broken.png").write_bytes(b"junk")
    found = glimpse(str(hidden))
    assert found is not None and found.grey and found.short_side == 8


def test_grey_images_train_a_grey_model(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "images", [(32, 32)] * 24, "L")
    small = {
        "steps": 2,
        "batch_size": 2,
        "evaluate.samples": 2,
        "evaluate.steps": 2,
        "first_stage.train.steps": 2,
        "first_stage.train.batch_size": 2,
        "first_stage.train.autoencoder.channels": 8,
    }
    run = train(place, tmp_path / "run", overrides=small, quiet=True)
    assert run.model is not None
    model = darkroom.load(run.model)
    assert model.first_stage is not None and model.first_stage.image_channels == 1
    result = model.generate(steps=2)
    assert result.images.shape == (1, 32, 32, 1)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("first-stage-decoder", {}, 'train_encoder" is false): --init-from MODEL'),
        ("first-stage-finetune", {}, 'autoencoder" is null): --init-from MODEL'),
        ("preview", {}, "preview needs a first stage: --first-stage MODEL"),
        ("first-stage-f4", {"data.size": 32}, "--set first_stage.train.objective.crop=null"),
        (
            "first-stage-f4",
            {"data.channels": 1, "first_stage.train.autoencoder.in_channels": 3},
            "is 3 but the data has",
        ),
        ("first-stage-f4", {"first_stage.train.autoencoder.out_channels": 1}, 'out_channels" is 1 but the data has "'),
    ],
)
def test_what_a_recipe_lacks_is_said_at_once(
    tmp_path: Path, recipe: str, overrides: dict[str, Any], words: str, dry_run: bool
) -> None:
    place = folder_of(tmp_path / "images", [(64, 64)] * 3)
    with pytest.raises(DarkroomError) as error:
        train(recipe, tmp_path / "run", data=place, overrides=overrides, dry_run=dry_run, quiet=True)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_missing_files_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message says which setting to mend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DARKROOM_DATA", raising=False)
    with pytest.raises(DarkroomError, match=r"no such file or folder.* --data DIR.* DARKROOM_DATA"):
        new_recipe("first-stage-f4")
    with pytest.raises(DarkroomError, match="absent: no such file or folder; check the path"):
        train("first-stage-f4", tmp_path / "run", data="absent", quiet=True)
    place = folder_of(tmp_path / "mine", [(64, 64)] * 3)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: first-stage-f4\ndata:\n  source: [{place}, shapes@3]\n")
    with pytest.raises(DarkroomError, match=r'"data.validation" names it.*data.validation=0.05'):
        new_recipe(recipe)
    assert new_recipe(recipe, changes={"data.validation": 0.05})[0].data.validation == 0.05


def test_image_channels_of_a_first_stage_follow_from_the_data() -> None:
    settings: dict[str, Any] = {"data": {"channels": 6}, "first_stage": {"train": {}}}
    train_first = resolve(settings).first_stage.train
    assert train_first is not None and train_first.autoencoder is not None
    assert train_first.autoencoder.in_channels == train_first.autoencoder.out_channels == 6
    stated = resolve(settings, {"first_stage.train.autoencoder.out_channels": 3}).first_stage.train
    assert stated is not None and stated.autoencoder is not None
    assert (stated.autoencoder.in_channels, stated.autoencoder.out_channels) == (6, 3)  # the plan complains


def test_deep_grey_pictures_in_a_recipe_of_8_bit_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line says what is lost and how to keep it; a first stage alone is not compared with a denoiser's needs."""
    folder = tmp_path / "grey16"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16)).save(folder / f"{k}.png")
    small = {"first_stage.train.autoencoder.channels": 8, "first_stage.train.batch_size": 1, "data.size": 64}
    train("first-stage-f4", tmp_path / "run", data=folder, overrides=small, dry_run=True)
    output = capsys.readouterr().out
    assert "the pictures have 1 channel of 16 bits; this recipe makes 3 of 8 bits: " in output
    assert "--set data.channels=1 --set data.pixels=uint16" in output
    assert "memorise" not in output and "denoiser" not in output and "condition" not in output
    cured = small | {"data.channels": 1, "data.pixels": "uint16"}
    train("first-stage-f4", tmp_path / "run", data=folder, overrides=cured, dry_run=True)
    assert "warning" not in capsys.readouterr().out


def test_the_report_of_a_first_stage_alone_is_silent_about_a_denoiser() -> None:
    assert about_line({"recipe": "x", "conditioning": None, "denoiser": None}) == "Recipe x"
