"""Training a perceptual network as users do it: from a folder, interrupted, resumed; and the pieces of its losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.data.distortions import DISTORTIONS, MARGIN, cut, gaussian_blur
from darkroom.data.sources import DataConfig
from darkroom.errors import DarkroomError
from darkroom.features.perceptual import load_perceptual
from darkroom.perceptual_job import TYPICAL_DISTANCE, LabelledPictures
from darkroom.safe_files import read_json
from darkroom.train_job import train
from darkroom.training.perceptual_step import discrimination_loss, distorted_pairs, ranking_loss

TINY = {
    "data.size": 40,
    "perceptual.steps": 4,
    "perceptual.batch_size": 4,
    "perceptual.checkpoint_every": 2,
    "perceptual.precision": "float32",
    "perceptual.network.widths": [8, 8, 8],
    "perceptual.objective.crop": 24,
}


def pictures(folder: Path, count: int = 8, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def run(folder: Path, data: Path, steps: int = 4, **more: Any) -> dict[str, Any]:
    settings = TINY | {"perceptual.steps": steps}
    done = train("perceptual", folder, data=data, overrides=settings, threads=1, quiet=True, **more)
    assert done.model == folder / "model"
    return done.summary


def test_trains_on_a_folder_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    summary = run(tmp_path / "whole", data)
    assert summary["steps"] == 4 and math.isfinite(summary["validation_loss"])
    run(tmp_path / "part", data, steps=2)
    train(output=tmp_path / "part", resume=True, overrides={"perceptual.steps": 4}, threads=1, quiet=True)
    whole, part = (load_perceptual(tmp_path / name / "model") for name in ("whole", "part"))
    assert whole.sha256 == part.sha256
    assert read_json(tmp_path / "whole" / "model" / "config.json")["info"]["data"]["classes"] == 0
    x = torch.rand(2, 3, 40, 40) * 2 - 1
    assert bool((whole(x, x.flip(0)) > 0).all())


def test_the_distance_is_scaled(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", 10)
    run(tmp_path / "run", data)
    network = load_perceptual(tmp_path / "run" / "model")
    held_out = LabelledPictures(DataConfig(source=str(data), size=40), "validation")
    x = torch.stack([held_out[i]["image"] for i in range(len(held_out))]).float() / 127.5 - 1
    strength = torch.full((len(x),), 0.5)
    values = [
        network(cut(x), cut(d(x, strength, torch.Generator().manual_seed(0)))).mean() for d in DISTORTIONS.values()
    ]
    assert float(torch.stack(values).mean()) == pytest.approx(TYPICAL_DISTANCE, rel=0.02)  # float16 weights


def test_labels_of_several_sources(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        pictures(tmp_path / "classes" / name, 4)
    pictures(tmp_path / "plain", 4)
    source = [str(tmp_path / "plain"), str(tmp_path / "classes")]
    data = LabelledPictures(DataConfig(source=source, size=40, validation=0.0), "train")
    labels = [data[i]["class_label"] for i in range(len(data))]
    assert data.classes == 2 and labels == [-1] * 4 + [0] * 4 + [1] * 4
    run(tmp_path / "run", tmp_path / "classes")
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["classification"] > 0


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    with pytest.raises(DarkroomError, match=r"perceptual\.steps"):
        train("perceptual", tmp_path / "a", data=data, minutes=1.0, quiet=True)
    settings = TINY | {"perceptual.objective.crop": 48}
    with pytest.raises(DarkroomError, match=r"data\.size"):
        train("perceptual", tmp_path / "b", data=data, overrides=settings, quiet=True)
    with pytest.raises(DarkroomError, match="not on 6 channels"):
        LabelledPictures(DataConfig(source=str(data), size=40, channels=6), "train")
    with pytest.raises(DarkroomError, match="no perceptual network"):
        load_perceptual(tmp_path / "a" / "model")


def test_ranking_loss() -> None:
    near, far = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.2])
    loss, right = ranking_loss(near, far, 0.25, 0.5)
    hinge = [
        0.5 * math.log1p(math.exp((math.log((n + 1e-4) / (f + 1e-4)) + 0.25) / 0.5))
        for n, f in ((0.1, 0.2), (0.3, 0.2))
    ]
    assert float(loss) == pytest.approx(sum(hinge) / 2, rel=1e-5) and float(right) == 0.5


def test_discrimination_loss_against_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    z = torch.nn.functional.normalize(torch.cat([one, two]), dim=1)
    total = 0.0
    for i in range(6):
        scores = {k: math.exp(float(z[i] @ z[k]) / 0.2) for k in range(6) if k != i}
        total -= math.log(scores[(i + 3) % 6] / sum(scores.values())) / 6
    assert float(discrimination_loss(one, two, 0.2)) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("kind", list(DISTORTIONS))
def test_distortions_grow_and_repeat(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 10, 10, generator=g), size=(56, 56), mode="bicubic") * 2 - 1
    x = x.clamp(-1, 1)

    def at(strength: float) -> torch.Tensor:
        return DISTORTIONS[kind](x, torch.full((4,), strength), torch.Generator().manual_seed(1))

    assert torch.equal(at(0.5), at(0.5)) and at(0.5).shape == x.shape and float(at(1.0).abs().max()) <= 1.0 + 1e-6
    errors = torch.stack([(cut(at(s)) - cut(x)).square().mean((1, 2, 3)) for s in (0.0, 0.5, 1.0)])
    assert bool((errors.diff(dim=0) > 0).all())


def test_blur_keeps_the_mean_and_has_its_deviation() -> None:
    x = torch.zeros(2, 1, 33, 33)
    x[:, :, 16, 16] = 1.0
    y = gaussian_blur(x, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(y.sum((1, 2, 3)), torch.ones(2))
    offsets = torch.arange(33.0) - 16
    variance = (y.sum(2)[:, 0] * offsets.square()).sum(1)
    torch.testing.assert_close(variance.sqrt(), torch.tensor([1.0, 2.0]), rtol=0.01, atol=0.0)


def test_pairs_are_cut_and_differ() -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.rand(32, 3, 24 + 2 * MARGIN, 24 + 2 * MARGIN, generator=g) * 2 - 1
    milder, stronger = distorted_pairs(wide, 0.15, g)
    assert milder.shape == stronger.shape == (32, 3, 24, 24)
    for pair in (milder, stronger):
        assert bool(((pair - cut(wide)).abs().amax((1, 2, 3)) > 0).all())
