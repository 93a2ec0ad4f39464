"""The channels_last group norm against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from darkroom.first_stage.norm import group_norm, group_norm_silu


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_equal_to_torch_in_float64(silu: bool, groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, 6, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=g))
        norm.bias.copy_(torch.randn(6, generator=g))
    x = (3 * torch.randn(2, 6, 5, 4, generator=g, dtype=torch.float64) + 1).to(memory_format=torch.channels_last)
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=g, dtype=torch.float64)
    inputs = (x, norm.weight, norm.bias)
    ours = group_norm_silu(norm, x) if silu else group_norm(norm, x)
    theirs = F.silu(norm(x)) if silu else norm(x)
    assert type(ours.grad_fn).__name__ == "_ChannelsLastGroupNormBackward"
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(theirs, inputs, upstream)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_bfloat16_input_with_float32_weights() -> None:
    g = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(8, 32)
    x = torch.randn(2, 32, 16, 16, generator=g).to(memory_format=torch.channels_last)
    upstream = torch.randn(x.shape, generator=g)
    exact_x = x.clone().requires_grad_()
    exact = torch.autograd.grad(F.silu(norm(exact_x)), (exact_x, norm.weight, norm.bias), upstream)
    half = x.bfloat16().requires_grad_()
    y = group_norm_silu(norm, half)
    assert y.dtype == torch.bfloat16
    ours = torch.autograd.grad(y, (half, norm.weight, norm.bias), upstream.bfloat16())
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(ours, exact, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.01


def test_other_layouts_and_inference_use_torch() -> None:
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    assert torch.equal(group_norm_silu(norm, x), F.silu(norm(x)))
    with torch.no_grad():
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(group_norm(norm, last), norm(last))
