"""An image through a first stage and back has its own shape and type; one that does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import darkroom
from darkroom.build import build_first_stage
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.pixel_format import PixelFormat
from darkroom.reconstruction import psnr, reconstruct

FORMATS = {"uint8": PixelFormat(), "uint16": PixelFormat.of("uint16"), "float32": PixelFormat.of("float32", (-5, 20))}


def first_stage(channels: int, dtype: str) -> FirstStage:
    torch.manual_seed(0)
    config = {"in_channels": channels, "out_channels": channels, "channels": 8, "channel_mult": [1, 2]}
    config |= {"num_res_blocks": 1, "norm_groups": 8, "z_channels": 2, "embed_dim": 2}
    return build_first_stage(config | {"pixels": FORMATS[dtype].to_dict()}).eval()


@pytest.mark.parametrize(("channels", "dtype"), [(3, "uint8"), (1, "uint16"), (6, "float32"), (2, "uint8")])
def test_shape_and_type_come_back(channels: int, dtype: str) -> None:
    model = first_stage(channels, dtype)
    rng = np.random.default_rng(0)
    image = (rng.random((13, 17, channels)) * 100).astype(dtype)  # no multiples of f
    back = reconstruct(model, image)
    assert back.shape == image.shape and back.dtype == image.dtype
    assert np.array_equal(darkroom.reconstruct(model, image, tile=None), back)
    grey = image[..., 0]
    if channels == 1:
        assert np.array_equal(reconstruct(model, grey), back[..., 0])
    network = FORMATS[dtype].to_network(torch.from_numpy(image).permute(2, 0, 1)[None])
    with torch.no_grad():
        decoded = model.decode(model.encode(network).mode(), size=(17, 13))
    assert np.array_equal(back, FORMATS[dtype].from_network(decoded)[0].permute(1, 2, 0).numpy())


def test_the_identity_gives_every_value_back() -> None:
    for dtype in ("uint8", "uint16"):
        model = build_first_stage({"kind": "identity", "channels": 1, "pixels": FORMATS[dtype].to_dict()})
        values = np.arange(256).reshape(16, 16, 1) * (1 if dtype == "uint8" else 257)
        assert np.array_equal(reconstruct(model, values.astype(dtype)), values)


def test_images_that_do_not_fit() -> None:
    model = first_stage(1, "uint16")
    for image, message in (
        (np.zeros((8, 8), np.uint8), "1 channel of uint8, the model takes 1 channel of uint16"),
        (np.zeros((8, 8, 3), np.uint16), "3 channels of uint16"),
        (np.zeros((8,), np.uint16), "not an image"),
    ):
        with pytest.raises(DarkroomError, match=message):
            reconstruct(model, image)
    with pytest.raises(DarkroomError, match="not finite"):
        reconstruct(first_stage(6, "float32"), np.full((8, 8, 6), np.nan, np.float32))


def test_psnr() -> None:
    one = np.array([0, 65535], np.uint16)
    assert psnr(one, one, 65535) == float("inf")
    assert psnr(one, np.array([65535, 0], np.uint16), 65535) == pytest.approx(0)
    assert psnr(np.zeros(4), np.full(4, 0.1), 1.0) == pytest.approx(20)
