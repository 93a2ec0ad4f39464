"""DiT and MMDiT through the whole package: recipes, training, model folders, pictures of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import darkroom
from darkroom.errors import DarkroomError
from darkroom.networks.dit import DiT
from darkroom.networks.kinds import make_network
from darkroom.networks.mmdit import MMDiT
from darkroom.train_job import train
from darkroom.training.recipe import find_recipe, read_recipe, resolve

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2, "input_size": 8},
    "mmdit": {"hidden_size": 32, "depth": 2, "num_heads": 2, "pos_embed_max_size": 4, "qk_norm": "rms"},
}
QUICK = {
    "steps": 3,
    "validate_every": 3,
    "sample_every": 3,
    "checkpoint_every": 3,
    "evaluate.samples": 1,
    "first_stage.train.steps": 2,
    "first_stage.train.validate_every": 2,
    "first_stage.train.sample_every": 2,
    "data.count": 16,
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_recipe_with_another_network_trains_and_draws(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {f"denoiser.network.{key}": value for key, value in {"kind": kind, **SMALL[kind]}.items()}
    train("shapes-tiny", tmp_path / "run", overrides=QUICK | network)
    assert f"denoiser    {kind}, " in capsys.readouterr().out
    model = darkroom.load(tmp_path / "run", device="cpu")
    assert isinstance(model.denoiser.network, DiT if kind == "dit" else MMDiT)
    zero = dict(model.denoiser.network.named_parameters())["final_layer.linear.weight"]
    assert zero.any()  # it was trained
    # f = 4 and patches of 2: any multiple of 8, in any shape.
    for size in ((32, 32), (48, 24)):
        picture = model.generate("a red circle", seed=1, steps=2, size=size).images
        assert picture.shape == (1, size[1], size[0], 3)
    with pytest.raises(DarkroomError, match="multiples of 8, the nearest are 32 and 40"):
        model.generate("a red circle", size=(36, 32))


def test_data_that_does_not_fit_the_patches(tmp_path: Path) -> None:
    network = {f"denoiser.network.{key}": value for key, value in {"kind": "dit", **SMALL["dit"]}.items()}
    with pytest.raises(DarkroomError, match="sides must be multiples of 8"):
        train("shapes-tiny", tmp_path / "run", overrides=QUICK | network | {"data.size": 36}, dry_run=True)


def test_an_mmdit_needs_something_to_read(tmp_path: Path) -> None:
    changes = {"denoiser.network.kind": "mmdit", "conditioner.text": None}
    with pytest.raises(DarkroomError, match=r"needs a context.*use kind: dit"):
        train("shapes-tiny", tmp_path / "run", overrides=QUICK | changes, dry_run=True)


def test_the_compared_recipes_differ_in_the_network_alone() -> None:
    """Same first stage, text, objective and steps; the sizes within 5 %."""
    recipes = {name: resolve(read_recipe(find_recipe(name))) for name in ("emoji-unet", "emoji-dit", "emoji-mmdit")}
    sizes = []
    for recipe in recipes.values():
        network: Any = recipe.denoiser.network
        network.in_channels = network.out_channels = 4
        network.context_dim = network.adm_in_channels = 96
        if network.kind == "unet":
            network.use_spatial_transformer = True
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in make_network(network).parameters()))
    assert max(sizes) < 1.05 * min(sizes)
    base = recipes["emoji-unet"]
    assert base.first_stage.name == "emoji" and base.denoiser.schedule.kind == "flow"
    for recipe in recipes.values():
        assert recipe.denoiser.prediction_type == "velocity" and recipe.denoiser.schedule == base.denoiser.schedule
        for part in ("data", "first_stage", "conditioner", "objective", "steps", "batch_size"):
            assert getattr(recipe, part) == getattr(base, part), part
