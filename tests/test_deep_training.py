"""Training on files of more than 8 bits or other than 3 channels: the model keeps their format and gives it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import darkroom
from darkroom.data.export import write_synthetic
from darkroom.data.image_files import image_bytes
from darkroom.data.synthetic import open_synthetic
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.pixel_format import PixelFormat
from darkroom.plan import automatic_recipe
from darkroom.train_job import train
from darkroom.training.recipe import read_recipe, recipe_names, resolve

STAGE = {"steps": 2, "batch_size": 2, "validate_every": 2, "sample_every": 2, "checkpoint_every": 2}
FEW: dict[str, Any] = {
    **{f"first_stage.train.{key}": value for key, value in STAGE.items()},
    **STAGE,
    "first_stage.train.autoencoder.channels": 8,
    "denoiser.network.model_channels": 32,
    "data.size": 32,
    "evaluate.samples": 2,
    "evaluate.steps": 2,
}


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe grey16 on 16-bit PNG files."""
    folder = tmp_path_factory.mktemp("grey")
    write_synthetic(open_synthetic("phantoms16", (32, 32), 12), folder / "files", ".png")
    train("grey16", folder / "run", data=folder / "files", overrides=FEW, quiet=True)
    return folder


def test_sixteen_bit_files_make_a_sixteen_bit_model(grey: Path) -> None:
    model = darkroom.load(grey / "run" / "model")
    assert isinstance(model, LatentDiffusion) and model.first_stage is not None
    assert model.pixels == model.first_stage.pixels == PixelFormat.of("uint16")
    result = model.generate(seed=[0, 1])
    assert result.images.dtype == np.uint16 and result.images.shape == (2, 32, 32, 1)
    with Image.open(grey / "files" / "000000.png") as image:
        values = np.asarray(image)
    back = darkroom.reconstruct(model.first_stage, values)
    assert back.dtype == np.uint16 and back.shape == values.shape
    config = json.loads((grey / "run" / "model" / "first_stage" / "config.json").read_text())
    assert config["pixels"] == {"dtype": "uint16", "low": 0.0, "high": 65535.0}
    facts = json.loads((grey / "run" / "data.json").read_text())
    assert facts["pixels"] == "16 bits, 0 to 65535" and not facts["problems"]
    with Image.open(grey / "run" / "samples" / "denoiser-000002.png") as image:
        assert image.mode == "L"  # a preview


def test_old_model_folders_have_eight_bits(grey: Path, tmp_path: Path) -> None:
    from shutil import copytree

    folder = copytree(grey / "run" / "first_stage", tmp_path / "old")
    path = folder / "first_stage" / "config.json"
    config = json.loads(path.read_text())
    del config["pixels"]
    path.write_text(json.dumps(config))
    loaded = darkroom.load(folder)
    assert isinstance(loaded, FirstStage) and loaded.pixels == PixelFormat()


def test_a_given_first_stage_decides_the_format(grey: Path, tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=r'set "data.pixels" to uint16 and "data.value_range" to \[0, 65535\]'):
        eight = {**FEW, "data.pixels": "uint8", "first_stage": {"path": str(grey / "run" / "model")}}
        eight = {key: value for key, value in eight.items() if not key.startswith("first_stage.")}
        train("grey16", tmp_path / "a", data=grey / "files", overrides=eight, quiet=True)


def test_bands_measure_their_range_and_resume_with_it(tmp_path: Path) -> None:
    write_synthetic(open_synthetic("bands6", (32, 32), 12), tmp_path / "files", ".npy")
    only = {**FEW, "steps": 0}
    run = train("bands6", tmp_path / "run", data=tmp_path / "files", overrides=only, quiet=True)
    assert run.model is not None
    first_stage = darkroom.load(run.model)
    assert isinstance(first_stage, FirstStage)
    pixels = first_stage.pixels
    assert pixels.dtype == "float32" and 0 <= pixels.low < 0.05 < 0.3 < pixels.high <= 0.8
    stated = resolve(read_recipe(tmp_path / "run" / "config.yaml")).data
    assert stated.value_range == (pixels.low, pixels.high)
    again = train(None, tmp_path / "run", resume=True, quiet=True)
    assert again.model is not None
    image = np.load(tmp_path / "files" / "000000.npy")
    back = darkroom.reconstruct(first_stage, image)
    assert back.shape == (32, 32, 6) and back.dtype == np.float32 and back.min() >= pixels.low


def test_automatic_recipes_see_depth_and_channels(tmp_path: Path) -> None:
    for name, values, settings in (
        ("grey", np.arange(4096, dtype=np.uint16).reshape(64, 64, 1) * 16, {"pixels": "uint16", "channels": 1}),
        ("bands", np.linspace(0, 1, 20480, dtype=np.float32).reshape(64, 64, 5), {"pixels": "float32", "channels": 5}),
    ):
        (tmp_path / name).mkdir()
        for k in range(3):
            (tmp_path / name / f"{k}.npy").write_bytes(image_bytes(values, ".npy"))
        recipe = automatic_recipe(str(tmp_path / name), None, {})
        assert {key: recipe["data"][key] for key in settings} == settings
        network = resolve(recipe).first_stage.train.autoencoder  # type: ignore[union-attr]
        assert network is not None and network.in_channels == network.out_channels == settings["channels"]


def test_the_recipes_train_on_their_own_sets() -> None:
    for name, source, channels in (("grey16", "phantoms16", 1), ("bands6", "bands6", 6)):
        recipe = resolve(read_recipe(recipe_names()[name]))
        assert (recipe.data.source, recipe.data.channels) == (source, channels)
        assert recipe.first_stage.train is not None and recipe.first_stage.train.autoencoder is not None
        assert recipe.first_stage.train.autoencoder.in_channels == channels
