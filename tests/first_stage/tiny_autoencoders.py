"""Small autoencoders in float64, one of each kind that tiling must know."""

from __future__ import annotations

from typing import Any

import torch

from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.grain import Grain, OutputGrain

TINY: dict[str, Any] = {
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "z_channels": 3,
    "embed_dim": 2,
    "norm_groups": 4,
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "kl": {},
    "three levels": {"channel_mult": (1, 2, 3), "bottleneck_attention": False},
    "attention levels": {"attention_levels": (0, 1)},
    "vq": {"codebook_size": 16},
    "no quant_conv": {"quant_conv": False, "z_channels": 2},
    "grey to two": {
        "in_channels": 1,
        "out_channels": 2,
        "num_res_blocks": 2,
        "decoder_channels": 4,
        "decoder_num_res_blocks": 1,
    },
    "f1": {"channel_mult": (1,)},
    "grain": {"channel_mult": (1, 2, 3), "decoder_grain": True},
    "output grain": {"channel_mult": (1, 2, 3), "output_grain": True},
}


def make_autoencoder(name: str) -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = Autoencoder(AutoencoderConfig(**(TINY | AUTOENCODERS[name]))).double().eval()
        for parameter in autoencoder.parameters():  # gains and biases of norms that matter
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.5)
        for module in autoencoder.modules():
            if isinstance(module, Grain):  # it begins as nothing
                torch.nn.init.normal_(module.project.weight)
            if isinstance(module, OutputGrain):
                torch.nn.init.normal_(module.variance.weight)
    return autoencoder.requires_grad_(False)
