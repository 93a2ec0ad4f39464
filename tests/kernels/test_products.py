"""The fast linear layer and attention against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from darkroom.kernels import attention, linear, products


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 3, 24), (2, 24), (3, 16, 24), (2, 2, 8, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_linear_is_linear(shape: tuple[int, ...], with_bias: bool, large: bool, monkeypatch: Any) -> None:
    """By oneDNN, where it is taken for large products, and by torch; rows that 16 divides and others."""
    monkeypatch.setattr(products, "_WORTH_IT", 0 if large else 2**31)
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
    monkeypatch.setattr(products, "_WORTH_IT", 0)
    given = {"x": randn(2, 8, 24), "weight": randn(10, 24, seed=1), "bias": randn(10, seed=2)}
    given[trained].requires_grad_()
    out_grad = randn(2, 8, 10, seed=3)
    (ours,) = torch.autograd.grad(linear(**given), given[trained], out_grad)
    (expected,) = torch.autograd.grad(F.linear(*given.values()), given[trained], out_grad)
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-5)


def test_linear_takes_tokens_and_weights_in_any_layout(monkeypatch: Any) -> None:
    monkeypatch.setattr(products, "_WORTH_IT", 0)
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
