"""How LoRA files spell the layers of a model: one spelling in kohya's scripts, another in diffusers and peft.

    lora_unet_down_blocks_0_attentions_0_proj_in      kohya: diffusers' names of the network, dots as underscores
    lora_unet_input_blocks_1_1_proj_in                kohya for SDXL and SD 3: official names
    unet.down_blocks.0.attentions.0.proj_in           diffusers; transformer. for SD 3 and DiT
    lora_te_text_model_encoder_layers_0_mlp_fc1       kohya: te1, te2, te3 where there are several towers
    text_encoder_2.text_model.encoder.layers.0...     diffusers

All are compared with dots as underscores. Text towers have the names of the transformers library everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_transformers import REPEATED, SWAPPED, rows_of
from darkroom.interop.diffusers_unet import ADDED_WIDTH, key_table
from darkroom.networks.dit import DiTConfig
from darkroom.networks.mmdit import MMDiTConfig
from darkroom.networks.unet import UNetConfig


@dataclass(frozen=True)
class Spot:
    """Rows of a weight: the i-th of n equal parts; `swapped`: the halves of theirs are the other way round."""

    name: str
    part: tuple[int, int] = (0, 1)
    swapped: bool = False


Spots = dict[str, Spot]  # a layer as files spell it, with underscores: where it is in our network


def flat(name: str) -> str:
    return name.replace(".", "_")


def network_spots(network: nn.Module) -> Spots:
    """Of a denoiser's network: official names, and diffusers' where that library has such a network."""
    spots = _own(network)
    config: Any = network.config
    names = dict(network.named_parameters())
    for ours, theirs in _rows(config):
        layer = ours.removesuffix(".weight")
        if layer == ours or names[ours].ndim < 2:
            continue
        for index, name in enumerate(theirs):
            if name.startswith(REPEATED):
                continue  # of one tensor there are many copies: a change of one of them has no place here
            plain = name.removeprefix(SWAPPED).removesuffix(".weight")
            spots[flat(plain)] = Spot(ours, (index, len(theirs)), name.startswith(SWAPPED))
    return spots


def tower_spots(network: nn.Module, family: str) -> Spots:
    """Of a text tower: the names of transformers, and OpenCLIP's own."""
    spots = _own(network)
    if family == "open_clip":
        blocks = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        for name, _ in network.named_parameters():
            match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._]weight", name)
            if match is None:
                continue
            layer = f"text_model.encoder.layers.{match[1]}"
            if match[2] == "attn.in_proj":
                for index, part in enumerate("qkv"):
                    spots[flat(f"{layer}.self_attn.{part}_proj")] = Spot(name, (index, 3))
            elif match[2] in blocks:
                spots[flat(f"{layer}.{blocks[match[2]]}")] = Spot(name)
    # Newer releases of transformers leave a level of the names out.
    return spots | {name.removeprefix("text_model_"): spot for name, spot in spots.items()}


def _own(network: nn.Module) -> Spots:
    """Every weight with rows and columns under its own name."""
    return {
        flat(name.removesuffix(".weight")): Spot(name)
        for name, parameter in network.named_parameters()
        if name.endswith(".weight") and parameter.ndim >= 2
    }


def _rows(config: object) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(ours, theirs) per tensor; nothing for what diffusers cannot express."""
    try:
        if isinstance(config, UNetConfig):
            added = ADDED_WIDTH if config.num_classes == "sequential" else None
            yield from ((ours, (theirs,)) for ours, theirs in key_table(config, added).items())
        elif isinstance(config, DiTConfig | MMDiTConfig):
            yield from ((ours, theirs) for ours, theirs in rows_of(config) if ours != "pos_embed")
    except DarkroomError:
        return


# The beginnings of names: the part of the model that follows. None: whichever has such a layer.
PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", "denoiser"),
    ("lora_transformer_", "denoiser"),
    ("lora_te1_", "text 1"),
    ("lora_te2_", "text 2"),
    ("lora_te3_", "text 3"),
    ("lora_te_", "text 1"),
    ("unet.", "denoiser"),
    ("transformer.", "denoiser"),
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("text_encoder_3.", "text 3"),
    ("text_encoder_2.", "text 2"),
    ("text_encoder.", "text 1"),
    ("base_model.model.", None),
    ("", None),
)


def find_spot(layer: str, parts: Mapping[str, Spots]) -> tuple[str, Spot] | None:
    """(part, place) of a layer as a file spells it; None where the model has no such layer."""
    for prefix, part in PREFIXES:
        if not layer.startswith(prefix):
            continue
        rest = flat(layer.removeprefix(prefix))
        for name in parts if part is None else [part]:
            if rest in parts.get(name, {}):
                return name, parts[name][rest]
    return None
