"""Group normalisation with what stands around it: a shift before, a modulation and SiLU behind.

Shapes: B batch, C channels, G groups, P = H*W positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# torch's kernel takes the variance as E[x^2] - E[x]^2, whose relative error grows with (mean / deviation)^2.
_LARGE_MEAN = 30.0
# Positions up to which it adds the numbers of a channels_last map without losing digits: it sums one after the other in
# float32, and at 512x512 the deviation is wrong by 5e-5.
_SUMS_WELL = 64 * 64
_SUMMED_AT_ONCE = 2**20  # elements, which stay in a processor's cache


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """layer(x), (B, C, H, W)."""
    return group_norm(x, None, layer.weight[None], layer.bias[None], layer.num_groups, layer.eps, False)


def norm_silu(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(layer(x)), (B, C, H, W)."""
    return group_norm(x, None, layer.weight[None], layer.bias[None], layer.num_groups, layer.eps, True)


def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """(B, C, H, W) -> same: GroupNorm(x + shift) * weight + bias, then SiLU if asked.

    shift (B, C) or None; weight and bias (B, C), or (1, C) for all examples. Statistics in at least float32.
    """
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        if not torch.is_grad_enabled():
            return _forward(x, shift, weight, bias, groups, eps, silu)[0]
        if weight.shape[0] > 1 or not _wide_groups(x, groups):
            return _GroupNorm.apply(x, shift, weight, bias, groups, eps, silu)
    if shift is not None:
        x = x + _map(shift).to(x.dtype)
    if weight.shape[0] == 1:
        y = F.group_norm(x, groups, weight[0], bias[0], eps)
    else:
        y = F.group_norm(x, groups, None, None, eps) * _map(weight) + _map(bias)
    y = y.to(x.dtype)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


class _GroupNorm(torch.autograd.Function):
    """For channels_last on a CPU, where torch's own backward pass is up to 20 times slower than for contiguous tensors.

    Only the input is kept. With r = 1 / sqrt(var + eps), d = x + shift - mean, z = d r w + b, y = silu(z), and <.> the
    mean over a group: dx = r w dz - r <w dz> - r^3 d <w dz d>   (Wu & He 2018, differentiated).
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
        y, center, rstd = _forward(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, center, rstd, weight, bias)
        ctx.groups, ctx.silu, ctx.shifted = groups, silu, shift is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, center, rstd, weight, bias = ctx.saved_tensors
        h, w = x.shape[2:]
        exact = rstd.dtype
        wide_weight = weight.to(exact)
        scale = rstd * wide_weight
        tokens = _tokens(x)
        dz = _tokens(grad.to(x.dtype).contiguous(memory_format=torch.channels_last))
        if ctx.silu:
            z = torch.addcmul(_row(bias.to(exact) - center * scale, x), tokens, _row(scale, x))
            dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
        product = dz * tokens
        bias_grad, weighted = (_sum_positions(t, h, w, exact) for t in (dz, product))
        weighted = weighted - center * bias_grad
        slope = -(rstd**3) * _group_mean(wide_weight * weighted, ctx.groups, h * w)
        offset = -rstd * _group_mean(wide_weight * bias_grad, ctx.groups, h * w) - center * slope
        x_grad = torch.addcmul(_row(offset, x), tokens, _row(slope, x), out=product).addcmul_(dz, _row(scale, x))
        return (
            x_grad.unflatten(1, (h, w)).permute(0, 3, 1, 2),
            _sum_positions(x_grad, h, w, exact) if ctx.shifted else None,
            (weighted * rstd).sum_to_size(weight.shape).to(weight.dtype),
            bias_grad.sum_to_size(bias.shape).to(bias.dtype),
            None,
            None,
            None,
        )


def _forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and (B, C) each: what the norm subtracts from x, and 1 / sqrt(var + eps)."""
    size = x.shape[2] * x.shape[3]
    exact = torch.promote_types(x.dtype, torch.float32)
    large = size >= 1024  # torch changes its method there
    sums_well = size <= _SUMS_WELL or x.is_contiguous()
    if sums_well and (large or _wide_groups(x, groups)) and weight.shape[0] == 1 and weight.dtype in (x.dtype, exact):
        shifted = x if shift is None else x + _map(shift).to(x.dtype)
        y, mean, rstd = torch.native_group_norm(shifted, weight[0], bias[0], x.shape[0], x.shape[1], size, groups, eps)
        if not bool(((mean * rstd).abs() > _LARGE_MEAN).any()):
            mean, rstd = (t.to(exact).repeat_interleave(x.shape[1] // groups, 1) for t in (mean, rstd))
            center = mean if shift is None else mean - shift.to(exact)
            return F.silu(y, inplace=True) if silu else y, center, rstd
    work = x.to(exact)
    total = _sum_rows(work)
    if shift is not None:
        total = total + size * shift.to(exact)
    mean = _group_mean(total, groups, size)
    center = mean if shift is None else mean - shift.to(exact)
    # A second pass for the variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    rstd = torch.rsqrt(_group_mean(_sum_rows(work, center), groups, size) + eps)
    y = work.sub_(_map(center)) if work is not x else work - _map(center)
    y.mul_(_map(rstd * weight.to(exact))).add_(_map(bias.to(exact)))
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype), center, rstd


def _sum_rows(x: Tensor, center: Tensor | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C): the sum over positions of x, or of (x - center)^2; no second map of its size is made."""
    rows = max(_SUMMED_AT_ONCE // (x.shape[0] * x.shape[1] * x.shape[3]), 1)
    parts = x.split(rows, 2)
    if center is not None:
        parts = ((part - _map(center)).square_() for part in parts)
    return torch.stack([part.sum((2, 3)) for part in parts]).sum(0)


def _wide_groups(x: Tensor, groups: int) -> bool:
    """Whether torch's kernels for channels_last, which walk the groups one by one, find enough numbers side by side."""
    channels, positions = x.shape[1] // groups, x.shape[2] * x.shape[3]
    if x.element_size() < 4:
        return channels >= 16
    return channels >= 8 or (channels >= 4 and positions <= 1024)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, P, C); a view of a tensor in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _row(t: Tensor, like: Tensor) -> Tensor:
    """(B, C) -> (B, 1, C) in the precision of `like`."""
    return t[:, None].to(like.dtype)


def _sum_positions(t: Tensor, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """(B, P, C) -> (B, C). Rows first: bfloat16 is rounded once per row, and no float32 copy of t is made."""
    if t.dtype == dtype:
        return t.sum(1)
    return t.unflatten(1, (h, w)).sum(2).sum(1, dtype=dtype)


def _group_mean(sums: Tensor, groups: int, size: int) -> Tensor:
    """(B, C) sums over positions -> (B, C): mean over positions and over the channels of each group."""
    per_group = sums.unflatten(1, (groups, -1)).mean(-1, keepdim=True) / size
    return per_group.expand(-1, -1, sums.shape[1] // groups).flatten(1)


def _map(t: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, 1)"""
    return t[:, :, None, None]
