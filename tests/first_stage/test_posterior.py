"""The diagonal Gaussian against the official one and against torch.distributions in float64."""

from __future__ import annotations

import pytest
import torch
from first_stage_golden import assert_golden, load_topic, make_inputs
from torch.distributions import Normal, kl_divergence

from darkroom.first_stage.posterior import Posterior

CASES = load_topic("autoencoder_kl")


def test_official_outputs() -> None:
    case = CASES["diagonal_gaussian"]
    given = make_inputs(case)
    posterior = Posterior.from_moments(given["moments"])
    to_other = Posterior.from_moments(0.05 * given["moments"]).kl(Posterior.from_moments(given["other_moments"]))
    checks = {
        "mean": posterior.mean,
        "std": posterior.std,
        "var": posterior.variance,
        "kl": posterior.kl(),
        "kl_to_other": to_other,
    }
    assert set(checks) == set(case.spec["outputs"])
    for name, value in checks.items():
        assert_golden(value, case, name)


def test_closed_forms() -> None:
    g = torch.Generator().manual_seed(0)
    mean, logvar, mean2, logvar2, x = torch.randn(5, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    q, other = Posterior(mean, logvar), Posterior(mean2, logvar2)
    ours, theirs = Normal(mean, (0.5 * logvar).exp()), Normal(mean2, (0.5 * logvar2).exp())
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(q.kl(), kl_divergence(ours, standard).flatten(1).sum(1))
    torch.testing.assert_close(q.kl(other), kl_divergence(ours, theirs).flatten(1).sum(1))
    torch.testing.assert_close(q.nll(x), -ours.log_prob(x).flatten(1).sum(1))
    assert Posterior.from_moments(q.moments).mean.dtype == torch.float64
    torch.testing.assert_close(Posterior.from_moments(q.moments).logvar, logvar)


def test_samples_have_the_stated_distribution() -> None:
    q = Posterior(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 4.0).log())
    z = q.sample(torch.Generator().manual_seed(0))
    assert abs(float(z.mean()) - 3.0) < 0.05 and abs(float(z.std()) - 2.0) < 0.05
    assert torch.equal(z, q.sample(torch.Generator().manual_seed(0)))


def test_half_precision_moments_become_float32() -> None:
    q = Posterior.from_moments(torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16))
    assert q.mean.dtype == torch.float32 and q.logvar is not None and q.logvar.dtype == torch.float32


def test_a_deterministic_posterior() -> None:
    q = Posterior(torch.ones(2, 3, 2, 2))
    assert torch.equal(q.sample(torch.Generator()), q.mode()) and torch.equal(q.kl(), torch.zeros(2))
    assert torch.equal(q.moments, q.mean) and float(q.std.sum()) == float(q.variance.sum()) == 0.0
    assert torch.equal(q.nll(q.mean), torch.zeros(2))
    with pytest.raises(ValueError, match="infinite"):
        Posterior(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)).kl(q)
