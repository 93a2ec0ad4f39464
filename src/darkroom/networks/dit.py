"""DiT: a transformer over patches of the latent, modulated by time and class (Peebles & Xie 2023).

The names of parameters are those of the official code (`x_embedder.proj.weight`, `blocks.0.attn.qkv.weight`, ...):
official weights load with strict=True. What the official models lack (a vector, a context, a target time) adds
parameters only where it is asked for.

Shapes: B batch, C channels, H W latent size, p patch side, N = H*W/p^2 image tokens, L context tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.networks.blocks import CrossAttention, TargetTime, run, zero_module
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
    check_slot,
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
class DiTConfig:
    """Sizes and options of `DiT`. The published sizes are in `DIT_SIZES`.

    input_size:       side of the latents that the position table is made for; other sizes and aspect ratios work too
    patch_size:       side of the square of latent pixels that becomes one token
    in_channels:      channels of the latent plus those of the `concat` slot
    out_channels:     channels of the prediction: the latent's, or twice as many where the variance is learned, as in
                      the official models (`learn_sigma` there)
    hidden_size:      width of the tokens
    depth:            number of blocks
    num_heads:        attention heads; hidden_size is a multiple
    mlp_ratio:        inner width of the feed-forward layers in units of hidden_size
    num_classes:      number of classes of the `label` slot (the null class counts: 1001 for ImageNet)
    adm_in_channels:  width of the `vector` slot, which is embedded and added to time and class
    context_dim:      width of the `context` slot; each block then attends to it between attention and feed-forward
    qk_norm:          normalise queries and keys per head: "rms", "ln" or nothing
    position_fit:     how sizes other than input_size are placed: "stretch" (over the same coordinates) or "crop" (a
                      window in the middle at unchanged spacing)
    target_time:      read the optional target time of one-step objectives
    use_checkpoint:   compute activations twice to save memory in training
    """

    kind: Literal["dit"] = "dit"
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    adm_in_channels: int | None = None
    context_dim: int | None = None
    qk_norm: QKNorm | None = None
    position_fit: PositionFit = "stretch"
    target_time: bool = False
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_widths("dit", self.hidden_size, self.num_heads, self.depth, self.patch_size)
        if self.input_size < self.patch_size or self.input_size % self.patch_size:
            raise DarkroomError(
                f"dit: input_size {self.input_size} is no multiple of patch_size {self.patch_size}; choose one that is"
            )

    @property
    def size_multiple(self) -> int:
        """Sides of the latent are multiples of this."""
        return self.patch_size


class DiTBlock(nn.Module):
    """(B, N, D), (B, D) -> (B, N, D): attention and feed-forward, both modulated and gated by the embedding
    (adaLN-zero, Peebles & Xie 2023, fig. 3); with a context (B, L, C) attention to it in between, which starts at 0."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = config
        self.use_checkpoint = c.use_checkpoint
        self.attn = SelfAttention(c.hidden_size, c.num_heads, qk_norm=c.qk_norm)
        self.cross_attn = (
            None
            if c.context_dim is None
            else CrossAttention(c.hidden_size, c.context_dim, c.num_heads, c.hidden_size // c.num_heads)
        )
        if self.cross_attn is not None:
            zero_module(self.cross_attn.to_out)
        self.mlp = Mlp(c.hidden_size, int(c.mlp_ratio * c.hidden_size))
        self.adaLN_modulation = modulation(c.hidden_size, 6)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return run(self._forward, x, emb, context, mask, use_checkpoint=self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(emb).chunk(6, dim=1)
        x = gated(x, gate, self.attn(modulate(layer_norm(x), shift, scale)))
        if self.cross_attn is not None:
            x = x + self.cross_attn(layer_norm(x), context, mask)
        return gated(x, mlp_gate, self.mlp(modulate(layer_norm(x), mlp_shift, mlp_scale)))


class DiT(nn.Module):
    """`network(x, time, conditioning) -> raw prediction`, (B, C_in, H, W) -> (B, C_out, H, W).

    Slots: `label` and `vector` are embedded and added to the time embedding; `context` and `context_mask` are attended
    to; `concat` is joined to x (or x carries all channels already).
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = c = config
        width = c.hidden_size
        self.x_embedder = PatchEmbed(c.in_channels, width, c.patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = None if c.num_classes is None else LabelEmbedder(c.num_classes, width)
        self.vector_embedder = None if c.adm_in_channels is None else VectorEmbedder(c.adm_in_channels, width)
        self.target_time_embedder = TargetTime(width, FREQUENCIES) if c.target_time else None
        side = c.input_size // c.patch_size
        self.register_buffer("pos_embed", square_table(side, side, width))
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(width, c.patch_size, c.out_channels)
        initialise(self)

    def forward(
        self, x: Tensor, time: Tensor, conditioning: Slots | None = None, target_time: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), time (B,) in the network's own units (0..T-1 for a table of T steps), any real number.

        The result has the dtype of x whatever the precision of the weights.
        """
        c, dtype = self.config, next(self.parameters()).dtype
        h = joined_input("dit", x, conditioning, c.in_channels, c.patch_size)
        size = (h.shape[2] // c.patch_size, h.shape[3] // c.patch_size)
        emb = summed_embedding("dit", self, time, target_time, conditioning, self.y_embedder, self.vector_embedder)
        context = None if conditioning is None else conditioning.context
        mask = None if conditioning is None else conditioning.context_mask
        check_slot("dit", "context", context is not None, c.context_dim is not None, "context_dim")
        if context is not None:
            context = context.to(dtype)

        side = c.input_size // c.patch_size
        positions = fitted_table(self.pos_embed, side, side, size, c.position_fit)
        # In the weights' precision, also under autocast: the sum over all blocks keeps its digits.
        tokens = self.x_embedder(h.to(dtype)) + positions.to(dtype)
        for block in self.blocks:
            tokens = block(tokens, emb, context, mask)
        return unpatchify(self.final_layer(tokens, emb), size, c.patch_size).to(x.dtype)


# Peebles & Xie 2023, table 1: ImageNet at 256x256 (latents of 32x32), 1000 classes and the null class, learned
# variance. For 512x512 the official models have input_size 64.
DIT_SIZES = {
    f"DiT-{size}/{patch}": DiTConfig(
        patch_size=patch, out_channels=8, hidden_size=width, depth=depth, num_heads=heads, num_classes=1001
    )
    for size, depth, width, heads in (("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16))
    for patch in (2, 4, 8)
}
