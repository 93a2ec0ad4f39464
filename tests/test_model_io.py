"""A model saved and loaded is the same model; what cannot be loaded is refused with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import full_disk, one_line, tiny_first_stage, tiny_model

from darkroom import model_folder
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import bundled, load, save, select_device, select_dtype


def equal_states(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("condition", ["text", "class", None])
def test_round_trip(tmp_path: Path, condition: str | None) -> None:
    model = tiny_model(condition)
    model.save(tmp_path / "m", card="# tiny\n")
    state = torch.get_rng_state()
    again = load(tmp_path / "m", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(again, LatentDiffusion) and not again.training and equal_states(model, again)
    assert again.info["name"] == "tiny" and len(again.info["sha256"]) == 64
    assert (tmp_path / "m" / "README.md").read_text() == "# tiny\n"
    arguments: dict[str, Any] = {"text": {"prompt": "a fox"}, "class": {"class_label": "coat"}}.get(condition or "", {})
    one, other = (m.generate(**arguments, seed=[3, 4]) for m in (model, again))
    assert one.images.shape == (2, 16, 16, 3) and np.array_equal(one.images, other.images)
    again.save(tmp_path / "n", card="# tiny\n")
    for path in (tmp_path / "m").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "n" / path.relative_to(tmp_path / "m")).read_bytes()


def test_parts_alone(tmp_path: Path) -> None:
    save(tiny_first_stage(), tmp_path / "fs")
    first_stage = load(tmp_path / "fs", device="cpu")
    assert isinstance(first_stage, FirstStage) and equal_states(first_stage, tiny_first_stage())
    assert torch.equal(first_stage.scale, torch.tensor([1.5, 2.0, 0.5]))
    tiny_model(with_first_stage=False).save(tmp_path / "d")
    model = load(tmp_path / "d", device="cpu")
    assert isinstance(model, LatentDiffusion) and model.first_stage is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half_precision(tmp_path: Path, dtype: str) -> None:
    model = tiny_model()
    model.save(tmp_path / "whole")
    model.save(tmp_path / "half", dtype=dtype)
    sizes = [(tmp_path / n / "denoiser" / "model.safetensors").stat().st_size for n in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = load(tmp_path / "half", device="cpu")
    assert isinstance(again, LatentDiffusion)
    assert equal_states(again.first_stage, tiny_first_stage()) is False
    assert torch.equal(again.first_stage.scale, model.first_stage.scale)  # buffers keep their precision
    read = again.state_dict()
    for name, value in model.state_dict().items():
        assert read[name].dtype == value.dtype
        assert torch.allclose(read[name], value, rtol=0.01, atol=1e-4), name
    with torch.no_grad():
        next(model.denoiser.parameters()).fill_(1e6)
    if dtype == "float16":
        with pytest.raises(DarkroomError, match="beyond the range"):
            model.save(tmp_path / "half", dtype=dtype)
        assert equal_states(load(tmp_path / "half", device="cpu"), again)


def test_loaded_network_precision(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m")
    model = load(tmp_path / "m", device="cpu", dtype="bfloat16")
    assert isinstance(model, LatentDiffusion)
    assert next(model.denoiser.network.parameters()).dtype == torch.bfloat16
    exact = load(tmp_path / "m", device="cpu")
    assert isinstance(exact, LatentDiffusion)
    one, other = (m.generate("a fox").images.astype(float) for m in (model, exact))
    assert np.abs(one - other).mean() < 4


def test_live_weights(tmp_path: Path) -> None:
    model = tiny_model()
    live = {name: value + 1 for name, value in model.denoiser.state_dict().items()}
    model.save(tmp_path / "m", live={"denoiser": live})
    averaged, raw = (load(tmp_path / "m", weights=w, device="cpu") for w in ("ema", "live"))
    assert isinstance(averaged, LatentDiffusion) and isinstance(raw, LatentDiffusion)
    assert equal_states(averaged, model) and raw.info["weights"] == "live"
    assert all(torch.equal(value, live[name]) for name, value in raw.denoiser.state_dict().items())
    assert equal_states(raw.first_stage, model.first_stage)
    model.save(tmp_path / "m")
    with pytest.raises(DarkroomError, match="no live weights"):
        load(tmp_path / "m", weights="live")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships the first stage "fs" and the model "emoji"."""
    for module in ("darkroom.model_folder", "darkroom.model_io"):
        monkeypatch.setattr(f"{module}.BUNDLED", tmp_path / "bundled")
    save(tiny_first_stage(), tmp_path / "bundled" / "fs")
    tiny_model().save(tmp_path / "bundled" / "emoji")
    return tmp_path / "bundled"


def test_bundled_models_and_references(tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled() == ["emoji", "fs"]
    assert equal_states(load("emoji", device="cpu"), tiny_model())
    model = tiny_model()
    model.first_stage = load("fs", device="cpu")
    model.save(tmp_path / "m", refer=True)
    assert not (tmp_path / "m" / "first_stage").exists()
    again = load(tmp_path / "m", device="cpu")
    assert equal_states(again, model)
    again.save(tmp_path / "n", refer=True)  # a reference survives loading
    assert (
        json.loads((tmp_path / "n" / "darkroom.json").read_text())["parts"]["first_stage"]["reference"]["name"] == "fs"
    )
    again.save(tmp_path / "copied")
    assert (tmp_path / "copied" / "first_stage" / "model.safetensors").is_file()

    monkeypatch.chdir(tmp_path)
    tiny_model("class").save("emoji")  # a path wins over a name
    assert "class" in load("emoji", device="cpu").conditioner.encoders

    other = tiny_first_stage()
    other._set(0.0, 1.0)
    save(other, shipped / "fs")
    with pytest.raises(DarkroomError, match="another version of the bundled first stage"):
        load(tmp_path / "m")


def test_an_older_model_is_replaced_whole(tmp_path: Path) -> None:
    tiny_model("class").save(tmp_path / "m", card="old")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "samples").mkdir()
    (tmp_path / "m" / "samples" / "a.png").write_text("picture")
    tiny_model("text", with_first_stage=False).save(tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["conditioner", "darkroom.json", "denoiser", "notes.txt", "samples"]
    assert (tmp_path / "m" / "samples" / "a.png").read_text() == "picture"
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(DarkroomError, match="holds other files"):
        tiny_model().save(tmp_path / "photos")


@pytest.mark.parametrize(
    "file", ["denoiser/model.safetensors", "darkroom.json", "conditioner/config.json", "README.md"]
)
def test_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    model = tiny_model()
    model.save(tmp_path / "m", card="old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        full_disk(patch, file)
        with pytest.raises(DarkroomError) as error:
            model.save(tmp_path / "m", card="new")
        assert "No space left on device" in one_line(error)
        with pytest.raises(DarkroomError):
            model.save(tmp_path / "deep" / "new", card="new")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    def refused(words: str, source: str | Path, **options: Any) -> None:
        with pytest.raises(DarkroomError) as error:
            load(source, **options)
        assert words in one_line(error), error.value

    refused("no such file or folder", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("empty folder", tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    refused("not a model folder", tmp_path / "photos")
    refused("is not a model", tmp_path / "photos" / "a.jpg")
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "model_index.json").write_text("{}")
    refused("diffusers folder", tmp_path / "diffusers")

    model = tiny_model()
    folder = model.save(tmp_path / "run" / "model")
    assert equal_states(load(tmp_path / "run", device="cpu"), model)  # a run folder means its model
    refused("weights=", folder, weights="best")
    refused("device", folder, device="cuda:99")
    refused("device", folder, device="toaster")
    refused("dtype", folder, dtype="int3")
    weights = folder / "denoiser" / "model.safetensors"
    refused("cannot load", weights)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    refused("truncated", folder)
    weights.write_bytes(whole)
    config = folder / "denoiser" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"model_channels": 32', '"model_channels": 64'))
    refused("does not fit", folder)
    config.write_text(text.replace('"model_channels"', '"model_chanels"'))
    refused('did you mean "model_channels"', folder)
    config.unlink()
    refused("does not exist", folder)
    config.write_text(text)

    index = folder / "darkroom.json"
    content = json.loads(index.read_text())
    for change, words in (
        ({"format_version": 99}, "upgrade"),
        ({"format_version": None}, "no format_version"),
        ({"kind": "cake"}, "cake"),
        ({"parts": {"first_stage": "first_stage"}}, "lacks the part"),
        ({"parts": content["parts"] | {"denoiser": "../../denoiser"}}, "must be"),
        ({"parts": content["parts"] | {"x": "x"}}, "unknown part"),
        ({"parts": content["parts"] | {"first_stage": {"reference": {"name": "nope", "sha256": ""}}}}, "does not ship"),
        ({"parts": content["parts"] | {"first_stage": {}}}, "damaged"),
        ({"parts": []}, "tables"),
    ):
        index.write_text(json.dumps(content | change))
        refused(words, folder)
    index.write_text("{")
    refused("not a readable model index", folder)


def test_official_files_are_recognised(tmp_path: Path) -> None:
    names = {
        "model.diffusion_model.input_blocks.0.0.weight": "a latent diffusion checkpoint",
        "cond_stage_model.transformer.text_model.x": "Stable Diffusion",
        "first_stage_model.encoder.conv_in.weight": "first stage",
    }
    torch.save({"state_dict": dict.fromkeys(names, torch.ones(1))}, tmp_path / "sd.ckpt")
    with pytest.raises(DarkroomError, match=r"lacks 'model\.diffusion_model\.input_blocks\.1\."):
        load(tmp_path / "sd.ckpt")
    guess = model_folder.guess_family
    assert "autoencoder" in guess(["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"])
    assert "LoRA" in guess(["lora_unet_down_blocks_0.lora_up.weight"])
    assert "diffusers denoiser" in guess(["down_blocks.0.resnets.0.conv1.weight"])
    assert "no known model" in guess(["weight"])


def test_an_unbuilt_module_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    del model.denoiser.config_dict
    with pytest.raises(DarkroomError, match="config_dict"):
        model.save(tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_selections() -> None:
    assert select_device("cpu") == torch.device("cpu") and select_dtype("auto") == torch.float32
    assert select_dtype(torch.float16) == select_dtype("float16") == torch.float16
