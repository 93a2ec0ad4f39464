"""The text tower of the paper: a BERT-style transformer over token ids, trained jointly with the U-Net.

Source: Rombach et al. 2022, App. E.2.1 (tau_theta); Devlin et al. 2019. Pre-norm encoder with learned absolute
positions. Parameter names are those of the paper's checkpoints (`transformer.token_emb.weight`, ...).

Shapes: B batch, L tokens, D width, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import attention, linear


@dataclass
class TextTransformerConfig:
    """Sizes of `TextTransformer`. The paper's text2img-large: 30522 tokens, width 1280, depth 32, length 77.

    vocabulary_size: token ids are 0 .. vocabulary_size - 1
    width:           D of the result, which is the network's context_dim
    depth:           pairs of attention and feed-forward layers
    heads, head_width: in the paper always 8 heads of 64, whatever the width
    length:          the longest sequence; shorter ones are accepted
    logits_head:     also hold the unused output layer that official checkpoints contain
    """

    vocabulary_size: int = 30522
    width: int = 512
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    length: int = 77
    dropout: float = 0.0
    logits_head: bool = False


class SelfAttention(nn.Module):
    """(B, L, D) -> (B, L, D): q, k, v without bias; `mask` (B, L) is True where a token may be seen."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = linear(x, weight).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        h = attention(q, k, v, mask)
        return linear(h.transpose(1, 2).flatten(2), self.to_out.weight, self.to_out.bias)


class FeedForward(nn.Module):
    """(B, L, D) -> (B, L, D): Linear, GELU, Linear; four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        layers: Any = self.net
        (inner, activation), dropout, outer = layers
        return linear(dropout(activation(linear(x, inner.weight, inner.bias))), outer.weight, outer.bias)


class _Layers(nn.Module):
    """[LayerNorm, block] pairs; attention and feed-forward take turns, as separate entries of `layers`."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        c = config
        self.layers = nn.ModuleList()
        for _ in range(c.depth):
            attention = SelfAttention(c.width, c.heads, c.head_width)
            self.layers.append(nn.ModuleList([nn.LayerNorm(c.width), attention]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(c.width), FeedForward(c.width, c.dropout)]))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            norm, block = layer.children()
            x = x + block(norm(x), mask)
        return x


class _Positions(nn.Module):
    """Learned absolute positions: (L, D)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, width)


class _Transformer(nn.Module):
    """(B, L) ids -> (B, L, D)."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        c = config
        self.token_emb = nn.Embedding(c.vocabulary_size, c.width)
        self.pos_emb = _Positions(c.length, c.width)
        # As large as what the layers add. With the customary 0.02 the first attention, which at the start averages over
        # all tokens, drowns the words: every token then says the same, and "left" is learned long after "red".
        for embedding in (self.token_emb, self.pos_emb.emb):
            nn.init.normal_(embedding.weight, std=1.0)
        self.attn_layers = _Layers(c)
        self.norm = nn.LayerNorm(c.width)
        if c.logits_head:
            # Never called: frozen, so that optimisers and data-parallel wrappers do not wait for its gradient.
            self.to_logits = nn.Linear(c.width, c.vocabulary_size).requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        x = self.token_emb(ids) + self.pos_emb.emb.weight[: ids.shape[1]]
        return self.norm(self.attn_layers(x, mask))


class TextTransformer(nn.Module):
    """Token ids (B, L) -> context (B, L, D).

    The official model has no padding mask: padding is read like words. With `mask` (B, L), True at real tokens, the
    result at real tokens does not depend on the padding.
    """

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)

    @property
    def width(self) -> int:
        return self.config.width

    def unused(self) -> list[nn.Parameter]:
        """Parameters that `forward` does not touch."""
        return list(self.transformer.to_logits.parameters()) if self.config.logits_head else []

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if ids.shape[1] > self.config.length:
            raise DarkroomError(
                f"text: {ids.shape[1]} tokens for a tower of length {self.config.length}; truncate the ids"
            )
        return self.transformer(ids, None if mask is None else mask.to(torch.bool))
