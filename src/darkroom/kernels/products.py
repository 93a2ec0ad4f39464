"""Linear layers and attention.

Shapes: B batch, C channels, N tokens, M rows, L context tokens, h heads, d head width.
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
