"""`darkroom.edit`: what is not masked is not changed, whatever the picture; what is masked comes from the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from condition_models import make_model

import darkroom
from darkroom.editing import Edited, Editor, EditSettings
from darkroom.editing.seams import without_seam
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.pixel_format import PixelFormat


@pytest.fixture(scope="module")
def masked() -> LatentDiffusion:
    """f = 2, trained (so it says) at 32x32 with masks."""
    return make_model("masked_image", masked_image={"mask_via": "pixels"})


@pytest.fixture(scope="module")
def worded() -> LatentDiffusion:
    return make_model("text")


def picture(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    rng = np.random.default_rng([height, width])
    shape = (height, width, channels) if channels else (height, width)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def hole(height: int, width: int, top: int = 3, left: int = 5, size: int = 9) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + size, left : left + size] = 255
    return mask


def assert_kept(before: np.ndarray, result: Edited) -> None:
    for image in result.images:
        assert image.shape == before.shape and image.dtype == before.dtype
        assert result.mask is not None and np.array_equal(image[~result.mask], before[~result.mask])


# ---- what is kept


@pytest.mark.parametrize("size", [(32, 32), (17, 41), (100, 75), (5, 200), (2, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_what_is_not_masked_is_bit_identical(
    size: tuple[int, int], dtype: Any, channels: int, masked: LatentDiffusion
) -> None:
    image, mask = picture(*size, channels, dtype), hole(*size, 1, 1, min(9, *(n - 1 for n in size)))
    result = Editor(masked)(image, mask, EditSettings(seeds=(3, 4), steps=1))
    assert_kept(image, result)
    assert (result.images[0] != image).any() and (result.images[0] != result.images[1]).any()


def test_a_model_without_masks_keeps_it_too(worded: LatentDiffusion) -> None:
    image, mask = picture(40, 52), hole(40, 52, 10, 20)
    result = darkroom.edit(image, mask, worded, prompt="a red fox", steps=2)
    assert_kept(image, result)
    assert result.settings[0]["request"]["solver"] == "repaint" and result.settings[0]["request"]["prompts"]
    other = darkroom.edit(image, mask, worded, prompt="a blue snail", steps=2)
    assert (other.images[0] != result.images[0]).any()
    assert darkroom.edit(image, mask, worded, steps=2, solver="ddim").settings[0]["request"]["solver"] == "ddim"


@pytest.mark.parametrize("kind", ["masked", "worded"])
def test_what_is_under_the_mask_has_no_influence(kind: str, request: pytest.FixtureRequest) -> None:
    """Nothing of an object that is to go comes back: not through the encoder, not where the picture is made smaller."""
    model = request.getfixturevalue(kind)
    for size, mask in (((40, 40), hole(40, 40)), ((90, 90), hole(90, 90, 10, 10, 60))):
        image = picture(*size)
        other = image.copy()
        other[mask > 0] = 255 - other[mask > 0]
        one, two = (darkroom.edit(i, mask, model, steps=2) for i in (image, other))
        assert np.array_equal(one.images[0], two.images[0])


def test_sixteen_bits_are_not_eight(masked: LatentDiffusion) -> None:
    image, mask = picture(32, 32, dtype=np.uint16), hole(32, 32)
    new = darkroom.edit(image, mask, masked, steps=1).images[0][mask > 0]
    assert len(np.unique(new % 257)) > 50


def test_floating_point_for_a_model_of_it() -> None:
    model = make_model("masked_image", pixels=PixelFormat("float32", -10, 30))
    image = np.random.default_rng(0).uniform(-10, 30, (32, 32, 3)).astype(np.float32)
    result = darkroom.edit(image, hole(32, 32), model, steps=1)
    assert_kept(image, result)


def test_pixels_without_a_first_stage() -> None:
    model = make_model("masked_image", f=1)
    image = picture(35, 41)
    assert_kept(image, darkroom.edit(image, hole(35, 41), model, steps=1))


# ---- one seed or several, one side or all


def test_a_number_stands_for_a_tuple(masked: LatentDiffusion) -> None:
    image = picture(32, 32)
    one, same = (darkroom.edit(image, None, masked, seeds=s, expand=e, steps=1) for s, e in ((3, 4), ((3,), (4,) * 4)))
    assert len(one.images) == 1 and one.images[0].shape == (40, 40, 3)
    assert np.array_equal(one.images[0], same.images[0])


# ---- several windows


def test_holes_apart_and_large_ones(masked: LatentDiffusion) -> None:
    image = picture(150, 200)
    mask = hole(150, 200) | hole(150, 200, 120, 180) | hole(150, 200, 40, 60, 70)
    calls: list[tuple[int, int]] = []
    result = Editor(masked)(image, mask, EditSettings(steps=2), lambda done, total: calls.append((done, total)))
    assert_kept(image, result)
    assert (result.images[0][mask > 0] != image[mask > 0]).mean() > 0.9
    assert len(result.settings[0]["edit"]["windows"]) == 3 and calls == [(k, 6) for k in range(1, 7)]


def test_an_image_belongs_to_its_seed(masked: LatentDiffusion) -> None:
    image, mask = picture(60, 150), hole(60, 150) | hole(60, 150, 40, 130)
    both = darkroom.edit(image, mask, masked, seeds=(1, 2), steps=2, batch_size=2)
    alone = darkroom.edit(image, mask, masked, seeds=(2,), steps=2)
    again = darkroom.edit(image, mask, masked, seeds=(2,), steps=2)
    assert np.abs(both.images[1].astype(int) - alone.images[0]).max() <= 1
    assert np.array_equal(alone.images[0], again.images[0])
    assert [r["request"]["seeds"][r["index"]] for r in both.settings] == [1, 2]


def test_the_window_can_be_chosen(masked: LatentDiffusion) -> None:
    image, mask = picture(100, 100), hole(100, 100, 20, 20, 50)
    sizes = [darkroom.edit(image, mask, masked, steps=1, window=w).settings[0]["request"]["size"] for w in (32, 104)]
    assert sizes == [[32, 32], [100, 100]]
    with pytest.raises(DarkroomError, match="a window of 3 pixels is too small"):
        darkroom.edit(image, mask, masked, window=3)


# ---- outpainting and image-to-image


def test_outpainting(masked: LatentDiffusion) -> None:
    image = picture(40, 50)
    result = darkroom.edit(image, model=masked, expand=(6, 0, 10, 3), steps=1)
    assert result.images[0].shape == (43, 66, 3) and np.array_equal(result.images[0][:40, 6:56], image)
    assert result.mask is not None and result.mask.sum() == 43 * 66 - 40 * 50
    both = darkroom.edit(image, hole(40, 50), masked, expand=(6, 0, 10, 3), steps=1)
    assert both.mask is not None and both.mask.sum() == result.mask.sum() + 81
    assert result.settings[0]["edit"]["expand"] == [6, 0, 10, 3]


def test_variations_are_nearer_the_weaker_they_are(worded: LatentDiffusion) -> None:
    image = np.full((32, 48, 3), 90, np.uint8)
    image[8:20, 10:30] = (200, 30, 60)
    weak, strong = (
        darkroom.edit(image, model=worded, strength=s, steps=10, seeds=(1, 2), prompt="a fox") for s in (0.1, 1.0)
    )
    for result in (weak, strong):
        assert len(result.images) == 2 and result.mask is None and result.images[0].shape == image.shape
    coded = np.asarray(darkroom.reconstruct(worded.first_stage, image), int)  # type: ignore[arg-type]
    assert np.abs(weak.images[0] - coded).mean() < 0.7 * np.abs(strong.images[0] - coded).mean()
    large = darkroom.edit(picture(300, 150, 1), model=worded, steps=2)
    assert large.images[0].shape == (64, 32, 1)
    assert large.settings[0]["edit"]["strength"] == 0.6


def test_strength_under_a_mask(masked: LatentDiffusion, worded: LatentDiffusion) -> None:
    image, mask = picture(32, 32), hole(32, 32)
    for model in (masked, worded):
        result = darkroom.edit(image, mask, model, strength=0.5, steps=4)
        assert_kept(image, result)
        assert result.settings[0]["edit"]["strength"] == 0.5


# ---- the seam


def test_colours_meet_at_the_seam() -> None:
    """A model that gives everything back 0.2 too bright, with a texture of its own."""
    generator = torch.Generator().manual_seed(0)
    image = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 48, 64).clone()
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 12:30, 20:44] = 1
    texture = 0.05 * torch.randn(1, 3, 48, 64, generator=generator)
    generated = image + 0.2 + torch.where(mask > 0, texture, torch.zeros(()))
    mended = without_seam(generated, image, mask)
    inside = mask.expand(-1, 3, -1, -1) > 0
    torch.testing.assert_close(mended[inside], (image + texture)[inside], atol=1e-3, rtol=0)
    tiny = torch.rand(1, 3, 2, 9)
    assert torch.equal(without_seam(tiny, tiny + 1, torch.ones(1, 1, 2, 9)), tiny)


# ---- what cannot be


@pytest.mark.parametrize(
    ("image", "mask", "settings", "message"),
    [
        ((40, 40, 3), (30, 40), {}, "the mask is 40x30, the picture 40x40: give both the same size"),
        ((40, 40, 3), (40, 40, 3), {}, r"the mask is of shape \(40, 40, 3\)"),
        ((40, 40, 3), "black", {}, "the mask is black everywhere"),
        ((40, 40, 3), "white", {}, "the mask is white everywhere"),
        ((1, 1, 3), "white", {}, "the mask is white everywhere"),
        ((40, 40, 4), "hole", {}, "the picture has 4 channels, the model works on 3"),
        ((40, 0, 3), "hole", {}, "is not a picture"),
        ((40, 40, 3), "hole", {"seeds": ()}, r"seed \(none\): a seed is"),
        ((40, 40, 3), "hole", {"seeds": -1}, "seed -1: a seed is"),
        ((40, 40, 3), "hole", {"seeds": (0, 2**63)}, "seed 9223372036854775808: a seed is"),
        ((40, 40, 3), "hole", {"strength": 0.0}, "strength is 0"),
        ((40, 40, 3), "hole", {"strength": 2.0}, "strength is 2"),
        ((40, 40, 3), "hole", {"expand": (0, -1, 0, 0)}, "expand is 0,-1,0,0"),
        ((40, 40, 3), "hole", {"expand": (99999, 99999, 0, 0)}, "more than can be read again"),
        ((40, 40, 3), "hole", {"prompt": "a fox"}, "does not take a prompt"),
        ((40, 40, 3), None, {}, "give a mask or sides to expand"),
        ((40, 40, 3), "hole", {"colour": 1}, "edit has no setting 'colour'"),
    ],
)
def test_what_cannot_be_is_said(
    image: tuple[int, ...], mask: Any, settings: dict[str, Any], message: str, masked: LatentDiffusion
) -> None:
    values = np.zeros(image, np.uint8)
    known = {"black": 0, "white": 255}
    if isinstance(mask, str):
        given = hole(*image[:2]) if mask == "hole" else np.full(image[:2], known[mask], np.uint8)
    else:
        given = None if mask is None else np.full(mask, 255, np.uint8)
    with pytest.raises(DarkroomError, match=message):
        darkroom.edit(values, given, masked, **settings)


def test_numbers_and_models_that_do_not_fit(masked: LatentDiffusion) -> None:
    with pytest.raises(DarkroomError, match="the picture has float32 numbers, the model was trained with 8 bits"):
        darkroom.edit(np.zeros((32, 32, 3), np.float32), hole(32, 32), masked)
    with pytest.raises(DarkroomError, match="this model was trained with low_resolution and makes nothing without"):
        Editor(make_model("low_resolution"))
    with pytest.raises(DarkroomError, match="no-such-model"):
        darkroom.edit(np.zeros((32, 32, 3), np.uint8), hole(32, 32), "no-such-model")


def test_masks_of_any_type(masked: LatentDiffusion) -> None:
    image, mask = picture(32, 32), hole(32, 32) > 0
    kinds = (mask, mask.astype(np.float32), mask.astype(np.uint8) * np.uint8(128), mask[..., None])
    images = [darkroom.edit(image, m, masked, steps=1).images[0] for m in kinds]
    assert all(np.array_equal(images[0], other) for other in images)
