"""`darkroom eval --first-stage`: what it prints, what it writes, and what it says to bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.build import build_first_stage
from darkroom.cli.evaluate import parse_size
from darkroom.errors import DarkroomError
from darkroom.eval_job import comparison, error_maps, model_name, open_images, trained_size
from darkroom.model_io import load_first_stage

Run = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("quick_extractors")


def pictures(folder: Path, count: int = 5, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def test_eval_writes_scores_pictures_and_a_page(run: Run, models: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos")
    status, out, error = run("eval", "--first-stage", models / "fs", data, "--size", 32, "-o", "scores")
    assert status == 0, error
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert record["protocol"]["model"] == "fs" and record["protocol"]["count"] == 5 and record["protocol"]["hardware"]
    assert record["protocol"]["data"]["photos"]["size"] == [32, 32] and not record["sources"]
    for name in ("PSNR", "SSIM", "perceptual-darkroom", "rFD-darkroom", "gradient energy ratio", "decode s/MP"):
        assert name in record["scores"] and name in out
    assert "warning: rFD-darkroom from 5 images" in out and "report: scores/report.html" in out
    with Image.open(tmp_path / "scores" / "pictures.png") as picture:
        assert picture.size == (5 * 34 - 2, 3 * 34 - 2)
    page = (tmp_path / "scores" / "report.html").read_text()
    for words in (
        "rFD-darkroom",
        "Before you trust it",
        "Latents",
        "Flat colours",
        "Protocol",
        "data:image",
        record["protocol"]["crop"],
    ):
        assert words in page
    assert str(tmp_path) not in page and str(tmp_path) not in json.dumps(record)
    assert {c["name"] for c in record["flat_colours"]["colours"]} >= {"black", "grey", "white"}
    assert (tmp_path / "scores" / "flat-colours.png").is_file()


def test_eval_counts_in_every_source(models: Path) -> None:
    first_stage = load_first_stage(models / "fs")
    for place in ("shapes@3", "shapes:single@2"):
        (images,) = open_images([place], 32, first_stage).values()
        assert len(images) == int(place.partition("@")[2])
    config = {"channels": 8, "channel_mult": [1], "num_res_blocks": 1, "in_channels": 6, "out_channels": 6}
    six = build_first_stage(config | {"pixels": {"dtype": "float32", "low": 0.0, "high": 1.0}})
    (images,) = open_images(["bands6@4"], 32, six).values()
    assert len(images) == 4


def test_eval_takes_sizes_that_are_no_multiples_of_f(run: Run, models: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos", 2)
    status, _, error = run("eval", "--first-stage", models / "fs", data, "--size", "35x33", "-o", "odd")
    assert status == 0, error
    assert json.loads((tmp_path / "odd" / "scores.json").read_text())["protocol"]["data"]["photos"]["size"] == [35, 33]


def test_eval_takes_several_sources_and_parts_of_models(run: Run, models: Path, tmp_path: Path) -> None:
    one, two = pictures(tmp_path / "a" / "photos", 3), pictures(tmp_path / "b" / "photos", 4)
    command = ("eval", "--first-stage", models / "text", one, two, "shapes@6", "--size", "32x32", "--count", 4)
    status, out, error = run(*command)
    assert status == 0, error
    record = json.loads((tmp_path / "runs" / "eval-text" / "scores.json").read_text())
    assert {name: row["images"] for name, row in record["sources"].items()} == {"photos": 3, "photos 2": 4, "shapes": 4}
    assert record["protocol"]["data"]["shapes"]["split"] == "validation"  # a tenth of its scenes
    assert out.splitlines()[0].split() == ["all", "photos", "photos", "2", "shapes"]
    assert run(*command)[0] == 0  # again, into the same folder


def test_held_out_parts_are_taken_where_the_source_has_them(run: Run, models: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "train", 5)
    pictures(tmp_path / "set" / "val", 2)
    assert run("eval", "--first-stage", models / "fs", "set", "--size", 32)[0] == 0
    record = json.loads((tmp_path / "runs" / "eval-fs" / "scores.json").read_text())
    assert record["protocol"]["data"]["set"]["split"] == "validation" and record["protocol"]["count"] == 2


def test_eval_refuses_bad_input(refused: Callable[..., str], models: Path, tmp_path: Path) -> None:
    model, data = models / "fs", pictures(tmp_path / "photos", 2)
    assert "--first-stage MODEL DATA" in refused("eval")
    assert "nothing to evaluate on" in refused("eval", "--first-stage", model)
    assert "no model" in refused("eval", "--first-stage", "absent", data)
    assert "no first stage" in refused("eval", "--first-stage", models / "bare", data)
    assert "--size 12x: write it as" in refused("eval", "--first-stage", model, data, "--size", "12x")
    assert "absent" in refused("eval", "--first-stage", model, "absent")
    assert "--count" in refused("eval", "--first-stage", model, data, "--count", 0)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("eval", "--first-stage", model, data, "-o", "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert "holds a run" in refused("eval", "--first-stage", model, data, "-o", "run")


def test_sizes_and_names(models: Path, tmp_path: Path) -> None:
    assert parse_size(None) is None and parse_size("64") == (64, 64) and parse_size("96X32") == (96, 32)
    for bad in ("0", "-1", "a", "1x2x3", "x"):
        with pytest.raises(DarkroomError, match="write it as"):
            parse_size(bad)
    assert trained_size(models / "text") == (16, 16) and trained_size(models / "fs") is None
    assert model_name("emoji") == "emoji" and model_name("a/kl-f8.ckpt") == "kl-f8"
    run = tmp_path / "a-run" / "model"
    run.mkdir(parents=True)
    assert model_name(run) == model_name(run.parent) == "a-run"


def test_comparison_has_rows_of_images_reconstructions_and_errors() -> None:
    images = torch.linspace(-1, 1, 11)[:, None, None, None].expand(11, 2, 4, 6)
    sheet = np.asarray(comparison(images, images.flip(1), columns=8))
    assert sheet.shape == (6 * 6 - 2, 8 * 8 - 2, 3)
    assert (sheet[18:22, 24:] == 255).all()  # the rest of the second block is white
    errors = error_maps(torch.zeros(3, 1, 2, 2), torch.tensor([0.0, 0.25, 3.0])[:, None, None, None].expand(3, 1, 2, 2))
    assert (errors[0] == 0).all() and (errors[2] == 255).all()
    assert errors[1, 0, 0, 0] == 255 and errors[1, 0, 0, 2] == 0  # red and yellow before white
