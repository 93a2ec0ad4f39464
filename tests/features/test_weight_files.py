"""Published weight files: where they are looked for, and what is made of those that hold something else."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features.weight_files import fill, find_weights, need_weights, read_weights, weights_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    return tmp_path


def test_the_first_name_that_is_there(folder: Path) -> None:
    assert weights_folder() == folder
    assert find_weights(["a.pth", "b/c.pth"]) is None
    with pytest.raises(DarkroomError, match=r"put a\.pth or b/c\.pth \(from there\) into"):
        need_weights(["a.pth", "b/c.pth"], "it", "there")
    (folder / "b").mkdir()
    (folder / "b" / "c.pth").touch()
    assert find_weights(["a.pth", "b/c.pth"]) == need_weights(["b/c.pth"], "it", "there") == folder / "b" / "c.pth"


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "state_dict", "state_dict legacy"])
def test_every_form_gives_the_same_tensors(folder: Path, form: str) -> None:
    state = {"one": torch.arange(6.0).view(2, 3), "two": torch.ones(2, dtype=torch.float16)}
    path = folder / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        content = {"epoch": 3, "state_dict": state} if "state_dict" in form else state
        torch.save(content, path, _use_new_zipfile_serialization="legacy" not in form)
    found = read_weights(path)
    assert found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["zip", "legacy", "text"])
def test_nothing_in_a_file_is_executed(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = folder / "w.pth"
    if form == "text":
        path.write_bytes(b"not weights at all")
    else:
        torch.save({"w": _Evil()}, path, _use_new_zipfile_serialization=form == "zip", pickle_module=pickle)
    with pytest.raises(DarkroomError) as error:
        read_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "executed").exists()


def test_a_file_that_cannot_be_opened(folder: Path) -> None:
    with pytest.raises(DarkroomError, match="cannot read"):
        read_weights(folder / "absent.pth")


def test_a_network_is_filled_strictly(folder: Path) -> None:
    """torchvision's own Inception, for example, has other classes than that of FID."""
    network, path = nn.Linear(2, 3), folder / "w.pth"
    state: dict[str, Tensor] = {"weight": torch.ones(3, 2, dtype=torch.float16), "bias": torch.arange(3.0)}
    fill(network, state, path)
    assert network.weight.dtype == torch.float32 and network.bias.tolist() == [0.0, 1.0, 2.0]
    for other, problem in (
        ({"weight": state["weight"]}, "has no bias"),
        (state | {"extra": torch.zeros(1)}, "has extra, which has no place"),
        (state | {"bias": torch.zeros(4)}, r"has bias of shape \[4\], not \[3\]"),
    ):
        with pytest.raises(DarkroomError, match=problem):
            fill(network, other, path)
