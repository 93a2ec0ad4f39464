"""`darkroom.upscale`: sizes, types, seeds, and one window against the model's own `generate`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from condition_models import make_model

import darkroom
from darkroom.data.degradations import LowResolution, degrade
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.pixel_format import PixelFormat
from darkroom.upscaling import Upscaler, UpscaleSettings


def picture(width: int, height: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    rng = np.random.default_rng([width, height])
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(columns / (3 + c)) + np.cos(rows / (4 + c)) for c in range(channels)], 2)
    values = 0.5 + 0.2 * waves + 0.05 * rng.standard_normal(waves.shape)
    return (np.clip(values, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """32x32 images of f = 2, four times larger than their pictures."""
    made = make_model("low_resolution", low_resolution={"noise_levels": 0})
    made.info["data"] = {"low_resolution": {"factor": 4, "pipeline": "bicubic"}}
    return made


def test_one_window_is_what_generate_makes(model: LatentDiffusion) -> None:
    image = picture(8, 8)
    result = darkroom.upscale(image, model, seed=7, steps=3)
    theirs = model.generate(low_resolution=image, seed=7, steps=3, size=(32, 32))
    difference = np.abs(result.image.astype(int) - theirs.images[0].astype(int))
    assert result.image.shape == (32, 32, 3) and difference.max() <= 1
    assert result.settings["nfe"] == theirs.nfe and result.settings["request"]["seeds"] == [7]
    assert result.settings["upscale"]["windows"] == 1 and result.difference is None


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 8), (8, 1), (11, 9), (30, 17)])
def test_any_size(model: LatentDiffusion, width: int, height: int) -> None:
    result = darkroom.upscale(picture(width, height), model, steps=1)
    assert result.image.shape == (4 * height, 4 * width, 3) and result.image.dtype == np.uint8
    assert result.settings["upscale"]["input_size"] == [width, height]


def test_the_seed_decides_and_the_batch_does_not(model: LatentDiffusion) -> None:
    image = picture(20, 12)
    options: dict[str, Any] = {"steps": 2, "window": 32, "overlap": 16}
    first, again, other = (darkroom.upscale(image, model, seed=s, **options).image for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    small = darkroom.upscale(image, model, seed=1, batch_size=1, **options).image
    assert np.abs(small.astype(int) - first.astype(int)).max() <= 1


def test_grey_stays_grey_and_sixteen_bits_stay(model: LatentDiffusion) -> None:
    grey = darkroom.upscale(picture(9, 9, 1)[..., 0], model, steps=1)
    assert grey.image.shape == (36, 36) and grey.image.dtype == np.uint8
    deep = darkroom.upscale(picture(9, 9, 3, np.uint16), model, steps=1).image
    shallow = darkroom.upscale((picture(9, 9, 3, np.uint16) / 257).round().astype(np.uint8), model, steps=1).image
    assert deep.dtype == np.uint16 and len(np.unique(deep)) > 256
    assert np.abs(deep / 257.0 - shallow).max() < 8


def test_consistency_is_exact(model: LatentDiffusion) -> None:
    truth = torch.from_numpy(picture(68, 40).transpose(2, 0, 1).copy())
    small = degrade(truth, LowResolution(4))
    image = small.permute(1, 2, 0).numpy()
    result = darkroom.upscale(image, model, steps=1, consistency=True)
    back = degrade(torch.from_numpy(result.image.transpose(2, 0, 1).copy()), LowResolution(4))
    assert torch.equal(back, small) and result.difference is not None and result.difference < 0.5
    assert result.settings["upscale"]["difference"] == pytest.approx(result.difference, abs=1e-6)
    plain = darkroom.upscale(image, model, steps=1)
    assert not torch.equal(degrade(torch.from_numpy(plain.image.transpose(2, 0, 1).copy()), LowResolution(4)), small)


@pytest.mark.parametrize("kind", ["16 bits", "grey", "grey of 16 bits"])
def test_consistency_of_other_kinds(model: LatentDiffusion, kind: str) -> None:
    channels, dtype = 1 if "grey" in kind else 3, np.uint16 if "16" in kind else np.uint8
    truth = torch.from_numpy(picture(44, 36, channels, dtype).transpose(2, 0, 1).copy())
    small = degrade(truth, LowResolution(4))
    image = small.permute(1, 2, 0).numpy()
    result = darkroom.upscale(image[..., 0] if channels == 1 else image, model, steps=1, consistency=True)
    made = np.atleast_3d(result.image).transpose(2, 0, 1).copy()
    assert made.dtype == dtype and torch.equal(degrade(torch.from_numpy(made), LowResolution(4)), small)


def test_consistency_of_floating_point() -> None:
    pixels = PixelFormat("float32", 200, 320)
    model = make_model("low_resolution", pixels=pixels, low_resolution={"noise_levels": 0})
    truth = 200 + 120 * torch.from_numpy(picture(44, 36).transpose(2, 0, 1).copy()).float() / 255
    small = degrade(truth, LowResolution(4))
    result = darkroom.upscale(small.permute(1, 2, 0).numpy(), model, steps=1, consistency=True)
    back = degrade(torch.from_numpy(result.image.transpose(2, 0, 1).copy()), LowResolution(4))
    assert result.image.dtype == np.float32 and float((back - small).abs().max()) < 120 / 2**15


def test_the_smallest_windows_share_nothing(model: LatentDiffusion) -> None:
    """A window of one step of the network's grid begins where its neighbour ends."""
    step = model.downsampling * model.size_multiple
    result = darkroom.upscale(picture(9, 5), model, steps=1, window=step)
    assert result.settings["upscale"]["overlap"] == 0 and result.settings["upscale"]["window"] == step
    with pytest.raises(DarkroomError, match=f"windows of {step} pixels overlap by 0 to 0, not by 1"):
        darkroom.upscale(picture(9, 5), model, steps=1, window=step, overlap=1)


def test_pixels_without_a_first_stage() -> None:
    model = make_model("low_resolution", f=1, low_resolution={"noise_levels": 0})
    result = darkroom.upscale(picture(11, 9), model, steps=1, consistency=True)
    assert result.image.shape == (36, 44, 3)


@pytest.mark.parametrize("part", ["solve", "decode"])
def test_what_is_not_finite_is_said(model: LatentDiffusion, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of: Any = LatentDiffusion if part == "solve" else type(model.first_stage)
    right = getattr(of, part)
    monkeypatch.setattr(of, part, lambda *given, **options: right(*given, **options) * torch.nan)
    with pytest.raises(DarkroomError, match="the result is not finite"):
        darkroom.upscale(picture(8, 8), model, steps=1)


def test_progress_ends_where_it_said(model: LatentDiffusion) -> None:
    told: list[tuple[str, float, int]] = []
    darkroom.upscale(
        picture(20, 20), model, steps=3, window=32, batch_size=2, progress=lambda *now: told.append(now), solver="heun"
    )
    assert list(dict.fromkeys(name for name, *_ in told)) == ["upscaling", "decoding"]
    done = [(d, t) for name, d, t in told if name == "upscaling"]
    assert done[-1][0] == done[-1][1] and all(a[0] <= b[0] for a, b in pairwise(done))


def test_a_sharpening_model_keeps_the_size() -> None:
    model = make_model("low_resolution", low_resolution={"noise_levels": 0, "factor": 1})
    result = darkroom.upscale(picture(37, 21), model, steps=1)
    assert result.image.shape == (21, 37, 3)
    with pytest.raises(DarkroomError, match="sharpens pictures of the same size"):
        darkroom.upscale(picture(8, 8), model, consistency=True)


def test_noise_on_the_condition_and_text() -> None:
    model = make_model("low_resolution", "text")
    asked = {"steps": 1, "prompt": "a red circle", "noise_level": 200, "guidance_scale": 3.0}
    images = [darkroom.upscale(picture(8, 8), model, **(asked | change)).image for change in ({}, {"noise_level": 0})]
    assert not np.array_equal(*images)
    other = darkroom.upscale(picture(8, 8), model, **(asked | {"prompt": "a blue square"}))
    assert not np.array_equal(other.image, images[0]) and other.settings["request"]["prompts"] == ["a blue square"]


@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), {}, "has 5 channels, the model works on 3"),
        (np.zeros((4, 0, 3), np.uint8), {}, "is not a picture"),
        ("photo.png", {}, r"the picture is a str; give an array, such as numpy.asarray\(PIL"),
        (np.zeros((4, 4, 3), np.float32), {}, "float32 numbers, the model was trained with 8 bits"),
        (np.zeros((4, 4, 3), np.uint8), {"steps": 0}, "steps is 0"),
        (np.zeros((4, 4, 3), np.uint8), {"window": 32, "overlap": 30}, "windows of 32 pixels overlap by 0 to 16"),
        (np.zeros((4, 4, 3), np.uint8), {"stepps": 3}, "no setting 'stepps'"),
    ],
)
def test_what_cannot_be_is_refused(model: LatentDiffusion, image: Any, settings: Any, message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        darkroom.upscale(image, model, **settings)


def test_models_and_memory(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DarkroomError, match="does not enlarge pictures"):
        darkroom.upscale(picture(8, 8), make_model("class"))
    monkeypatch.setattr("darkroom.upscaling.upscaler.available_memory", lambda device: 2e9)
    Upscaler(model).check_memory(400, 300)
    with pytest.raises(DarkroomError, match="20000x20000 becomes 80000x80000, which needs about"):
        Upscaler(model).check_memory(20000, 20000)
    for damage, shown in (({"pipeline": "bsr"}, "bsr"), ({"pipeline": "bicubic", "blur": 1.6}, "blur 1.6")):
        monkeypatch.setitem(model.info["data"], "low_resolution", {"factor": 4, **damage})
        with pytest.raises(DarkroomError, match=rf"trained to undo damage \({shown}\)"):
            Upscaler(model)(picture(8, 8), UpscaleSettings(consistency=True))
    for clean in ({"factor": 4}, {"factor": 4, "pipeline": "bicubic", "blur": 0.0}, None):
        monkeypatch.setitem(model.info["data"], "low_resolution", clean)
        assert Upscaler(model).damage is None


def test_pixels_of_floating_point_models(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentDiffusion, "pixels", PixelFormat("float32", 0, 4))
    upscaler = Upscaler(model)
    with pytest.raises(DarkroomError, match="uint8 numbers, the model was trained with"):
        upscaler(picture(4, 4))
    bad = np.full((4, 4, 3), np.nan, np.float32)
    with pytest.raises(DarkroomError, match="not finite"):
        upscaler(bad)
