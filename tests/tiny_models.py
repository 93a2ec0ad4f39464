"""Small models with random weights, and a disk that is full, for the tests of saving, loading and the command line."""

from __future__ import annotations

import builtins
import os
from typing import Any

import pytest
import torch
from data_facts import Facts

from darkroom.build import build_conditioner, build_denoiser, build_first_stage, conditioner_config
from darkroom.conditioning.classes import ClassEncoderConfig
from darkroom.conditioning.text import TextEncoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.latent_diffusion import LatentDiffusion

FIRST_STAGE = {
    "kind": "kl",
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 3,
    "embed_dim": 3,
}
CLASSES = ["boot", "coat", "shirt"]


def tiny_first_stage() -> FirstStage:
    torch.manual_seed(0)
    first_stage = build_first_stage(FIRST_STAGE)
    first_stage._set(0.25, torch.tensor([1.5, 2.0, 0.5]))
    return first_stage


def tiny_model(condition: str | None = "text", with_first_stage: bool = True) -> LatentDiffusion:
    """Random weights, 16x16 images at f 2."""
    torch.manual_seed(1)
    encoders: dict[str, Any] = {}
    if condition == "text":
        encoders["text"] = TextEncoderConfig(width=16, depth=1, heads=1, head_width=16, length=8, vocabulary_size=60)
    if condition == "class":
        encoders["class"] = ClassEncoderConfig(width=16)
    conditioner = build_conditioner(
        conditioner_config(encoders, Facts(CLASSES, ["a red fox", "a blue snail on a box"]))
    )
    network = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_heads": 2,
        "use_spatial_transformer": condition is not None,
        "context_dim": conditioner.context_dim,
    }
    denoiser = build_denoiser({"network": network})
    with torch.no_grad():  # an untrained output layer is zero and would hide differences
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    info = {"name": "tiny", "defaults": {"size": [16, 16], "steps": 3}}
    return LatentDiffusion(tiny_first_stage() if with_first_stage else None, denoiser, conditioner, info)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Files whose path holds `name` are /dev/full: the kernel itself answers that no space is left."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    original = builtins.open

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "x" in mode and name in str(file):
            return original("/dev/full", mode.replace("x", "w"), *args, **kwargs)
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The text of an error that a user sees."""
    text = str(error.value)
    assert text and "\n" not in text
    return text
