"""Every condition through a whole model: it trains, generates, obeys null and guidance, and is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from condition_models import DATA, KINDS, make_model
from torch import Tensor

from darkroom.conditioning.encoders import ENCODERS
from darkroom.config import from_dict
from darkroom.data.batches import collate
from darkroom.data.sources import open_dataset
from darkroom.errors import DarkroomError
from darkroom.generation_request import Request
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.objective import ObjectiveConfig
from darkroom.training.denoiser_step import DenoiserPhase


def example(index: int) -> dict[str, Any]:
    return open_dataset(DATA)[index] | {"embedding": torch.arange(5.0) * (1 + index)}


def batch() -> dict[str, Any]:
    data = open_dataset(DATA)
    return collate([example(i) for i in range(4)], data.pixels)


def asked(name: str, index: int) -> dict[str, Any]:
    """Arguments of `generate` for the condition of an example, as a person has them: arrays, names."""
    one = example(index)
    image = one["image"].permute(1, 2, 0).numpy()
    return {
        "class": {"class_label": index},
        "text": {"prompt": one["text"]},
        "boxes": {"boxes": one["boxes"].numpy()},
        "segmentation": {"segmentation": one["segmentation"].numpy().astype(np.uint8)},
        "segmentation_tokens": {"segmentation": one["segmentation"].numpy()},
        "low_resolution": {"low_resolution": one["low_resolution"].permute(1, 2, 0).numpy()},
        "masked_image": {"image": image, "repaint_mask": one["repaint_mask"][0].numpy() > 0},
        "depth": {"depth": one["depth"][0].numpy()},
        "label": {"class_label": index},
        "vector": {"embedding": one["embedding"].tolist()},
    }[name]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_every_kind_is_tried() -> None:
    """Published text towers and SDXL's sizes have tests of their own (test_text_models)."""
    elsewhere = ("text_towers", "text_arrangements", "sizes")
    own = {kind for kind, encoder in ENCODERS.items() if not encoder.__module__.endswith(elsewhere)}
    assert {entry["kind"] for entry in KINDS.values()} == own


@pytest.mark.parametrize("name", KINDS)
def test_a_model_trains_and_generates_with_it(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    phase = DenoiserPhase(model.denoiser, model.conditioner, model.first_stage, ObjectiveConfig())
    loss, _ = phase(batch(), torch.Generator().manual_seed(0), 0)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.conditioner.parameters() if p.requires_grad)

    one, other = (model.generate(seed=5, **asked(name, index)) for index in (0, 3))
    assert one.images.shape == (1, 32, 32, 3) and difference(one.images, other.images) > 0
    assert difference(one.images, model.generate(seed=5, **asked(name, 0)).images) == 0
    json.dumps(one.settings[0])  # what a picture says about itself
    field = next(iter(asked(name, 0)))
    request = one.settings[0]["request"]
    assert request[{"prompt": "prompts", "class_label": "class_labels"}.get(field, "conditions")]

    place = save(model, tmp_path / "model")
    again = load(place)
    assert isinstance(again, LatentDiffusion)
    assert difference(again.generate(seed=5, **asked(name, 0)).images, one.images) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_guidance_moves_away_from_the_null_unless_the_condition_stays(name: str) -> None:
    model = make_model(name)
    request = model.validate(Request(**_as_request(asked(name, 0)), guidance_scale=3.0))
    part = slice(0, 1)
    condition, negative = model.encode_condition(request, part), model.encode_negative(request, part)
    assert negative is not None
    stays = name in ("low_resolution", "masked_image", "depth")
    (encoder,) = model.conditioner.encoders.values()
    assert encoder.stays == stays
    expected = condition if stays else model.conditioner.null(1).spread(16, 16)
    for slot in ("context", "context_mask", "vector", "concat", "label"):
        a, b = getattr(negative, slot), getattr(expected, slot)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), slot
    assert (condition.concat is None) or condition.concat.shape[2:] == (16, 16)


def _as_request(arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"prompt": "prompts", "class_label": "class_labels"}
    plain = {names[k]: [v] for k, v in arguments.items() if k in names}
    return plain | {"conditions": {k: v for k, v in arguments.items() if k not in names} or None}


def test_everything_at_once_and_each_part_matters() -> None:
    names = ("text", "boxes", "segmentation", "masked_image", "low_resolution", "depth")
    model = make_model(*names)
    whole = {k: v for name in names for k, v in asked(name, 0).items()}
    picture = model.generate(seed=1, **whole).images
    for name in names:
        changed = model.generate(seed=1, **(whole | asked(name, 3))).images
        assert difference(picture, changed) > 0, name
    without = {k: v for k, v in whole.items() if k not in ("boxes", "prompt", "segmentation")}
    assert difference(picture, model.generate(seed=1, **without).images) > 0
    phase = DenoiserPhase(model.denoiser, model.conditioner, model.first_stage, ObjectiveConfig())
    loss, _ = phase(batch(), torch.Generator().manual_seed(0), 0)
    assert torch.isfinite(loss)


def test_one_value_for_all_or_one_for_each() -> None:
    model = make_model("text", "boxes")
    layouts = [asked("boxes", i)["boxes"] for i in (0, 3)]
    both = model.generate("a red circle", boxes=layouts, seed=[4, 5])
    alone = model.generate("a red circle", boxes=layouts[1], seed=5)
    shared = model.generate("a red circle", boxes=layouts[1], seed=[4, 5])
    assert difference(both.images[1], alone.images[0]) <= 1 and difference(shared.images[1], alone.images[0]) <= 1
    cut = model.generate("a red circle", boxes=layouts, seed=[4, 5], batch_size=1)
    assert difference(both.images, cut.images) <= 1


def test_a_recorded_layout_repeats_the_image() -> None:
    model = make_model("boxes")
    one = model.generate(boxes=[("circle", 0.1, 0.2, 0.5, 0.75)], seed=3)
    record = json.loads(json.dumps(one.settings[0]["request"]))
    assert record["conditions"] == {"boxes": [[{"class": "circle", "bbox": [0.1, 0.2, 0.5, 0.75]}]]}
    assert np.array_equal(model.generate(from_dict(Request, record)).images, one.images)


def test_noise_on_a_condition_is_the_images_own() -> None:
    model = make_model("low_resolution")
    given = asked("low_resolution", 0)
    request = model.validate(Request(seeds=[1, 2], conditions=given))
    maps = model.encode_condition(request, slice(0, 2)).concat
    alone = model.encode_condition(request, slice(1, 2)).concat
    assert maps is not None and not torch.equal(maps[0], maps[1]) and torch.equal(maps[1:], alone)
    assert model.encode_condition(request, slice(0, 2)).label.tolist() == [20, 20]
    louder = model.validate(replace(request, noise_level=300))
    assert model.encode_condition(louder, slice(0, 2)).label.tolist() == [300, 300]
    start: Tensor = torch.randn(maps[0].shape, generator=torch.Generator().manual_seed(1))
    clean = model.conditioner({"low_resolution": request.conditions["low_resolution"][0][None]}).concat[0]
    correlation = torch.corrcoef(torch.stack([(maps[0] - clean).flatten(), start.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.2  # another stream than the first noise of the image


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (("text",), {"boxes": []}, "does not take 'boxes': it was trained with text"),
        (("boxes",), {"steps": 2, "stepz": 3}, "does not take 'stepz'"),
        (("boxes",), {"boxes": [[("circle", 0, 0, 1, 1)]] * 3, "seed": [1, 2]}, "2 seeds for 3 images"),
        (("masked_image",), {"repaint_mask": np.zeros((32, 32))}, "repaint_mask needs image beside it"),
        (("segmentation",), {"segmentation": []}, "the list is empty"),
        (("text",), {"prompt": "x", "noise_level": 3}, "trained without noise"),
        (("low_resolution",), {"noise_level": 400, "low_resolution": np.zeros((8, 8, 3), np.uint8)}, "0 to 349"),
        (("depth",), {"class_label": 1}, "does not take a class"),
    ],
)
def test_requests_that_cannot_be(names: tuple[str, ...], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        make_model(*names).generate(**arguments)
