"""What recipes offer beyond the defaults trains, is saved, and generates: networks, objectives, sizes of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import darkroom
from darkroom.data.export import write_shapes
from darkroom.data.sources import DataConfig, ShapesDataset
from darkroom.latent_diffusion import LatentDiffusion

SHORT: dict[str, Any] = {"steps": 2, "batch_size": 4, "data.count": 16, "first_stage.train.steps": 1}


def nested(prefix: str, **options: Any) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in options.items()}


TABLE = {"denoiser.schedule.kind": "ldm", "denoiser.prediction_type": "epsilon"}
FLOW = {"denoiser.schedule.kind": "flow", "denoiser.prediction_type": "velocity"}
LEARNED = TABLE | {"denoiser.learned_variance": True}
TRANSFORMER = nested("denoiser.network", hidden_size=32, depth=2, num_heads=2, patch_size=2)
DIT = TRANSFORMER | {"denoiser.network.kind": "dit"}
MMDIT = TRANSFORMER | {"denoiser.network.kind": "mmdit"}
OURS = nested("denoiser.network", use_checkpoint=True, target_time=True)
CASES: dict[str, dict[str, Any]] = {
    "L_hybrid": LEARNED,
    "L_vlb": LEARNED | {"objective.loss_weighting": "vlb", "objective.time_sampling": "uniform"},
    "L_hybrid of a DiT": LEARNED | DIT,
    "v, zero terminal SNR": TABLE | {"denoiser.prediction_type": "v", "denoiser.schedule.zero_terminal_snr": True},
    "min-SNR": TABLE | {"objective.loss_weighting": "min_snr"},
    "x0, absolute error": TABLE | {"denoiser.prediction_type": "x0", "objective.loss_type": "l1"},
    "EDM": {"denoiser.schedule.kind": "edm", "denoiser.prediction_type": "edm", "objective.time_sampling": "edm"},
    "logit-normal times, a shift by size": FLOW
    | {"objective.time_sampling": "logit_normal"}
    | nested("denoiser.schedule", shift=2.0, shift_rule="sqrt", shift_places=[64, 256]),
    "U-Net, saved activations and target time": OURS,
    "U-Net without self-attention": {"denoiser.network.disable_self_attentions": [True, False]},
    "U-Net of SDXL's kind": nested(
        "denoiser.network", resblock_updown=True, use_scale_shift_norm=True, use_linear_in_transformer=True,
        num_head_channels=16, transformer_depth=[1, 2], legacy=False,
    ),
    "DiT": FLOW | DIT | OURS,
    "MMDiT of SD 3.5's kind": FLOW | MMDIT | OURS
    | nested("denoiser.network", qk_norm="rms", x_block_self_attn_layers=[0]),
}  # fmt: skip


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    darkroom.train("shapes-tiny", folder, overrides=SHORT, quiet=True)
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_options_of_recipes(name: str, first_stage: Path, tmp_path: Path) -> None:
    changes = {k: v for k, v in SHORT.items() if not k.startswith("first_stage")} | CASES[name]
    darkroom.train("shapes-tiny", tmp_path / "run", first_stage=first_stage, overrides=changes, quiet=True)
    model = darkroom.load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(model, LatentDiffusion)
    for key, value in CASES[name].items():
        config: Any = model.denoiser.config_dict  # type: ignore[assignment]
        path = key.split(".")
        for part in path[1:] if path[0] == "denoiser" else ():
            config = config[part]
        assert path[0] != "denoiser" or config == value, key
    solver = "ddpm" if model.denoiser.learned_variance else None
    result = model.generate("a red circle", seed=[1, 2], steps=3, solver=solver, size=(32, 32))
    assert result.images.shape == (2, 32, 32, 3) and result.images.std() > 0


def test_sizes_of_pictures_reach_the_network(tmp_path: Path) -> None:
    """`data.sizes` through the latent cache, training, validation, samples, and a request."""
    write_shapes(ShapesDataset(DataConfig(source="shapes:single", size=(48, 32), count=16), "train"), tmp_path / "data")
    changes = SHORT | {
        "data.source": str(tmp_path / "data"), "data.count": None, "data.validation": 0.2, "data.sizes": True,
        "conditioner.sizes": {"kind": "sizes", "width": 16}, "denoiser.network.num_classes": "sequential",
    }  # fmt: skip
    darkroom.train("shapes-tiny", tmp_path / "run", overrides=changes, quiet=True)
    model = darkroom.load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(model, LatentDiffusion) and model.conditioner.fields == ("text", "sizes")
    request = {"original_size": [900, 900]}
    result = model.generate("a red circle", seed=1, steps=2, size=(32, 32), sizes=request)
    assert result.settings[0]["request"]["conditions"] == {"sizes": [[900, 900, 0, 0, 32, 32]]}
