"""The recipes of inpainting, each for two steps on a few pictures at reduced width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model

import darkroom
from darkroom.build import build_first_stage
from darkroom.data.shapes import draw_scene, render
from darkroom.errors import DarkroomError
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import save
from darkroom.networks.unet import UNet, UNetConfig
from darkroom.objective import ObjectiveConfig
from darkroom.train_job import train
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.recipe import find_recipe, read_recipe, resolve

SHORT: dict[str, Any] = {
    "data.size": 32,
    "steps": 2,
    "batch_size": 2,
    "denoiser.network.model_channels": 32,
    "denoiser.network.num_head_channels": 32,
    "evaluate.samples": 2,
    "evaluate.steps": 2,
}
FIRST: dict[str, Any] = {
    "first_stage.train.steps": 2,
    "first_stage.train.batch_size": 2,
    "first_stage.train.autoencoder.channels": 8,
    "first_stage.train.objective.crop": 16,
    "first_stage.train.objective.discriminator_start": 1,
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f = 4, random weights."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "channel_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
    return save(build_first_stage({"kind": "kl", **sizes}), tmp_path_factory.mktemp("first") / "stage")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        Image.fromarray(render(draw_scene(i))[0]).save(folder / f"{i}.png")
    return folder


def in_channels(folder: Path) -> int:
    model = darkroom.load(folder / "model", device="cpu")
    assert isinstance(model, LatentDiffusion)
    return int(model.denoiser.network.config.in_channels)  # type: ignore[union-attr, arg-type]


def test_the_shipped_one_and_fine_tuning_it_on_larger_pictures(
    first_stage: Path, pictures: Path, tmp_path: Path
) -> None:
    train("clothing-inpaint", tmp_path / "a", data=pictures, first_stage=first_stage, overrides=SHORT, quiet=True)
    assert in_channels(tmp_path / "a") == 4 + 4 + 16
    for i, name in enumerate(("camvid-inpaint", "inpaint-half-finetuned")):
        changes = {k: v for k, v in SHORT.items() if not k.startswith("denoiser")} | {"data.size": [64, 48]}
        train(name, tmp_path / str(i), data=pictures, init_from=tmp_path / "a" / "model", overrides=changes, quiet=True)
        model = darkroom.load(tmp_path / str(i) / "model", device="cpu")
        assert isinstance(model, LatentDiffusion) and model.defaults["size"] == [64, 48]
    hole = np.zeros((48, 64), bool)
    hole[10:20, 10:30] = True
    result = model.generate(image=np.zeros((48, 64, 3), np.uint8), repaint_mask=hole, size=(64, 48), steps=2)
    assert result.images.shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    [
        ("inpaint-kl-f4", "kl", False),
        ("inpaint-kl-f4-attention", "kl", True),
        ("inpaint-vq-f4", "vq", False),
        ("inpaint-vq-f4-attention", "vq", True),
    ],
)
def test_the_rows_of_first_stages(name: str, kind: str, attention: bool, pictures: Path, tmp_path: Path) -> None:
    train(name, tmp_path / "run", data=pictures, overrides=SHORT | FIRST, quiet=True)
    model = darkroom.load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(model, LatentDiffusion) and model.first_stage is not None
    config: Any = model.first_stage.autoencoder.config
    assert (config.codebook_size is not None, config.bottleneck_attention, model.downsampling) == (
        kind == "vq",
        attention,
        4,
    )
    whole, base = (resolve(read_recipe(find_recipe(n))) for n in (name, "clothing-inpaint"))
    assert whole.denoiser == base.denoiser and whole.conditioner == base.conditioner


def test_the_row_of_pixels(pictures: Path, tmp_path: Path) -> None:
    train("inpaint-f1", tmp_path / "run", data=pictures, overrides=SHORT, quiet=True)
    model = darkroom.load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(model, LatentDiffusion) and in_channels(tmp_path / "run") == 3 + 3 + 1
    assert model.first_stage is None or isinstance(model.first_stage.autoencoder, IdentityAutoencoder)
    # Of equal size, within what attention at one level more would add.
    sizes = []
    for name, inputs, outputs in (("inpaint-f1", 3 + 3 + 1, 3), ("clothing-inpaint", 4 + 4 + 16, 4)):
        network = resolve(read_recipe(find_recipe(name))).denoiser.network
        assert isinstance(network, UNetConfig)
        made = UNet(replace(network, in_channels=inputs, out_channels=outputs))
        sizes.append(sum(p.numel() for p in made.parameters()))
    assert 0.95 < sizes[0] / sizes[1] <= 1


def test_half_the_size_is_the_only_difference() -> None:
    half, whole = (resolve(read_recipe(find_recipe(n))) for n in ("inpaint-half", "clothing-inpaint"))
    assert half.data.size == 64 and whole.data.size == 128 and half.denoiser == whole.denoiser


def test_every_draw_has_its_own_time_and_noise_and_the_same_condition() -> None:
    """One encoding for all draws; the loss is the mean over the doubled batch."""
    model, seen, calls = tiny_model("class"), [], []
    network: Any = model.denoiser.network
    conditioner = model.conditioner
    network.register_forward_pre_hook(lambda module, args: seen.append(args))
    conditioner.register_forward_pre_hook(lambda module, args: calls.append(args))
    objective = ObjectiveConfig(draws=3, stratified=True)
    phase = DenoiserStep(model.denoiser, conditioner, None, objective).phases[0].module
    batch = {"image": torch.randn(2, 3, 8, 8), "class_label": torch.tensor([0, 2])}
    loss, _ = phase(batch, torch.Generator().manual_seed(3), 0)
    ((x, time, conditioning),) = seen
    assert len(calls) == 1 and x.shape[0] == 6 and loss.ndim == 0
    for first, other in ((0, 2), (0, 4), (1, 3)):
        assert torch.equal(conditioning.context[first], conditioning.context[other])
        assert not torch.equal(x[first], x[other]) and abs(float(time[first] - time[other])) > 200
    alone = DenoiserStep(model.denoiser, conditioner, None, ObjectiveConfig()).phases[0].module
    alone(batch, torch.Generator().manual_seed(3), 0)
    assert seen[1][0].shape[0] == 2


def test_draws_are_at_least_one() -> None:
    with pytest.raises(DarkroomError, match=r'"objective\.draws" is 0'):
        ObjectiveConfig(draws=0)
