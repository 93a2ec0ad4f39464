"""What the measurements of super-resolution are made with: seam energy, the regression network, the table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from condition_models import make_model

from darkroom.data.degradations import LowResolution
from darkroom.data.sources import DataConfig
from darkroom.errors import DarkroomError
from darkroom.evaluation.protocol import read_record
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.networks.unet import UNetConfig
from darkroom.training.recipe import find_recipe, read_recipe, resolve
from darkroom.upscaling import Upscaler, UpscaleSettings

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NETWORK = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=())


@pytest.fixture(autouse=True)
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_seam_energy_sees_a_seam_and_nothing_else() -> None:
    from upscale_seams import drawn_photo, seam_energy

    image = np.asarray(drawn_photo(512, 256)).astype(np.float32)
    borders = [128, 256, 384]
    across, near = seam_energy(image, borders, 16)
    assert 0.9 < across / near < 1.1
    seams = image + 40 * (np.arange(512)[None, :, None] // 128 % 2)
    across, near = seam_energy(seams, borders, 16)
    assert across / near > 1.5


def test_borders_are_those_of_the_windows() -> None:
    from upscale_seams import borders_of

    model = make_model("low_resolution", low_resolution={"noise_levels": 0})
    settings = UpscaleSettings(window=32, overlap=8)
    columns, rows = borders_of(Upscaler(model), 20, 8, settings)
    assert rows == [] and columns == [24, 32, 48, 56]  # of 80 pixels: windows at 0, 24 and 48


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
def test_the_regression_network_takes_any_size(size: tuple[int, int]) -> None:
    from regression_baseline import Regression
    from restoration import bicubic_by

    network = Regression(NETWORK, 4)
    small = torch.rand(2, 3, *size)
    image = network(small)
    assert image.shape == (2, 3, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(image, bicubic_by(4)(small))  # untrained it is bicubic: its last layer is zero


def test_the_small_pictures_of_a_table_are_those_of_all_models_or_of_the_named_one() -> None:
    from upscaling_table import common_rule

    made: dict[str, LatentDiffusion] = {}
    for name, rule in {"clean": {"factor": 4}, "blind": {"factor": 4, "pipeline": "bsr-light"}}.items():
        made[name] = make_model("low_resolution", low_resolution={"noise_levels": 0})
        made[name].info |= {"data": {"low_resolution": rule}}
    assert common_rule({}) == LowResolution(4)
    assert common_rule({"blind": made["blind"]}) == LowResolution(4, pipeline="bsr-light")
    assert common_rule(made, "blind").pipeline == "bsr-light" and common_rule(made, "clean").pipeline == "bicubic"
    with pytest.raises(DarkroomError, match="small pictures; give each kind a table of its own, or say --degr"):
        common_rule(made)
    with pytest.raises(DarkroomError, match="absent: no such model; give one of clean, blind"):
        common_rule(made, "absent")
    with pytest.raises(DarkroomError, match="name a model with --model"):
        common_rule({}, "absent")
    made["twice"] = make_model("low_resolution", low_resolution={"noise_levels": 0, "factor": 2})
    with pytest.raises(DarkroomError, match="different factors"):
        common_rule(made, "blind")


@pytest.mark.slow
def test_the_baseline_and_the_table(tmp_path: Path) -> None:
    """Both commands for a few steps: trained, resumed, scored, with a record for each row. Half a minute."""
    from regression_baseline import load_regression, train_regression
    from upscaling_table import run

    recipe = resolve(read_recipe(find_recipe("clothing-sr")), {"first_stage": None, "steps": 4, "batch_size": 2})
    data = DataConfig(count=12, size=32, low_resolution=LowResolution(4), validation=0.2)
    recipe = replace(recipe, data=data, denoiser=replace(recipe.denoiser, network=NETWORK))
    facts = train_regression(recipe, tmp_path / "regression", quiet=True)
    _, saved = load_regression(tmp_path / "regression")
    assert facts["steps"] == saved["steps"] == 4 and saved["factor"] == 4
    again = train_regression(recipe, tmp_path / "regression", resume=True, quiet=True)
    assert again["psnr"] == pytest.approx(facts["psnr"], abs=1e-4)
    timed = train_regression(recipe, tmp_path / "timed", minutes=1e-6, quiet=True)
    assert timed["steps"] == 1
    with pytest.raises(DarkroomError, match="no regression network"):
        load_regression(tmp_path)

    model = make_model("low_resolution", low_resolution={"noise_levels": 0})
    model.save(tmp_path / "model")
    options: dict[str, Any] = {"data": ["shapes"], "model": [f"ours={tmp_path / 'model'}"], "steps": 1, "count": 4}
    options |= {"regression": tmp_path / "regression", "output": tmp_path / "table", "size": "32x32", "pictures": 2}
    options["degradation_of"] = None
    text = run(argparse.Namespace(**options, speed=True, batch_size=2, threads=1))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["", "---", "bicubic", "L1 regression", "ours", "ours, consistent"]
    assert {"PSNR", "SSIM", "consistency", "training samples/s"} <= {cell.strip() for cell in text.split("|")}
    found = {row["row"]: row for row in json.loads((tmp_path / "table" / "table.json").read_text())}
    for row in found.values():
        record = read_record(tmp_path / "table" / row["record"])
        assert record.values == row["scores"] and record.sampling.count == 4
    assert found["ours, consistent"]["scores"]["consistency"] < 0.5 < found["ours"]["scores"]["consistency"]
    assert found["bicubic"]["parameters"] == 0 < found["L1 regression"]["parameters"]
    assert (tmp_path / "table" / "pictures.png").is_file()


@pytest.mark.slow
def test_the_table_of_other_degradations(tmp_path: Path) -> None:
    """Blurred pictures of equal size, and a model on the small pictures of another one. A quarter of a minute."""
    from regression_baseline import Regression, save_regression
    from upscaling_table import run

    for name, factor, rule in (
        ("sharpens", 1, {"factor": 1, "blur": 2.0}),
        ("clean", 4, {"factor": 4}),
        ("blind", 4, {"factor": 4, "pipeline": "bsr-light"}),
    ):
        made = make_model("low_resolution", low_resolution={"noise_levels": 0, "factor": factor})
        made.info |= {"data": {"low_resolution": rule}}
        made.save(tmp_path / name)
    options: dict[str, Any] = {"data": ["shapes"], "steps": 1, "count": 3, "size": "32x32", "pictures": 2}
    options |= {"speed": False, "batch_size": 2, "threads": 1, "regression": None, "degradation_of": None}

    def table(output: str, *models: str, **changed: Any) -> str:
        places = [f"{name}={tmp_path / name}" for name in models]
        return run(argparse.Namespace(**options | {"model": places, "output": tmp_path / output} | changed))

    blurred = table("blurred", "sharpens")
    rows = [line.split("|")[1].strip() for line in blurred.splitlines() if line.startswith("| ")]
    assert rows == ["", "---", "as it is", "sharpens"] and "of equal size, blur 2.0" in blurred
    assert "consistency" not in blurred  # of a blurred picture it would be best to leave it as it is
    with pytest.raises(DarkroomError, match="different small pictures"):
        table("both", "clean", "blind")
    text = table("both", "clean", "blind", degradation_of="blind")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["", "---", "bicubic", "clean", "blind"] and "4 times smaller by bsr-light" in text
    with pytest.raises(DarkroomError, match="begun with other settings"):  # its pictures were damaged otherwise
        table("both", "clean", "blind", degradation_of="clean")
    save_regression(Regression(NETWORK, 4), tmp_path / "regression", {"minutes": 1.0})
    with pytest.raises(DarkroomError, match="enlarges by 4, and these small pictures are 1 times smaller"):
        table("with", "sharpens", regression=tmp_path / "regression")


@pytest.mark.slow
def test_the_measurement_of_seams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in a process of its own; what has no border, or no model, is no pass."""
    import upscale_seams

    made = make_model("low_resolution", low_resolution={"noise_levels": 0})
    made.info |= {"name": "tiny-sr"}
    model = str(made.save(tmp_path / "model"))
    command = ["upscale_seams.py", "--model", model, "--size", "40x24", "--steps", "1", "--consistency", "--check"]
    monkeypatch.setattr(sys, "argv", [*command, "--window", "64", "--overlap", "16"])
    monkeypatch.setattr(upscale_seams, "LARGEST_SEAM", 100.0)  # of random weights
    assert upscale_seams.main() == 0
    told = capsys.readouterr().out
    assert "40x24 -> 160x96, tiny-sr" in told and "peak memory" in told and "nan" not in told
    monkeypatch.setattr(sys, "argv", [*command, "--window", "1024"])
    assert upscale_seams.main() == 1
    monkeypatch.setattr(sys, "argv", ["upscale_seams.py", "--model", "no-such-model", "--check"])
    assert upscale_seams.main() == 1 and "left out" in capsys.readouterr().out
