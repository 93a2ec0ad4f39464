"""Small models with any conditions, for `shapes` of 32x32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from darkroom.build import (
    build_conditioner,
    build_denoiser,
    build_first_stage,
    conditioner_config,
    denoiser_config,
    pixel_first_stage,
)
from darkroom.conditioning.encoders import ENCODERS
from darkroom.config import from_dict
from darkroom.data.degradations import LowResolution
from darkroom.data.masks import RandomMask
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.denoiser import DenoiserConfig
from darkroom.diffusion.schedules import ScheduleConfig
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.networks.unet import UNetConfig
from darkroom.pixel_format import PixelFormat

DATA = DataConfig(count=6, size=32, low_resolution=LowResolution(4), repaint_mask=RandomMask())
TEXT = {"kind": "text", "width": 16, "depth": 1, "heads": 2, "head_width": 8, "length": 12, "vocabulary_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "class": {"kind": "class", "width": 16},
    "text": TEXT,
    "boxes": {"kind": "boxes", "width": 16, "depth": 1, "heads": 2, "head_width": 8, "max_objects": 2},
    "segmentation": {"kind": "segmentation"},
    "segmentation_tokens": {"kind": "segmentation_tokens", "width": 16, "grid": 4},
    "low_resolution": {"kind": "low_resolution", "noise_levels": 350},
    "masked_image": {"kind": "masked_image"},
    "depth": {"kind": "depth"},
    "label": {"kind": "label", "count": 6},
    "vector": {"kind": "vector", "width": 5, "noise_levels": 100, "level_width": 2},
}


def make_model(*names: str, pixels: PixelFormat | None = None, f: int = 2, **changes: Any) -> LatentDiffusion:
    """Random weights, 32x32 images of f = 2, or of f = 1 without a network, with the encoders of KINDS."""
    torch.manual_seed(3)
    if f == 1:
        first_stage = pixel_first_stage(3, pixels or PixelFormat())
    else:
        sizes = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8}
        first_stage = build_first_stage(sizes | ({} if pixels is None else {"pixels": pixels.to_dict()}))
        first_stage._set(0.1, 2.0)
    configs = {
        name: from_dict(ENCODERS[KINDS[name]["kind"]].config_class, {**KINDS[name], **changes.get(name, {})})
        for name in names
    }
    conditioner = build_conditioner(conditioner_config(configs, open_dataset(DATA)), first_stage)
    network = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=2
    )
    if conditioner.vector_dim is not None:
        network = replace(network, num_classes="sequential")
    config = DenoiserConfig(network=network, schedule=ScheduleConfig(kind="flow"), prediction_type="velocity")
    denoiser = build_denoiser(denoiser_config(config, {}, first_stage.latent_channels, conditioner))
    for p in denoiser.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return LatentDiffusion(first_stage, denoiser, conditioner, {"defaults": {"size": [32, 32], "steps": 2}})
