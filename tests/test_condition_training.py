"""Conditions through `darkroom.train`: recipe, plan, latent cache, samples, and a second run from the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import darkroom
from darkroom.data.shapes import draw_scene, render
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.train_job import train

SHORT: dict[str, Any] = {
    "first_stage.train.steps": 1,
    "steps": 2,
    "data.count": 16,
    "batch_size": 4,
    "data.repaint_mask": {"share": [0.2, 0.6]},
    "data.low_resolution": {"factor": 4},
    "conditioner.boxes": {"kind": "boxes", "width": 32, "depth": 1, "heads": 2, "head_width": 16, "max_objects": 2},
    "conditioner.map": {"kind": "segmentation", "drop_rate": 0.5},
    "conditioner.hole": {"kind": "masked_image"},
    "conditioner.low": {"kind": "low_resolution", "noise_levels": 100},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "conditions"
    train("shapes-tiny", folder, overrides=SHORT, quiet=True)
    return folder


def test_the_model_takes_all_of_them(run: Path) -> None:
    model = darkroom.load(run / "model", device="cpu")
    assert isinstance(model, LatentDiffusion)
    fields = ("text", "boxes", "segmentation", "image", "repaint_mask", "low_resolution")
    assert model.conditioner.fields == fields
    channels = model.latent_channels
    # The latent, the map, mask and latent of the hole, and 3 channels of the small picture.
    assert model.denoiser.network.config.in_channels == channels + channels + (channels + 1) + 3  # type: ignore[union-attr]
    assert model.denoiser.network.config.num_classes == 1000  # type: ignore[union-attr]
    scene = draw_scene(0, split="validation", size=(32, 32))
    image, labels = render(scene)
    result = model.generate(
        scene.caption,
        boxes=scene.boxes,
        segmentation=torch.from_numpy(labels),
        image=image,
        repaint_mask=np.ones((32, 32), bool),
        low_resolution=np.ascontiguousarray(image[::4, ::4]),
    )
    assert result.images.shape == (1, 32, 32, 3)
    assert (run / "samples" / "denoiser-000002.png").is_file()


def test_another_run_starts_from_it_if_the_names_agree(run: Path, tmp_path: Path) -> None:
    more = {key: value for key, value in SHORT.items() if not key.startswith(("conditioner", "first_stage"))}
    train("shapes-tiny", tmp_path / "more", init_from=run / "model", overrides=more, quiet=True)
    model = darkroom.load(tmp_path / "more" / "model", device="cpu")
    assert isinstance(model, LatentDiffusion) and "boxes" in model.conditioner.fields
    (model.conditioner.encoders["boxes"].config).classes[0] = "disc"  # type: ignore[union-attr]
    model.conditioner.config_dict["encoders"]["boxes"]["classes"][0] = "disc"  # type: ignore[index]
    model.save(tmp_path / "renamed")
    with pytest.raises(DarkroomError, match=r"its classes \(disc, square"):
        train("shapes-tiny", tmp_path / "other", init_from=tmp_path / "renamed", overrides=more, quiet=True)


def test_what_the_data_lacks_is_said_before_training(tmp_path: Path) -> None:
    changes = {key: value for key, value in SHORT.items() if key != "data.low_resolution"}
    with pytest.raises(DarkroomError, match=r'"conditioner\.low" needs pictures of low resolution'):
        train("shapes-tiny", tmp_path / "run", overrides=changes, quiet=True)
