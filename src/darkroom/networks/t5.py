"""The encoder of T5, whose version 1.1 XXL is the third text tower of SD 3.

Source: Raffel et al. 2020, sec. 2.1; Shazeer 2020 for the gated feed-forward of version 1.1. Pre-norm transformer with
RMS norms, no biases, attention without the factor 1/sqrt(d), and positions that are learned numbers added to the
scores: one per head and bucket of distances, shared by all layers. Parameter names are those of the transformers
library, which released files use (`encoder.block.0.layer.0.SelfAttention.q.weight`, ...).

Shapes: B batch, L tokens, D width, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import linear
from darkroom.networks.clip import SpecialIds, TextFeatures, activation


@dataclass
class T5EncoderConfig:
    """Sizes of `T5Encoder`, under the names of `T5Config` in the transformers library; the defaults are those of XXL.

    d_kv:              d, the width of a head
    feed_forward_proj: "relu" in version 1.0, "gated-gelu" in version 1.1
    relative_attention_num_buckets:  buckets of distances, half of them for each direction
    relative_attention_max_distance: distances beyond share the last bucket
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"


def distance_buckets(length: int, buckets: int, longest: int) -> Tensor:
    """(L, L) int64: the bucket of the distance from token i (row) to token j (column).

    Half of the buckets are for tokens behind, half for tokens ahead. Of each half, the first half holds one distance
    each, the rest grows logarithmically up to `longest` (Raffel et al. 2020, sec. 2.1).
    """
    position = torch.arange(length)
    distance = position[None] - position[:, None]
    half = buckets // 2
    exact = half // 2
    ahead = (distance > 0) * half
    distance = distance.abs()
    # Distance 0 gives log(0), which the `where` leaves out.
    growth = torch.log(distance.float() / exact) / math.log(longest / exact) * (half - exact)
    wide = (exact + growth.clamp(min=0).long()).clamp(max=half - 1)
    return ahead + torch.where(distance < exact, distance, wide)


class RMSNorm(nn.Module):
    """(..., D) -> (..., D): x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(
            x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(-1, keepdim=True) + self.eps
        )
        return self.weight * (x * scale).to(self.weight.dtype)


class _SelfAttention(nn.Module):
    """(B, L, D) -> (B, L, D): softmax(q k^T + bias) v; the first layer holds the table of the bias."""

    def __init__(self, config: T5EncoderConfig, has_bias: bool) -> None:
        super().__init__()
        c = config
        self.heads = c.num_heads
        inner = c.num_heads * c.d_kv
        self.q = nn.Linear(c.d_model, inner, bias=False)
        self.k = nn.Linear(c.d_model, inner, bias=False)
        self.v = nn.Linear(c.d_model, inner, bias=False)
        self.o = nn.Linear(inner, c.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            linear(x, layer.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return linear(h.transpose(1, 2).flatten(2), self.o.weight)


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5EncoderConfig, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, has_bias)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _Dense(nn.Module):
    """(B, L, D) -> (B, L, D): wo(act(wi(x))), or gated: wo(act(wi_0(x)) * wi_1(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        kind = config.feed_forward_proj
        # "gated-gelu" has always meant the tanh approximation.
        self.act = activation("gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"))
        self.inner = ("wi_0", "wi_1") if kind.startswith("gated-") else ("wi",)
        for name in self.inner:
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, *gate = (linear(x, self.get_parameter(f"{name}.weight")) for name in self.inner)
        h = self.act(first)
        return linear(h * gate[0] if gate else h, self.wo.weight)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = _Dense(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nn.Module):
    def __init__(self, config: T5EncoderConfig, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, has_bias), _FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class _Stack(nn.Module):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList([_Block(config, has_bias=i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """Token ids (B, L) of any length -> `TextFeatures` with context (B, L, D) and nothing pooled."""

    special_ids = SpecialIds(None, 1, 0)

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        if config.num_layers < 1:
            raise DarkroomError(f"text tower: num_layers is {config.num_layers}; T5 needs at least 1")
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)
        self._initialise()
        self.register_load_state_dict_pre_hook(_one_token_table)

    @torch.no_grad()
    def _initialise(self) -> None:
        """As released: q is small because the scores are not divided by sqrt(d)."""
        c = self.config
        inner, narrow = c.num_heads * c.d_kv, c.d_model**-0.5
        std = {"q": (c.d_model * c.d_kv) ** -0.5, "o": inner**-0.5, "wo": c.d_ff**-0.5, "shared": 1.0}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std.get(name.split(".")[-2], narrow))

    @property
    def width(self) -> int:
        return self.config.d_model

    def forward(self, ids: Tensor, mask: Tensor | None = None, skip_layers: int = 0) -> TextFeatures:
        """mask (B, L) is True at real tokens: then padding changes nothing there. SD 3 reads padding like words.

        skip_layers: blocks left out at the end; the final norm follows in any case.
        """
        c, blocks = self.config, self.encoder.block
        if not 0 <= skip_layers < len(blocks):
            raise DarkroomError(f"text tower: skip_layers is {skip_layers}; it has {len(blocks)} layers")
        buckets = distance_buckets(
            ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        ).to(ids.device)
        table: Any = blocks[0].layer[0]  # type: ignore[index]
        bias = table.SelfAttention.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # (1, h, L, L)
        if mask is not None:
            bias = bias.masked_fill(~mask.to(ids.device, torch.bool)[:, None, None], torch.finfo(bias.dtype).min)
        x = self.shared(ids)
        for block in blocks[: len(blocks) - skip_layers]:
            x = block(x, bias)
        return TextFeatures(self.encoder.final_layer_norm(x), None)

    def unused(self, skip_layers: int = 0) -> list[nn.Parameter]:
        """Parameters that `forward` with this option does not touch."""
        blocks = self.encoder.block
        return [p for block in blocks[len(blocks) - skip_layers :] for p in block.parameters()]


def _one_token_table(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The token table has two names, of which files hold one or both."""
    table = state.pop(f"{prefix}encoder.embed_tokens.weight", None)
    if table is not None:
        state.setdefault(f"{prefix}shared.weight", table)


# Version 1.1; SD 3 uses XXL.
T5_SIZES: Mapping[str, T5EncoderConfig] = {
    "t5-v1_1-small": T5EncoderConfig(d_model=512, d_ff=1024, num_layers=8, num_heads=6),
    "t5-v1_1-base": T5EncoderConfig(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "t5-v1_1-large": T5EncoderConfig(d_model=1024, d_ff=2816, num_layers=24, num_heads=16),
    "t5-v1_1-xl": T5EncoderConfig(d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    "t5-v1_1-xxl": T5EncoderConfig(),
}
