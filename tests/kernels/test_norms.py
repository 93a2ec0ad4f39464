"""Group norm with its neighbours against torch's own, in every way in which it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from darkroom.kernels import group_norm, norm, norm_silu

LAST, FIRST = torch.channels_last, torch.contiguous_format


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_are_exact(silu: bool, shifted: bool, rows: int) -> None:
    """Against finite differences in float64."""
    x = randn(3, 8, 3, 2, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    shift = randn(3, 8, seed=1, dtype=torch.float64).requires_grad_() if shifted else None
    weight = randn(rows, 8, seed=2, dtype=torch.float64).requires_grad_()
    bias = randn(rows, 8, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(group_norm, (x, shift, weight, bias, 4, 1e-5, silu))  # type: ignore[arg-type]


# channels, groups, height, width: narrow and wide groups, below and above the size where torch changes its method
SHAPES = [(6, 3, 5, 4), (64, 32, 5, 7), (8, 4, 33, 35), (32, 4, 6, 6), (64, 2, 33, 35), (24, 4, 9, 5), (512, 32, 3, 3)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_torch(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, rows: int) -> None:
    """Value with and without gradients, and the gradients, against float64."""
    channels, groups, height, width = shape
    parameters = torch.float32 if dtype == torch.bfloat16 else dtype
    x = (3 * randn(2, channels, height, width) + 1).to(dtype).contiguous(memory_format=layout)
    shift = randn(2, channels, seed=1).to(dtype)
    weight, bias = (randn(rows, channels, seed=s).to(parameters) for s in (2, 3))
    inputs = [t.requires_grad_() for t in (x, shift, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours = group_norm(x, shift, weight, bias, groups, 1e-6, True)
    normal = F.group_norm(exact[0] + exact[1][:, :, None, None], groups, eps=1e-6)
    expected = F.silu(normal * exact[2][:, :, None, None] + exact[3][:, :, None, None])
    with torch.no_grad():
        again = group_norm(x, shift, weight, bias, groups, 1e-6, True)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    for result in (ours, again):
        assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    out_grad = randn(*expected.shape, seed=4).double()
    grads = torch.autograd.grad(ours, inputs, out_grad.to(dtype))
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    for a, b in zip(grads, torch.autograd.grad(expected, exact, out_grad), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_a_layer_with_and_without_silu(layout: torch.memory_format) -> None:
    layer = nn.GroupNorm(3, 6, eps=1e-6).double()
    with torch.no_grad():
        layer.weight.copy_(randn(6))
        layer.bias.copy_(randn(6, seed=1))
    x = randn(2, 6, 5, 4, seed=2, dtype=torch.float64).contiguous(memory_format=layout)
    torch.testing.assert_close(norm(layer, x), layer(x))
    torch.testing.assert_close(norm_silu(layer, x), F.silu(layer(x)))
    with torch.no_grad():
        before = x.clone()
        torch.testing.assert_close(norm_silu(layer, x), F.silu(layer(x)))
        assert torch.equal(x, before)  # only the result is written


@pytest.mark.parametrize("size", [16, 40])
def test_survives_a_large_mean(size: int) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by a tenth here."""
    x = (randn(1, 32, size, size) + 1000).contiguous(memory_format=LAST)
    expected = F.group_norm(x.double(), 32)
    one, zero = torch.ones(1, 32), torch.zeros(1, 32)
    torch.testing.assert_close(group_norm(x, None, one, zero, 32, 1e-5, False).double(), expected, atol=2e-3, rtol=0)


def test_no_gradient_through_the_gradient() -> None:
    """It would be wrong, hence an error instead of a number."""
    x = randn(1, 4, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    y = norm_silu(nn.GroupNorm(4, 4), x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_large_maps_keep_their_digits() -> None:
    """A plain float32 sum over 256x256 positions would be wrong by some 1e-5."""
    layer = nn.GroupNorm(2, 8, eps=1e-6)
    x = torch.randn(1, 8, 256, 256, generator=torch.Generator().manual_seed(0)) * 1.3 + 0.4
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.group_norm(x.double(), 2, eps=1e-6)
        assert float((norm(layer, x) - expected).abs().max()) < 3e-6
