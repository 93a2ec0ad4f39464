"""MMDiT: a transformer in which the tokens of text and picture have weights of their own and one attention in common.

Source: Esser et al. 2024 (Stable Diffusion 3), sec. 4; SD 3.5 adds norms of queries and keys, and in its medium size a
second attention among image tokens alone. The names of parameters are those of the official code
(`joint_blocks.0.x_block.attn.qkv.weight`, ...): official weights load with strict=True.

Shapes: B batch, C channels, H W latent size, p patch side, N = H*W/p^2 image tokens, L context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darkroom.errors import DarkroomError
from darkroom.kernels import attention
from darkroom.networks.blocks import TargetTime, pointwise
from darkroom.networks.positions import PositionFit, fitted_table, square_table
from darkroom.networks.slots import Slots
from darkroom.networks.transformer import (
    FREQUENCIES,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    QKNorm,
    SelfAttention,
    TimestepEmbedder,
    VectorEmbedder,
    check_widths,
    gated,
    initialise,
    joined_input,
    layer_norm,
    modulate,
    modulation,
    summed_embedding,
    unpatchify,
)


@dataclass
class MMDiTConfig:
    """Sizes and options of `MMDiT`. The published sizes are in `MMDIT_SIZES`.

    patch_size:       side of the square of latent pixels that becomes one token
    in_channels:      channels of the latent plus those of the `concat` slot
    out_channels:     channels of the prediction
    depth:            number of joint blocks
    hidden_size:      width of the tokens; 64 * depth in the official models
    num_heads:        attention heads; as many as the depth in the official models
    mlp_ratio:        inner width of the feed-forward layers in units of hidden_size
    qkv_bias:         queries, keys and values have a bias
    qk_norm:          normalise queries and keys per head: "rms" (SD 3.5), "ln" or nothing (SD 3)
    x_block_self_attn_layers: blocks with a second attention among image tokens alone (SD 3.5 medium: the first 13)
    context_dim:      width of the `context` slot, which this network cannot do without
    adm_in_channels:  width of the `vector` slot, which is embedded and added to the time
    num_classes:      number of classes of a `label` slot (the null class counts); not in the official models
    pos_embed_max_size: side of the stored position table in tokens
    pos_embed_base_size: coordinates along a side of the table, into which its tokens are squeezed: the tokens of the
                      size first trained on. None: as many as pos_embed_max_size
    position_fit:     how sizes are placed: "crop" (a window in the middle of the table) or "stretch" (over the same
                      coordinates whatever the size)
    target_time:      read the optional target time of one-step objectives
    use_checkpoint:   compute activations twice to save memory in training
    """

    kind: Literal["mmdit"] = "mmdit"
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    depth: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: QKNorm | None = None
    x_block_self_attn_layers: tuple[int, ...] = ()
    context_dim: int | None = None
    adm_in_channels: int | None = None
    num_classes: int | None = None
    pos_embed_max_size: int = 64
    pos_embed_base_size: int | None = None
    position_fit: PositionFit = "crop"
    target_time: bool = False
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_widths("mmdit", self.hidden_size, self.num_heads, self.depth, self.patch_size)
        self.x_block_self_attn_layers = tuple(self.x_block_self_attn_layers)
        beyond = [i for i in self.x_block_self_attn_layers if not 0 <= i < self.depth]
        if beyond:
            raise DarkroomError(
                f"mmdit: x_block_self_attn_layers names block {beyond[0]}, but there are blocks 0 to {self.depth - 1}"
            )
        if self.pos_embed_max_size < 1:
            raise DarkroomError(f"mmdit: pos_embed_max_size is {self.pos_embed_max_size}; give at least 1")

    @property
    def size_multiple(self) -> int:
        """Sides of the latent are multiples of this."""
        return self.patch_size

    @property
    def position_base(self) -> float:
        return self.pos_embed_max_size if self.pos_embed_base_size is None else self.pos_embed_base_size


class Stream(nn.Module):
    """One kind of token in a joint block: its norms, projections, feed-forward and modulation (Esser et al. 2024,
    fig. 2b). `last`: nothing reads its result, so it only gives queries, keys and values. `dual`: a second attention of
    these tokens among themselves (SD 3.5 medium)."""

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False) -> None:
        super().__init__()
        c = config
        self.last = last
        self.attn = SelfAttention(c.hidden_size, c.num_heads, c.qkv_bias, c.qk_norm, last)
        self.attn2 = SelfAttention(c.hidden_size, c.num_heads, c.qkv_bias, c.qk_norm) if dual else None
        self.mlp = None if last else Mlp(c.hidden_size, int(c.mlp_ratio * c.hidden_size))
        self.adaLN_modulation = modulation(c.hidden_size, 2 if last else 9 if dual else 6)

    def finish(self, x: Tensor, h: Tensor, normed: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Tokens x, the joint attention's result h (B, heads, N, d) -> the block's result; `normed`: x after the norm,
        `parts`: shift, scale, gate of the attention, of the feed-forward, of the second attention."""
        assert self.mlp is not None
        x = gated(x, parts[2], self.attn.merge(h))
        if self.attn2 is not None:
            x = gated(x, parts[8], self.attn2(modulate(normed, parts[6], parts[7])))
        return gated(x, parts[5], self.mlp(modulate(layer_norm(x), parts[3], parts[4])))


class JointBlock(nn.Module):
    """context (B, L, D), image tokens (B, N, D), embedding (B, D) -> both; the last block's context is given back as
    it came. mask (B, L + N) or None is True where a token may be seen."""

    def __init__(self, config: MMDiTConfig, last: bool, dual: bool) -> None:
        super().__init__()
        self.use_checkpoint = config.use_checkpoint
        self.context_block = Stream(config, last=last)
        self.x_block = Stream(config, dual=dual)

    def forward(self, context: Tensor, x: Tensor, emb: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, context, x, emb, mask, use_reentrant=False)
        return self._forward(context, x, emb, mask)

    def _forward(self, context: Tensor, x: Tensor, emb: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        streams, heads = (self.context_block, self.x_block), []
        states: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        for stream, tokens in zip(streams, (context, x), strict=True):
            normed = layer_norm(tokens)
            parts = stream.adaLN_modulation(emb).unflatten(1, (-1, emb.shape[1])).unbind(1)
            heads.append(stream.attn.heads(modulate(normed, parts[0], parts[1])))
            states.append((normed, parts))
        q, k, v = (torch.cat(both, dim=2) for both in zip(*heads, strict=True))
        h = attention(q, k, v, mask)
        text, image = h.split([context.shape[1], x.shape[1]], dim=2)
        if not self.context_block.last:
            context = self.context_block.finish(context, text, *states[0])
        return context, self.x_block.finish(x, image, *states[1])


class MMDiT(nn.Module):
    """`network(x, time, conditioning) -> raw prediction`, (B, C_in, H, W) -> (B, C_out, H, W).

    Slots: `context` (needed) and `context_mask`; `vector` and `label` are embedded and added to the time embedding;
    `concat` is joined to x (or x carries all channels already).
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.context_dim is None:
            raise DarkroomError(
                "mmdit: context_dim is not set: this network needs a context (text, or a class with slot: context); "
                "without one use kind: dit"
            )
        width = c.hidden_size
        self.register_buffer("pos_embed", square_table(c.pos_embed_max_size, c.position_base, width))
        self.x_embedder = PatchEmbed(c.in_channels, width, c.patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = None if c.adm_in_channels is None else VectorEmbedder(c.adm_in_channels, width)
        self.label_embedder = None if c.num_classes is None else LabelEmbedder(c.num_classes, width)
        self.target_time_embedder = TargetTime(width, FREQUENCIES) if c.target_time else None
        self.context_embedder = nn.Linear(c.context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(c, last=i == c.depth - 1, dual=i in c.x_block_self_attn_layers) for i in range(c.depth)
        )
        self.final_layer = FinalLayer(width, c.patch_size, c.out_channels)
        initialise(self)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        conditioning: Slots | None = None,
        target_time: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """x (B, C, H, W), time (B,) in the network's own units (1000 * sigma in SD 3), any real number.

        skip_layers: blocks to leave out, which gives the weaker model of skip-layer guidance (SD 3.5).
        The result has the dtype of x whatever the precision of the weights.
        """
        c, dtype = self.config, next(self.parameters()).dtype
        h = joined_input("mmdit", x, conditioning, c.in_channels, c.patch_size)
        size = (h.shape[2] // c.patch_size, h.shape[3] // c.patch_size)
        emb = summed_embedding("mmdit", self, time, target_time, conditioning, self.label_embedder, self.y_embedder)
        if conditioning is None or conditioning.context is None:
            raise DarkroomError("mmdit: this network needs a context (B, L, D); give the conditioning slot 'context'")
        context = pointwise(conditioning.context.to(dtype), self.context_embedder)

        positions = fitted_table(self.pos_embed, c.pos_embed_max_size, c.position_base, size, c.position_fit)
        # In the weights' precision, also under autocast: the sum over all blocks keeps its digits.
        tokens = self.x_embedder(h.to(dtype)) + positions.to(dtype)
        mask = conditioning.context_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1])], dim=1)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, tokens = block(context, tokens, emb, mask)
        return unpatchify(self.final_layer(tokens, emb), size, c.patch_size).to(x.dtype)


def _stable_diffusion(depth: int, **options: object) -> MMDiTConfig:
    """Stable Diffusion 3: width and heads follow from the depth; CLIP-L, CLIP-G and T5 give 4096-wide tokens, both CLIP
    models a vector of 768 + 1280. The position table is made for latents of 128x128."""
    sizes = {"hidden_size": 64 * depth, "num_heads": depth, "context_dim": 4096, "adm_in_channels": 2048}
    table = {"pos_embed_max_size": 192, "pos_embed_base_size": 64}
    return MMDiTConfig(depth=depth, **{**sizes, **table, **options})  # type: ignore[arg-type]


MMDIT_SIZES = {
    "sd3-medium": _stable_diffusion(24),
    "sd3.5-medium": _stable_diffusion(
        24, qk_norm="rms", x_block_self_attn_layers=tuple(range(13)), pos_embed_max_size=384
    ),
    "sd3.5-large": _stable_diffusion(38, qk_norm="rms"),
}
