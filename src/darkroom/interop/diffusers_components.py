"""What a diffusers folder of a model consists of: one folder a component, each with its class, its config and the names
of its tensors. Both directions follow from this: what is written, and where ours stands in what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from darkroom.conditioning.encoders import ENCODERS
from darkroom.conditioning.text_arrangements import SD3TextConfig, SDXLTextConfig
from darkroom.conditioning.text_towers import OneTowerConfig, TowerConfig, Use
from darkroom.config import from_dict
from darkroom.errors import DarkroomError
from darkroom.interop import diffusers_first_stage as autoencoders
from darkroom.interop import diffusers_text as text
from darkroom.interop import diffusers_transformers as transformers
from darkroom.interop import diffusers_unet as unet
from darkroom.interop import diffusers_unet2d as unet2d
from darkroom.interop.diffusers_pipelines import Pipeline
from darkroom.interop.tensor_source import Made, Place, Shape, Table
from darkroom.networks.dit import DiTConfig
from darkroom.networks.mmdit import MMDiTConfig
from darkroom.networks.unet import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

MODEL, TRANSFORMER = "diffusion_pytorch_model", "model"  # how weight files of either library are called
# Folders of the text towers, by kind of the encoder and name of the tower.
TOWER_FOLDERS: dict[str, dict[str, str]] = {
    "clip": {"tower": "text_encoder"},
    "open_clip": {"tower": "text_encoder"},
    "sdxl_text": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "sd3_text": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"},
}


@dataclass(frozen=True)
class Component:
    """folder:  its name in the pipeline
    library: whose class it is, as model_index.json says it
    config:  its config.json
    stem:    of its weight file's name
    part:    of our model, whose tensors it holds; table: that part's names -> theirs, without the folder
    ready:   tensors that theirs has and ours has not, made when they are written
    """

    folder: str
    library: str
    cls: str
    config: Mapping[str, Any]
    stem: str
    part: str
    table: Table
    ready: Mapping[str, Made] = field(default_factory=dict)

    def places(self) -> Table:
        """The table with the folder in front of their names."""
        return {
            ours: replace(place, names=tuple(f"{self.folder}/{name}" for name in place.names))
            for ours, place in self.table.items()
        }


def network_config(denoiser: Mapping[str, Any]) -> UNetConfig | DiTConfig | MMDiTConfig:
    """Of a denoiser's config."""
    values = dict(denoiser["network"])
    kind: Any = {"unet": UNetConfig, "dit": DiTConfig, "mmdit": MMDiTConfig}[values.get("kind", "unet")]
    result: UNetConfig | DiTConfig | MMDiTConfig = from_dict(kind, values, "denoiser.network")
    return result


def components(
    configs: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Mapping[str, Shape]],
    latents: tuple[Any, Any] | None,
    pipeline: Pipeline,
    sample_size: int | None = None,
) -> list[Component]:
    """The components with tensors of a model of ours. shapes: by part, of our tensors."""
    network = network_component(network_config(configs["denoiser"]), configs["conditioner"]["encoders"], sample_size)
    if pipeline.name == "StableDiffusionPipeline" and _is_upcast(configs):
        network = replace(network, config={**network.config, "upcast_attention": True})
    result = [network]
    if "first_stage" in configs and latents is not None:
        result.append(_autoencoder(configs["first_stage"], shapes["first_stage"], latents, pipeline.autoencoder))
    for name, encoder in configs["conditioner"]["encoders"].items():
        kind = encoder["kind"]
        if kind in TOWER_FOLDERS:
            result += _towers(name, encoder)
        elif kind == "text":
            result.append(_bert(name, encoder, shapes["conditioner"]))
        elif kind == "class" and encoder.get("slot", "context") != "label":
            result.append(_classes(name, encoder))
    return result


def _is_upcast(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Stable Diffusion 2 at 768 pixels, whose attention overflows in float16: the official code computes it in float32,
    and diffusers where the network's config says so."""
    second = any(
        encoder["kind"] == "open_clip" or (encoder["kind"] == "clip" and encoder.get("model") == "ViT-H-14")
        for encoder in configs["conditioner"]["encoders"].values()
    )
    return second and configs["denoiser"].get("prediction_type") == "v"


def network_component(
    config: UNetConfig | DiTConfig | MMDiTConfig, encoders: Mapping[str, Mapping[str, Any]], sample_size: int | None
) -> Component:
    if isinstance(config, DiTConfig):
        folder, values, table = (
            "transformer",
            transformers.dit_to_diffusers_config(config),
            transformers.dit_table(config),
        )
    elif isinstance(config, MMDiTConfig):
        folder, values, table = (
            "transformer",
            transformers.sd3_to_diffusers_config(config),
            transformers.sd3_table(config),
        )
    elif config.use_spatial_transformer:
        sizes = next((e for e in encoders.values() if e["kind"] == "sizes"), None)
        added = None if sizes is None else int(sizes.get("width", unet.ADDED_WIDTH))
        values = unet.to_diffusers_config(config, sample_size, added)
        names = unet.key_table(config, added)
        folder, table = "unet", {ours: Place((theirs,)) for ours, theirs in names.items()}
    else:
        folder, values, table = "unet", unet2d.to_unet2d_config(config, sample_size), unet2d.unet2d_table(config)
    table = {f"network.{ours}": place for ours, place in table.items()}
    return Component(folder, "diffusers", values["_class_name"], values, MODEL, "denoiser", table)


def _autoencoder(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], latents: tuple[Any, Any], folder: str
) -> Component:
    from darkroom.interop.first_stage_files import plain_config

    plain = plain_config(config, "this first stage")
    values = autoencoders.to_diffusers_config(plain, *latents)
    levels, table = len(plain["channel_mult"]), {}
    for ours, shape in shapes.items():
        if not ours.startswith("autoencoder."):
            continue  # shift and scale
        theirs = autoencoders.to_theirs(ours.removeprefix("autoencoder."), levels)
        table[ours] = Place((theirs,), shape=autoencoders.stored_shape(theirs, shape))
    return Component(folder, "diffusers", values["_class_name"], values, MODEL, "first_stage", table)


# --------------------------------------------------------------------------------------------------------------- text


def towers_of(encoder: Mapping[str, Any]) -> dict[str, tuple[TowerConfig, Use]]:
    """The text towers of an encoder's config, by name."""
    config: Any = from_dict(ENCODERS[encoder["kind"]].config_class, encoder, "conditioner")
    if isinstance(config, OneTowerConfig):
        found = {"tower": (config, config.use())}
    else:
        assert isinstance(config, SDXLTextConfig | SD3TextConfig)
        uses = dict(config.uses)
        if isinstance(config, SD3TextConfig) and config.project_l:
            uses["clip_l"] = replace(uses["clip_l"], pool="projected")
        found = {n: (tower, use) for n, use in uses.items() if (tower := getattr(config, n)) is not None}
    return {
        name: (tower, replace(use, family=tower.family or use.family, model=tower.model or use.model))
        for name, (tower, use) in found.items()
    }


def _towers(encoder_name: str, encoder: Mapping[str, Any]) -> list[Component]:
    kind, result = encoder["kind"], []
    for name, (tower, use) in towers_of(encoder).items():
        folder = TOWER_FOLDERS[kind][name]
        options = dict(tower.network)
        if use.family == "clip" and use.pool == "projected":
            options.setdefault("with_projection", True)
        network = text.tower_config(use.family, use.model, options)
        ready: dict[str, Made] = {}
        if use.family == "t5":
            cls, table, values = "T5EncoderModel", text.t5_table(network), text.t5_config(network)
        else:
            # Stable Diffusion 1 and 2 read the last state, the others the last but one.
            depth = network.layers if use.family == "open_clip" else network.num_hidden_layers
            layers = depth - use.skip_layers if kind in ("clip", "open_clip") else depth
            projected = kind == "sd3_text" or name == "clip_g"
            table = text.clip_table(network, layers, projected)
            values = text.clip_config(network, layers, projected)
            cls = values["architectures"][0]
            if projected and use.pool != "projected":  # theirs projects; ours reads the text as it is
                table = {ours: place for ours, place in table.items() if "text_projection" not in ours}
                values = values | {"projection_dim": values["hidden_size"]}
                side = values["hidden_size"]
                ready["text_projection.weight"] = Made((side, side), partial(_identity, side))
        start = f"encoders.{encoder_name}.towers.{name}.network."
        table = {start + ours: place for ours, place in table.items()}
        result.append(Component(folder, "transformers", cls, values, TRANSFORMER, "conditioner", table, ready))
    return result


def _identity(width: int) -> Tensor:
    import torch

    return torch.eye(width)


def _bert(name: str, encoder: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Component:
    import torch

    from darkroom.config import to_dict

    full = to_dict(from_dict(ENCODERS["text"].config_class, encoder, f"conditioner.{name}"))
    start = f"encoders.{name}.tower."
    vocabulary, width = shapes[f"{start}transformer.token_emb.weight"]
    table = {start + ours: place for ours, place in text.bert_table(full["depth"], full["logits_head"]).items()}
    ready: dict[str, Made] = {}
    if not full["logits_head"]:  # theirs always has that layer, which nothing reads
        sizes = {"to_logits.weight": (vocabulary, width), "to_logits.bias": (vocabulary,)}
        ready = {name: Made(shape, partial(torch.zeros, shape)) for name, shape in sizes.items()}
    values = text.bert_config(full, vocabulary)
    return Component("bert", "latent_diffusion", text.BERT_CLASS, values, TRANSFORMER, "conditioner", table, ready)


def _classes(name: str, encoder: Mapping[str, Any]) -> Component:
    """A table of embedded classes; diffusers has no class for one, so the folder brings it along."""
    classes, null = list(encoder["classes"]), bool(encoder.get("null_class", True))
    values = {
        "_class_name": "ClassEmbedder",
        "classes": classes,
        "rows": len(classes) + null,
        "width": encoder["width"],
        "null_class": null,
        "slot": encoder.get("slot", "context"),
    }
    table = {f"encoders.{name}.embedding.weight": Place(("embedding.weight",))}
    return Component("class_embedder", "class_embedder", "ClassEmbedder", values, MODEL, "conditioner", table)


def check_towers(encoders: Mapping[str, Mapping[str, Any]]) -> None:
    """What their pipelines do with text towers, where ours differ, is refused by name."""
    for encoder in encoders.values():
        kind = encoder["kind"]
        if kind not in TOWER_FOLDERS:
            continue
        towers = towers_of(encoder)
        arranged = kind in ("sdxl_text", "sd3_text")
        clips = [(tower, use) for tower, use in towers.values() if use.family != "t5"]
        for is_lacking, what in (
            (bool(encoder.get("use_mask")), "mask for padding (use_mask)"),
            (not arranged and towers["tower"][1].family == "t5", "T5 alone"),
            (not arranged and towers["tower"][1].pool != "none", "vector of a text"),
            (any(use.final_norm == arranged for _, use in clips), "final norm of the text (final_norm)"),
            (arranged and any(use.skip_layers != 1 for _, use in clips), "other layer of a text tower"),
            (
                encoder.get("no_text", "zeros" if kind == "sdxl_text" else "empty")
                != ("zeros" if kind == "sdxl_text" else "empty"),
                f"no_text: {encoder.get('no_text')}",
            ),
            (kind == "sdxl_text" and "clip_l" not in towers, "SDXL with one text tower"),
        ):
            if is_lacking:
                raise DarkroomError(f"diffusers' pipelines have no {what}; this model cannot be written for them")
