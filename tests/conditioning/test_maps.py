"""Pictures as conditions: golden vectors of the official inpainting and upscaling inputs; sizes, nulls, requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_facts import Facts
from parity_data import load_case, weights
from torch import Tensor

from darkroom.build import build_conditioner, build_first_stage, conditioner_config
from darkroom.conditioning.augmentation import IMAGE_NOISE, LEVELS, Noised, with_noise
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import Parts
from darkroom.conditioning.maps import (
    DepthEncoder,
    DepthEncoderConfig,
    LowResolutionConfig,
    LowResolutionEncoder,
    MaskedImageConfig,
    MaskedImageEncoder,
)
from darkroom.errors import DarkroomError


def fake_encode(image: Tensor, normalised: bool) -> Tensor:
    """A first stage of f = 4 and 2 channels that can be followed by hand: means of 4x4, halved if normalised."""
    small = F.avg_pool2d(image[:, :2], 4)
    return small / 2 if normalised else small


PARTS = Parts(fake_encode, downsampling=4, latent_channels=2, image_channels=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


# ---- low resolution


def low_resolution(parts: Parts = PARTS, **options: Any) -> LowResolutionEncoder:
    return LowResolutionEncoder.build(LowResolutionConfig(**{"factor": 4, **options}).fitted(parts), parts)


def test_at_the_latents_size_the_picture_is_the_map() -> None:
    """LR_image of the paper's x4 model: factor 4, f 4."""
    picture = randn(2, 3, 8, 12)
    result = low_resolution().encode(picture)
    assert torch.equal(result.concat, picture) and result.label is None


def test_a_smaller_picture_is_enlarged_and_a_larger_one_folded() -> None:
    small, blurred = randn(1, 3, 4, 6), randn(1, 3, 32, 48)
    enlarged = low_resolution(factor=8).encode(small).concat
    torch.testing.assert_close(enlarged, F.interpolate(small, size=(8, 12), mode="bicubic", antialias=True))
    encoder = low_resolution(factor=1)  # a blurred picture of the image's size
    folded = encoder.encode(blurred).concat
    assert encoder.widths == {"concat": 48} and folded.shape == (1, 48, 8, 12)
    assert torch.equal(F.pixel_shuffle(folded, 4), blurred)  # nothing is lost
    with pytest.raises(DarkroomError, match=r'3 times smaller and latents 4 times smaller .* via: "latent"'):
        low_resolution(factor=3)


def test_via_latent_encodes_the_enlarged_picture() -> None:
    picture = randn(2, 3, 8, 12)
    encoder = low_resolution(via="latent")
    large = F.interpolate(picture, size=(32, 48), mode="bicubic", antialias=True)
    assert encoder.widths == {"concat": 2}
    torch.testing.assert_close(encoder.encode(picture).concat, fake_encode(large, True))
    stated = LowResolutionConfig(factor=4, via="latent", channels=3, downsampling=4, latent_channels=2)
    with pytest.raises(DarkroomError, match="this model has none"):
        LowResolutionEncoder.build(stated.fitted(Parts()), Parts()).encode(picture)


def test_noise_golden_of_the_upscaler() -> None:
    case = load_case("unet_sd2", "low_scale_noise")
    noised = with_noise(case.input("x"), case.input("noise_level"), case.input("noise"), IMAGE_NOISE)
    case.check("noised", noised.values, atol=2e-5)
    assert (IMAGE_NOISE.beta_start, IMAGE_NOISE.beta_end) == (case.args["linear_start"], case.args["linear_end"])


def test_the_upscaler_of_sd2() -> None:
    """7 channels in all, 1000 levels as labels, of which 350 are trained."""
    encoder = low_resolution(noise_levels=350)
    assert encoder.widths == {"concat": 3, "label": LEVELS}
    picture = randn(512, 3, 2, 2)
    augmented = encoder.augment(picture, generator())
    assert isinstance(augmented, Noised) and augmented.level.min() >= 0 and 300 < augmented.level.max() < 350
    result = encoder.encode(augmented)
    assert torch.equal(result.label, augmented.level)
    quiet, loud = augmented.level < 20, augmented.level > 300
    error = (result.concat - picture).square().mean((1, 2, 3))
    assert error[quiet].mean() < 0.01 < 0.3 < error[loud].mean()
    again = encoder.augment(picture, generator())
    assert torch.equal(again.values, augmented.values)
    plain = encoder.encode(picture)
    assert torch.equal(plain.concat, picture) and not plain.label.any()
    assert low_resolution(noise_levels=350, noise_label=False).widths == {"concat": 3}
    assert low_resolution().augment(picture, generator()) is picture


def test_noise_when_images_are_made() -> None:
    encoder, picture, noise = (
        low_resolution(noise_levels=350, noise_level=20),
        randn(2, 3, 8, 8),
        randn(2, 3, 8, 8, seed=1),
    )
    for level, expected in ((None, 20), (7, 7)):
        result = encoder.noised(picture, level, noise)
        assert result.level.tolist() == [expected] * 2
        assert torch.equal(result.values, with_noise(picture, torch.tensor([expected] * 2), noise, IMAGE_NOISE).values)
    with pytest.raises(DarkroomError, match=r"noise level 350 is outside .* 0 to 349"):
        encoder.noised(picture, 350, noise)
    assert low_resolution().noised(picture, None, noise) is picture


def test_low_resolution_null_and_request() -> None:
    encoder = low_resolution(noise_levels=10)
    null = encoder.null(2)
    assert null.concat.shape == (2, 3, 1, 1) and not null.concat.any() and null.label.tolist() == [0, 0]
    conditioner = Conditioner({"low": low_resolution(noise_levels=10, drop_rate=1.0)})
    dropped = conditioner({"low_resolution": randn(2, 3, 8, 8)}, generator())
    assert not dropped.concat.any() and dropped.concat.shape == (2, 3, 8, 8) and dropped.label.tolist() == [0, 0]
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    read = encoder.from_request("low_resolution", pixels, (12, 8))
    torch.testing.assert_close(read, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    assert torch.equal(encoder.from_request("low_resolution", read, (12, 8)), read)
    deep = pixels.astype(np.uint16) * 257
    torch.testing.assert_close(encoder.from_request("low_resolution", deep, (12, 8)), read)
    with pytest.raises(DarkroomError, match="is 3x2, it must be 4x4"):
        encoder.from_request("low_resolution", pixels, (16, 16))
    with pytest.raises(DarkroomError, match="no picture of 3 channels"):
        encoder.from_request("low_resolution", pixels[..., 0], (12, 8))


def test_low_resolution_config() -> None:
    complete = conditioner_config({"low": LowResolutionConfig()}, Facts(low_resolution_factor=8))
    assert complete["encoders"]["low"]["factor"] == 8
    assert conditioner_config({"low": LowResolutionConfig(factor=2)}, Facts())["encoders"]["low"]["factor"] == 2
    with pytest.raises(DarkroomError, match=r'set "data\.low_resolution\.factor"'):
        conditioner_config({"low": LowResolutionConfig()}, Facts())
    with pytest.raises(DarkroomError, match="needs channels and downsampling and latent_channels"):
        LowResolutionConfig(factor=4).fitted(Parts())
    with pytest.raises(DarkroomError, match="factor is 0"):
        low_resolution(factor=0)
    with pytest.raises(DarkroomError, match="noise_levels is 1001"):
        low_resolution(noise_levels=1001)


# ---- masked pictures


def masked(**options: Any) -> MaskedImageEncoder:
    return MaskedImageEncoder.build(MaskedImageConfig(**options).fitted(PARTS), PARTS)


PAPER = {"mask_first": False, "normalised": False, "fill": -1.0}


@torch.no_grad()
def test_condition_of_the_tiny_inpainting_checkpoint() -> None:
    """The golden's masked picture is whatever it is, its mask 0 or 1: ours with nothing to fill in."""
    case = load_case("latent_diffusion_tiny", "tiny_inpainting")
    dd, embed = (case.args["first_stage_config"]["args"][k] for k in ("ddconfig", "embed_dim"))
    config = {
        "channels": dd["ch"],
        "channel_mult": dd["ch_mult"],
        "num_res_blocks": dd["num_res_blocks"],
        "z_channels": dd["z_channels"],
        "embed_dim": embed,
        "codebook_size": case.args["first_stage_config"]["args"]["n_embed"],
    }
    first_stage = build_first_stage(config)
    state = weights().make_state_dict(case.spec["layout"], case.spec["derived"], "first_stage_model.", strip=True)
    first_stage.autoencoder.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()}, strict=True)
    first_stage._set(0.7, 3.0)  # the paper's arrangement takes the latent before shift and scale
    kind = {"kind": "masked_image", **PAPER, "mask_range": [0.0, 1.0]}
    encoder = build_conditioner({"encoders": {"hole": kind}}, first_stage).encoders["hole"]
    mask = (case.input("mask_field") > 0).float()
    picture = case.input("masked_image")
    # Put the golden's picture under the mask too: then what is encoded is that picture.
    values = {"image": picture, "repaint_mask": mask}
    encoder.config.fill = 0.0
    latent = encoder._encode_image(picture, False)
    small = F.interpolate(mask, size=latent.shape[2:])
    case.check("concat_condition", torch.cat([latent, small], 1), atol=2e-5)
    ours = encoder.encode(values).concat
    expected = encoder._encode_image(picture * (1 - mask), False)
    torch.testing.assert_close(ours, torch.cat([expected, small], 1))


def test_the_arrangements_of_the_paper_and_of_sd() -> None:
    image, mask = randn(2, 3, 16, 24), (randn(2, 1, 16, 24, seed=1) > 0).float()
    values = {"image": image, "repaint_mask": mask}
    small = mask[:, :, ::4, ::4]  # the nearest pixel of an image f times larger
    paper = masked(**PAPER, mask_range=(-1.0, 1.0)).encode(values).concat
    hole = image * (1 - mask) - mask
    torch.testing.assert_close(paper, torch.cat([fake_encode(hole, False), small * 2 - 1], 1))
    sd = masked().encode(values).concat
    torch.testing.assert_close(sd, torch.cat([small, fake_encode(image * (1 - mask), True)], 1))
    assert masked().widths == {"concat": 3} and masked().fields == ("image", "repaint_mask")


@pytest.mark.parametrize("options", [{}, {"fill": "smooth"}, {**PAPER, "mask_range": (-1.0, 1.0)}])
def test_what_is_under_the_mask_does_not_matter(options: dict[str, Any]) -> None:
    image, mask = randn(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 3:12] = 1
    other = torch.where(mask.bool(), randn(1, 3, 16, 16, seed=5), image)
    one, two = (masked(**options).encode({"image": i, "repaint_mask": mask}).concat for i in (image, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("size", [(16, 24), (14, 21)])
def test_every_pixel_of_the_mask_as_channels(size: tuple[int, int]) -> None:
    """A hole of one pixel may be lost at the nearest of its block, not among all f*f; also where sizes are padded."""
    encoder = masked(mask_via="pixels", mask_range=(-1.0, 1.0))
    encoder._encode_image = lambda image, _: F.avg_pool2d(image[:, :2], 4, ceil_mode=True)
    mask = torch.zeros(1, 1, *size)
    mask[0, 0, 5, 7] = 1
    concat = encoder.encode({"image": randn(1, 3, *size), "repaint_mask": mask}).concat
    assert concat.shape == (1, 16 + 2, -(-size[0] // 4), -(-size[1] // 4)) and encoder.widths == {"concat": 18}
    is_hole = (concat[0, :16] == 1).nonzero().tolist()
    assert is_hole == [[1 * 4 + 3, 1, 1]]  # row 5 = 4 + 1, column 7 = 4 + 3
    assert encoder.null(1).concat[0, :, 0, 0].tolist() == [1.0] * 16 + [0.0] * 2


def test_a_smooth_fill_continues_what_is_around() -> None:
    """On a flat picture there is nothing to see of the hole but in the mask."""
    encoder = masked(fill="smooth")
    image, mask = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    holed = torch.where(mask.bool(), torch.full_like(image, 7.0), image)
    concat = encoder.encode({"image": holed, "repaint_mask": mask}).concat
    torch.testing.assert_close(concat[:, 1:], fake_encode(image, True))
    assert torch.equal(concat[:, :1], mask[:, :, ::4, ::4])


def test_masked_null_is_all_to_repaint() -> None:
    assert masked().null(2).concat[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert masked(mask_first=False, mask_range=(-1.0, 2.0)).null(2).concat[0, :, 0, 0].tolist() == [0.0, 0.0, 2.0]
    values = {"image": randn(2, 3, 16, 16), "repaint_mask": torch.zeros(2, 1, 16, 16)}
    kept = masked().encode_kept(values, torch.tensor([True, False])).concat
    assert torch.equal(kept[0], masked().encode(values).concat[0])
    assert torch.equal(kept[1], masked().null(1).concat[0].expand(3, 4, 4))


def test_masks_as_someone_gives_them() -> None:
    encoder = masked()
    expected = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    for value in (
        np.array([[0, 127], [128, 255]], np.uint8),
        np.array([[False, False], [True, True]]),
        np.array([[0.0, 0.4], [0.5, 1.0]], np.float32),
        expected,
    ):
        assert torch.equal(encoder.from_request("repaint_mask", value, (2, 2)), expected)
    assert encoder.from_request("image", np.zeros((2, 2, 3), np.uint8), (2, 2)).shape == (3, 2, 2)
    with pytest.raises(DarkroomError, match="image is 3x2, it must be 2x2"):
        encoder.from_request("image", np.zeros((2, 3, 3), np.uint8), (2, 2))


def test_masked_image_needs_a_first_stage() -> None:
    stated = {"kind": "masked_image", "latent_channels": 2, "image_channels": 3}
    encoder = build_conditioner({"encoders": {"hole": stated}}).encoders["hole"]
    with pytest.raises(DarkroomError, match="needs latents of images"):
        encoder.encode({"image": randn(1, 3, 8, 8), "repaint_mask": torch.ones(1, 1, 8, 8)})


# ---- depth


def test_depth_is_that_of_sd2() -> None:
    """Bicubic to the latent's size, then each picture's own range over [-1, 1] with the official bound."""
    encoder = DepthEncoder.build(DepthEncoderConfig().fitted(PARTS), PARTS)
    depth = randn(2, 1, 32, 48) * torch.tensor([3.0, 500.0]).view(2, 1, 1, 1)
    for image, ours in zip(depth, encoder.encode(depth).concat, strict=True):
        small = F.interpolate(image[None], size=(8, 12), mode="bicubic", align_corners=False)[0]
        torch.testing.assert_close(ours, 2.0 * (small - small.min()) / (small.max() - small.min() + 0.001) - 1.0)
    assert not encoder.encode(torch.ones(1, 1, 8, 8)).concat.add(1).any()  # flat: no division by zero
    assert encoder.null(2).concat.shape == (2, 1, 1, 1) and encoder.stays
    assert not DepthEncoder(DepthEncoderConfig(drop_rate=0.1, downsampling=4)).stays


def test_depth_as_someone_gives_it() -> None:
    encoder = DepthEncoder(DepthEncoderConfig(downsampling=4))
    for value in (np.array([[0, 65535]], np.uint16), np.array([[0.0, 65535.0]])):
        assert torch.equal(encoder.from_request("depth", value, (2, 1)), torch.tensor([[[0.0, 65535.0]]]))
    with pytest.raises(DarkroomError, match="not finite"):
        encoder.from_request("depth", np.array([[np.nan]]), (1, 1))


def test_what_is_derived_is_stored() -> None:
    """A saved conditioner names its sizes, so that it can be built without the first stage."""
    first_stage = build_first_stage({"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4})
    config = {"encoders": {"low": {"kind": "low_resolution", "factor": 2}, "depth": {"kind": "depth"}}}
    built = build_conditioner(config, first_stage)
    again = build_conditioner(built.config_dict)  # type: ignore[arg-type]
    assert again.concat_channels == built.concat_channels == 4
    assert built.config_dict["encoders"]["low"]["downsampling"] == 2  # type: ignore[index]
