"""Group normalisation and SiLU as one operation, with a backward pass that is fast for channels_last on a CPU.

Convolutions want channels_last there, but torch's own group-norm backward walks that layout group by group: it takes 10
(float32) to 70 (bfloat16) times as long as for contiguous tensors, longer than the convolutions around it. Here the
backward pass is a few dense passes over (B, P, C). Shapes: B batch, C channels, P = H*W positions, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), (B, C, H, W)."""
    return _apply(norm, x, silu=False)


def group_norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), (B, C, H, W)."""
    return _apply(norm, x, silu=True)


def _apply(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    if torch.is_grad_enabled() and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        return _ChannelsLastGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    x = norm(x)
    return F.silu(x) if silu else x


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """y = silu(n) or n, n = gain * (x - m) * r + bias, m and r = 1/sqrt(var + eps) per image and group.

    With d = dL/dn, N elements per group and the sums A = sum(gain * d * x), D = sum(gain * d) over a group:
    dL/dx = gain*r*d + k*x - k*m - D*r/N,  k = (D*m - A) * r^3 / N    (the derivative of the formula above).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        b, c, h, w = x.shape
        n, mean, rstd = torch.native_group_norm(x, gain, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, gain, mean, rstd, n if silu else None)
        return F.silu(n) if silu else n

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, rstd, n = ctx.saved_tensors
        d = outputs[0]
        if n is not None:
            d = torch.ops.aten.silu_backward(d, n)
        b, c, h, w = x.shape
        groups = mean.shape[1]
        size = c // groups
        d = d.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(b, h * w, c)
        x = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        precise = mean.dtype  # float32, or float64 in tests
        sum_d, sum_dx = (_sum_positions(t, h, w, precise) for t in (d, d * x))  # (B, C)
        g, m, r = gain.to(precise), mean.unsqueeze(2), rstd.unsqueeze(2)  # (C,), (B, G, 1)
        in_group = (b, groups, size)
        total_d = (g * sum_d).view(in_group).sum(2, keepdim=True)
        total_dx = (g * sum_dx).view(in_group).sum(2, keepdim=True)
        k = (total_d * m - total_dx) * r.pow(3) / (size * h * w)
        constant = -k * m - total_d * r / (size * h * w)

        def per_channel(t: Tensor) -> Tensor:
            return t.expand(in_group).reshape(b, 1, c).to(x.dtype)

        dx = torch.addcmul(per_channel(constant), x, per_channel(k))
        dx.addcmul_(d, per_channel(r * g.view(1, groups, size)))
        normalised = (sum_dx.view(in_group) - sum_d.view(in_group) * m) * r
        d_gain = normalised.sum(0).view(c).to(gain.dtype)
        return dx.view(b, h, w, c).permute(0, 3, 1, 2), d_gain, sum_d.sum(0).to(gain.dtype), None, None, None


def _sum_positions(t: Tensor, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """(B, P, C) -> (B, C). Rows first: bfloat16 is rounded once per row, and no float32 copy of t is made."""
    return t.unflatten(1, (h, w)).sum(2).sum(1, dtype=dtype)
