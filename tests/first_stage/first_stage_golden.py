"""Reads the golden vectors of the first stage: weights from names, inputs from recipes, expected arrays."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkroom.first_stage.autoencoder import AutoencoderConfig

PARITY = Path(__file__).parents[1] / "parity"
TOLERANCE = 2e-5  # of tests/parity/README.md

_spec = importlib.util.spec_from_file_location("deterministic_weights", PARITY / "deterministic_weights.py")
assert _spec is not None and _spec.loader is not None
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)


def load_topic(topic: str) -> tuple[dict[str, Any], Any]:
    """(cases, arrays) of one golden topic; a missing file fails."""
    path = PARITY / "goldens" / f"{topic}.json"
    text = path.read_text() if path.exists() else gzip.decompress(path.with_suffix(".json.gz").read_bytes())
    return json.loads(text)["cases"], np.load(PARITY / "goldens" / f"{topic}.npz")


def state_dict(case: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The case's weights under `prefix`, with the prefix removed."""
    made = weights.make_state_dict(case["layout"], case.get("derived"), prefix, strip=bool(prefix))
    return {k: torch.as_tensor(v) for k, v in made.items()}


def make_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    makers = {"make_input": weights.make_input, "make_ints": weights.make_ints}
    return {
        name: torch.from_numpy(makers[kind](**recipe))
        for name, entry in case["inputs"].items()
        for kind, recipe in entry.items()
    }


def assert_golden(actual: Tensor, case: dict[str, Any], arrays: Any, name: str) -> None:
    """Within 2e-5 of the stored output, relative where values exceed 1."""
    entry = case["outputs"][name]
    actual = actual.detach()
    if "value" in entry:
        expected = torch.tensor(entry["value"], dtype=actual.dtype)
    else:
        assert list(actual.shape) == entry["shape"]
        stride = entry.get("flat_stride", 1)
        expected = torch.from_numpy(arrays[entry["array"]]).reshape(-1)
        actual = actual.contiguous().reshape(-1)[::stride]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def autoencoder_config(ddconfig: dict[str, Any], embed_dim: int) -> AutoencoderConfig:
    """The official hyper-parameters in our words."""
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
    )
