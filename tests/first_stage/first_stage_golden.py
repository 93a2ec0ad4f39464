"""Reads the golden vectors of the first stage: weights from names, inputs from recipes, expected arrays."""

from __future__ import annotations

from typing import Any

import torch
from parity_data import Case, case_names, load_case, weights
from torch import Tensor

from darkroom.first_stage.autoencoder import AutoencoderConfig

TOLERANCE = 2e-5  # of tests/parity/README.md


def load_topic(topic: str) -> dict[str, Case]:
    """All cases of one golden topic; a missing file fails."""
    return {name: load_case(topic, name) for name in case_names(topic)}


def state_dict(case: Case, prefix: str = "") -> dict[str, Tensor]:
    """The case's weights under `prefix`, with the prefix removed."""
    made = weights().make_state_dict(case.spec["layout"], case.spec.get("derived"), prefix, strip=bool(prefix))
    return {k: torch.as_tensor(v) for k, v in made.items()}


def make_inputs(case: Case) -> dict[str, Tensor]:
    return {name: case.input(name) for name in case.spec["inputs"]}


def assert_golden(actual: Tensor, case: Case, name: str) -> None:
    """Within 2e-5 of the stored output, relative where values exceed 1."""
    expected = torch.as_tensor(case.output(name), dtype=actual.dtype)
    torch.testing.assert_close(actual.detach().contiguous(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def autoencoder_config(ddconfig: dict[str, Any], embed_dim: int, n_embed: int | None = None) -> AutoencoderConfig:
    """The official hyper-parameters in our words; `n_embed` is that of a VQ autoencoder."""
    assert ddconfig["double_z"] == (n_embed is None)
    sizes = [ddconfig["resolution"] // 2**i for i in range(len(ddconfig["ch_mult"]))]
    return AutoencoderConfig(
        in_channels=ddconfig["in_channels"],
        out_channels=ddconfig["out_ch"],
        channels=ddconfig["ch"],
        channel_mult=tuple(ddconfig["ch_mult"]),
        num_res_blocks=ddconfig["num_res_blocks"],
        attention_levels=tuple(i for i, size in enumerate(sizes) if size in ddconfig["attn_resolutions"]),
        z_channels=ddconfig["z_channels"],
        embed_dim=embed_dim,
        dropout=ddconfig["dropout"],
        bottleneck_attention=ddconfig.get("attn_type", "vanilla") != "none",
        codebook_size=n_embed,
    )
