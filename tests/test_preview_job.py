"""Preview decoders from training to use: `darkroom train preview`, model folders, live previews while generating."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import one_line, tiny_first_stage, tiny_model

import darkroom
from darkroom.build import build_preview
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.preview import PreviewDecoder
from darkroom.first_stage.statistics import encoder_fingerprint
from darkroom.model_folder import read_index
from darkroom.model_io import install_preview, load_first_stage, save
from darkroom.train_job import train
from darkroom.training.checkpoint import latest_checkpoint

SHORT = {
    "data.source": "shapes",
    "data.validation": None,
    "data.size": 32,
    "data.count": 24,
    "preview.network.channels": 8,
    "preview.steps": 6,
    "preview.batch_size": 4,
    "preview.validate_every": 3,
    "preview.sample_every": 6,
    "preview.checkpoint_every": 3,
    "preview.log_every": 1,
    "preview.optimizer.decay": "constant",
    "preview.precision": "float32",
}


def tiny_preview(first_stage: FirstStage) -> PreviewDecoder:
    torch.manual_seed(3)
    sizes = {"latent_channels": 3, "image_channels": 3, "downsampling": 2, "channels": 8}
    return build_preview(sizes, first_stage.shift, first_stage.scale)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first-stage folder, untrained."""
    return save(tiny_first_stage(), tmp_path_factory.mktemp("given") / "first_stage")


@pytest.fixture(scope="module")
def run(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "preview"
    train("preview", folder, first_stage=given, overrides=SHORT, quiet=True)
    return folder


def test_one_command_makes_a_first_stage_with_a_preview_decoder(run: Path, given: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["preview_steps"] == 6 and summary["preview_times_faster"] > 0
    lost = summary["preview_psnr_full_decoder"] - summary["preview_psnr"]
    assert summary["preview_decibels_lost"] == pytest.approx(lost, abs=1e-3)
    assert (run / "samples" / "preview-000006.png").is_file() and "Preview decoder" in (run / "report.html").read_text()
    first_stage = darkroom.load(run / "model")
    assert isinstance(first_stage, FirstStage) and first_stage.preview is not None
    assert first_stage.preview.config_dict["first_stage"] == encoder_fingerprint(first_stage.autoencoder)
    one, two = (load_file(f / "first_stage" / "model.safetensors") for f in (run / "model", given))
    assert all(torch.equal(one[k], two[k]) for k in two)
    assert load_file(run / "model" / "preview" / "model.safetensors")["conv_in.weight"].dtype == torch.float16
    assert "latent_channels: 3" in (run / "config.yaml").read_text()  # what followed from the first stage


def test_resume_is_bit_equal_and_latents_need_no_cache(run: Path, given: Path, tmp_path: Path) -> None:
    for folder, more in ((tmp_path / "parts", {}), (tmp_path / "fresh", {"preview.cache": False})):
        train("preview", folder, first_stage=given, overrides=SHORT | more | {"preview.steps": 3}, quiet=True)
        train(None, folder, resume=True, overrides={"preview.steps": 6}, quiet=True)
    names = [latest_checkpoint(f / "checkpoints" / "preview") for f in (run, tmp_path / "parts", tmp_path / "fresh")]
    whole, parts, fresh = (load_file(str(n)) for n in names)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not (tmp_path / "fresh" / "latents").exists()
    torch.testing.assert_close(fresh["module/preview/conv_in.weight"], whole["module/preview/conv_in.weight"])


def test_what_cannot_be_trained(given: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"data.random_crop": 16}, "preview.cache=false"),
        ({"preview.network.latent_channels": 4}, '"latent_channels" is 4 but 3 follows'),
        ({"preview.install": True, "preview.stepz": 1}, "stepz"),
    ):
        with pytest.raises(DarkroomError, match=message):
            train("preview", tmp_path / "run", first_stage=given, overrides=SHORT | changes, quiet=True)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(DarkroomError, match="needs a given first stage"):  # before anything is trained
        train("preview", tmp_path / "run", overrides=SHORT | {"preview.install": True}, quiet=True)
    with pytest.raises(DarkroomError, match=r"preview\.steps=N"):
        train("preview", tmp_path / "run", first_stage=given, overrides=SHORT, minutes=1, quiet=True)


def test_model_folders_keep_it(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.first_stage is not None
    model.first_stage.preview = tiny_preview(model.first_stage)
    model.save(tmp_path / "m", dtype="float16")  # the fingerprint is that of the rounded weights
    again = darkroom.load(tmp_path / "m")
    assert again.first_stage.preview is not None
    again.save(tmp_path / "n")
    assert darkroom.load(tmp_path / "n").first_stage.preview is not None
    again.first_stage.preview = None
    again.save(tmp_path / "n")
    assert not (tmp_path / "n" / "preview").exists() and darkroom.load(tmp_path / "n").first_stage.preview is None


def test_one_of_another_first_stage_is_refused(tmp_path: Path) -> None:
    first_stage = tiny_first_stage()
    first_stage.preview = tiny_preview(first_stage)
    save(first_stage, tmp_path / "one")
    other = tiny_first_stage()
    with torch.no_grad():
        next(other.autoencoder.encoder.parameters()).add_(0.1)  # type: ignore[union-attr]
    save(other, tmp_path / "two")
    shutil.copytree(tmp_path / "one" / "preview", tmp_path / "two" / "preview")
    index = json.loads((tmp_path / "two" / "darkroom.json").read_text())
    index["parts"]["preview"] = "preview"
    (tmp_path / "two" / "darkroom.json").write_text(json.dumps(index))
    with pytest.raises(DarkroomError, match="belongs to another first stage") as error:
        darkroom.load(tmp_path / "two")
    for owner in (first_stage, other):
        assert encoder_fingerprint(owner.autoencoder)[:12] in one_line(error)
    shutil.rmtree(tmp_path / "two" / "preview")  # the cure
    assert darkroom.load(tmp_path / "two").preview is None


def test_installing_changes_nothing_else(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "m")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "m").rglob("*")) if p.is_file() and p.suffix != ".json"}
    identity = read_index(tmp_path / "m").sha256
    first_stage = load_first_stage(tmp_path / "m")
    for _ in range(2):  # also over an older one
        install_preview(tiny_preview(first_stage), tmp_path / "m")
    assert all(p.read_bytes() == content for p, content in before.items())
    assert read_index(tmp_path / "m").sha256 == identity  # it decides no image
    assert darkroom.load(tmp_path / "m").first_stage.preview is not None


def test_live_previews_do_not_change_the_images() -> None:
    model = tiny_model()
    with pytest.raises(DarkroomError, match="no preview decoder"):
        model.generate("a red fox", preview=lambda done, images: None)
    assert model.first_stage is not None
    model.first_stage.preview = tiny_preview(model.first_stage)
    seen: list[tuple[int, np.ndarray]] = []
    options: dict[str, Any] = {"seed": [1, 2, 3], "steps": 4, "batch_size": 2}
    result = model.generate("a red fox", **options, preview=lambda *call: seen.append(call), preview_every=2)
    assert [done for done, _ in seen] == [2, 4, 6, 8]  # two batches of four steps
    assert [images.shape for _, images in seen] == [(2, 16, 16, 3)] * 2 + [(1, 16, 16, 3)] * 2
    assert seen[0][1].dtype == np.uint8 and not np.array_equal(seen[0][1], seen[1][1])
    assert np.array_equal(result.images, model.generate("a red fox", **options).images)
    with pytest.raises(DarkroomError, match="preview_every is 0"):
        model.generate("a red fox", preview=lambda *call: None, preview_every=0)


def test_the_command_shows_unfinished_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from darkroom.cli.main import main

    model = tiny_model()
    assert model.first_stage is not None
    model.first_stage.preview = tiny_preview(model.first_stage)
    model.save(tmp_path / "m")
    words = ["generate", "a red fox", "-m", str(tmp_path / "m"), "-n", "2", "--steps", "3"]
    live, output = tmp_path / "live.png", tmp_path / "out"
    assert main([*words, "-o", str(output), "--preview", str(live)]) == 0
    with Image.open(live) as picture:
        assert picture.size == (34, 16)
    assert main([*words, "-o", str(output), "--preview", str(tmp_path / "live.jpg")]) == 2
    assert ".png" in capfd.readouterr().err
