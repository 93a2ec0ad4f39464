"""Networks and schedules of official files out of their tensors: the config is found again, whatever it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from darkroom.build import build_denoiser
from darkroom.config import from_dict, to_dict
from darkroom.diffusion.schedules import ScheduleConfig
from darkroom.errors import DarkroomError
from darkroom.interop.compvis_networks import infer_network
from darkroom.interop.compvis_schedule import buffers, read_schedule
from darkroom.interop.tensor_source import Place, fits, inverse, taken
from darkroom.networks.kinds import NETWORKS

SMALL = {"kind": "unet", "model_channels": 32, "num_res_blocks": 1}
TRANSFORMER = {"use_spatial_transformer": True, "num_heads": 2}
UNETS: dict[str, dict[str, Any]] = {
    "plain": {"channel_mult": [1, 2], "attention_resolutions": [2]},
    "one level": {"channel_mult": [1], "attention_resolutions": []},
    "no attention outside of the middle": {"channel_mult": [1, 2, 3], "attention_resolutions": []},
    "without convolutions between levels": {"channel_mult": [1, 2, 2], "conv_resample": False},
    "residual resampling": {"channel_mult": [1, 1, 2], "resblock_updown": True, "use_scale_shift_norm": True},
    "blocks per level": {"channel_mult": [1, 2, 2], "num_res_blocks": [1, 3, 2]},
    "blocks per level, residual": {"channel_mult": [1, 2, 2], "num_res_blocks": [3, 1, 2], "resblock_updown": True},
    "context": TRANSFORMER | {"channel_mult": [1, 2], "context_dim": 40},
    "context of the width of a level": TRANSFORMER | {"channel_mult": [1, 2], "context_dim": 64},
    "transformer without context": TRANSFORMER | {"channel_mult": [1, 2], "attention_resolutions": [1, 2]},
    "depths": TRANSFORMER
    | {"channel_mult": [1, 2, 4], "attention_resolutions": [2, 4], "transformer_depth": [1, 2, 3], "context_dim": 24},
    "linear": TRANSFORMER | {"channel_mult": [1, 2], "context_dim": 24, "use_linear_in_transformer": True},
    "classes": {"channel_mult": [1, 2], "num_classes": 7},
    "a number": {"channel_mult": [1, 2], "num_classes": "continuous", "adm_in_channels": None},
    "a vector": {"channel_mult": [1, 2], "num_classes": "sequential", "adm_in_channels": 48},
}
OTHERS: dict[str, dict[str, Any]] = {
    "dit": {"kind": "dit", "input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 1, "num_classes": 11},
    "mmdit": {
        "kind": "mmdit",
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "context_dim": 40,
        "adm_in_channels": 24,
        "pos_embed_max_size": 8,
    },
    "mmdit with norms": {
        "kind": "mmdit",
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 4,
        "context_dim": 40,
        "adm_in_channels": 24,
        "pos_embed_max_size": 6,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 1],
        "qkv_bias": False,
        "mlp_ratio": 2.0,
    },
    "mmdit with layer norms": {
        "kind": "mmdit",
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 4,
        "context_dim": 40,
        "adm_in_channels": 24,
        "pos_embed_max_size": 6,
        "qk_norm": "ln",
    },
}


@pytest.mark.parametrize("name", [*UNETS, *OTHERS])
def test_the_config_is_found_in_the_shapes(name: str) -> None:
    config = SMALL | UNETS[name] if name in UNETS else OTHERS[name]
    with torch.device("meta"):
        network = build_denoiser({"network": config}).network
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        facts = {key: config[key] for key in ("num_heads",) if key in config}
        found = infer_network(shapes, facts, "the file")
        again = from_dict(type(network.config), found, "network")  # type: ignore[arg-type]
        rebuilt = NETWORKS[type(again)](again)
    assert {key: tuple(tensor.shape) for key, tensor in rebuilt.state_dict().items()} == shapes
    given = to_dict(network.config)  # type: ignore[arg-type]
    mine = to_dict(again)
    if given["kind"] == "unet":
        levels = [2**level for level in range(len(given["channel_mult"]))]
        for c in (given, mine):
            c["attention_resolutions"] = [f for f in levels if f in c["attention_resolutions"]]
    assert mine == given


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DarkroomError, match=r"^x\.ckpt lacks 'net\.out\.2\.weight': the file is incomplete"):
        infer_network(_unet_without("out.2.weight"), {}, "x.ckpt", "net.")
    shapes = _unet_without("out.2.weight") | {"out.2.weight": ()}
    with pytest.raises(DarkroomError, match=r"'net\.out\.2\.weight' has shape \(\)"):
        infer_network(shapes, {}, "x.ckpt", "net.")
    odd = _unet_without("out.2.weight") | {"out.2.weight": (4, 32, 3, 3), "input_blocks.0.0.weight": (24, 4, 3, 3)}
    with pytest.raises(DarkroomError, match=r"widths \[32, 64\] are no multiples of 24"):
        infer_network(odd, {}, "x.ckpt", "net.")


def _unet_without(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_denoiser({"network": SMALL | UNETS["plain"]}).network
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if key != name}


# ---- schedules

SCHEDULES: dict[str, dict[str, Any]] = {
    "usual": {"beta_start": 0.0015, "beta_end": 0.0195},
    "other ends": {"kind": "ldm", "beta_start": 0.0009, "beta_end": 0.0133},
    "linear": {"kind": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "square roots": {"kind": "sqrt", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"kind": "cosine"},
    "short": {"kind": "ldm", "beta_start": 0.001, "beta_end": 0.1, "timesteps": 50},
    "zero terminal SNR": {"beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_found_in_their_betas(name: str, dtype: torch.dtype) -> None:
    config = SCHEDULES[name]
    usual = {"beta_start": 0.00085, "beta_end": 0.012} if "zero" in name else SCHEDULES["usual"]
    if dtype == torch.float16 and name not in ("usual", "cosine", "zero terminal SNR"):
        return  # half precision does not tell the ends of other schedules
    betas = buffers(config)["betas"].to(dtype)
    found = from_dict(ScheduleConfig, read_schedule(betas, usual, "the file"), "schedule")
    assert torch.equal(buffers(to_dict(found))["betas"], buffers(config)["betas"])


def test_betas_of_no_known_schedule_are_refused() -> None:
    with pytest.raises(DarkroomError, match=r"its 10 betas, 0\.1 to 0\.01, are of no known schedule"):
        read_schedule(torch.linspace(0.1, 0.01, 10), SCHEDULES["usual"], "the file")
    with pytest.raises(DarkroomError, match="'flow' has no table of betas"):
        buffers({"kind": "flow"})


# ---- places

PLACES = {
    "same": (Place(("a",)), (6, 4)),
    "a convolution": (Place(("a",), shape=(6, 4, 1, 1)), (6, 4)),
    "transposed": (Place(("a",), "transposed"), (6, 4)),
    "swapped": (Place(("a",), "swapped"), (6, 4)),
    "repeated": (Place(("a", "b"), "repeated"), (6, 4)),
    "joined": (Place(("a", "b", "c")), (6, 4)),
    "joined vectors": (Place(("a", "b")), (6,)),
}


@pytest.mark.parametrize("name", PLACES)
def test_tensors_go_to_their_places_and_come_back(name: str) -> None:
    place, shape = PLACES[name]
    ours = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    targets = inverse({"x": place}, {"x": shape}, {"x": "float32"})
    written = {key: target.made({"x": ours}) for key, target in targets.items()}
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {k: t.shape for k, t in targets.items()}
    assert fits(place, shape, {key: tuple(tensor.shape) for key, tensor in written.items()})
    assert torch.equal(taken(place, written, shape), ours)
    if name not in ("same", "a convolution", "repeated"):
        assert not torch.equal(next(iter(written.values())).flatten(), ours.flatten())
    wrong = {key: (5, *tensor.shape[1:]) for key, tensor in written.items()}
    assert not fits(place, shape, wrong)


def test_parts_of_one_tensor() -> None:
    table = {name: Place(("qkv",), part=(i, 3)) for i, name in enumerate("qkv")}
    packed = torch.arange(36.0).view(9, 4)
    shapes = dict.fromkeys("qkv", (3, 4))
    ours = {name: taken(place, {"qkv": packed}, (3, 4)) for name, place in table.items()}
    assert torch.equal(ours["k"], packed[3:6])
    (target,) = inverse(table, shapes, dict.fromkeys("qkv", "float32")).values()
    assert target.needs == ("q", "k", "v") and target.shape == (9, 4) and torch.equal(target.made(ours), packed)
    assert fits(table["q"], (3, 4), {"qkv": (9, 4)}) and not fits(table["q"], (3, 4), {"qkv": (8, 4)})


def test_places_that_contradict() -> None:
    with pytest.raises(DarkroomError, match="should be one tensor and differ"):
        taken(Place(("a", "b"), "repeated"), {"a": torch.ones(2), "b": torch.zeros(2)}, (2,))
    with pytest.raises(DarkroomError, match="y and x would both be written as a"):
        inverse({"x": Place(("a",)), "y": Place(("a",))}, {"x": (2,), "y": (2,)}, {"x": "float32", "y": "float32"})
