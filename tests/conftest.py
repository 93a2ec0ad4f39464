"""Fixtures that several tests share. Helpers beside this file (parity_data, gaussian_mixture) are imported by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gaussian_mixture import GaussianMixture, make_mixture

LAST = "test_goldens_are_used.py"  # looks back at what the other tests have read


@pytest.fixture(scope="session")
def gaussian_mixture() -> GaussianMixture:
    """A data distribution with exact x0 and score at every noise level."""
    return make_mixture()


def reads_goldens(path: Path) -> bool:
    return "parity_data" in path.read_text()


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes (`-n`) each takes one thread."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST)
    if config.pluginmanager.hasplugin("xdist"):
        # A file's fixtures are made once; the process that reads goldens is the one that is asked which it has read.
        groups = {path: "goldens" if reads_goldens(path) else str(path) for path in {item.path for item in items}}
        for item in items:
            item.add_marker(pytest.mark.xdist_group(groups[item.path]))


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> bool:
    """Whether every test file takes part in this session, and all of its tests but the slow ones."""
    config = request.config
    files = {item.path for item in request.session.items}
    chosen = config.option.keyword or config.option.lf or any("::" in argument for argument in config.args)
    return not chosen and files >= {p for p in Path(__file__).parent.rglob("test_*.py") if reads_goldens(p)}
