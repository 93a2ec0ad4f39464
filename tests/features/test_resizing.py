"""The resizing rules of scores: against Pillow, torch-fidelity and clean-fid."""

from __future__ import annotations

import numpy as np
import pytest
import reference_metrics as reference
import torch
from PIL import Image
from torch import Tensor

from darkroom.features.resizing import resize_bicubic, resize_tf1, shorter_side_and_centre

SIZES = [(32, 32), (64, 48), (299, 299), (350, 411)]  # grows, shrinks, stays


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    """uint8 (B, 3, H, W): the worst for a resize, noise."""
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("size", SIZES)
def test_tensorflow_rule_equals_torch_fidelity(size: tuple[int, int]) -> None:
    image = pictures(*size).float()
    resize = reference.fidelity_resize.interpolate_bilinear_2d_like_tensorflow1x
    expected = resize(image, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(image, (299, 299)), expected, rtol=0, atol=2e-4)  # of 255


def test_tensorflow_rule_of_a_ramp() -> None:
    """Positions 0, 0.5, 1, ...: corners stay where they are, and the last pixel is repeated."""
    ramp = torch.tensor([0.0, 10.0, 20.0]).expand(1, 1, 3, 3)
    assert resize_tf1(ramp, (3, 6))[0, 0, 0].tolist() == [0.0, 5.0, 10.0, 15.0, 20.0, 20.0]


@pytest.mark.parametrize("size", SIZES)
def test_float_rule_equals_clean_fid(size: tuple[int, int]) -> None:
    image = pictures(*size)
    resize = reference.clean_resize.build_resizer("clean")
    expected = np.stack([resize(picture) for picture in image.permute(0, 2, 3, 1).numpy()])
    ours = resize_bicubic(image.float(), (299, 299), rounded=False).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)  # of 255
    assert ours.min() >= 0 and ours.max() <= 255


@pytest.mark.parametrize("size", [*SIZES, (224, 100), (100, 224)])
def test_byte_rule_equals_pillow(size: tuple[int, int]) -> None:
    image = pictures(*size)
    resized = [
        np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC))
        for p in image.permute(0, 2, 3, 1).numpy()
    ]
    ours = resize_bicubic(image.float(), (224, 224), rounded=True).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(ours, np.stack(resized))


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (50, 50)])
def test_shorter_side_and_centre_as_with_pillow(size: tuple[int, int]) -> None:
    image = pictures(*size)
    height, width = size
    shorter = min(size)
    whole = (int(24 * width / shorter), int(24 * height / shorter))  # width, height, as Pillow has them
    left, top = round((whole[0] - 24) / 2), round((whole[1] - 24) / 2)
    ours = shorter_side_and_centre(image.float(), 24).permute(0, 2, 3, 1).numpy()
    for one, picture in zip(ours, image.permute(0, 2, 3, 1).numpy(), strict=True):
        expected = Image.fromarray(picture).resize(whole, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(one, np.asarray(expected.crop((left, top, left + 24, top + 24))))
