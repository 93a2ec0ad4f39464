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
from darkroom.networks.dit import DiTConfig
from darkroom.networks.mmdit import MMDiTConfig
from darkroom.networks.unet import UNetConfig

TEXT = TextEncoderConfig(width=16, depth=1, heads=2, head_width=8, length=8, vocabulary_size=40)
CAPTIONS = ["a red circle", "a blue square"]


UNET = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,))
DIT = DiTConfig(hidden_size=32, depth=1, num_heads=2)
MMDIT = MMDiTConfig(hidden_size=32, depth=1, num_heads=2)
Network = UNetConfig | DiTConfig | MMDiTConfig


def parts(
    encoders: dict[str, Any], stated: dict[str, Any] | None = None, network: Network = UNET
) -> tuple[Denoiser, Conditioner]:
    conditioner = build_conditioner(conditioner_config(encoders, Facts(["cat", "dog"], CAPTIONS)))
    config = DenoiserConfig(network=network)
    return build_denoiser(denoiser_config(config, stated or {}, 4, conditioner)), conditioner


@pytest.mark.parametrize("kind", [UNET, DIT, MMDIT], ids=lambda c: c.kind)
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
def test_the_network_expects_what_the_conditioner_gives(
    kind: Network, encoders: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    if kind is MMDIT and expected[0] is None:
        with pytest.raises(DarkroomError, match="needs a context"):
            parts(encoders, network=kind)
        return
    denoiser, conditioner = parts(encoders, network=kind)
    assert denoiser.config_dict["network"]["kind"] == kind.kind
    assert build_denoiser(denoiser.config_dict).config_dict == denoiser.config_dict
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


@pytest.mark.parametrize("kind", [UNET, DIT, MMDIT], ids=lambda c: c.kind)
def test_a_learned_variance_doubles_the_output(kind: Network) -> None:
    conditioner = build_conditioner(conditioner_config({"text": TEXT}, Facts([], CAPTIONS)))
    config = denoiser_config(DenoiserConfig(network=kind, learned_variance=True), {}, 4, conditioner)
    denoiser = build_denoiser(config)
    x, level = torch.zeros(2, 4, 8, 8), denoiser.schedule.level(500.0)
    raw = denoiser.network(x, torch.tensor([1.0, 2.0]), conditioner({"text": CAPTIONS}))
    assert raw.shape == (2, 8, 8, 8)
    assert denoiser(x, level, conditioner({"text": CAPTIONS})).shape == x.shape
