"""Widths that follow from other parts of a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_facts import Facts

from darkroom.build import build_conditioner, build_denoiser, conditioner_config, denoiser_config
from darkroom.conditioning.classes import ClassEncoderConfig
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.text import TextEncoderConfig
from darkroom.denoiser import Denoiser, DenoiserConfig
from darkroom.errors import DarkroomError
from darkroom.networks.unet import UNetConfig

TEXT = TextEncoderConfig(width=16, depth=1, heads=2, head_width=8, length=8, vocabulary_size=40)
CAPTIONS = ["a red circle", "a blue square"]


def parts(encoders: dict[str, Any], stated: dict[str, Any] | None = None) -> tuple[Denoiser, Conditioner]:
    conditioner = build_conditioner(conditioner_config(encoders, Facts(["cat", "dog"], CAPTIONS)))
    network = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,))
    config = DenoiserConfig(network=network)
    return build_denoiser(denoiser_config(config, stated or {}, 4, conditioner)), conditioner


@pytest.mark.parametrize(
    ("encoders", "expected"),
    [
        ({}, (None, None, None)),
        ({"text": TEXT}, (16, None, None)),
        ({"text": TextEncoderConfig(**{**vars(TEXT), "vector": True})}, (16, 16, None)),
        ({"class": ClassEncoderConfig(width=8, slot="vector")}, (None, 8, None)),
        ({"class": ClassEncoderConfig(slot="label")}, (None, None, 3)),
        ({"class": ClassEncoderConfig(slot="label"), "text": TEXT}, (16, None, 3)),
    ],
)
def test_the_network_expects_what_the_conditioner_gives(encoders: dict[str, Any], expected: tuple[Any, ...]) -> None:
    denoiser, conditioner = parts(encoders)
    network: Any = denoiser.network
    assert (network.config.context_dim, network.config.adm_in_channels, network.config.num_classes) == expected
    assert network.config.in_channels == network.config.out_channels == 4
    conditioning = conditioner({"text": CAPTIONS, "class_label": ["cat", "dog"]})
    assert network(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 2.0]), conditioning).shape == (2, 4, 8, 8)


def test_a_stated_width_that_cannot_be_is_refused() -> None:
    with pytest.raises(DarkroomError, match=r'"denoiser.network.context_dim" is 32 in the recipe but 16 follows'):
        parts({"text": TEXT}, {"context_dim": 32})
    with pytest.raises(DarkroomError, match=r'"denoiser.network.num_classes" is 7 in the recipe but 3 follows'):
        parts({"class": ClassEncoderConfig(slot="label")}, {"num_classes": 7})
