"""Convolutions with fewer multiplications against the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.kernels import Conv1x1, Conv3x3, convolutions, upsample_conv

LAST, FIRST = torch.channels_last, torch.contiguous_format
# batch, channels in and out, height, width: odd sizes, one pixel, one row
SHAPES = [(2, 8, 6, 5, 7), (1, 3, 4, 8, 4), (3, 4, 4, 1, 1), (1, 5, 2, 13, 1), (2, 4, 3, 1, 6)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(conv: nn.Conv2d, x: Tensor, upsample: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The plain result in float64, and its inputs: x, weight, bias."""
    assert conv.bias is not None
    inputs = [t.detach().double().requires_grad_() for t in (x, conv.weight, conv.bias)]
    image = F.interpolate(inputs[0], scale_factor=2.0, mode="nearest") if upsample else inputs[0]
    return F.conv2d(image, inputs[1], inputs[2], padding=conv.padding), inputs


@pytest.fixture
def always_fast(monkeypatch: Any) -> None:
    for name in ("_WINOGRAD_CHANNELS", "_WINOGRAD_POSITIONS", "_UPSAMPLE_POSITIONS"):
        monkeypatch.setattr(convolutions, name, 1)


@pytest.mark.parametrize("weight_layout", [LAST, FIRST])
@pytest.mark.parametrize("shape", SHAPES)
def test_winograd(shape: tuple[int, ...], weight_layout: torch.memory_format, always_fast: None) -> None:
    batch, channels, out_channels, height, width = shape
    conv = Conv3x3(channels, out_channels).to(memory_format=weight_layout)  # type: ignore[call-overload]
    x = randn(batch, channels, height, width).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert convolutions.winograd_is_faster(x, conv.weight)
        ours = conv(x)
    torch.testing.assert_close(ours.double(), exact(conv, x)[0], atol=2e-5, rtol=0)
    assert ours.is_contiguous(memory_format=LAST)


def test_winograd_in_float64_and_in_several_chunks(monkeypatch: Any) -> None:
    """The method itself is exact: what is left in float32 is rounding."""
    monkeypatch.setattr(convolutions, "_WINOGRAD_CHUNK", 1)
    conv = Conv3x3(4, 4).double()
    x = randn(2, 4, 14, 5, dtype=torch.float64).contiguous(memory_format=LAST)
    with torch.no_grad():
        ours = convolutions.winograd(x, conv.weight, conv.bias)
        without_bias = convolutions.winograd(x, conv.weight, None)
    torch.testing.assert_close(ours, exact(conv, x)[0], atol=1e-13, rtol=0)
    assert conv.bias is not None
    torch.testing.assert_close(without_bias + conv.bias[:, None, None], ours)


def test_winograd_at_the_size_where_it_is_used() -> None:
    """Its rounding error is a few times that of the plain convolution: a few 1e-6 of the result's scale."""
    conv = Conv3x3(128, 128).to(memory_format=LAST)  # type: ignore[call-overload]
    x = randn(1, 128, 46, 46).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert convolutions.winograd_is_faster(x, conv.weight)
        ours, expected = conv(x), exact(conv, x)[0]
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("shape", SHAPES)
def test_upsampling_then_a_convolution(shape: tuple[int, ...], layout: torch.memory_format, always_fast: None) -> None:
    batch, channels, out_channels, height, width = shape
    conv = Conv3x3(channels, out_channels)
    x = randn(batch, channels, height, width).contiguous(memory_format=layout).requires_grad_()
    ours = upsample_conv(x, conv)
    expected, inputs = exact(conv, x, upsample=True)
    assert ours.shape == (batch, out_channels, 2 * height, 2 * width)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(upsample_conv(x, conv), ours)
    out_grad = randn(*expected.shape, seed=1)
    assert conv.bias is not None
    grads = torch.autograd.grad(ours, (x, conv.weight, conv.bias), out_grad)
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, out_grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=1e-5)


def test_gradients_of_upsampling_are_exact() -> None:
    """Against finite differences in float64."""
    inputs = [
        randn(2, 3, 3, 2, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_(),
        randn(4, 3, 3, 3, seed=1, dtype=torch.float64).requires_grad_(),
        randn(4, seed=2, dtype=torch.float64).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(convolutions._UpsampleConv.apply, inputs)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_upsampling_gives_only_the_gradients_asked_for(trained: int) -> None:
    inputs = [randn(1, 3, 4, 4).contiguous(memory_format=LAST), randn(4, 3, 3, 3, seed=1), randn(4, seed=2)]
    inputs[trained].requires_grad_()
    ours = convolutions._UpsampleConv.apply(*inputs)
    expected = F.conv2d(F.interpolate(inputs[0], scale_factor=2.0), inputs[1], inputs[2], padding=1)
    grads = [torch.autograd.grad(y.square().sum(), inputs[trained])[0] for y in (ours, expected)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_one_by_one(layout: torch.memory_format) -> None:
    conv, x = Conv1x1(5, 7), randn(2, 5, 3, 4).contiguous(memory_format=layout).requires_grad_()
    ours, (expected, inputs) = conv(x), exact(conv, x)
    assert ours.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    out_grad = randn(*expected.shape, seed=1)
    assert conv.bias is not None
    grads = torch.autograd.grad(ours, (x, conv.weight, conv.bias), out_grad)
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, out_grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_other_precisions_and_paddings_are_plain(always_fast: None) -> None:
    conv, x = Conv3x3(8, 8), randn(1, 8, 16, 16).contiguous(memory_format=LAST)
    image = F.interpolate(x, scale_factor=2.0)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
            assert torch.equal(upsample_conv(x, conv), F.conv2d(image, conv.weight, conv.bias, padding=1))
        conv.padding_mode = "circular"
        wrapped = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
        torch.testing.assert_close(conv(x), wrapped, atol=1e-5, rtol=0)
        torch.testing.assert_close(upsample_conv(x, conv), conv(image), atol=1e-5, rtol=0)


def test_the_method_does_not_depend_on_the_batch() -> None:
    conv = Conv3x3(128, 128)
    one, many = (torch.empty(b, 128, 32, 32).contiguous(memory_format=LAST) for b in (1, 16))
    assert convolutions.winograd_is_faster(one, conv.weight) == convolutions.winograd_is_faster(many, conv.weight)


def test_the_weights_are_those_of_a_plain_convolution() -> None:
    """Same names, same draws: files and seeds keep their meaning."""
    for make, make_plain in (
        (lambda: Conv3x3(3, 4), lambda: nn.Conv2d(3, 4, 3, padding=1)),
        (lambda: Conv1x1(3, 4), lambda: nn.Conv2d(3, 4, 1)),
    ):
        states = []
        for build in (make, make_plain):
            torch.manual_seed(0)
            states.append(build().state_dict())
        assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
