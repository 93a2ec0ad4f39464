"""The fast linear layer and group norm against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from darkroom.networks.kernels import group_norm, linear


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 3, 24), (2, 24), (3, 16, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_linear(shape: tuple[int, ...], with_bias: bool) -> None:
    x = randn(*shape).requires_grad_()
    weight, bias = randn(10, 24, seed=1).requires_grad_(), randn(10, seed=2).requires_grad_() if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    ours, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    out_grad = randn(*expected.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, out_grad), torch.autograd.grad(expected, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


def test_linear_takes_tokens_in_any_layout() -> None:
    x = randn(2, 24, 6).transpose(1, 2)
    torch.testing.assert_close(linear(x, randn(8, 24)), F.linear(x, randn(8, 24)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_group_norm_gradients_are_exact(silu: bool, shifted: bool, rows: int) -> None:
    """Against finite differences in float64."""
    x = randn(3, 8, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    shift = randn(3, 8, seed=1, dtype=torch.float64).requires_grad_() if shifted else None
    weight = randn(rows, 8, seed=2, dtype=torch.float64).requires_grad_()
    bias = randn(rows, 8, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: group_norm(*a, 4, 1e-5, silu), (x, shift, weight, bias))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_torchs(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = randn(2, 64, 5, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    shift, weight, bias = randn(2, 64, seed=1).to(dtype), randn(1, 64, seed=2), randn(1, 64, seed=3)
    ours = group_norm(x, shift, weight, bias, 32, 1e-5, True)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=layout)
    exact = F.silu(
        F.group_norm(x.double() + shift.double()[:, :, None, None], 32, weight[0].double(), bias[0].double())
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)
    out_grad = randn(2, 64, 5, 7, seed=4)
    (grad,) = torch.autograd.grad(ours, x, out_grad.to(dtype))
    (expected,) = torch.autograd.grad(exact, x, out_grad.double())
    torch.testing.assert_close(grad.double(), expected.double(), atol=3 * tolerance, rtol=tolerance)


def test_group_norm_survives_a_large_mean() -> None:
    """E[x^2] - E[x]^2 in float32 would be off by a tenth here."""
    x = randn(1, 32, 16, 16) + 1000
    expected = F.group_norm(x.double(), 32)
    one, zero = torch.ones(1, 32), torch.zeros(1, 32)
    torch.testing.assert_close(group_norm(x, None, one, zero, 32, 1e-5, False).double(), expected, atol=2e-3, rtol=0)
