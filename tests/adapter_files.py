"""LoRA files of random numbers under the names of others, and small models that they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from text_tower_files import CLIP_L, write_clip_vocabulary
from torch import Tensor

from darkroom.build import build_conditioner, build_denoiser, build_first_stage
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.safe_files import write_safetensors

UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
    "attention_resolutions": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
FIRST_STAGE = {"kind": "kl", "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}


def shaken(module: Any, seed: int = 0) -> Any:
    """Random numbers everywhere: layers that begin as zeros would hide differences."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in torch.nn.Module.parameters(module):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def small_stable_diffusion(folder: Path, encoder: Mapping[str, Any] | None = None, **network: Any) -> LatentDiffusion:
    """Like SD 1: a U-Net with text, a CLIP tower with its vocabulary, a KL first stage."""
    vocabulary = write_clip_vocabulary(folder / "vocabulary")
    from darkroom.conditioning.vocabularies import read_vocabulary

    tokenizer = read_vocabulary(vocabulary, "clip").to_str()
    clip = {"kind": "clip", "network": CLIP_L, "length": 12, "tokenizer": tokenizer}
    conditioner = build_conditioner({"encoders": {"text": dict(encoder or clip)}})
    sizes = {**UNET, "context_dim": conditioner.context_dim, **network}
    parts = build_first_stage(FIRST_STAGE), build_denoiser({"network": sizes}), conditioner
    info = {"name": "small", "defaults": {"size": [16, 16], "steps": 2}}
    return LatentDiffusion(*(shaken(part) for part in parts), info)


def low_rank(layers: Mapping[str, Iterable[int]], rank: int = 2, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) for layers of these shapes: (r, in, ...) and (out, r, ...)."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in layers.items():
        out, inner, *kernel = shape
        down = torch.randn(rank, inner, *kernel, generator=generator)
        up = 0.1 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        result[name] = down, up
    return result


def change(pair: tuple[Tensor, Tensor], factor: float) -> Tensor:
    """factor * up @ down in float64, in the shape of the layer."""
    down, up = (tensor.double() for tensor in pair)
    return factor * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def kohya(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], prefix: str, alpha: float | None) -> Path:
    """Layers by diffusers' names (or official ones) in the spelling of kohya's scripts."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        layer = prefix + name.replace(".", "_")
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    write_safetensors(path, tensors)
    return path


def spelled(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], start: str, ends: tuple[str, str]) -> Path:
    """start + layer + an ending for each matrix; `.bin` is a pickle."""
    tensors = {f"{start}{name}{end}": t for name, pair in pairs.items() for end, t in zip(ends, pair, strict=True)}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors)
    return path
