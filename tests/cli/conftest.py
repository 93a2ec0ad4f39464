"""One set of tiny models for all command-line tests, and a way to run a command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_first_stage, tiny_model

from darkroom.cli.main import main
from darkroom.evaluation.extractors import Embedding, PerceptualDistance
from darkroom.model_io import save

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models text, class, none (unconditional), bare (no first stage) and fs (first stage only)."""
    folder = tmp_path_factory.mktemp("models")
    for condition in ("text", "class", None):
        tiny_model(condition).save(folder / str(condition).lower(), card="# tiny\n")
    tiny_model(with_first_stage=False).save(folder / "bare")
    save(tiny_first_stage(), folder / "fs")
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("generate", ...) -> exit status, standard output, standard error; in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """The command must leave with status 2, one line on standard error and nothing else; gives that line."""

    def refused(*arguments: object) -> str:
        status, out, error = run(*arguments)
        assert status == 2 and out == "" and error.startswith("darkroom: ") and error.count("\n") == 1, (out, error)
        return error

    return refused


@pytest.fixture
def quick_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No VGG files of the machine, and a network that takes no time."""

    def embed(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(image.mean(1, keepdim=True), 4).flatten(1)

    def extractors(device: torch.device, channels: int = 3) -> tuple[PerceptualDistance, Embedding]:
        distance = PerceptualDistance("perceptual-darkroom", lambda a, b: (embed(a) - embed(b)).abs().mean(1), "0" * 64)
        return distance, Embedding("darkroom", embed, "1" * 64)

    monkeypatch.setattr("darkroom.evaluation.first_stage.default_extractors", extractors)
