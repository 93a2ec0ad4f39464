"""What a file holds besides the model's own tensors goes on its way through a loaded model, whatever its size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official_files import golden, write_checkpoint
from torch import Tensor

from darkroom.errors import DarkroomWarning
from darkroom.exchange import export
from darkroom.first_stage.first_stage import FirstStage
from darkroom.interop.first_stage_files import same_bits
from darkroom.interop.kept_tensors import CARRIED
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, save

Make = Callable[[Path], tuple[Path, dict[str, Tensor]]]
LARGE, SMALL = "loss.perceptual_loss.net.0.weight", "loss.logvar"
REST = {LARGE: torch.arange(CARRIED + 1, dtype=torch.float32), SMALL: torch.tensor(0.25)}


def whole(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    _, state = golden("latent_diffusion_tiny", "tiny_cin")
    state |= {f"first_stage_model.{name}": tensor for name, tensor in REST.items()}
    return write_checkpoint(tmp_path / "cin.ckpt", state), state


def stage(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    _, state = golden("autoencoder_kl", "kl_f8_attn")
    state |= REST
    return write_checkpoint(tmp_path / "kl.ckpt", state), state


def contents(path: Path) -> dict[str, Tensor]:
    file = open_tensor_file(path)
    return file.read(file.shapes)


def same(written: dict[str, Tensor], state: dict[str, Tensor], without: tuple[str, ...] = ()) -> bool:
    """Equal; the network's tensors are the averaged ones."""
    averaged = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in state}
    names = {n: averaged[n] if n.startswith("model.diffusion") and averaged[n] in state else n for n in state}
    return written.keys() == state.keys() - set(without) and all(
        same_bits(written[n], state[names[n]]) for n in written
    )


@pytest.mark.parametrize("make", [whole, stage])
def test_large_tensors_stay_in_their_file_until_an_export(make: Make, tmp_path: Path) -> None:
    path, state = make(tmp_path)
    model = load(path, device="cpu")
    assert isinstance(model, LatentDiffusion | FirstStage)
    prefix = "first_stage_model." if isinstance(model, LatentDiffusion) else ""
    assert list(model.kept.large.shapes) == [prefix + LARGE] and prefix + SMALL in model.kept.tensors
    assert same(contents(export(model, tmp_path / "direct.safetensors", format="compvis")), state)
    save(model, tmp_path / "ours")
    for _ in range(2):  # the second time over itself
        model = load(tmp_path / "ours", device="cpu")
        save(model, tmp_path / "ours")
        assert same(contents(export(model, tmp_path / "again.ckpt", format="compvis")), state)
    if isinstance(model, LatentDiffusion):
        export(model, tmp_path / "theirs", format="diffusers")
        model = load(tmp_path / "theirs", device="cpu")
        assert same(contents(export(model, tmp_path / "last.safetensors", format="compvis")), state)


@pytest.mark.parametrize("make", [whole, stage])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_is_no_longer_there_is_told(make: Make, is_gone: bool, tmp_path: Path) -> None:
    path, state = make(tmp_path)
    model = load(path, device="cpu")
    name = next(n for n in state if n.endswith(LARGE))
    if is_gone:
        path.unlink()
    else:
        write_checkpoint(path, state | {name: state[name] * 2}, more=1)
    for target in ("out.safetensors", "ours"):
        with pytest.warns(DarkroomWarning, match=rf"{path.name} has changed or gone .* 1 tensor .*{LARGE}\) are left"):
            if target == "ours":
                save(model, tmp_path / target)
            else:
                export(model, tmp_path / target, format="compvis")
    assert same(contents(tmp_path / "out.safetensors"), state, without=(name,))
    model = load(tmp_path / "ours", device="cpu")
    assert same(contents(export(model, tmp_path / "again.safetensors", format="compvis")), state, without=(name,))
