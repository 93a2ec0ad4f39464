"""Operations that cost more on a CPU than they should, written so that they are fast there, in `channels_last`.

Shapes: B batch, C channels, G groups, H W latent size, N tokens, M rows, L context tokens, h heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# oneDNN's matrix product, as torch's own compiler calls it; not every build of torch has it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Multiplications below which oneDNN's call costs more than its product saves.
_WORTH_IT = 2**21


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., C) -> (..., C'), as F.linear.

    torch gives matrix products in float32 to MKL, which on AMD processors reaches half the speed of oneDNN: there the
    larger ones go to oneDNN. Other precisions and devices have one good kernel.
    """
    if (
        _ONEDNN is None
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.numel() * weight.shape[0] < _WORTH_IT
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN."""
    assert _ONEDNN is not None
    return _ONEDNN(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        x_grad = _product(grad, weight.t()) if need_x else None
        weight_grad = bias_grad = None
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        if (need_weight or need_bias) and len(rows) % _IMAGES == 0:
            # The long sum over all rows is what oneDNN's convolution of kernel size 1 does best.
            _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
                _pictures(rows),
                _pictures(columns),
                weight[:, :, None, None],
                [len(weight)],
                *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),
                [False, need_weight, need_bias],
            )
            weight_grad = None if weight_grad is None else weight_grad[:, :, 0, 0]
        else:
            weight_grad = rows.t() @ columns if need_weight else None
            bias_grad = rows.sum(0) if need_bias else None
        return x_grad, weight_grad, bias_grad


# torch leaves a 1x1 convolution of fewer images to a slow kernel when it runs in one thread.
_IMAGES = 16


def _pictures(rows: Tensor) -> Tensor:
    """(M, C) -> (16, C, 1, M/16) in channels_last; a view."""
    return rows.unflatten(0, (_IMAGES, -1)).unsqueeze(1).permute(0, 3, 1, 2)


# Up to this many scores per head they fit the processor's cache, and writing them out costs little.
_SMALL_SCORES = 256 * 256


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, h, N, d), k and v (B, h, L, d) -> (B, h, N, d): softmax(q k^T / sqrt(d)) v.

    mask (B, L) is True where a token may be seen. On a CPU torch's fused kernel is slow for short contexts, and its
    backward pass in bfloat16 takes 3 to 15 times as long as plain matrix products.
    """
    scores = q.shape[2] * k.shape[2]
    plain = scores <= _SMALL_SCORES and (q.dtype == torch.bfloat16 or k.shape[2] <= 32)
    if q.device.type == "cpu" and plain:
        weights = torch.matmul(q * q.shape[3] ** -0.5, k.transpose(-1, -2))
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, None, :], float("-inf"))
        return torch.matmul(weights.softmax(-1), v)
    seen = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=seen).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


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
