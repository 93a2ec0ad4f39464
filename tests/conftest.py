"""Fixtures that several tests share. Helpers beside this file (parity_data, gaussian_mixture) are imported by name."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from gaussian_mixture import GaussianMixture, make_mixture

LAST = "test_goldens_are_used.py"  # looks back at what the other tests have read


@pytest.fixture(scope="session")
def gaussian_mixture() -> GaussianMixture:
    """A data distribution with exact x0 and score at every noise level."""
    return make_mixture()


TESTS = Path(__file__).parent


@cache
def golden_readers() -> frozenset[str]:
    """`parity_data` and the helper modules that import it, or each other."""
    helpers = {path.stem: path.read_text() for path in TESTS.rglob("*.py") if not path.name.startswith("test_")}
    found, known = {"parity_data"}, set[str]()
    while found != known:
        known = set(found)
        found |= {
            name for name, text in helpers.items() if any(f"import {k}" in text or f"from {k}" in text for k in known)
        }
    return frozenset(found)


@cache
def reads_goldens(path: Path) -> bool:
    return any(name in path.read_text() for name in golden_readers())


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes (`-n`) each takes one thread."""
    os.environ.setdefault("DARKROOM_KEEP_MEMORY", "0")  # tests of what memory is taken look at it afterwards
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A file's fixtures are made once; the process that reads goldens is the one that is asked which it has read."""
    if item.config.pluginmanager.hasplugin("xdist"):
        item.add_marker(pytest.mark.xdist_group("goldens" if reads_goldens(item.path) else str(item.path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> bool:
    """Whether every test file takes part in this session, and all of its tests but the slow ones."""
    config = request.config
    files = {item.path for item in request.session.items}
    chosen = config.option.keyword or config.option.lf or any("::" in argument for argument in config.args)
    return not chosen and files >= {p for p in TESTS.rglob("test_*.py") if reads_goldens(p)}
