"""Our U-Net with plain attention <-> diffusers' `UNet2DModel`, the network of its unconditional and class-conditional
latent diffusion: the names of all tensors and the config, both ways.

Theirs keeps queries, keys and values apart, ours packs them, head by head in the official order; the numbers are the
same. What one side has and the other has not is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_unet import ENDS, RESIDUAL, SHORTCUT, group_counts
from darkroom.interop.tensor_source import Place, Table, same
from darkroom.networks.unet import UNetConfig

CLASS_NAME = "UNet2DModel"
BLOCKS = {
    # attention, resampling in residual blocks: types on the way down and up
    (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
    (False, False): ("DownBlock2D", "UpBlock2D"),
    (True, True): ("AttnDownBlock2D", "AttnUpBlock2D"),
    (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
# Entries without an option of ours: the value under which both are the same network.
NEUTRAL: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
UNREAD = ("sample_size", "num_train_timesteps")
# Entries that are translated, with diffusers' defaults.
TRANSLATED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}


def to_unet2d_config(config: UNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """The arguments of `UNet2DModel` for the same network; JSON-ready."""
    c = config
    width = _head_width(c)
    groups = group_counts(c)
    for is_lacking, what in (
        (c.use_spatial_transformer, "spatial transformers (UNet2DConditionModel has)"),
        (c.channel_mult[0] != 1, f"first level of {c.channel_mult[0]} times model_channels"),
        (not isinstance(c.num_res_blocks, int), "numbers of blocks that differ between levels"),
        (not c.conv_resample and not c.resblock_updown, "resampling without a convolution"),
        (c.adm_in_channels is not None or isinstance(c.num_classes, str), "vector as condition"),
        (c.position_embedding, "position_embedding"),
        (c.target_time, "target_time"),
        (width is None, "heads of several widths"),
        (len(groups) > 1, f"norms of {' and '.join(map(str, sorted(groups)))} groups in one network"),
    ):
        if is_lacking:
            raise DarkroomError(f"{CLASS_NAME} of diffusers has no {what}; this network cannot be exchanged with it")
    kinds = [BLOCKS[2**level in c.attention_resolutions, c.resblock_updown] for level in range(len(c.channel_mult))]
    resampling = "resnet" if c.resblock_updown else "conv"
    return {
        "_class_name": CLASS_NAME,
        **NEUTRAL,
        "sample_size": sample_size,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        "block_out_channels": [c.model_channels * mult for mult in c.channel_mult],
        "layers_per_block": c.num_res_blocks,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": c.dropout,
        "attention_head_dim": width,
        "norm_num_groups": next(iter(groups)),
        # Said only where theirs would leave the middle's norm out.
        "attn_norm_num_groups": next(iter(groups)) if c.use_scale_shift_norm else None,
        "resnet_time_scale_shift": "scale_shift" if c.use_scale_shift_norm else "default",
        "num_class_embeds": c.num_classes,
    }


def _head_width(c: UNetConfig) -> int | None:
    """The same everywhere, or None. The middle has attention in any case."""
    levels = [level for level in range(len(c.channel_mult)) if 2**level in c.attention_resolutions]
    widths = {c.model_channels * c.channel_mult[level] for level in (*levels, -1)}
    found = {c.heads(width, decoder)[1] for width in widths for decoder in (False, True)}
    return found.pop() if len(found) == 1 else None


def from_unet2d_config(config: Mapping[str, Any]) -> UNetConfig:
    """Our config for theirs; entries that are left out have diffusers' defaults, what we cannot honour is refused."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {*NEUTRAL, *UNREAD, *TRANSLATED}
    for key, value in given.items():
        if key not in known:
            raise DarkroomError(f'diffusers {CLASS_NAME}: unknown config entry "{key}"{nearest(key, known)}')
        if key in NEUTRAL and value != NEUTRAL[key]:
            raise DarkroomError(
                f'diffusers {CLASS_NAME}: "{key}" is {value!r}; only {NEUTRAL[key]!r} has an equivalent here'
            )
    get = {**TRANSLATED, **given}
    channels = list(get["block_out_channels"])
    down, up = list(get["down_block_types"]), list(get["up_block_types"])
    resampling = {get["downsample_type"], get["upsample_type"]}
    in_blocks = resampling == {"resnet"}
    kinds = {pair[0]: (attention, pair[1]) for (attention, own), pair in BLOCKS.items() if own == in_blocks}
    mirrored = [kinds[name][1] for name in down if name in kinds]
    if len(resampling) > 1 or not resampling <= {"conv", "resnet"} or len(down) != len(channels):
        raise DarkroomError(f"diffusers {CLASS_NAME}: resampling by {sorted(resampling)} has no equivalent here")
    if mirrored != list(reversed(up)) or len(mirrored) != len(down):
        raise DarkroomError(f"diffusers {CLASS_NAME}: blocks of the types {down} and {up} have no equivalent here")
    if any(width % channels[0] for width in channels):
        raise DarkroomError(f'diffusers {CLASS_NAME}: "block_out_channels" {channels} are no multiples of the first')
    head = get["attention_head_dim"]
    result = UNetConfig(
        in_channels=get["in_channels"],
        out_channels=get["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(width // channels[0] for width in channels),
        num_res_blocks=get["layers_per_block"],
        attention_resolutions=tuple(2**level for level, name in enumerate(down) if kinds[name][0]),
        num_heads=1 if head is None else None,
        num_head_channels=head,
        num_classes=get["num_class_embeds"],
        use_scale_shift_norm=get["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=in_blocks,
        dropout=get["dropout"],
    )
    in_middle = get["attn_norm_num_groups"] or (None if result.use_scale_shift_norm else get["norm_num_groups"])
    if in_middle != get["norm_num_groups"]:
        raise DarkroomError(
            f'diffusers {CLASS_NAME}: "attn_norm_num_groups" is {get["attn_norm_num_groups"]!r}; only the norm of the '
            "other blocks has an equivalent here"
        )
    if group_counts(result) != {get["norm_num_groups"]}:
        raise DarkroomError(
            f'diffusers {CLASS_NAME}: "norm_num_groups" is {get["norm_num_groups"]!r}; norms of these widths have '
            f"{sorted(group_counts(result))} groups here"
        )
    return result


# ------------------------------------------------------------------------------------------------------------- weights


def unet2d_table(config: UNetConfig) -> Table:
    """Our names -> theirs; follows the constructor of `UNet`."""
    return dict(_rows(config))


def _rows(c: UNetConfig) -> Iterator[tuple[str, Place]]:
    for ours, theirs in ENDS.items():
        yield from _both(ours, theirs)
    if c.num_classes is not None:
        yield "label_emb.weight", same("class_embedding.weight")
    levels, width = len(c.channel_mult), c.model_channels
    block, channels, skips = 1, width, [width]
    for level, mult in enumerate(c.channel_mult):
        theirs = f"down_blocks.{level}"
        for i in range(c.res_blocks(level)):
            yield from _residual(f"input_blocks.{block}.0", f"{theirs}.resnets.{i}", channels != mult * width)
            channels = mult * width
            if 2**level in c.attention_resolutions:
                yield from _attention(c, f"input_blocks.{block}.1", f"{theirs}.attentions.{i}", channels, False)
            block += 1
            skips.append(channels)
        if level < levels - 1:
            yield from _resampled(c, f"input_blocks.{block}.0", f"{theirs}.downsamplers.0", ".op")
            block += 1
            skips.append(channels)
    yield from _residual("middle_block.0", "mid_block.resnets.0", False)
    yield from _attention(c, "middle_block.1", "mid_block.attentions.0", channels, False)
    yield from _residual("middle_block.2", "mid_block.resnets.1", False)
    block = 0
    for level, mult in reversed(list(enumerate(c.channel_mult))):
        theirs = f"up_blocks.{levels - 1 - level}"
        for i in range(c.res_blocks(level) + 1):
            ours = f"output_blocks.{block}"
            yield from _residual(f"{ours}.0", f"{theirs}.resnets.{i}", channels + skips.pop() != mult * width)
            channels = mult * width
            if attends := 2**level in c.attention_resolutions:
                yield from _attention(c, f"{ours}.1", f"{theirs}.attentions.{i}", channels, True)
            if level and i == c.res_blocks(level):
                yield from _resampled(c, f"{ours}.{1 + attends}", f"{theirs}.upsamplers.0", ".conv")
            block += 1


def _both(ours: str, theirs: str) -> Iterator[tuple[str, Place]]:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", same(f"{theirs}.{name}")


def _residual(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, Place]]:
    for a, b in (RESIDUAL | SHORTCUT if shortcut else RESIDUAL).items():
        yield from _both(f"{ours}.{a}", f"{theirs}.{b}")


def _resampled(c: UNetConfig, ours: str, theirs: str, layer: str) -> Iterator[tuple[str, Place]]:
    """A residual block that changes the resolution, or a convolution that does."""
    if c.resblock_updown:
        yield from _residual(ours, theirs, False)
    else:
        yield from _both(f"{ours}{layer}", f"{theirs}.conv")


def _attention(c: UNetConfig, ours: str, theirs: str, width: int, decoder: bool) -> Iterator[tuple[str, Place]]:
    yield from _both(f"{ours}.norm", f"{theirs}.group_norm")
    heads = 1 if c.use_new_attention_order else c.heads(width, decoder)[0]
    for name, shape in (("weight", (width, width)), ("bias", (width,))):
        parts = tuple(f"{theirs}.to_{part}.{name}" for part in "qkv")
        yield f"{ours}.qkv.{name}", Place(parts, "heads", shape=shape, heads=heads)
        yield f"{ours}.proj_out.{name}", Place((f"{theirs}.to_out.0.{name}",), shape=shape)
