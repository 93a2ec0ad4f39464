"""DINOv2: the published names, and transformers' own networks with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_weights import dinov2_as_published, noise, randomise
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from darkroom.errors import DarkroomError
from darkroom.features.dinov2 import DINOV2_SIZES, DinoV2, DinoV2Config, dinov2_file, load_dinov2

TINY = DinoV2Config(width=32, depth=3, heads=4, grid=5)
TINY_REGISTERS = DinoV2Config(width=32, depth=3, heads=4, grid=5, registers=4)


def pair(config: DinoV2Config, folder: Path) -> tuple[DinoV2, Any]:
    """Ours, filled from a file in the published layout, and theirs."""
    sizes = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.grid * config.patch,
        "patch_size": config.patch,
    }
    torch.manual_seed(0)
    if config.registers:
        theirs: Any = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=config.registers))
    else:
        theirs = Dinov2Model(Dinov2Config(**sizes))
    randomise(theirs)
    for name, parameter in theirs.named_parameters():
        if "lambda" in name or "token" in name or "position" in name:
            torch.nn.init.normal_(parameter, mean=0.5 if "lambda" in name else 0.0, std=0.5)
    torch.save(dinov2_as_published(theirs.state_dict()), folder / "dinov2.pth")
    return load_dinov2("", folder / "dinov2.pth", config), theirs.eval()


@pytest.mark.parametrize("config", [TINY, TINY_REGISTERS], ids=["plain", "registers"])
def test_equals_transformers(config: DinoV2Config, tmp_path: Path) -> None:
    ours, theirs = pair(config, tmp_path)
    image = noise(2, 3, 70, 70)
    with torch.no_grad():
        expected = theirs(image).last_hidden_state[:, 0]
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_other_sizes_equal_transformers_with_registers(tmp_path: Path) -> None:
    ours, theirs = pair(TINY_REGISTERS, tmp_path)
    image = noise(2, 3, 42, 56)
    with torch.no_grad():
        expected = theirs(image).last_hidden_state[:, 0]
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


def cubic(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Cubic convolution (Keys 1981) with a = -0.75, as torch has it, of (n, D) at places (m,); edges are repeated."""
    first = np.floor(places).astype(int)
    result = np.zeros((len(places), values.shape[1]))
    for step in range(-1, 3):
        x = np.abs(places - (first + step))
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, far)
        result += weight[:, None] * values[np.clip(first + step, 0, len(values) - 1)]
    return result


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_positions_of_other_sizes_without_registers(offset: float) -> None:
    """Facebook's code samples the grid at (i + 1/2) * 5 / (n + 0.1) - 1/2; transformers leaves the 0.1 out."""
    network = DinoV2(TINY)
    network.pos_embed.copy_(noise(1, 26, 32))
    assert network.positions(5, 5) is network.pos_embed
    found = network.positions(4, 3)
    assert found.shape == (1, 1 + 12, 32) and found[:, 0].equal(network.pos_embed[:, 0])
    square = network.pos_embed[0, 1:].view(5, 5, 32).double().numpy()
    rows, columns = ((np.arange(n) + 0.5) * 5 / (n + offset) - 0.5 for n in (4, 3))
    down = np.stack([cubic(square[:, i], rows) for i in range(5)], 1)  # (4, 5, D)
    both = np.stack([cubic(down[i], columns) for i in range(4)])  # (4, 3, D)
    difference = np.abs(both.reshape(12, 32) - found[0, 1:].numpy()).max()
    assert difference < 1e-5 if offset else difference > 0.01


def test_layouts_of_the_published_files() -> None:
    """Parameters of the model card (86 M and so on), with the token of the training that every file holds."""
    millions = {"vits14": 22.06, "vitb14": 86.58, "vitl14": 304.37}
    for size, config in DINOV2_SIZES.items():
        with torch.device("meta"):
            state = DinoV2(config).state_dict()
        name = size.removesuffix("-reg4")
        count = sum(value.numel() for value in state.values()) - config.registers * config.width
        assert count / 1e6 == pytest.approx(millions[name], abs=0.02), size
        assert state["pos_embed"].shape == (1, 1370, config.width) and ("register_tokens" in state) == ("reg4" in size)
        assert state["blocks.0.attn.qkv.weight"].shape == (3 * config.width, config.width)


def test_where_to_put_the_file_and_sizes_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    with pytest.raises(DarkroomError, match=r"dinov2_vitb14_reg4_pretrain\.pth"):
        dinov2_file("vitb14-reg4")
    (tmp_path / "dinov2_vits14_pretrain.pth").touch()
    assert dinov2_file("vits14").name == "dinov2_vits14_pretrain.pth"
    with pytest.raises(DarkroomError, match="multiples of its patch of 14"):
        DinoV2(TINY)(noise(1, 3, 70, 71))
