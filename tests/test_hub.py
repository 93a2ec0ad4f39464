"""Models of the hub: only when one is named, from a cache on the disk, and one clear line where there is no network."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tiny_models import one_line, tiny_first_stage, tiny_model

from darkroom.errors import DarkroomError
from darkroom.hub import UNWANTED, WANTED, fetch
from darkroom.model_folder import find_source
from darkroom.model_io import load, load_first_stage, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one: every connection and every look-up of a name fails at once."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("Network is unreachable")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own layout of a cache, read without asking the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def repository(cache: Path, name: str) -> Path:
    """The folder of a repository's only revision."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    return place / "snapshots" / COMMIT


def test_a_model_in_the_cache(cache: Path) -> None:
    place = repository(cache, "someone/foxes")
    model = tiny_model()
    model.save(place / "model")
    loaded = load("hf:someone/foxes")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert find_source("hf:someone/foxes") == place / "model"
    assert find_source("hf:someone/foxes/model/darkroom.json") == place / "model" / "darkroom.json"
    assert find_source("hf:someone/foxes@main") == place / "model"


def test_one_file_of_a_repository(cache: Path, tmp_path: Path) -> None:
    place = repository(cache, "someone/codec")

    first_stage = tiny_first_stage()
    first_stage.shift, first_stage.scale = torch.tensor(0.0), torch.tensor(1.0)
    save(first_stage, place)
    assert torch.equal(load_first_stage("hf:someone/codec").scale, first_stage.scale)


def test_without_network_and_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for source in ("hf:someone/nothing", "hf:someone/nothing/vae/model.safetensors"):
        for offline in (True, False):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            with pytest.raises(DarkroomError, match=r"the hub cannot be reached|cannot be fetched") as error:
                load(source)
            assert source in one_line(error)


def test_nothing_is_asked_for_that_was_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would raise
    for source in ("someone/foxes", "runwayml/stable-diffusion-v1-5", "hf", "HF:someone/foxes"):
        with pytest.raises(DarkroomError, match="no such file or folder"):
            load(source)
    with pytest.raises(DarkroomError, match=r"pip install 'darkroom-ldm\[hub\]'") as error:
        load("hf:someone/foxes")
    one_line(error)


@pytest.mark.parametrize("source", ["hf:", "hf:foxes", "hf:a/../b", "hf:/etc/passwd", "hf:a b/c", "hf:../x/y"])
def test_bad_names(source: str) -> None:
    with pytest.raises(DarkroomError, match="is no name in the hub"):
        fetch(source)


def test_what_is_wanted_of_a_repository() -> None:
    """The library's own rule of patterns, on the files of a usual repository."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt",
        "tokenizer/vocab.json", "text_encoder_3/model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors", "darkroom.json", "first_stage/model.safetensors",
        "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    others = [
        "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "modeling.py", "README.md",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors", "vae/model.onnx", "image.png",
    ]  # fmt: skip
    kept = filter_repo_objects(wanted + others, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    assert list(kept) == wanted
