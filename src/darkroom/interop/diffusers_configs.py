"""Our configs for the components of a diffusers folder that others wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from darkroom.conditioning import vocabularies
from darkroom.config import to_dict
from darkroom.errors import DarkroomError
from darkroom.interop import diffusers_first_stage as autoencoders
from darkroom.interop import diffusers_text as text
from darkroom.interop import families
from darkroom.interop.diffusers_pipelines import Pipeline, choose_pipeline
from darkroom.interop.diffusers_scheduler import from_scheduler
from darkroom.interop.diffusers_transformers import (
    DIT_CLASS,
    SD3_CLASS,
    dit_from_diffusers_config,
    sd3_from_diffusers_config,
)
from darkroom.interop.diffusers_unet import ADDED_WIDTH, from_diffusers_config
from darkroom.interop.diffusers_unet import CLASS_NAME as UNET_CLASS
from darkroom.interop.diffusers_unet2d import CLASS_NAME as UNET2D_CLASS
from darkroom.interop.diffusers_unet2d import from_unet2d_config
from darkroom.interop.families import Look
from darkroom.interop.first_stage_files import CONFIG
from darkroom.interop.found_model import OWN
from darkroom.interop.tensor_source import Made
from darkroom.safe_files import read_json

NETWORK_CLASSES = {
    UNET_CLASS: from_diffusers_config,
    UNET2D_CLASS: from_unet2d_config,
    DIT_CLASS: dit_from_diffusers_config,
    "Transformer2DModel": dit_from_diffusers_config,  # of DiT before its class had a name of its own
    SD3_CLASS: sd3_from_diffusers_config,
}
# Entries that only the shared class of older releases has.
OLD_DIT = ("cross_attention_dim", "double_self_attention", "only_cross_attention", "use_linear_projection",
           "num_vector_embeds", "attention_type", "caption_channels", "num_embeds_ada_norm_single",
           "interpolation_scale", "use_additional_conditions")  # fmt: skip
MADE = "made/"  # in front of names of tensors that theirs computes and ours stores
UPSCALER_LEVELS = 350  # of noise on the condition: the pipeline's max_noise_level


@dataclass(frozen=True)
class FoundConfigs:
    """folders:     with weights of the model
    sizes_from:  our names of the conditioner -> names in the files that tell their shapes
    """

    configs: dict[str, dict[str, Any]]
    latents: tuple[Any, Any]
    pipeline: Pipeline
    folders: list[str]
    family: str
    title: str
    defaults: dict[str, Any]
    sample_size: int | None = None
    sizes_from: dict[str, str] = field(default_factory=dict)


def made_tensors(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Made]:
    """What theirs computes or leaves out, and ours stores, by "made/PART/our name"."""
    result: dict[str, Made] = {}
    network = configs["denoiser"]["network"]
    if network["kind"] == "dit":
        from darkroom.networks.positions import square_table

        side, width = network["input_size"] // network["patch_size"], network["hidden_size"]
        table = Made((1, side * side, width), partial(square_table, side, side, width))
        result[f"{MADE}denoiser/network.pos_embed"] = table
    for name, encoder in configs["conditioner"]["encoders"].items():
        if encoder["kind"] == "sdxl_text":
            import torch

            # The temperature of CLIP's training, which nothing reads.
            temperature = Made((), partial(torch.tensor, 2.6592600))
            result[f"{MADE}conditioner/encoders.{name}.towers.clip_g.network.logit_scale"] = temperature
    return result


def bare_configs(place: Path) -> dict[str, dict[str, Any]]:
    """For the config.json of a network alone: of its noise it says nothing, so that is as in the published models."""
    network = _network(place)
    denoiser: dict[str, Any] = {"network": network, "schedule": {"kind": "ldm", **families.STABLE_DIFFUSION}}
    if network["kind"] == "mmdit":
        denoiser |= {"schedule": {"kind": "flow", "shift": 3.0}, "prediction_type": "velocity"}
    elif network["kind"] == "dit":
        variance = network["out_channels"] == 2 * network["in_channels"]
        betas = {"kind": "linear", "beta_start": 0.0001, "beta_end": 0.02}
        denoiser |= {"schedule": betas, "learned_variance": variance}
    elif not network["use_spatial_transformer"]:
        denoiser["schedule"] = {"kind": "ldm", **families.PAPER_UNCONDITIONAL}
    return {"denoiser": {"prediction_type": "epsilon", **denoiser}, "conditioner": {"encoders": {}}}


def read_configs(path: Path, pipeline: str, names: list[str]) -> FoundConfigs:
    """names: the components that model_index.json lists."""
    network_folder = next((name for name in ("unet", "transformer") if name in names), None)
    vae_folder = next((name for name in autoencoders.SUBFOLDERS if name in names), None)
    if network_folder is None or vae_folder is None:
        raise DarkroomError(f"{path} is a diffusers folder ({pipeline}) without a denoiser or autoencoder known here")
    network = _network(path / network_folder / CONFIG)
    where = str(path / vae_folder / CONFIG)
    first_stage, shift, scale = autoencoders.from_diffusers_config(read_json(Path(where), "config"), where)
    patch = network.get("patch_size") or 1
    place = path / "scheduler" / "scheduler_config.json"
    schedule, prediction, solver = from_scheduler(read_json(place, "config of the scheduler"), str(place), patch)
    variance = network["kind"] == "dit" and network["out_channels"] == 2 * network["in_channels"]
    denoiser = {
        "network": network,
        "schedule": schedule,
        "prediction_type": prediction,
        "learned_variance": variance,
    }
    encoders, folders = _encoders(path, pipeline, names, network, first_stage)
    configs = {"first_stage": first_stage, "denoiser": denoiser, "conditioner": {"encoders": encoders}}
    sample = read_json(path / network_folder / CONFIG, "config").get("sample_size")
    family, title, defaults = _family(path, configs, solver, sample)
    latents = (shift, scale)
    chosen = choose_pipeline(configs, latents)
    sizes = {"encoders.text.tower.transformer.token_emb.weight": "bert/model.embed_tokens.weight"}
    return FoundConfigs(
        configs=configs,
        latents=latents,
        pipeline=Pipeline(chosen.name, vae_folder, chosen.has_shift),
        folders=[network_folder, vae_folder, *folders],
        family=family,
        title=title,
        defaults=defaults,
        sample_size=sample if isinstance(sample, int) else None,
        sizes_from=sizes if "bert" in folders else {},
    )


def _network(place: Path) -> dict[str, Any]:
    config = read_json(place, "config")
    name = str(config.get("_class_name"))
    if name not in NETWORK_CLASSES:
        raise DarkroomError(
            f"{place} is the config of a diffusers {name}; {', '.join(NETWORK_CLASSES)} can be read here"
        )
    if name == "Transformer2DModel":
        config = {key: value for key, value in config.items() if key not in OLD_DIT} | {"_class_name": DIT_CLASS}
    read: Any = NETWORK_CLASSES[name]
    result: dict[str, Any] = to_dict(read(config))
    return result


# ---------------------------------------------------------------------------------------------------------- conditions


def _encoders(
    path: Path, pipeline: str, names: list[str], network: Mapping[str, Any], first_stage: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Our encoders, and the folders that hold their tensors."""
    if network["kind"] == "mmdit":
        return _sd3(path, names, network)
    if network["kind"] == "dit":
        count = network["num_classes"] - 1
        classes = {"kind": "class", "slot": "label", "classes": [str(i) for i in range(count)], "drop_rate": 0.1}
        return {"class": classes}, []
    extra = network["in_channels"] - first_stage["embed_dim"]
    if "bert" in names:
        place = path / "bert" / CONFIG
        encoder = text.read_bert(read_json(place, "config"), str(place))
        if (folder := vocabularies.find_vocabulary("bert", [path / "tokenizer"])) is not None:
            tokenizer = vocabularies.read_vocabulary(folder, "bert")
            if tokenizer.get_vocab_size() == encoder["vocabulary_size"]:
                encoder["tokenizer"] = tokenizer.to_str()
        return {"text": encoder}, ["bert"]
    if "text_encoder_2" in names:
        return _sdxl(path, names)
    if "text_encoder" in names:
        beside = _beside_text(path, pipeline, extra, network)
        return {"text": _one_tower(path)} | beside, ["text_encoder"]
    if extra:
        return {"low_resolution": {"kind": "low_resolution", "factor": _factor(first_stage)}}, []
    if network["num_classes"] is not None:
        raise DarkroomError(f"{path} is a diffusers {pipeline} with classes, which has no equivalent here")
    return {}, []


def _factor(first_stage: Mapping[str, Any]) -> int:
    """A picture at the latent's size."""
    return int(2 ** (len(first_stage["channel_mult"]) - 1))


def _beside_text(path: Path, pipeline: str, extra: int, network: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if network["num_classes"] is not None and extra:
        levels = read_json(path / "model_index.json", "pipeline index").get("max_noise_level", UPSCALER_LEVELS)
        return {"low_resolution": {"kind": "low_resolution", "factor": 4, "noise_levels": levels}}
    if "Depth" in pipeline:
        return {"depth": {"kind": "depth"}}
    return {"mask": {"kind": "masked_image"}} if extra else {}


def _clip_tower(path: Path, folder: str, tokens: str) -> tuple[Any, dict[str, Any]]:
    """The tower's network, and entries of our `TowerConfig` about its vocabulary."""
    place = path / folder / CONFIG
    config = text.read_clip(read_json(place, "config"), str(place), _padding(path / tokens))
    return config, {"length": config.max_position_embeddings, **_vocabulary(path / tokens, "clip")}


def _vocabulary(folder: Path, family: str) -> dict[str, Any]:
    place = vocabularies.find_vocabulary(family, [folder])
    return {} if place is None else {"tokenizer": vocabularies.read_vocabulary(place, family).to_str()}


def _padding(folder: Path) -> int | None:
    """The id that a CLIP tokenizer fills texts up with: "!" is its first piece, else it is the end of a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = read_json(folder / name, "config of the tokenizer").get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return 0 if token == "!" else None
    return None


def _one_tower(path: Path) -> dict[str, Any]:
    """That of Stable Diffusion 1 and 2: the last state of the layers that are there, normalised."""
    config, more = _clip_tower(path, "text_encoder", "tokenizer")
    model = "ViT-H-14" if config.hidden_act == "gelu" else "ViT-L-14"
    return {"kind": "clip", "model": model, "network": text.changed_options(config, "clip", model), **more}


def _sdxl(path: Path, names: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    if "text_encoder" not in names:
        raise DarkroomError(f"{path} has one text tower, as SDXL's refiner; this version reads the base model's two")
    index = read_json(path / "model_index.json", "pipeline index")
    towers: dict[str, Any] = {}
    for name, folder, tokens, model in (
        ("clip_l", "text_encoder", "tokenizer", "ViT-L-14"),
        ("clip_g", "text_encoder_2", "tokenizer_2", "ViT-bigG-14"),
    ):
        config, more = _clip_tower(path, folder, tokens)
        family = "clip"
        if name == "clip_g":
            config, family = text.as_open_clip(config, str(path / folder / CONFIG)), "open_clip"
        towers[name] = {"network": text.changed_options(config, family, model), **more}
    zeros = index.get("force_zeros_for_empty_prompt", True)
    encoders = {
        "text": {"kind": "sdxl_text", "no_text": "zeros" if zeros else "empty", **towers},
        "sizes": {"kind": "sizes", "size": [1024, 1024], "width": _sizes_width(path)},
    }
    return encoders, ["text_encoder", "text_encoder_2"]


def _sizes_width(path: Path) -> int:
    return int(read_json(path / "unet" / CONFIG, "config").get("addition_time_embed_dim") or ADDED_WIDTH)


def _sd3(path: Path, names: list[str], network: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    folders: list[str] = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if name in names]
    if not folders:
        return {}, []
    if folders[:2] != ["text_encoder", "text_encoder_2"]:
        raise DarkroomError(f"{path} lacks a text tower: text_encoder and text_encoder_2 are needed")
    encoder: dict[str, Any] = {"kind": "sd3_text", "project_l": True, "t5": None, "context_dim": network["context_dim"]}
    for name, folder, tokens, model in (
        ("clip_l", "text_encoder", "tokenizer", "ViT-L-14"),
        ("clip_g", "text_encoder_2", "tokenizer_2", "ViT-bigG-14"),
    ):
        config, more = _clip_tower(path, folder, tokens)
        encoder[name] = {"network": text.changed_options(config, "clip", model), **more}
    if len(folders) == 3:
        t5 = text.read_t5(read_json(path / "text_encoder_3" / CONFIG, "config"))
        options = text.changed_options(t5, "t5", "t5-v1_1-xxl")
        # Their pipeline's default; the official code has 77.
        encoder["t5"] = {"network": options, "length": 256, **_vocabulary(path / "tokenizer_3", "t5")}
    return {"text": encoder}, folders


# -------------------------------------------------------------------------------------------------------------- family


def _family(
    path: Path, configs: Mapping[str, Mapping[str, Any]], solver: str, sample: Any
) -> tuple[str, str, dict[str, Any]]:
    """(family, title, defaults of generation); a model of no known family is one of its owner's."""
    network, first = configs["denoiser"]["network"], configs["first_stage"]
    encoders = {encoder["kind"]: encoder for encoder in configs["conditioner"]["encoders"].values()}
    f = 2 ** (len(first["channel_mult"]) - 1)
    traits = {
        "updown": bool(network.get("resblock_updown")),
        "labels": isinstance(network.get("num_classes"), int),
        "dual": bool(network.get("x_block_self_attn_layers")),
        "qk_norm": network.get("qk_norm") is not None,
    }
    kinds = {"clip": "clip", "sdxl_text": "sdxl", "sd3_text": "sd3", "text": "text"}
    conditions = next((word for kind, word in kinds.items() if kind in encoders), None)
    if conditions == "clip" and encoders["clip"]["model"] == "ViT-H-14":
        conditions = "open_clip"
    # Names of files tell apart what one official file cannot; here the scheduler says it.
    said = "base" if configs["denoiser"]["prediction_type"] == "epsilon" else ""
    look = Look(
        network=network["kind"],
        extra=network["in_channels"] - first["embed_dim"],
        conditions=conditions,
        quantised=first["codebook_size"] is not None,
        f=f,
        traits=frozenset(name for name, has in traits.items() if has),
        name=said,
        context=network.get("context_dim") if network["kind"] == "unet" else None,
        vector=network["kind"] == "unet" and network.get("num_classes") is not None,
    )
    size = sample * f if isinstance(sample, int) else None
    try:
        family = families.recognise(look, str(path))
    except DarkroomError:
        defaults = {"solver": solver} | ({} if size is None else {"size": [size, size]})
        return OWN, "a diffusers pipeline", defaults
    defaults = family.defaults | ({} if size is None else {"size": [size, size]})
    return family.name, f"{family.title} (diffusers)", defaults | {"solver": solver}
