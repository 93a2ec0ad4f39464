"""Files in the layouts of others: real ones of the shrunk goldens, hollow ones of the full layouts."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_data import PARITY, Case, load_case, weights
from torch import Tensor

from darkroom.safe_files import read_safetensors_header, stream_safetensors

# Every public layout with a first stage: name, what it must be recognised as, shift and scale.
BARE = ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
INSIDE = {
    "bsr_sr": ("vq-f4", 0.0, 1.0),
    "celeba256": ("vq-f4", 0.0, 1.0),
    "cin256": ("vq-f8", 0.0, 1.0),
    "inpainting_big": ("vq-f4-noattn", 0.0, 1.0),
    "sd-v1": ("kl-f8", 0.0, 0.18215),
    "sd-v1-inpainting": ("kl-f8", 0.0, 0.18215),
    "sd-v2-1-v768": ("kl-f8", 0.0, 0.18215),
    "sd3-medium": ("sd3", 0.0609, 1.5305),
    "text2img-large": ("kl-f8", 0.0, 0.18215),
}
DIFFUSERS = {"diffusers-sd1-vae": ("kl-f8", 0.0, 0.18215), "diffusers-sd3-vae": ("sd3", 0.0609, 1.5305)}


def layout(name: str) -> dict[str, Any]:
    """The layout file of a public model; a missing one fails."""
    (path,) = [PARITY / "layouts" / f"{name}{suffix}" for suffix in (".json", ".json.gz") if _exists(name, suffix)]
    result: dict[str, Any] = weights().load_layout(path)
    return result


def _exists(name: str, suffix: str) -> bool:
    return (PARITY / "layouts" / f"{name}{suffix}").is_file()


def official_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of an official first stage (`ddconfig`, `embed_dim`, `n_embed`) in our words."""
    dd = config["ddconfig"]
    sizes = [dd["resolution"] // 2**i for i in range(len(dd["ch_mult"]))]
    return {
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "channels": dd["ch"],
        "channel_mult": tuple(dd["ch_mult"]),
        "num_res_blocks": dd["num_res_blocks"],
        "attention_levels": tuple(i for i, size in enumerate(sizes) if size in dd["attn_resolutions"]),
        "bottleneck_attention": dd.get("attn_type", "vanilla") != "none",
        "z_channels": dd["z_channels"],
        "embed_dim": config["embed_dim"],
        "codebook_size": config.get("n_embed"),
        "quant_conv": True,
        "norm_groups": 32,
        "decoder_channels": None,
        "decoder_num_res_blocks": None,
        "decoder_grain": False,
        "output_grain": False,
    }


def hollow_file(path: Path, shapes: Mapping[str, Any], dtypes: Mapping[str, str] | None = None) -> Path:
    """A valid safetensors file of these shapes, filled with zeros that take no place on the disk."""
    header, end = {}, 0
    for name, shape in sorted(shapes.items(), key=lambda item: (dtypes or {}).get(item[0]) != "int64"):
        kind, size = {"int64": ("I64", 8), "int32": ("I32", 4)}.get((dtypes or {}).get(name, ""), ("F32", 4))
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def hollow_layout(folder: Path, name: str, suffix: str = "") -> Path:
    """The file of a public layout: hollow weights, and the buffers that every such file has."""
    spec = layout(name)
    path = hollow_file(folder / f"{name}{suffix}.safetensors", spec["layout"], spec.get("dtypes"))
    made = {key: recipe for key, recipe in spec.get("derived", {}).items() if recipe["kind"] in SMALL}
    fill_in(path, {key: weights().derived_tensor(recipe, spec["layout"][key]) for key, recipe in made.items()})
    return path


def filled_layout(path: Path, name: str) -> Path:
    """The file of a public layout with all its deterministic numbers, written one tensor at a time."""
    spec = layout(name)
    dtypes = spec.get("dtypes") or {}
    entries = {key: (dtypes.get(key, "float32"), tuple(shape)) for key, shape in spec["layout"].items()}
    stream_safetensors(path, entries, lambda keys: ((key, published_tensor(spec, key)) for key in keys))
    return path


def published_tensor(spec: Mapping[str, Any], name: str) -> Tensor:
    """One of them."""
    recipes = {key: recipe for key, recipe in (spec.get("derived") or {}).items() if key == name}
    ((_, array),) = weights().iter_arrays({name: spec["layout"][name]}, recipes)
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(spec["layout"][name])


SMALL = ("ddpm_schedule", "value", "arange")


def fill_in(path: Path, arrays: Mapping[str, Any]) -> None:
    """Put numbers in the place of a hollow file's tensors."""
    header = read_safetensors_header(path)
    with open(path, "r+b") as file:
        for name, array in arrays.items():
            file.seek(header.tensors[name].start)
            data = np.ascontiguousarray(array).tobytes()
            assert len(data) == header.tensors[name].end - header.tensors[name].start, name
            file.write(data)


def diffusers_folder(folder: Path, name: str) -> Path:
    """A hollow diffusers folder of a public layout."""
    spec = layout(name)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": spec["hyper_parameters"]["class"],
        "_diffusers_version": "0.36.0",
        **spec["hyper_parameters"],
    }
    del config["class"]
    (folder / "config.json").write_text(json.dumps(config))
    hollow_file(folder / "diffusion_pytorch_model.safetensors", spec["layout"])
    return folder


def golden(topic: str, name: str) -> tuple[Case, dict[str, Tensor]]:
    """A golden case and its deterministic weights under their full names."""
    case = load_case(topic, name)
    state = weights().make_state_dict(case.spec["layout"], case.spec.get("derived"))
    return case, {key: torch.as_tensor(value) for key, value in state.items()}


def write_checkpoint(path: Path, state: Mapping[str, Tensor], **more: Any) -> Path:
    """As Lightning writes it."""
    torch.save({"epoch": 1, "global_step": 2, "state_dict": dict(state), "callbacks": {}, **more}, path)
    return path
