"""Folders for files of hundreds of megabytes, pipelines of the diffusers library, and the command that must refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from darkroom.cli.main import main


@pytest.fixture
def big_path(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: pytest keeps its own for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`darkroom convert` or another command must leave with status 2 and one line on standard error; gives the line."""

    def refused(*arguments: object) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, error = capfd.readouterr()
        assert status == 2 and out == "" and error.startswith("darkroom: ") and error.count("\n") == 1, (out, error)
        return error

    return refused


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small pipeline of each kind, as diffusers saves it."""
    from diffusers_models import NAMES, write_pipeline
    from diffusers_runs import silence

    silence()
    place = tmp_path_factory.mktemp("pipelines")
    for name in NAMES:
        write_pipeline(name, place / name)
    return place
