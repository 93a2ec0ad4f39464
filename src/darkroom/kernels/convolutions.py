"""3x3 convolutions that need fewer multiplications, equal to the plain ones up to rounding.

Shapes: B batch, C and O channels in and out, H W size of the input. Maps inside are (B, H, W, C): `channels_last`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from darkroom.kernels.products import linear

# Winograd's method is faster from this width on (below, its transforms cost more than it saves), and for this many
# positions (below, the transform of the weights does): of one image, so that an image does not depend on its batch.
_WINOGRAD_CHANNELS = 128
_WINOGRAD_POSITIONS = 2048
# Elements of the transformed rows that are worked on at once: they stay in a processor's cache.
_WINOGRAD_CHUNK = 2**22
# The same for the sums of weights of `upsample_conv`.
_UPSAMPLE_POSITIONS = 512


class Conv3x3(nn.Conv2d):
    """nn.Conv2d(channels, out_channels, 3, padding=1), faster in inference."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)"""
        if self.padding_mode == "zeros" and not torch.is_grad_enabled() and winograd_is_faster(x, self.weight):
            return winograd(x, self.weight, self.bias)
        return super().forward(x)


class Conv1x1(nn.Conv2d):
    """nn.Conv2d(channels, out_channels, 1): in channels_last one matrix product."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)"""
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _fast_on(x: Tensor, weight: Tensor) -> bool:
    """Float32 in channels_last on a CPU: where the methods of this file were measured to be faster."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
    )


# ----------------------------------------------------------------------------------------------------------- upsampling


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(nearest-neighbour x2 of x), (B, C, H, W) -> (B, O, 2H, 2W), with 16 instead of 36 multiplications.

    `conv` has a 3x3 kernel and pads with one zero. Two of its three taps along an axis always read the same pixel, so
    the outputs of each parity (even or odd row, even or odd column) are a 2x2 convolution of the small map, whose
    weights are sums of the given ones.
    """
    # In inference an image must not depend on its batch.
    positions = (x.shape[0] if torch.is_grad_enabled() else 1) * x.shape[2] * x.shape[3]
    if positions < _UPSAMPLE_POSITIONS or conv.padding_mode != "zeros" or not _fast_on(x, conv.weight):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    if torch.is_grad_enabled():
        return _UpsampleConv.apply(x, conv.weight, conv.bias)
    return _upsample_conv(x, conv.weight, conv.bias)


def _parities(weight: Tensor) -> list[tuple[int, int, Tensor]]:
    """(row parity, column parity, 2x2 weight): along an axis [w0, w1 + w2] for even outputs, [w0 + w1, w2] for odd."""
    w = weight.contiguous(memory_format=torch.channels_last)
    found = []
    for i, (upper, lower) in enumerate(_folded(w, 2)):
        rows = torch.stack([upper, lower], dim=2)
        for j, (left, right) in enumerate(_folded(rows, 3)):
            pair = torch.stack([left, right], dim=3)
            found.append((i, j, pair.contiguous(memory_format=torch.channels_last)))
    return found


def _folded(w: Tensor, axis: int) -> list[tuple[Tensor, Tensor]]:
    first, second, third = w.unbind(axis)
    return [(first, second + third), (first + second, third)]


def _upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    b, _, h, w = x.shape
    out = torch.empty(
        (b, weight.shape[0], 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    padded = F.pad(x, (1, 1, 1, 1))
    for i, j, part in _parities(weight):
        out[:, :, i::2, j::2] = F.conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], part, bias)
    return out


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _upsample_conv(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        h, w = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        padded_grad = torch.zeros_like(padded) if need_x else None
        weight_grad = torch.zeros_like(weight) if need_weight else None
        for i, j, part in _parities(weight):
            place = (slice(None), slice(None), slice(i, i + h + 1), slice(j, j + w + 1))
            part_x, part_weight, _ = torch.ops.aten.convolution_backward(
                grad[:, :, i::2, j::2].contiguous(memory_format=torch.channels_last),
                padded[place].contiguous(memory_format=torch.channels_last),
                part,
                None,
                *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),
                [need_x, need_weight, False],
            )
            if padded_grad is not None:
                padded_grad[place] += part_x
            if weight_grad is not None:  # each of the four taps goes back to the taps that it is the sum of
                for (r, rows), (s, columns) in ((a, b) for a in enumerate(_TAPS[i]) for b in enumerate(_TAPS[j])):
                    weight_grad[:, :, rows, columns] += part_weight[:, :, r : r + 1, s : s + 1]
        return (
            None if padded_grad is None else padded_grad[:, :, 1:-1, 1:-1],
            weight_grad,
            grad.sum((0, 2, 3)) if need_bias else None,
        )


# The taps of the 3x3 weight in each of the two taps along an axis, for even and odd outputs.
_TAPS = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))


# ------------------------------------------------------------------------------------------------------------- Winograd


def winograd_is_faster(x: Tensor, weight: Tensor) -> bool:
    large = x.shape[2] * x.shape[3] >= _WINOGRAD_POSITIONS
    return large and min(weight.shape[:2]) >= _WINOGRAD_CHANNELS and _fast_on(x, weight)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(x) with padding 1, (B, C, H, W) -> (B, O, H, W), with half the multiplications.

    Winograd's F(4, 3) (Lavin & Gray 2016, sec. 4.1) along the height: four rows of output are combinations of six
    convolutions along the width, instead of twelve. One axis only: with both, the transforms cost what they save for
    most widths, and rounding errors grow six-fold instead of two and a half times.
    """
    b, c, h, w = x.shape
    parts = _winograd_weights(weight)
    tiles = -(-h // 4)
    image = x.permute(0, 2, 3, 1)
    out = torch.empty((b, 4 * tiles, w, weight.shape[0]), dtype=x.dtype, device=x.device)
    step = max(_WINOGRAD_CHUNK // (6 * b * w * c), 1)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        start = 4 * first
        strip = _with_zeros(image, start - 1, start + 4 * count + 1)
        rows = _winograd_rows([strip[:, k : k + 4 * count - 3 : 4] for k in range(6)])
        # A constant in the second of the six comes out once in each of the four rows.
        m = [
            F.conv2d(row.permute(0, 3, 1, 2), part, bias if k == 1 else None, padding=(0, 1)).permute(0, 2, 3, 1)
            for k, (row, part) in enumerate(zip(rows, parts, strict=True))
        ]
        y = [out[:, start + k : start + 4 * count : 4] for k in range(4)]
        even, odd = m[1] + m[2], m[1].sub_(m[2])
        even_2, odd_2 = m[3] + m[4], m[3].sub_(m[4])
        torch.add(even, even_2, out=y[0]).add_(m[0])
        torch.add(odd, odd_2, alpha=2, out=y[1])
        torch.add(even, even_2, alpha=4, out=y[2])
        torch.add(odd, odd_2, alpha=8, out=y[3]).add_(m[5])
    return out[:, :h].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _with_zeros(image: Tensor, first: int, end: int) -> Tensor:
    """Rows first..end of (B, H, W, C), zeros where the image has none; a copy only at its edges."""
    height = image.shape[1]
    inside = image[:, max(first, 0) : min(end, height)]
    above, below = max(-first, 0), max(end - height, 0)
    return F.pad(inside, (0, 0, 0, 0, above, below)) if above or below else inside


def _winograd_rows(d: list[Tensor]) -> list[Tensor]:
    """B^T d of Lavin & Gray 2016 for six rows d."""
    a, b = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    c, e = d[4] - d[2], d[3] - d[1]
    return [
        torch.add(d[4], d[2], alpha=-5).add_(d[0], alpha=4),
        a + b,
        a.sub_(b),
        torch.add(c, e, alpha=2),
        c.sub_(e, alpha=2),
        torch.add(d[5], d[3], alpha=-5).add_(d[1], alpha=4),
    ]


def _winograd_weights(weight: Tensor) -> list[Tensor]:
    """G w along the height: (O, C, 3, 3) -> six of (O, C, 1, 3)."""
    above, here, below = weight.contiguous(memory_format=torch.channels_last).split(1, dim=2)
    outer = (above + below).div_(-6)
    outer_2 = torch.add(above, below, alpha=4).div_(24)
    return [
        part.contiguous(memory_format=torch.channels_last)
        for part in (
            above / 4,
            torch.sub(outer, here, alpha=1 / 6),
            torch.add(outer, here, alpha=1 / 6),
            torch.add(outer_2, here, alpha=1 / 12),
            torch.sub(outer_2, here, alpha=1 / 12),
            below,
        )
    ]
