"""The fast linear layer and group norm against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from darkroom.networks import kernels
from darkroom.networks.kernels import attention, group_norm, linear


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 3, 24), (2, 24), (3, 16, 24), (2, 2, 8, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_linear_is_linear(shape: tuple[int, ...], with_bias: bool, large: bool, monkeypatch: Any) -> None:
    """By oneDNN, where it is taken for large products, and by torch; rows that 16 divides and others."""
    monkeypatch.setattr(kernels, "_WORTH_IT", 0 if large else 2**31)
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

    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_linear_gives_only_the_gradients_asked_for(trained: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "_WORTH_IT", 0)
    given = {"x": randn(2, 8, 24), "weight": randn(10, 24, seed=1), "bias": randn(10, seed=2)}
    given[trained].requires_grad_()
    out_grad = randn(2, 8, 10, seed=3)
    (ours,) = torch.autograd.grad(linear(**given), given[trained], out_grad)
    (expected,) = torch.autograd.grad(F.linear(*given.values()), given[trained], out_grad)
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-5)


def test_linear_takes_tokens_and_weights_in_any_layout(monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "_WORTH_IT", 0)
    x, weight = randn(2, 24, 6).transpose(1, 2).requires_grad_(), randn(24, 8).t().requires_grad_()
    ours, expected = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    out_grad = randn(2, 8, 6, seed=3).transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), out_grad),
        torch.autograd.grad(expected, (x, weight), out_grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


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


@pytest.mark.parametrize("length", [3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_attention(length: int, dtype: torch.dtype, masked: bool) -> None:
    """Each of the ways it is computed, against float64, with gradients."""
    q, k, v = (
        randn(2, n, 3, 8, seed=s).to(dtype).transpose(1, 2).requires_grad_() for s, n in enumerate((12, length, length))
    )
    mask = torch.ones(2, length, dtype=torch.bool)
    if masked:
        mask[1, length // 2 :] = False
    ours = attention(q, k, v, mask if masked else None)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask[:, None, None])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)
    out_grad = randn(*ours.shape, seed=7)
    grads = torch.autograd.grad(ours, (q, k, v), out_grad.to(dtype))
    for a, b in zip(grads, torch.autograd.grad(exact, (q, k, v), out_grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=5 * tolerance, rtol=tolerance)


def test_attention_over_many_tokens() -> None:
    """Too many scores to write out: the fused kernel, in float32 where bfloat16 would be slow."""
    q = randn(1, 1, 300, 8).bfloat16().requires_grad_()
    exact = F.scaled_dot_product_attention(q.double(), q.double(), q.double())
    for result in (attention(q, q, q), attention(q.detach(), q.detach(), q.detach())):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, atol=2e-2, rtol=2e-2)
