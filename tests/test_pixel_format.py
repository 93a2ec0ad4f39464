"""Every value of an integer type comes back; other ranges are clipped; impossible formats are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_integer_round_trips(dtype: Any) -> None:
    pixels = PixelFormat.of(dtype)
    most = 2**pixels.bits - 1
    values = torch.arange(most + 1, dtype=torch.int32).to(getattr(torch, dtype))
    network = pixels.to_network(values)
    assert network.dtype == torch.float32 and network[0] == -1 and network[-1] == 1
    assert bool((network.diff() > 0).all())
    back = pixels.from_network(network)
    assert back.dtype == values.dtype and torch.equal(back, values)
    # An error of less than half a step changes nothing, on either side.
    for shift in (-0.9 / most, 0.9 / most):
        assert torch.equal(pixels.from_network(network + shift), values)


def test_the_default_is_the_arithmetic_of_eight_bit_models() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(PixelFormat().to_network(values), values.float().div_(127.5).sub_(1))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PixelFormat().from_network(noise), ((noise.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_a_part_of_sixteen_bits() -> None:
    pixels = PixelFormat.of("uint16", (100, 4195))
    values = torch.arange(100, 4196, dtype=torch.int32).to(torch.uint16)
    assert torch.equal(pixels.from_network(pixels.to_network(values)), values)
    ends = pixels.to_network(torch.tensor([0, 65535], dtype=torch.int32).to(torch.uint16))
    assert ends.tolist() == [-1, 1]
    assert pixels.from_network(torch.tensor([-3.0, 3.0])).tolist() == [100, 4195]


def test_floating_point_keeps_its_values() -> None:
    pixels = PixelFormat.of("float32", (-40.0, 60.5))
    values = torch.linspace(-40, 60.5, 1001)
    assert torch.allclose(pixels.from_network(pixels.to_network(values)), values, atol=1e-5)
    assert pixels.from_network(torch.tensor([-9.0, 9.0])).tolist() == [-40.0, 60.5]
    assert pixels.to_network(torch.tensor([-50.0, 99.0])).tolist() == [-1, 1]


def test_words() -> None:
    assert str(PixelFormat.of("uint16")) == "16 bits, 0 to 65535"
    assert str(PixelFormat.of("float32", (0, 0.5))) == "floating point, 0 to 0.5"
    assert PixelFormat(**PixelFormat.of("uint16").to_dict()) == PixelFormat.of("uint16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32", None), "no range"),
        (("uint16", (5, 5)), "lower one first"),
        (("float32", (0, float("inf"))), "finite"),
        (("uint8", (0, 4095)), "0 to 255"),
        (("uint16", (-1, 5)), "float32"),
        (("int12", (0, 1)), "uint16"),
    ],
)
def test_impossible_formats(arguments: Any, message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        PixelFormat.of(*arguments)


def test_a_picture_with_other_numbers() -> None:
    """8 and 16 bits stand for each other where the whole range is black to white; nothing else does."""
    assert PixelFormat.of("uint8").for_picture("uint16") == PixelFormat.of("uint16")
    assert PixelFormat.of("uint16").for_picture("uint8") == PixelFormat.of("uint8")
    kelvin = PixelFormat("float32", 200, 320)
    assert kelvin.for_picture("float32") is kelvin
    part = PixelFormat("uint16", 0, 4095)  # of twelve bits
    for own, dtype in ((kelvin, "uint8"), (part, "uint8"), (PixelFormat(), "float32"), (PixelFormat(), "int64")):
        with pytest.raises(DarkroomError, match=f"the picture has {dtype} numbers, the model was trained with"):
            own.for_picture(dtype)
