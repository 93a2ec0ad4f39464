"""The time-conditional U-Net of the paper (Rombach et al. 2022, App. E.2), also that of Stable Diffusion 1 and 2.

The names of parameters are the official ones (`input_blocks.0.0.weight`, ...): official weights load with strict=True.
Names of options are the official ones too, so that a published config can be compared line by line.

Shapes: B batch, C channels, H W latent size, L context tokens, D context width, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.networks.blocks import (
    AttentionBlock,
    CrossAttention,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    TargetTime,
    Upsample,
    timestep_embedding,
    zero_module,
)
from darkroom.networks.slots import Slots


@dataclass
class UNetConfig:
    """Sizes and options of `UNet`.

    in_channels:            channels of the latent plus those of the `concat` slot
    out_channels:           channels of the prediction
    model_channels:         width of the first level; level i has model_channels * channel_mult[i]
    num_res_blocks:         residual blocks per level, one number or one per level
    attention_resolutions:  downsampling factors (1, 2, 4, ...) whose levels have attention; the middle always has it
    num_heads:              attention heads; without it and without num_head_channels as many as have 32 channels
    num_head_channels:      channels per head; wins over num_heads
    num_heads_upsample:     another number of heads in the decoder half; only for plain attention and num_heads
    use_spatial_transformer: transformer blocks with cross-attention to the `context` slot instead of plain attention
    transformer_depth:      transformer blocks per spatial transformer, one number or one per level
    context_dim:            width of the context; None: the second attention is self-attention too
    num_classes:            number of classes of the `label` slot (the null class counts), or how the `vector` slot
                            is embedded: "sequential" (two layers from adm_in_channels) or "continuous" (one number)
    adm_in_channels:        width of the `vector` slot
    use_linear_in_transformer: SD 2 stores the transformer's projections as linear layers
    use_scale_shift_norm:   the embedding scales and shifts the second norm of a ResBlock instead of being added
    resblock_updown:        change resolution in residual blocks instead of single convolutions
    conv_resample:          with a convolution, or by plain averaging and repeating
    use_new_attention_order: order of rows in the weights of plain attention; see AttentionBlock
    legacy:                 the official switch for how head widths follow; False in Stable Diffusion
    disable_self_attentions: per level: the first attention reads the context too (x4 upscaler of SD 2)
    use_checkpoint:         compute activations twice to save memory in training
    position_embedding:     tell every place where it lies in the picture (ours; off in the official models). Without it
                            a place is known only by its distance to zero padding, and small networks are slow to learn
                            what a caption says about left and right
    target_time:            read the optional target time of one-step objectives (ours; its weights start at 0)
    """

    kind: Literal["unet"] = "unet"
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 2
    attention_resolutions: tuple[int, ...] = (2, 4)
    num_heads: int | None = None
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    context_dim: int | None = None
    num_classes: int | str | None = None
    adm_in_channels: int | None = None
    use_linear_in_transformer: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    use_new_attention_order: bool = False
    legacy: bool = True
    disable_self_attentions: tuple[bool, ...] | None = None
    disable_middle_self_attn: bool = False
    dropout: float = 0.0
    use_checkpoint: bool = False
    position_embedding: bool = False
    target_time: bool = False

    def __post_init__(self) -> None:
        self.channel_mult = tuple(self.channel_mult)
        self.attention_resolutions = tuple(self.attention_resolutions)
        levels = len(self.channel_mult)
        # Official configs write "not given" as -1.
        for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
            if getattr(self, name) == -1:
                setattr(self, name, None)
        for name in ("num_res_blocks", "transformer_depth", "disable_self_attentions"):
            value = getattr(self, name)
            if value is None or isinstance(value, int):
                continue
            setattr(self, name, tuple(value))
            if len(value) != levels:
                raise DarkroomError(
                    f"unet: {name} has {len(value)} entries for {levels} levels of channel_mult; give one per level"
                )
        if self.context_dim is not None and not self.use_spatial_transformer:
            raise DarkroomError("unet: context_dim is set but nothing reads it; set use_spatial_transformer: true")
        if isinstance(self.num_classes, str) and self.num_classes not in ("sequential", "continuous"):
            raise DarkroomError(
                f"unet: num_classes is {self.num_classes!r}; use a number, 'sequential', 'continuous' or nothing"
            )
        for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DarkroomError(f"unet: {name} is {getattr(self, name)}; give at least 1, or nothing")
        if not 0 <= self.dropout < 1:
            raise DarkroomError(f"unet: dropout is {self.dropout}; give a share from 0 to below 1")
        if not self.channel_mult or self.model_channels < 1:
            raise DarkroomError("unet: model_channels and channel_mult must describe at least one level of one channel")

    @property
    def size_multiple(self) -> int:
        """Sides of the latent that are multiples of this are halved evenly by every level."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def emb_channels(self) -> int:
        """E, the width of the embedding of time, label and vector."""
        return 4 * self.model_channels

    def res_blocks(self, level: int) -> int:
        return self.num_res_blocks if isinstance(self.num_res_blocks, int) else self.num_res_blocks[level]

    def depth(self, level: int) -> int:
        return self.transformer_depth if isinstance(self.transformer_depth, int) else self.transformer_depth[level]

    def self_attention(self, level: int) -> bool:
        return self.disable_self_attentions is None or not self.disable_self_attentions[level]

    def heads(self, channels: int, decoder: bool) -> tuple[int, int]:
        """Number and width of the heads at a level, by the rules of the official code."""
        upsample = self.num_heads_upsample if decoder and self.legacy and not self.use_spatial_transformer else None
        if self.num_head_channels is not None or self.num_heads is None:
            width = self.num_head_channels or min(32, channels)
            number = channels // width
        else:
            number = upsample or self.num_heads
            width = channels // number
        if number < 1 or width < 1 or number * width != channels:
            raise DarkroomError(
                f"unet: {channels} channels cannot be split into heads (num_heads={self.num_heads}, "
                f"num_head_channels={self.num_head_channels}); choose a divisor of {channels}"
            )
        return number, width


class Stage(nn.ModuleList):
    """Layers in a row, each given what it reads."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


POSITION_OCTAVES = 3


def position_features(
    height: int, width: int, octaves: int = POSITION_OCTAVES, device: torch.device | None = None
) -> Tensor:
    """(1, 4 * octaves, H, W) float32: sine and cosine of the centre of each place along both axes, in periods of 4, 2,
    1, ... picture sides. Relative to the picture, so that "left" means the same at every size."""
    rows, columns = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n - 0.5 for n in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [2 ** (k - 1) * math.pi * axis for k in range(octaves) for axis in (y, x)]
    return torch.stack([f(a) for a in angles for f in (torch.sin, torch.cos)])[None]


def embedding_mlp(width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))


def res_block(
    c: UNetConfig, channels: int, out_channels: int | None = None, up: bool = False, down: bool = False
) -> ResBlock:
    return ResBlock(
        channels, c.emb_channels, c.dropout, out_channels, c.use_scale_shift_norm, up, down, c.use_checkpoint
    )


def attention_block(
    c: UNetConfig, channels: int, level: int, self_attention: bool, decoder: bool = False
) -> AttentionBlock | SpatialTransformer:
    heads, head_width = c.heads(channels, decoder)
    if not c.use_spatial_transformer:
        return AttentionBlock(channels, heads, c.use_new_attention_order, c.use_checkpoint)
    return SpatialTransformer(
        channels,
        heads,
        head_width,
        c.depth(level),
        c.context_dim,
        use_linear=c.use_linear_in_transformer,
        self_attention=self_attention,
        use_checkpoint=c.use_checkpoint,
    )


def append_encoder(stages: nn.ModuleList, c: UNetConfig) -> list[int]:
    """Append the encoder half to its first convolution; returns the channels after each stage that was appended."""
    widths: list[int] = []
    channels, levels = c.model_channels, len(c.channel_mult)
    for level, mult in enumerate(c.channel_mult):
        for _ in range(c.res_blocks(level)):
            stage = Stage([res_block(c, channels, mult * c.model_channels)])
            channels = mult * c.model_channels
            if 2**level in c.attention_resolutions:
                stage.append(attention_block(c, channels, level, c.self_attention(level)))
            stages.append(stage)
            widths.append(channels)
        if level < levels - 1:
            halve = res_block(c, channels, down=True) if c.resblock_updown else Downsample(channels, c.conv_resample)
            stages.append(Stage([halve]))
            widths.append(channels)
    return widths


def middle_block(c: UNetConfig, channels: int) -> Stage:
    last = len(c.channel_mult) - 1
    # The attention first: the order in which weights are drawn.
    attention = attention_block(c, channels, last, not c.disable_middle_self_attn)
    return Stage([res_block(c, channels), attention, res_block(c, channels)])


class UNet(nn.Module):
    """`network(x, time, conditioning) -> raw prediction`, (B, C_in, H, W) -> (B, C_out, H, W).

    Slots: `context` and `context_mask` for the spatial transformers; `concat` is joined to x (or x carries all channels
    already); `label` and `vector` are embedded and added to the time embedding.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.num_classes == "sequential" and c.adm_in_channels is None:
            raise DarkroomError("unet: num_classes 'sequential' needs adm_in_channels, the width of the vector")
        width = c.model_channels
        emb = c.emb_channels
        self.time_embed = embedding_mlp(width, emb)
        self.target_time_embed = TargetTime(emb, width) if c.target_time else None
        # One name for either kind in the official code; `vector_emb` is ours, for a label and a vector at once.
        self.label_emb: nn.Module | None = None
        self.vector_emb: nn.Module | None = None
        if c.num_classes == "continuous":
            self.label_emb = nn.Linear(1, emb)
        elif c.num_classes == "sequential":
            assert c.adm_in_channels is not None
            self.label_emb = nn.Sequential(embedding_mlp(c.adm_in_channels, emb))
        elif c.num_classes is not None:
            self.label_emb = nn.Embedding(int(c.num_classes), emb)
        if c.adm_in_channels is not None and c.num_classes != "sequential":
            self.vector_emb = embedding_mlp(c.adm_in_channels, emb)

        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(c.in_channels, width, 3, padding=1)])])
        # The only parameter beyond the official ones.
        self.position_embed = nn.Conv2d(4 * POSITION_OCTAVES, width, 1, bias=False) if c.position_embedding else None
        skips = [width, *append_encoder(self.input_blocks, c)]
        channels = skips[-1]
        self.middle_block = middle_block(c, channels)

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for i in range(c.res_blocks(level) + 1):
                stage = Stage([res_block(c, channels + skips.pop(), mult * width)])
                channels = mult * width
                if 2**level in c.attention_resolutions:
                    stage.append(attention_block(c, channels, level, c.self_attention(level), decoder=True))
                if level and i == c.res_blocks(level):
                    up = res_block(c, channels, up=True) if c.resblock_updown else Upsample(channels, c.conv_resample)
                    stage.append(up)
                self.output_blocks.append(stage)

        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), zero_module(nn.Conv2d(channels, c.out_channels, 3, padding=1))
        )
        # Without a context each attention reads its own input, which only works where the widths agree.
        attentions = [m for m in self.modules() if isinstance(m, CrossAttention)]
        self.needs_context = any(m.to_k.in_features != m.to_q.in_features for m in attentions)

    def forward(
        self, x: Tensor, time: Tensor, conditioning: Slots | None = None, target_time: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), time (B,) in the network's own units (0..T-1 for a table of T steps), any real number.

        The result has the dtype of x whatever the precision of the weights.
        """
        dtype = next(self.parameters()).dtype
        context = mask = None
        h = x
        if conditioning is not None:
            if conditioning.concat is not None:
                h = torch.cat([x, conditioning.concat.to(x.dtype)], dim=1)
            context, mask = conditioning.context, conditioning.context_mask
        self._check(h, context)
        if context is not None:
            context = context.to(dtype)
        emb = self._embed(time, conditioning, dtype, target_time)

        # Layers keep this layout from here on.
        h = h.to(dtype).contiguous(memory_format=torch.channels_last)
        skips = []
        for index, stage in enumerate(self.input_blocks):
            h = stage(h, emb, context, mask)
            if index == 0 and self.position_embed is not None:
                h = h + self.position_embed(position_features(h.shape[2], h.shape[3], device=h.device).to(h.dtype))
            skips.append(h)
        h = self.middle_block(h, emb, context, mask)
        # Each stage also learns the size of the skip that its result will be joined to: odd sizes survive that way.
        sizes = [(s.shape[2], s.shape[3]) for s in reversed(skips)]
        following: list[tuple[int, int] | None] = [*(b for _, b in pairwise(sizes)), None]
        for stage, size in zip(self.output_blocks, following, strict=True):
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context, mask, size)
        norm, _, conv = self.out
        return conv(norm(h, silu=True)).to(x.dtype)

    def _embed(
        self, time: Tensor, conditioning: Slots | None, dtype: torch.dtype, target_time: Tensor | None
    ) -> Tensor:
        """(B,) times and the label and vector slots -> (B, E)."""
        label = None if conditioning is None else conditioning.label
        vector = None if conditioning is None else conditioning.vector
        takes_label = isinstance(self.config.num_classes, int)
        vector_emb = self.vector_emb if takes_label or self.label_emb is None else self.label_emb
        for name, value, taken in (("label", label, takes_label), ("vector", vector, vector_emb is not None)):
            if (value is not None) != taken:
                verb = "needs" if taken else "does not read"
                cure = "num_classes" if name == "label" else "adm_in_channels"
                raise DarkroomError(f"unet: this network {verb} the conditioning slot {name!r}; see its option {cure}")
        emb = self.time_embed(timestep_embedding(time, self.config.model_channels).to(dtype))
        if self.target_time_embed is not None:
            emb = emb + self.target_time_embed(time, target_time)
        elif target_time is not None:
            raise DarkroomError("unet: this network does not read a target time; see its option target_time")
        if label is not None:
            assert self.label_emb is not None
            emb = emb + self.label_emb(label)
        if vector is not None:
            assert vector_emb is not None
            emb = emb + vector_emb(vector.to(dtype))
        return emb

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        c = self.config
        if x.shape[1] != c.in_channels:
            raise DarkroomError(
                f"unet: the input has {x.shape[1]} channels with the concat slot joined, but this network takes "
                f"{c.in_channels}; give the right latent and concat maps"
            )
        if context is not None and not c.use_spatial_transformer:
            raise DarkroomError("unet: this network has no cross-attention; set use_spatial_transformer for a context")
        if context is None and self.needs_context:
            raise DarkroomError("unet: this network needs a context (B, L, D); give the conditioning slot 'context'")
