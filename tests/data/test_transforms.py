"""The one transform rule, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.data.transforms import (
    crop_box,
    crop_boxes,
    crop_example,
    flip_example,
    labels_to_network,
    to_eight_bits,
    to_network,
)
from darkroom.errors import DarkroomError


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (8, 4), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    picture.getexif()[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = to_network(picture, (4, 8))
    assert out.shape == (3, 8, 4)
    assert out[0, 0, 3] == 255 and out[0].sum() == 255


def test_sixteen_bits_are_scaled_by_65535() -> None:
    samples = np.array([[0, 65535, 32768, 257]], np.uint16)
    for picture in (Image.fromarray(samples), Image.fromarray(samples.astype(np.int32))):
        out = to_network(picture, (4, 1), channels=1)
        assert out.dtype == np.uint8 and out.tolist() == [[[0, 255, 128, 1]]]
    with pytest.raises(ValueError, match="float32"):
        to_eight_bits(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(("background", "expected"), [("white", 255), ("black", 0), ("#808080", 128)])
def test_transparency_shows_the_background(background: str, expected: int) -> None:
    clear = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    grey = Image.new("LA", (2, 2), (77, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    for picture in (clear, grey, palette):
        assert (to_network(picture, (2, 2), background=background) == expected).all()
    half = to_network(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), (1, 1), background="white")
    assert half.ravel().tolist() == [255, 127, 127]


def test_grey_and_colour() -> None:
    grey = to_network(Image.new("L", (2, 2), 90), (2, 2), channels=3)
    assert grey.shape == (3, 2, 2) and (grey == 90).all()
    luma = to_network(Image.new("RGB", (2, 2), (255, 0, 0)), (2, 2), channels=1)
    assert luma.shape == (1, 2, 2) and (luma == 76).all()  # 0.299 * 255
    assert to_network(Image.new("1", (2, 2), 1), (2, 2)).min() == 255
    cmyk = to_network(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (2, 2))
    assert cmyk[:, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(DarkroomError, match="channels=4"):
        to_network(Image.new("L", (2, 2)), (2, 2), channels=4)


def test_centre_crop_keeps_the_largest_rectangle() -> None:
    assert crop_box((100, 50), (10, 10)) == (25, 0, 75, 50)
    assert crop_box((50, 100), (10, 20)) == (0, 0, 50, 100)
    assert crop_box((60, 60), (20, 10)) == (0, 15, 60, 45)
    picture = Image.new("RGB", (9, 3), "black")
    picture.paste("white", (3, 0, 6, 3))
    assert (to_network(picture, (3, 3)) == 255).all()


def test_the_right_size_is_left_alone_and_others_are_resized() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    assert np.array_equal(to_network(Image.fromarray(noise), (5, 6)), noise.transpose(2, 0, 1))
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, 0)
    out = to_network(Image.fromarray(ramp), (16, 16), channels=1)[0, 8].astype(float)
    assert np.abs(np.diff(out)[2:-2] - 16).max() <= 1  # a ramp stays a ramp
    assert to_network(Image.fromarray(ramp[:4, :4]), (9, 9)).shape == (3, 9, 9)


def test_label_maps_are_never_mixed() -> None:
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 11
    out = labels_to_network(Image.fromarray(ids), (4, 4))
    assert out.tolist() == [[0, 0, 11, 11]] * 4
    indexed = Image.fromarray(ids).convert("P")
    indexed.putpalette([200, 100, 50] * 12)
    indexed.putdata(ids.ravel().tolist())
    assert np.array_equal(labels_to_network(indexed, (4, 4)), out)
    with pytest.raises(ValueError, match="RGB"):
        labels_to_network(Image.new("RGB", (2, 2)), (2, 2))


def test_boxes_follow_a_crop() -> None:
    boxes = np.array([[3, 0.0, 0.0, 0.5, 1.0], [1, 0.9, 0.1, 1.0, 0.2]], np.float32)
    out = crop_boxes(boxes, (0.25, 0.0, 0.75, 0.5))
    assert out.tolist() == [[3, 0.0, 0.0, 0.5, 1.0]]  # the second is outside
    assert crop_boxes(np.zeros((0, 5), np.float32), (0, 0, 1, 1)).shape == (0, 5)


def example() -> dict[str, object]:
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    boxes = torch.tensor([[2, 0.0, 0.0, 0.5, 0.5]])
    return {"image": image, "segmentation": image[0].long(), "boxes": boxes, "text": "a"}


def test_flip_is_its_own_inverse_and_moves_everything() -> None:
    one = example()
    flipped = flip_example(one)
    assert torch.equal(flipped["image"][..., 0], one["image"][..., -1])
    assert torch.equal(flipped["segmentation"], flipped["image"][0].long())
    assert flipped["boxes"].tolist() == [[2, 0.5, 0.0, 1.0, 0.5]]
    again = flip_example(flipped)
    assert all(torch.equal(again[f], one[f]) for f in ("image", "segmentation", "boxes")) and again["text"] == "a"


def test_crop_moves_everything() -> None:
    out = crop_example(example(), 1, 2, 4, 2)
    assert out["image"].shape == (3, 2, 4) and out["image"][0, 0, 0] == 2 * 6 + 1
    assert torch.equal(out["segmentation"], out["image"][0].long())
    assert out["boxes"].shape == (0, 5)  # it was in the upper half
