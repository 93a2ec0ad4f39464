"""First stages in the layout of the official code: what their tensors' names and shapes say, and what they cannot say.

Our autoencoder has the official names, so reading is a question of recognising: the config follows from the shapes, the
family from the config and from the checkpoint around it. Shift and scale of the latents are in no shape; they are facts
of the family (`RELEASED`, `CHECKPOINTS`), and a checkpoint trained with `scale_by_std` holds its scale.
torch is not needed here.

    encoder.down.{level}.block.{i}  encoder.down.{level}.attn.{i}  encoder.down.{level}.downsample  encoder.mid
    decoder.up.{level}.block.{i}    decoder.up.{level}.attn.{i}    decoder.up.{level}.upsample      decoder.mid
    quant_conv  post_quant_conv  quantize.embedding.weight          (level 0 is full size in both halves)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.errors import DarkroomError

Shapes = Mapping[str, tuple[int, ...]]

# The official code knows no other number; a norm's groups are in no tensor's shape.
NORM_GROUPS = 32

# Where the first stage may lie inside a checkpoint.
PREFIXES = ("", "first_stage_model.", "vae.")

# Tensors of official files that only training needs: start of the name, what they are.
LEFT_OUT = {
    "loss.perceptual_loss.": "perceptual network",
    "loss.discriminator.": "discriminator",
    "loss.logvar": "log-variance of the loss",
    "colorize": "colours for showing maps",
}
AVERAGED = "model_ema."  # followed by the name without its dots


@dataclass(frozen=True)
class Facts:
    """What shapes cannot tell: latent = (z - shift) * scale."""

    what: str
    scale: float
    shift: float = 0.0


SD1_SCALE, SDXL_SCALE, UPSCALER_SCALE, SD3_SCALE, SD3_SHIFT = 0.18215, 0.13025, 0.08333, 1.5305, 0.0609
SD3_LATENTS = Facts("Stable Diffusion 3", SD3_SCALE, SD3_SHIFT)

# Whole checkpoints by the start of a tensor's name, the more special first. KL models only where `kl_only`.
CHECKPOINTS: tuple[tuple[str, bool, Facts], ...] = (
    ("model.diffusion_model.joint_blocks.", False, SD3_LATENTS),
    ("conditioner.embedders.", False, Facts("Stable Diffusion XL", SDXL_SCALE)),
    ("low_scale_model.", False, Facts("Stable Diffusion x4 upscaler", UPSCALER_SCALE)),
    ("cond_stage_model.model.", False, Facts("Stable Diffusion 2", SD1_SCALE)),
    ("cond_stage_model.transformer.text_model.", False, Facts("Stable Diffusion 1", SD1_SCALE)),
    ("cond_stage_model.transformer.embeddings.", False, Facts("Stable Diffusion 1", SD1_SCALE)),
    # The paper's text2img-large; its other models have 1 or measure the scale and keep it.
    ("cond_stage_model.transformer.attn_layers.", True, Facts("latent diffusion of the paper's code", SD1_SCALE)),
    ("model.diffusion_model.", False, Facts("latent diffusion of the paper's code", 1.0)),
)


def _released(channel_mult: tuple[int, ...], channels: int, **more: Any) -> dict[str, Any]:
    defaults = {"codebook_size": None, "attention_levels": (), "bottleneck_attention": True, "quant_conv": True}
    return {"channel_mult": channel_mult, "z_channels": channels, "embed_dim": channels, **defaults, **more}


# The paper's model zoo. All have 128 channels, 2 residual blocks per level and RGB images.
RELEASED = {
    "kl-f4": _released((1, 2, 4), 3),
    "kl-f8": _released((1, 2, 4, 4), 4),
    "kl-f16": _released((1, 1, 2, 2, 4), 16, attention_levels=(4,)),
    "kl-f32": _released((1, 1, 2, 2, 4, 4), 64, attention_levels=(4, 5)),
    "vq-f4": _released((1, 2, 4), 3, codebook_size=8192),
    "vq-f4-noattn": _released((1, 2, 4), 3, codebook_size=8192, bottleneck_attention=False),
    "vq-f8": _released((1, 2, 2, 4), 4, codebook_size=16384, attention_levels=(3,)),
    "vq-f8-n256": _released((1, 2, 2, 4), 4, codebook_size=256, attention_levels=(3,)),
    "vq-f16": _released((1, 1, 2, 2, 4), 8, codebook_size=16384, attention_levels=(4,)),
    "sd3": _released((1, 2, 4, 4), 16, quant_conv=False),
}


def is_first_stage(names: Collection[str], prefix: str = "") -> bool:
    """Whether these are tensors of an autoencoder of the official code under `prefix`."""
    return any(name.startswith((f"{prefix}encoder.down.", f"{prefix}decoder.up.")) for name in names)


def released_name(config: Mapping[str, Any]) -> str | None:
    """ "kl-f8" for the config of a published autoencoder, None for any other."""
    common = {"channels": 128, "num_res_blocks": 2, "in_channels": 3, "out_channels": 3}
    for name, entries in RELEASED.items():
        if all(config[key] == value for key, value in (common | entries).items()):
            return None if _has_own_decoder(config) else name
    return None


def _has_own_decoder(config: Mapping[str, Any]) -> bool:
    return config.get("decoder_channels") is not None or config.get("decoder_num_res_blocks") is not None


def describe(config: Mapping[str, Any]) -> str:
    """ "vq-f8: VQ, f 8, 4 latent channels, 16384 codes" of the dict form of an `AutoencoderConfig`."""
    kind = "KL" if config["codebook_size"] is None else "VQ"
    text = f"{kind}, f {2 ** (len(config['channel_mult']) - 1)}, {config['embed_dim']} latent channels"
    text += "" if config["codebook_size"] is None else f", {config['codebook_size']} codes"
    name = released_name(config)
    return text if name is None else f"{name}: {text}"


def latent_facts(config: Mapping[str, Any], names: Collection[str]) -> Facts:
    """Shift and scale by family; `names` are all tensors of the file that holds the first stage."""
    for start, kl_only, facts in CHECKPOINTS:
        if any(name.startswith(start) for name in names) and not (kl_only and config["codebook_size"] is not None):
            return facts
    if released_name(config) == "sd3":
        return SD3_LATENTS
    return Facts("a bare first stage", 1.0)


# ------------------------------------------------------------------------------------------------------ from the shapes


def infer_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """The dict form of the `AutoencoderConfig` that these tensors belong to (names without prefix).

    What contradicts itself is left to the strict comparison with the config's own names and shapes; what is needed and
    absent is an error that names it. `where` begins messages.
    """
    read = _Shapes(shapes, where)
    channels = read.axis("encoder.conv_in.weight", 0)
    encoder, decoder = read.half("encoder.down"), read.half("decoder.up")
    if len(encoder.widths) != len(decoder.widths):
        raise DarkroomError(
            f"{where}: the encoder has {len(encoder.widths)} levels and the decoder {len(decoder.widths)}; "
            "tensors are missing, or this is no autoencoder of the paper's code"
        )
    mult = _multiples(encoder.widths, channels, f"{where}: encoder")
    decoder_channels = decoder.widths[0] // mult[0]
    if _multiples(decoder.widths, decoder_channels, f"{where}: decoder") != mult:
        raise DarkroomError(
            f"{where}: the encoder has widths {encoder.widths} and the decoder {decoder.widths}, which are not in "
            "proportion; this has no equivalent here"
        )
    if encoder.attention != decoder.attention:
        raise DarkroomError(
            f"{where}: attention on levels {encoder.attention} of the encoder but {decoder.attention} of the decoder "
            "has no equivalent here"
        )
    odd = [width for width in (channels, *encoder.widths, *decoder.widths) if width % NORM_GROUPS]
    if odd:
        raise DarkroomError(f"{where}: {odd[0]} channels do not divide into the {NORM_GROUPS} groups of official norms")

    z_channels = read.axis("decoder.conv_in.weight", 1)
    codebook = shapes.get("quantize.embedding.weight")
    if codebook is not None and len(codebook) != 2:
        raise DarkroomError(f"{where}: quantize.embedding.weight of shape {codebook} is no codebook")
    quant_conv = "quant_conv.weight" in shapes or "post_quant_conv.weight" in shapes
    moments = read.axis("encoder.conv_out.weight", 0)
    if moments != (2 * z_channels if codebook is None else z_channels):
        kind = "neither a codebook nor means and variances" if codebook is None else "both a codebook and variances"
        raise DarkroomError(
            f"{where}: {moments} channels leave the encoder and {z_channels} enter the decoder: an autoencoder with "
            f"{kind} has no equivalent here"
        )
    return {
        "in_channels": read.axis("encoder.conv_in.weight", 1),
        "out_channels": read.axis("decoder.conv_out.weight", 0),
        "channels": channels,
        "channel_mult": mult,
        "num_res_blocks": encoder.blocks,
        "attention_levels": encoder.attention,
        "bottleneck_attention": any(name.startswith(("encoder.mid.attn_1.", "decoder.mid.attn_1.")) for name in shapes),
        "z_channels": z_channels,
        "embed_dim": read.axis("post_quant_conv.weight", 1) if quant_conv else z_channels,
        "codebook_size": None if codebook is None else codebook[0],
        "quant_conv": quant_conv,
        "norm_groups": NORM_GROUPS,
        "decoder_channels": None if decoder_channels == channels else decoder_channels,
        "decoder_num_res_blocks": None if decoder.blocks == encoder.blocks + 1 else decoder.blocks - 1,
        "decoder_grain": False,
        "output_grain": False,
    }


@dataclass(frozen=True)
class _Half:
    """Per level: widths; levels with attention; residual blocks per level."""

    widths: tuple[int, ...]
    attention: tuple[int, ...]
    blocks: int


class _Shapes:
    def __init__(self, shapes: Shapes, where: str) -> None:
        self.shapes, self.where = shapes, where

    def axis(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise DarkroomError(f"{self.where} lacks {name!r}: the file is incomplete or another kind of model")
        if len(shape) <= axis or not shape[axis]:
            raise DarkroomError(f"{self.where}: {name!r} has shape {shape}; this is no autoencoder of the paper's code")
        return shape[axis]

    def half(self, start: str) -> _Half:
        """`start` is "encoder.down" or "decoder.up"."""
        pattern = re.compile(rf"{re.escape(start)}\.(\d{{1,4}})\.(block|attn)\.(\d{{1,4}})\.")
        blocks: dict[int, set[int]] = {}
        attention = set()
        for name in self.shapes:
            if found := pattern.match(name):
                level, kind, index = int(found[1]), found[2], int(found[3])
                if kind == "block":
                    blocks.setdefault(level, set()).add(index)
                else:
                    attention.add(level)
        levels = len(blocks)
        # A level that is not there is seen as its missing block, by name.
        widths = tuple(self.axis(f"{start}.{level}.block.0.conv1.weight", 0) for level in range(max(levels, 1)))
        return _Half(widths, tuple(sorted(attention & set(range(levels)))), len(blocks[0]))


def _multiples(widths: tuple[int, ...], channels: int, where: str) -> tuple[int, ...]:
    if any(width % max(channels, 1) for width in widths):
        raise DarkroomError(
            f"{where} has widths {widths}, which are no multiples of {channels}; this has no equivalent here"
        )
    return tuple(width // max(channels, 1) for width in widths)


# ------------------------------------------------------------------------------------------------------------ exporting


def refuse_what_compvis_lacks(config: Mapping[str, Any]) -> None:
    """The official code builds both halves from one set of numbers, with norms of 32 groups."""
    widths = {config["channels"], *(config["channels"] * m for m in config["channel_mult"])}
    groups = {math.gcd(config["norm_groups"], width) for width in widths}
    for is_lacking, what in (
        (_has_own_decoder(config), "a decoder of other widths or depths than the encoder's"),
        (groups != {NORM_GROUPS}, f"norms of {' and '.join(map(str, sorted(groups)))} groups (it has {NORM_GROUPS})"),
        (config["codebook_size"] is not None and not config["quant_conv"], "a VQ autoencoder without quant_conv"),
        (config.get("decoder_grain", False), "a decoder with grain (decoder_grain)"),
        (config.get("output_grain", False), "an image with grain (output_grain)"),
    ):
        if is_lacking:
            raise DarkroomError(f"the official code has no {what}; this first stage cannot be written in its layout")
