"""Our U-Net <-> diffusers' `UNet2DConditionModel`: the names of all tensors and the config, both ways.

Both store the same tensors in the same shapes and order of rows, so weights only change their names: a round trip is
exact to the last bit. What one side has and the other has not (plain attention, residual up- and downsampling, averaged
resampling, ...) is refused by name, never dropped.

diffusers numbers layers by level and kind (`down_blocks.1.attentions.0`), the official code in the order of execution
(`input_blocks.4.1`); the table is therefore derived from the config, in the order in which `UNet` builds its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.networks.unet import UNetConfig

CLASS_NAME = "UNet2DConditionModel"
ADDED_WIDTH = 256  # of the six embedded sizes of SDXL

# ours: theirs, inside a residual block; `skip_connection` exists only where the width changes.
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
SHORTCUT = {"skip_connection": "conv_shortcut"}
# Spatial transformers have the same names on both sides. Projections to queries, keys and values have no bias.
TRANSFORMER = ("norm", "proj_in", "proj_out")
TRANSFORMER_BLOCK = ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
WITHOUT_BIAS = tuple(f"{attention}.to_{part}" for attention in ("attn1", "attn2") for part in "qkv")
# The ends of the network.
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# Entries of a diffusers config that our network has no option for: the value under which both are the same network,
# which is also diffusers' default.
NEUTRAL: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
# Entries that say nothing about the function computed.
UNREAD = (
    "sample_size",
    "upcast_attention",
    "mid_block_only_cross_attention",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",  # of SDXL: how its pipeline embeds sizes, which here is the conditioner's matter
)
# Entries that are translated, with diffusers' defaults: its config files leave out what older versions did not know.
TRANSLATED: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
}


def to_diffusers_config(
    config: UNetConfig, sample_size: int | None = None, addition_time_embed_dim: int | None = None
) -> dict[str, Any]:
    """The arguments of `UNet2DConditionModel` for the same network; JSON-ready.

    sample_size: the latent's usual side, which pipelines read and the network does not.
    addition_time_embed_dim: makes the vector an "added condition" as in SDXL, where it is the pooled text and the
        embeddings, of this width each, of six numbers; otherwise it is a class embedding as in unCLIP.
    """
    _refuse_what_diffusers_lacks(config)
    added = _is_added(config, addition_time_embed_dim)
    levels = range(len(config.channel_mult))
    channels = [config.model_channels * mult for mult in config.channel_mult]
    attention = [_has_attention(config, level) for level in levels]
    # Where there is no attention the number of heads is not read; the middle reads the last level's.
    last = config.heads(channels[-1], decoder=False)[0]
    heads = [config.heads(channels[i], decoder=False)[0] if attention[i] else last for i in levels]
    vector = config.adm_in_channels is not None
    continuous = config.num_classes == "continuous"
    return {
        "_class_name": CLASS_NAME,
        **NEUTRAL,
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "only_cross_attention": _one_if_equal([not config.self_attention(i) for i in levels]),
        "mid_block_only_cross_attention": None if config.disable_self_attentions is None else False,
        "block_out_channels": channels,
        "layers_per_block": _one_if_equal([config.res_blocks(i) for i in levels]),
        "dropout": config.dropout,
        "norm_num_groups": next(iter(group_counts(config))),
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": _one_if_equal([config.depth(i) for i in levels]),
        # diffusers' name is a historical mistake that it keeps: this is the number of heads.
        "attention_head_dim": _one_if_equal(heads),
        "use_linear_projection": config.use_linear_in_transformer,
        "class_embed_type": "simple_projection" if continuous else "projection" if vector and not added else None,
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": addition_time_embed_dim,
        "num_class_embeds": config.num_classes if isinstance(config.num_classes, int) else None,
        "projection_class_embeddings_input_dim": 1 if continuous else config.adm_in_channels,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }


def from_diffusers_config(config: Mapping[str, Any]) -> UNetConfig:
    """Our config for a diffusers one (its arguments, or its config.json); entries that are left out have diffusers'
    defaults, entries that we cannot honour are refused by name."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise DarkroomError(f"this is the config of a diffusers {name}; a {CLASS_NAME} can be read here")
    known = {*NEUTRAL, *UNREAD, *TRANSLATED}
    for key, value in given.items():
        if key not in known:
            raise DarkroomError(f'diffusers U-Net: unknown config entry "{key}"{nearest(key, known)}')
        if key in NEUTRAL and value != NEUTRAL[key]:
            raise DarkroomError(f'diffusers U-Net: "{key}" is {value!r}; only {NEUTRAL[key]!r} has an equivalent here')
    get = {**TRANSLATED, **given}
    channels = list(get["block_out_channels"])
    count = len(channels)
    if any(width % channels[0] for width in channels):
        raise DarkroomError(
            f'diffusers U-Net: "block_out_channels" {channels} are no multiples of the first; such widths have no '
            "equivalent here"
        )
    attention = _attention_levels(list(get["down_block_types"]), list(get["up_block_types"]), count)
    cross_only = _per_level(get["only_cross_attention"], count, "only_cross_attention")
    heads = _per_level(get["attention_head_dim"], count, "attention_head_dim")
    result = UNetConfig(
        in_channels=get["in_channels"],
        out_channels=get["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(width // channels[0] for width in channels),
        num_res_blocks=_one_or_tuple(get["layers_per_block"], count, "layers_per_block"),
        attention_resolutions=tuple(2**level for level in range(count) if attention[level]),
        **_heads_option(channels, heads, [*attention[:-1], True]),
        use_spatial_transformer=True,
        transformer_depth=_one_or_tuple(get["transformer_layers_per_block"], count, "transformer_layers_per_block"),
        context_dim=_same_everywhere(get["cross_attention_dim"], count, "cross_attention_dim"),
        use_linear_in_transformer=get["use_linear_projection"],
        use_scale_shift_norm=_choice(get, "resnet_time_scale_shift", {"default": False, "scale_shift": True}),
        disable_self_attentions=tuple(cross_only) if any(cross_only) else None,
        dropout=get["dropout"],
        legacy=False,
        **_class_option(get),
    )
    _refuse_what_diffusers_lacks(result)
    groups = next(iter(group_counts(result)))
    if get["norm_num_groups"] != groups:
        raise DarkroomError(
            f'diffusers U-Net: "norm_num_groups" is {get["norm_num_groups"]!r}; norms of these widths have {groups} '
            "groups here"
        )
    return result


def key_table(config: UNetConfig, addition_time_embed_dim: int | None = None) -> dict[str, str]:
    """ours: theirs, for every tensor of the network, in the order of our layers."""
    _refuse_what_diffusers_lacks(config)
    return dict(_rows(config, _is_added(config, addition_time_embed_dim)))


def _is_added(config: UNetConfig, addition_time_embed_dim: int | None) -> bool:
    if addition_time_embed_dim is not None and config.adm_in_channels is None:
        raise DarkroomError(
            "U-Net: only a network with a vector (adm_in_channels) has an added condition; leave it out"
        )
    return addition_time_embed_dim is not None


def _rows(config: UNetConfig, added: bool) -> Iterator[tuple[str, str]]:
    """(ours, theirs) per tensor; follows the constructor of `UNet`."""
    for ours, theirs in ENDS.items():
        yield from _both(ours, theirs)
    if isinstance(config.num_classes, int):
        yield "label_emb.weight", "class_embedding.weight"
    elif config.num_classes == "continuous":
        yield from _both("label_emb", "class_embedding")
    elif config.adm_in_channels is not None:
        prefix = "label_emb.0" if config.num_classes == "sequential" else "vector_emb"
        embedding = "add_embedding" if added else "class_embedding"
        yield from _both(f"{prefix}.0", f"{embedding}.linear_1")
        yield from _both(f"{prefix}.2", f"{embedding}.linear_2")

    levels = len(config.channel_mult)
    block, channels, skips = 1, config.model_channels, [config.model_channels]
    for level, mult in enumerate(config.channel_mult):
        width = mult * config.model_channels
        for i in range(config.res_blocks(level)):
            yield from _residual(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}", channels != width)
            if _has_attention(config, level):
                yield from _transformer(
                    f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}", config.depth(level)
                )
            block, channels = block + 1, width
            skips.append(channels)
        if level < levels - 1:
            yield from _both(f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
            block += 1
            skips.append(channels)

    yield from _residual("middle_block.0", "mid_block.resnets.0", False)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", config.depth(levels - 1))
    yield from _residual("middle_block.2", "mid_block.resnets.1", False)

    block = 0
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        width, theirs = mult * config.model_channels, f"up_blocks.{levels - 1 - level}"
        for i in range(config.res_blocks(level) + 1):
            ours = f"output_blocks.{block}"
            yield from _residual(f"{ours}.0", f"{theirs}.resnets.{i}", channels + skips.pop() != width)
            channels = width
            if has_attention := _has_attention(config, level):
                yield from _transformer(f"{ours}.1", f"{theirs}.attentions.{i}", config.depth(level))
            if level and i == config.res_blocks(level):
                yield from _both(f"{ours}.{1 + has_attention}.conv", f"{theirs}.upsamplers.0.conv")
            block += 1


def _both(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", f"{theirs}.{name}"


def _residual(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    for a, b in (RESIDUAL | SHORTCUT if shortcut else RESIDUAL).items():
        yield from _both(f"{ours}.{a}", f"{theirs}.{b}")


def _transformer(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    for name in (*TRANSFORMER, *(f"transformer_blocks.{i}.{name}" for i in range(depth) for name in TRANSFORMER_BLOCK)):
        yield from _both(f"{ours}.{name}", f"{theirs}.{name}")
    for i in range(depth):
        for name in WITHOUT_BIAS:
            inner = f"transformer_blocks.{i}.{name}.weight"
            yield f"{ours}.{inner}", f"{theirs}.{inner}"


def _has_attention(config: UNetConfig, level: int) -> bool:
    return 2**level in config.attention_resolutions


def _refuse_what_diffusers_lacks(config: UNetConfig) -> None:
    c = config
    groups = group_counts(c)
    label_and_vector = c.num_classes not in (None, "sequential") and c.adm_in_channels is not None
    for is_lacking, what in (
        (not c.use_spatial_transformer, "attention without use_spatial_transformer"),
        (c.context_dim is None, "spatial transformers without a context_dim"),
        (c.channel_mult[0] != 1, f"a first level of {c.channel_mult[0]} times model_channels"),
        (c.resblock_updown, "resblock_updown"),
        (not c.conv_resample, "resampling without a convolution"),
        (c.disable_middle_self_attn, "a middle block without self-attention (disable_middle_self_attn)"),
        (c.position_embedding, "position_embedding"),
        (c.target_time, "target_time"),
        (label_and_vector, "a label and a vector at once"),
        (len(groups) > 1, f"norms of {' and '.join(map(str, sorted(groups)))} groups in one network"),
    ):
        if is_lacking:
            raise DarkroomError(f"{CLASS_NAME} of diffusers has no {what}; this network cannot be exchanged with it")


def group_counts(config: UNetConfig) -> set[int]:
    """How many groups the norms have: at most 32, a divisor of each width. diffusers has one number for all."""
    widths, skips = {config.model_channels}, [config.model_channels]
    channels = config.model_channels
    for level, mult in enumerate(config.channel_mult):
        widths.add(channels := mult * config.model_channels)
        skips += [channels] * (config.res_blocks(level) + (level < len(config.channel_mult) - 1))
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for _ in range(config.res_blocks(level) + 1):
            widths.add(channels + skips.pop())
            channels = mult * config.model_channels
    return {math.gcd(32, width) for width in widths}


def _one_if_equal(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _per_level(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count or any(isinstance(entry, (list, tuple)) for entry in value):
        raise DarkroomError(f'diffusers U-Net: "{name}" is {value!r}; one value, or one for each of {count} levels')
    return list(value)


def _one_or_tuple(value: Any, count: int, name: str) -> Any:
    one = _one_if_equal(_per_level(value, count, name))
    return tuple(one) if isinstance(one, list) else one


def _same_everywhere(value: Any, count: int, name: str) -> Any:
    one = _one_if_equal(_per_level(value, count, name))
    if isinstance(one, list):
        raise DarkroomError(f'diffusers U-Net: "{name}" is {value!r}; one value for all levels has an equivalent here')
    return one


def _choice(get: Mapping[str, Any], name: str, choices: Mapping[Any, Any]) -> Any:
    if get[name] not in choices:
        raise DarkroomError(f'diffusers U-Net: "{name}" is {get[name]!r}; known here: {", ".join(map(str, choices))}')
    return choices[get[name]]


def _attention_levels(down: list[str], up: list[str], count: int) -> list[bool]:
    """Which levels have cross-attention; both halves must agree."""
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    for name in (*down, *up):
        if name not in kinds:
            raise DarkroomError(f"diffusers U-Net: blocks of type {name!r} have no equivalent here")
    result = [kinds[name] for name in down]
    if len(result) != count or result != [kinds[name] for name in reversed(up)]:
        raise DarkroomError(
            f'diffusers U-Net: "down_block_types" {down} and "up_block_types" {up} must mirror each other and have one '
            "entry per level"
        )
    return result


def _heads_option(channels: list[int], heads: list[int], read: Iterable[bool]) -> dict[str, Any]:
    """num_heads or num_head_channels, from the heads of the levels where they are read."""
    used = [(width, number) for width, number, is_read in zip(channels, heads, read, strict=True) if is_read]
    numbers, widths = {number for _, number in used}, {width / number for width, number in used}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    if len(widths) == 1 and (width := widths.pop()).is_integer():
        return {"num_head_channels": int(width)}
    raise DarkroomError(
        f'diffusers U-Net: "attention_head_dim" {heads} for channels {channels}: neither the number nor the width of '
        "heads is the same everywhere, which has no equivalent here"
    )


def _class_option(get: Mapping[str, Any]) -> dict[str, Any]:
    """How a label or a vector is embedded."""
    kind, classes, width = (
        get[name] for name in ("class_embed_type", "num_class_embeds", "projection_class_embeddings_input_dim")
    )
    added = _choice(get, "addition_embed_type", {None: False, "text_time": True})
    if added and kind is None and classes is None and width is not None:
        return {"num_classes": "sequential", "adm_in_channels": width}
    if added:
        raise DarkroomError("diffusers U-Net: an added condition beside a class embedding has no equivalent here")
    if kind is None:
        return {"num_classes": classes}
    if kind == "projection" and width is not None:
        return {"num_classes": "sequential", "adm_in_channels": width}
    if kind == "simple_projection" and width == 1:
        return {"num_classes": "continuous"}
    raise DarkroomError(
        f'diffusers U-Net: "class_embed_type" {kind!r} with an input of width {width!r} has no equivalent here'
    )
