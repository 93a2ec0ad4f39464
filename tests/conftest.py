"""Fixtures that several tests share. Helpers beside this file (parity_data, gaussian_mixture) are imported by name."""

from __future__ import annotations

import pytest
from gaussian_mixture import GaussianMixture, make_mixture


@pytest.fixture(scope="session")
def gaussian_mixture() -> GaussianMixture:
    """A data distribution with exact x0 and score at every noise level."""
    return make_mixture()
