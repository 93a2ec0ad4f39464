"""All networks by their config, whose `kind` chooses one. A new network is one more entry in both lines."""

from __future__ import annotations

from typing import Any

from torch import nn

from darkroom.networks.dit import DiT, DiTConfig
from darkroom.networks.mmdit import MMDiT, MMDiTConfig
from darkroom.networks.unet import UNet, UNetConfig

AnyNetworkConfig = UNetConfig | DiTConfig | MMDiTConfig
NETWORKS: dict[type[Any], type[nn.Module]] = {UNetConfig: UNet, DiTConfig: DiT, MMDiTConfig: MMDiT}


def make_network(config: AnyNetworkConfig) -> nn.Module:
    """An untrained `network(x, time, conditioning, target_time) -> raw prediction`."""
    return NETWORKS[type(config)](config)
