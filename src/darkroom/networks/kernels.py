"""Two operations that cost more than they should, written so that they are fast on a CPU in `channels_last`.

Shapes: B batch, C channels, G groups, H W latent size, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, N, C) -> (B, N, C'), as F.linear.

    In float32 on a CPU it runs as a 1x1 convolution, for which a (B, N, C) tensor is a picture in channels_last: torch
    gives convolutions to oneDNN and matrix products to MKL, which on AMD processors reaches less than half the speed.
    A single token per image has no picture to gain from, and other precisions and devices have one good kernel.
    """
    lowered = torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or x.dtype != torch.float32 or lowered or x.ndim != 3 or x.shape[1] < 4:
        return F.linear(x, weight, bias)
    picture = x.contiguous().unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(picture, weight[:, :, None, None], bias).permute(0, 2, 3, 1).squeeze(2)


def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """(B, C, H, W) -> same: GroupNorm(x + shift) * weight + bias, then SiLU if asked.

    shift (B, C) or None; weight and bias (B, C), or (1, C) for all examples. Statistics in at least float32.
    """
    if x.device.type == "cpu":
        return _GroupNorm.apply(x, shift, weight, bias, groups, eps, silu)
    if shift is not None:
        x = x + shift[:, :, None, None].to(x.dtype)
    if weight.shape[0] == 1:
        y = F.group_norm(x, groups, weight[0], bias[0], eps)
    else:
        y = F.group_norm(x, groups, None, None, eps) * weight[:, :, None, None] + bias[:, :, None, None]
    y = y.to(x.dtype)
    return F.silu(y) if silu else y


class _GroupNorm(torch.autograd.Function):
    """One pass per term over the data, and only the input is kept for the backward pass.

    With d = x + shift - mean, r = 1 / sqrt(var + eps), z = d r w + b, y = silu(z), and <.> the mean over a group:
    dx = r (w dz) - r <w dz> - d r^3 <w dz d>   (Wu & He 2018, differentiated).
    torch's own kernel is 3 (float32) to 20 times (bfloat16) slower for channels_last tensors on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        size = x.shape[2] * x.shape[3]
        work = x.to(exact)
        total = work.sum((2, 3))
        if shift is not None:
            total = total + size * shift.to(exact)
        mean = _group_mean(total, groups, size)
        center = mean if shift is None else mean - shift.to(exact)
        # Second pass for the variance: E[x^2] - E[x]^2 loses digits where the mean is large.
        d = work.sub_(_map(center)) if work is not x else work - _map(center)
        y = d * d
        rstd = torch.rsqrt(_group_mean(y.sum((2, 3)), groups, size) + eps)
        scale = rstd * weight.to(exact)
        torch.addcmul(_map(bias.to(exact)), d, _map(scale), out=y)
        ctx.save_for_backward(x, center, rstd, total - size * mean, weight, bias)
        ctx.groups, ctx.silu, ctx.shifted = groups, silu, shift is not None
        if silu:
            F.silu(y, inplace=True)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, center, rstd, d_total, weight, bias = ctx.saved_tensors
        exact = rstd.dtype
        size = x.shape[2] * x.shape[3]
        work = x.to(exact)
        d = work.sub_(_map(center)) if work is not x else work - _map(center)
        w = weight.to(exact)
        scale = rstd * w
        grad = grad.to(exact)
        if ctx.silu:
            z = torch.addcmul(_map(bias.to(exact)), d, _map(scale))
            grad = torch.ops.aten.silu_backward(grad, z)
        bias_grad = grad.sum((2, 3))
        weighted = (grad * d).sum((2, 3))
        slope = -(rstd**3) * _group_mean(w * weighted, ctx.groups, size)
        offset = -rstd * _group_mean(w * bias_grad, ctx.groups, size)
        x_grad = torch.addcmul(_map(offset), d, _map(slope), out=d).addcmul_(grad, _map(scale))
        shift_grad = bias_grad * scale + d_total * slope + size * offset if ctx.shifted else None
        weight_grad = weighted * rstd
        return (
            x_grad.to(x.dtype),
            shift_grad,
            weight_grad.sum_to_size(weight.shape).to(weight.dtype),
            bias_grad.sum_to_size(bias.shape).to(bias.dtype),
            None,
            None,
            None,
        )


def _group_mean(sums: Tensor, groups: int, size: int) -> Tensor:
    """(B, C) sums over positions -> (B, C): mean over positions and over the channels of each group."""
    per_group = sums.unflatten(1, (groups, -1)).mean(-1, keepdim=True) / size
    return per_group.expand(-1, -1, sums.shape[1] // groups).flatten(1)


def _map(t: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, 1)"""
    return t[:, :, None, None]
