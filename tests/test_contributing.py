"""The example of CONTRIBUTING.md: its text, executed, is a condition like any other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from darkroom.build import build_conditioner, build_denoiser, build_first_stage, denoiser_config
from darkroom.conditioning import encoders
from darkroom.denoiser import DenoiserConfig
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save
from darkroom.networks.unet import UNetConfig
from darkroom.objective import ObjectiveConfig
from darkroom.training.denoiser_step import DenoiserPhase

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
MARK = "<!-- the example that tests/test_contributing.py executes -->\n"


def blocks() -> tuple[str, str]:
    """The file and the row, as they are printed."""
    example, row = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index(MARK) :], re.DOTALL)[:2]
    return example, row


@pytest.fixture
def palette(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as a module, its row in the table."""
    example, row = blocks()
    module = ModuleType("palette_of_contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(example, "CONTRIBUTING.md", "exec"), module.__dict__)
    entry: dict[str, Any] = eval("{" + row.partition("#")[0] + "}", module.__dict__)
    for kind, encoder in entry.items():
        monkeypatch.setitem(encoders.ENCODERS, kind, encoder)
    return module


def test_it_is_short_and_one_row() -> None:
    example, row = blocks()
    assert len(example.splitlines()) <= 60 and len(row.splitlines()) == 1


def test_it_trains_generates_and_is_saved(palette: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first_stage = build_first_stage({"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4})
    config = {"encoders": {"colours": {"kind": "palette", "colours": 2, "width": 16, "drop_rate": 0.5}}}
    conditioner = build_conditioner(config, first_stage)
    network = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,))
    channels = first_stage.latent_channels
    denoiser = build_denoiser(denoiser_config(DenoiserConfig(network=network), {}, channels, conditioner))
    for p in denoiser.parameters():  # layers that begin at zero would hide the condition
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)

    colours = torch.rand(8, 2, 3)
    batch = {"image": torch.rand(8, 3, 16, 16) * 2 - 1, "palette": colours}
    phase = DenoiserPhase(denoiser, conditioner, first_stage, ObjectiveConfig())
    loss, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in conditioner.parameters())  # some dropped, some not

    dropped = conditioner(batch, torch.Generator().manual_seed(0)).context
    nothing = conditioner.null(8).context
    share = sum(torch.equal(a, b) for a, b in zip(dropped, nothing, strict=True))
    assert dropped.shape == nothing.shape == (8, 2, 16) and 0 < share < 8

    model = LatentDiffusion(first_stage, denoiser, conditioner, {"defaults": {"size": [16, 16], "steps": 2}})
    warm, cold = [[1, 0, 0], [1, 0.5, 0]], [[0, 0, 1], [0, 1, 1]]
    one = model.generate(palette=warm, seed=1)
    assert not np.array_equal(one.images, model.generate(palette=cold, seed=1).images)
    both = model.generate(palette=[warm, cold], seed=[1, 1])
    assert both.images.shape[0] == 2 and np.abs(both.images[0].astype(int) - one.images[0]).max() <= 1
    with pytest.raises(DarkroomError, match="give 2 colours"):
        model.generate(palette=[[1, 0, 0]], seed=1)
    with pytest.raises(DarkroomError, match="palette cannot be understood"):  # what its file does not check itself
        model.generate(palette={"warm": 1}, seed=1)
    again = load(save(model, tmp_path / "model"))
    assert isinstance(again, LatentDiffusion)
    assert np.array_equal(again.generate(palette=warm, seed=1).images, one.images)


def test_the_page_of_checkpoints_names_every_module_of_interop() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page[page.index("## Where it is in the code") :]
    named = set(re.findall(r"`(\w+)`", table))
    modules = {path.stem for path in (root / "src" / "darkroom" / "interop").glob("*.py")} - {"__init__"}
    assert (
        modules <= named
        and {name for name in named if not (root / "src" / "darkroom" / "interop" / f"{name}.py").is_file()} == set()
    )
