"""The building blocks of the U-Net: residual blocks, attention, resampling.

Source: Rombach et al. 2022, App. E; Ho et al. 2020; Dhariwal & Nichol 2021. Parameter names are those of the paper's
code, so that its weights load strictly and without a map.

Shapes: B batch, C channels, H W latent size, N = H*W tokens, L context tokens, D context width, E embedding width.

Memory layout: everything here is written for `channels_last`. There (B, C, H, W) is stored as (B, H, W, C), so that
tokens (B, N, C) are a free view, a 1x1 convolution is a matrix product on that view, and the 3x3 convolutions run
faster on CPU and on tensor cores. Contiguous tensors give the same numbers at the price of copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darkroom import kernels
from darkroom.kernels import attention, linear

Module = TypeVar("Module", bound=nn.Module)


def timestep_embedding(time: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, width): [cos(t f_i), sin(t f_i)] with f_i = max_period^(-i/half); an odd width gets a zero column.

    Vaswani et al. 2017, sec. 3.5, in the order of the LDM code (cosine first). Computed in at least float32, because
    bfloat16 cannot tell time 999 from 1000.
    """
    half = width // 2
    time = time.to(torch.promote_types(time.dtype, torch.float32))
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=time.dtype, device=time.device))
    angles = time[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, width - 2 * half))


def zero_module(module: Module) -> Module:
    """Set all parameters to 0: a block that ends in such a layer starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TargetTime(nn.Module):
    """time (B,), target_time (B,) or None -> (B, E): how far the network is asked to go at once, time - target_time.

    For objectives that jump (consistency, mean flow: Geng et al. 2025, sec. 4.3 found the distance the best input).
    None is no jump. Ours; the last layer starts at 0, so that a network with official weights keeps its function.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), zero_module(nn.Linear(width, width)))

    def forward(self, time: Tensor, target_time: Tensor | None) -> Tensor:
        distance = torch.zeros_like(time) if target_time is None else time - target_time
        return self.mlp(timestep_embedding(distance, self.features).to(next(self.parameters()).dtype))


class GroupNorm(nn.GroupNorm):
    """(B, C, H, W) -> same: 32 groups as in the paper; widths that 32 does not divide get the largest common divisor.

    The neighbours in a residual block are part of it, because each would be one more pass over memory.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(math.gcd(32, channels), channels, eps=eps)

    def forward(self, x: Tensor, silu: bool = False, shift: Tensor | None = None, film: Tensor | None = None) -> Tensor:
        """norm(x + shift), then y (1 + scale) + offset, then SiLU; shift (B, C), film (B, 2C) = [scale, offset]."""
        weight, bias = self.weight[None], self.bias[None]
        if film is not None:
            scale, offset = film.chunk(2, dim=1)
            weight, bias = weight * (1 + scale), bias * (1 + scale) + offset
        return kernels.group_norm(x, shift, weight, bias, self.num_groups, self.eps, silu)


def run(function: Callable[..., Tensor], *inputs: Tensor | None, use_checkpoint: bool) -> Tensor:
    """Call `function`; with `use_checkpoint` forget its activations and compute them again in the backward pass."""
    if use_checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in channels_last, with the H and W of `like`; a view."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def pointwise(tokens: Tensor, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Tensor:
    """(B, N, C) -> (B, N, C'): a linear layer or a convolution of kernel size 1, whose weight is only stored with
    more axes."""
    return linear(tokens, layer.weight.flatten(1), layer.bias)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W): nearest neighbour, then optionally a 3x3 convolution."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`size`: the wanted (H, W) where it is not exactly the double, as after halving an odd size."""
        double = (2 * x.shape[2], 2 * x.shape[3])
        if self.conv is not None and (size is None or tuple(size) == double):
            return kernels.upsample_conv(x, self.conv)
        x = F.interpolate(x, size=size or double, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2)): 3x3 convolution of stride 2, or 2x2 averages (rounding down)."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """(B, C, H, W), (B, E) -> (B, C', H', W'): norm-SiLU-conv, add (or scale and shift by) the embedding,
    norm-SiLU-conv, plus a skip connection. `up` / `down` change the resolution inside the block (BigGAN)."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.up, self.down = up, down
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`size`: the wanted (H', W') of an `up` block."""
        return run(lambda x, emb: self._forward(x, emb, size), x, emb, use_checkpoint=self.use_checkpoint)

    def _resample(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.up:
            return F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x

    def _forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None) -> Tensor:
        # The activations in the lists only hold the official numbering: they are part of the norms.
        norm, _, conv = self.in_layers
        h = conv(self._resample(norm(x, silu=True), size))
        x = self._resample(x, size)
        emb = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        h = norm(h, silu=True, film=emb) if self.use_scale_shift_norm else norm(h, silu=True, shift=emb)
        h = conv(dropout(h))
        return self._skip(x) + h

    def _skip(self, x: Tensor) -> Tensor:
        if isinstance(self.skip_connection, nn.Conv2d):
            return from_tokens(pointwise(to_tokens(x), self.skip_connection), x)
        return x


class AttentionBlock(nn.Module):
    """(B, C, H, W) -> same: self-attention over all positions with a residual (Ho et al. 2020, App. B).

    `new_order`: the rows of the qkv weight are [all q, all k, all v]; otherwise [q, k, v] for each head in turn.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool = False, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return run(self._forward, x, use_checkpoint=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = pointwise(to_tokens(self.norm(x)), self.qkv)
        if self.new_order:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        else:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(3)
        h = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return x + from_tokens(pointwise(h.transpose(1, 2).flatten(2), self.proj_out), x)


class CrossAttention(nn.Module):
    """(B, N, C), context (B, L, D) -> (B, N, C): softmax(q k^T / sqrt(d)) v (Rombach et al. 2022, sec. 3.3).

    Without a context the tokens attend to themselves. `mask` (B, L) is True where the context may be seen.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None, heads: int, head_width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if context is None and self.to_k.in_features == self.to_q.in_features:
            # One product for all three reads x once, and sums one gradient for x instead of three.
            q, k, v = linear(x, torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])).chunk(3, dim=-1)
        else:
            context = x if context is None else context
            q, k, v = pointwise(x, self.to_q), pointwise(context, self.to_k), pointwise(context, self.to_v)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = attention(q, k, v, mask)
        projection, dropout = self.to_out
        assert isinstance(projection, nn.Linear)
        return dropout(pointwise(h.transpose(1, 2).flatten(2), projection))


class GEGLU(nn.Module):
    """(..., C) -> (..., C'): a * gelu(b) with [a, b] = W x + c (Shazeer 2020)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        # Two products with halves of the weight: contiguous results, which the activation wants.
        bias, gate_bias = self.proj.bias.chunk(2)
        weight, gate_weight = self.proj.weight.chunk(2)
        return linear(x, weight, bias) * F.gelu(linear(x, gate_weight, gate_bias))


class FeedForward(nn.Module):
    """(..., C) -> (..., C): gated two-layer network, four times as wide inside."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, dropout, projection = self.net
        assert isinstance(projection, nn.Linear)
        return pointwise(dropout(gate(x)), projection)


class BasicTransformerBlock(nn.Module):
    """(B, N, C), (B, L, D) -> (B, N, C): self-attention, attention to the context, feed-forward; each pre-norm with a
    residual. `self_attention=False` lets the first attention read the context too (x4 upscaler of SD 2)."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        context_dim: int | None,
        dropout: float = 0.0,
        self_attention: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.use_checkpoint = use_checkpoint
        self.attn1 = CrossAttention(width, None if self_attention else context_dim, heads, head_width, dropout)
        self.ff = FeedForward(width, dropout)
        self.attn2 = CrossAttention(width, context_dim, heads, head_width, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return run(self._forward, x, context, mask, use_checkpoint=self.use_checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + (self.attn1(self.norm1(x)) if self.self_attention else self.attn1(self.norm1(x), context, mask))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B, C, H, W), (B, L, D) -> (B, C, H, W): norm, projection, transformer blocks over the positions, projection,
    residual (Rombach et al. 2022, App. E.2.1). Its GroupNorm has eps 1e-6, unlike the rest of the U-Net.

    `use_linear`: store both projections as linear layers (SD 2) instead of 1x1 convolutions; the numbers are the same.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_linear: bool = False,
        self_attention: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if use_linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, head_width, context_dim, dropout, self_attention, use_checkpoint)
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(inner, channels) if use_linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        tokens = pointwise(to_tokens(self.norm(x)), self.proj_in)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return x + from_tokens(pointwise(tokens, self.proj_out), x)
