"""Fixtures that several tests share. Helpers beside this file (parity_data, gaussian_mixture) are imported by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from gaussian_mixture import GaussianMixture, make_mixture

LAST = "test_goldens_are_used.py"  # looks back at what the other tests have read


@pytest.fixture(scope="session")
def gaussian_mixture() -> GaussianMixture:
    """A data distribution with exact x0 and score at every noise level."""
    return make_mixture()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> bool:
    """Whether every test file takes part in this session, and all of its tests but the slow ones."""
    config = request.config
    files = {item.path for item in request.session.items}
    chosen = config.option.keyword or config.option.lf or any("::" in argument for argument in config.args)
    return not chosen and files >= {
        p for p in Path(__file__).parent.rglob("test_*.py") if "parity_data" in p.read_text()
    }
