"""Our autoencoder <-> diffusers' `AutoencoderKL` and `VQModel`: the names of all tensors and the config, both ways.

The tensors are the same. diffusers numbers the decoder's levels in the order of execution (its block 0 is our last
level) and stores the attention's projections as matrices, where the official code has 1x1 convolutions. Values never
change, so a round trip is exact to the last bit. What one side has and the other has not is refused by name, never
dropped.

torch is not needed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from darkroom.config import nearest
from darkroom.errors import DarkroomError

CLASSES = ("AutoencoderKL", "VQModel")
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)
# The autoencoder's folder inside a pipeline's.
SUBFOLDERS = ("vae", "vqvae")
# diffusers reads it for the size from which its own tiling begins; the paper's autoencoders saw images of this side.
SAMPLE_SIZE = 256

# ours: theirs, by module. {n} is a level, a block's index...; levels of the decoder are counted from the other end.
MODULES = {
    "encoder.down.{n}.block.{n}": "encoder.down_blocks.{n}.resnets.{n}",
    "encoder.down.{n}.attn.{n}": "encoder.down_blocks.{n}.attentions.{n}",
    "encoder.down.{n}.downsample.conv": "encoder.down_blocks.{n}.downsamplers.0.conv",
    "decoder.up.{n}.block.{n}": "decoder.up_blocks.{n}.resnets.{n}",
    "decoder.up.{n}.attn.{n}": "decoder.up_blocks.{n}.attentions.{n}",
    "decoder.up.{n}.upsample.conv": "decoder.up_blocks.{n}.upsamplers.0.conv",
    **{
        f"{half}.{ours}": f"{half}.{theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in {
            "mid.block_1": "mid_block.resnets.0",
            "mid.attn_1": "mid_block.attentions.0",
            "mid.block_2": "mid_block.resnets.1",
            "norm_out": "conv_norm_out",
            "conv_in": "conv_in",
            "conv_out": "conv_out",
        }.items()
    },
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "quantize.embedding": "quantize.embedding",
}
# ours: theirs, inside a residual block and inside an attention.
RESIDUAL = {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Names of diffusers before 0.18, which most released Stable Diffusion 1 files still have.
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{n\}", r"(\d{1,4})") + r"\.(.+)")


_TO_THEIRS = [(_pattern(ours), theirs) for ours, theirs in MODULES.items()]
_TO_OURS = [(_pattern(theirs), ours) for ours, theirs in MODULES.items()]


def is_first_stage(names: Collection[str], prefix: str = "") -> bool:
    """Whether these are tensors of an autoencoder in diffusers' layout under `prefix`."""
    return any(name.startswith((f"{prefix}encoder.down_blocks.", f"{prefix}decoder.up_blocks.")) for name in names)


def to_theirs(name: str, levels: int) -> str:
    """diffusers' name of our tensor `name` in an autoencoder of so many levels."""
    found = _renamed(name, levels, _TO_THEIRS, RESIDUAL, ATTENTION)
    if found is None:
        raise DarkroomError(f"diffusers' autoencoders have no place for {name!r}")
    return found


def to_ours(name: str, levels: int) -> str | None:
    """Our name of diffusers' tensor `name` (new or old), None for a tensor that we have no place for."""
    back = {theirs: ours for ours, theirs in ATTENTION.items()}
    back |= {OLD_ATTENTION[theirs]: ours for theirs, ours in back.items() if theirs in OLD_ATTENTION}
    return _renamed(name, levels, _TO_OURS, {theirs: ours for ours, theirs in RESIDUAL.items()}, back)


def _renamed(
    name: str,
    levels: int,
    modules: list[tuple[re.Pattern[str], str]],
    residual: Mapping[str, str],
    attention: Mapping[str, str],
) -> str | None:
    for pattern, place in modules:
        if (found := pattern.fullmatch(name)) is None:
            continue
        numbers, rest = list(found.groups()[:-1]), found.groups()[-1]
        if place.startswith("decoder.up") and numbers:
            numbers[0] = str(levels - 1 - int(numbers[0]))
        for number in numbers:
            place = place.replace("{n}", number, 1)
        layer, _, kind = rest.rpartition(".")
        if ".attn" in place or ".attentions." in place:
            if layer not in attention:
                return None
            layer = attention[layer]
        elif ".block" in place or ".resnets." in place:
            layer = residual.get(layer, layer)
        return ".".join(part for part in (place, layer, kind) if part)
    return None


def count_levels(names: Collection[str], prefix: str = "") -> int:
    pattern = re.compile(rf"{re.escape(prefix)}(?:encoder\.down|decoder\.up)_blocks\.(\d{{1,4}})\.")
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which diffusers stores the tensor that it calls `name` and we hold as `shape`."""
    is_projection = ".attentions." in name and name.endswith(".weight") and len(shape) == 4
    return shape[:2] if is_projection else shape


# ------------------------------------------------------------------------------------------------------------- configs

# Entries of a config that our autoencoder has no option for: the values under which both are the same network.
NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "AutoencoderKL": {"act_fn": ("silu", "swish")},
    "VQModel": {"act_fn": ("silu", "swish"), "norm_type": ("group",), "lookup_from_codebook": (False,)},
}
# Entries that say nothing about the function computed.
UNREAD = ("sample_size", "force_upcast")
# Entries that are translated, with diffusers' defaults.
_SHARED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
TRANSLATED: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **_SHARED,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    # The class says 0.18215, but the published models have no such entry and latents of scale 1, as the paper has.
    "VQModel": {
        **_SHARED,
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "scaling_factor": 1.0,
    },
}
Number = float | list[float]


def from_diffusers_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Number, Number]:
    """(dict form of our `AutoencoderConfig`, shift, scale) for diffusers' config.json.

    Entries that are left out have diffusers' defaults, entries that we cannot honour are refused by name.
    """
    cls = config.get("_class_name")
    if cls not in CLASSES:
        raise DarkroomError(f"{where} is the config of a diffusers {cls}; {' and '.join(CLASSES)} can be read here")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    translated, neutral = TRANSLATED[cls], NEUTRAL[cls]
    known = {*neutral, *UNREAD, *translated}
    for key, value in given.items():
        if key not in known:
            raise DarkroomError(f'{where}: unknown entry "{key}"{nearest(key, known)}')
        if key in neutral and value not in neutral[key]:
            raise DarkroomError(f'{where}: "{key}" is {value!r}; only {neutral[key][0]!r} has an equivalent here')
    get = _Entries(where, {**translated, **given})

    widths = get.numbers("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise DarkroomError(
            f'{where}: "block_out_channels" {widths} are no multiples of the first; such widths have no equivalent here'
        )
    quant_conv = cls == "VQModel" or get.flag("use_quant_conv")
    if cls == "AutoencoderKL" and quant_conv != get.flag("use_post_quant_conv"):
        raise DarkroomError(
            f'{where}: "use_quant_conv" and "use_post_quant_conv" differ, which has no equivalent here: both or neither'
        )
    z_channels = get.number("latent_channels")
    embed_dim = get.number("vq_embed_dim") if get.values.get("vq_embed_dim") is not None else z_channels
    groups = get.number("norm_num_groups")
    if odd := [width for width in widths if width % groups]:
        raise DarkroomError(f'{where}: {odd[0]} channels do not divide into "norm_num_groups" {groups}')
    fields = {
        "in_channels": get.number("in_channels"),
        "out_channels": get.number("out_channels"),
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": get.number("layers_per_block"),
        "attention_levels": get.attention_levels(len(widths)),
        "bottleneck_attention": get.flag("mid_block_add_attention"),
        "z_channels": z_channels,
        "embed_dim": embed_dim,
        "codebook_size": get.number("num_vq_embeddings") if cls == "VQModel" else None,
        "quant_conv": quant_conv,
        "norm_groups": groups,
        "decoder_channels": None,
        "decoder_num_res_blocks": None,
        "decoder_grain": False,
        "output_grain": False,
    }
    return fields, *get.shift_and_scale(embed_dim)


def to_diffusers_config(config: Mapping[str, Any], shift: Number, scale: Number) -> dict[str, Any]:
    """config.json of the same autoencoder. `config` is the dict form of our `AutoencoderConfig`."""
    refuse_what_diffusers_lacks(config)
    is_vq = config["codebook_size"] is not None
    attention = [level in config["attention_levels"] for level in range(len(config["channel_mult"]))]
    result: dict[str, Any] = {
        "_class_name": "VQModel" if is_vq else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config["channels"] * mult for mult in config["channel_mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "latent_channels": config["z_channels"],
        "layers_per_block": config["num_res_blocks"],
        "mid_block_add_attention": config["bottleneck_attention"],
        "norm_num_groups": next(iter(_group_counts(config))),
        "sample_size": SAMPLE_SIZE,
    }
    if is_vq:
        if shift != 0.0 or isinstance(scale, list):
            cures = ["--shift 0 to leave yours out"] * (shift != 0.0) + ["one --scale"] * isinstance(scale, list)
            raise DarkroomError(
                f"diffusers' VQModel has no place for {latents_in_words(shift, scale)}: give {' and '.join(cures)}"
            )
        vq = {"num_vq_embeddings": config["codebook_size"], "vq_embed_dim": config["embed_dim"]}
        return result | vq | {"norm_type": "group", "lookup_from_codebook": False, "scaling_factor": scale}
    result |= {"use_quant_conv": config["quant_conv"], "use_post_quant_conv": config["quant_conv"]}
    if isinstance(shift, list) or isinstance(scale, list):
        # latent = (z - mean) * scaling_factor / std
        channels = config["embed_dim"]
        scales = scale if isinstance(scale, list) else [scale] * channels
        means = shift if isinstance(shift, list) else [shift] * channels
        return result | {"latents_mean": means, "latents_std": [1.0 / s for s in scales], "scaling_factor": 1.0}
    return result | {"scaling_factor": scale} | ({"shift_factor": shift} if shift else {})


def latents_in_words(shift: Number, scale: Number) -> str:
    many = isinstance(shift, list) or isinstance(scale, list)
    return "a shift and scale per channel" if many else f"the shift {shift:g} of the latents"


def refuse_what_diffusers_lacks(config: Mapping[str, Any]) -> None:
    groups = _group_counts(config)
    own_decoder = config.get("decoder_channels") is not None or config.get("decoder_num_res_blocks") is not None
    is_vq = config["codebook_size"] is not None
    differs = config["embed_dim"] != config["z_channels"]
    for is_lacking, what in (
        (own_decoder, "a decoder of other widths or depths than the encoder's"),
        (config.get("decoder_grain", False), "a decoder with grain (decoder_grain)"),
        (config.get("output_grain", False), "an image with grain (output_grain)"),
        (config["channel_mult"][0] != 1, f"a first level of {config['channel_mult'][0]} times the width before it"),
        (differs and not is_vq, f"{config['z_channels']} channels around {config['embed_dim']} latent ones (KL)"),
        (is_vq and not config["quant_conv"], "a VQ autoencoder without quant_conv"),
        (len(groups) > 1, f"norms of {' and '.join(map(str, sorted(groups)))} groups in one network"),
    ):
        if is_lacking:
            raise DarkroomError(f"diffusers' autoencoders have no {what}; this first stage cannot be written for it")


def _group_counts(config: Mapping[str, Any]) -> set[int]:
    """How many groups our norms have: at most `norm_groups`, a divisor of each width. diffusers has one number."""
    return {math.gcd(config["norm_groups"], config["channels"] * mult) for mult in (1, *config["channel_mult"])}


class _Entries:
    """The entries of a config.json, checked as they are taken."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, values

    def _wrong(self, key: str, wanted: str) -> DarkroomError:
        return DarkroomError(f'{self.where}: "{key}" is {self.values[key]!r}; {wanted} is needed')

    def number(self, key: str) -> int:
        value = self.values[key]
        if type(value) is not int or value < 1:
            raise self._wrong(key, "a positive whole number")
        return value

    def numbers(self, key: str) -> list[int]:
        value = self.values[key]
        if not isinstance(value, (list, tuple)) or not value or any(type(v) is not int or v < 1 for v in value):
            raise self._wrong(key, "a list of positive whole numbers")
        return list(value)

    def flag(self, key: str) -> bool:
        if not isinstance(self.values[key], bool):
            raise self._wrong(key, "true or false")
        return self.values[key]

    def attention_levels(self, count: int) -> tuple[int, ...]:
        down, up = self.values["down_block_types"], self.values["up_block_types"]
        kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        kinds |= {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
        for key in ("down_block_types", "up_block_types"):
            if not isinstance(self.values[key], (list, tuple)) or len(self.values[key]) != count:
                raise self._wrong(key, f"one entry for each of {count} levels")
            if unknown := [name for name in self.values[key] if name not in kinds]:
                raise DarkroomError(f"{self.where}: blocks of type {unknown[0]!r} have no equivalent here")
        attention = [kinds[name] for name in down]
        if attention != [kinds[name] for name in reversed(up)]:
            raise DarkroomError(
                f'{self.where}: "down_block_types" {list(down)} and "up_block_types" {list(up)} must mirror each other'
            )
        return tuple(level for level in range(count) if attention[level])

    def shift_and_scale(self, channels: int) -> tuple[Number, Number]:
        """latent = (z - shift_factor) * scaling_factor, or (z - latents_mean) * scaling_factor / latents_std."""
        shift, scale = self.values.get("shift_factor"), self.values["scaling_factor"]
        for key, value in (("shift_factor", shift), ("scaling_factor", scale)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number and not (key == "shift_factor" and value is None):
                raise self._wrong(key, "a number")
        if not scale:
            raise self._wrong("scaling_factor", "a number other than 0")
        mean, std = self._per_channel("latents_mean", channels), self._per_channel("latents_std", channels)
        if mean is None and std is None:
            return float(shift or 0.0), float(scale)
        if mean is None or std is None or shift or not all(std):
            raise DarkroomError(
                f'{self.where}: "latents_mean" and "latents_std" go together, without "shift_factor" and zeros'
            )
        return mean, [float(scale) / s for s in std]

    def _per_channel(self, key: str, channels: int) -> list[float] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != channels:
            raise self._wrong(key, f"one number for each of {channels} channels")
        if any(not isinstance(v, (int, float)) or isinstance(v, bool) or not math.isfinite(v) for v in value):
            raise self._wrong(key, "a list of numbers")
        return [float(v) for v in value]
