"""L_hybrid, L_vlb with learned variance, sampling with it, and bits per dimension against entropies."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import grid_from_levels, make_grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.objective import ObjectiveConfig, bits_per_dimension, denoising_loss
from darkroom.solvers import SOLVERS

TABLE = make_schedule(ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02))


class Network(nn.Module):
    """(B, 2C, H, W): an answer, and where the variance lies, each with a parameter."""

    def __init__(self, answer: float = 0.2, variance: float = 0.4) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(variance, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        return torch.cat([self.answer * x, self.variance + 0.1 * torch.tanh(x)], dim=1)


def some(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoiser(**options: float) -> Denoiser:
    return Denoiser(Network(**options), TABLE, "epsilon", learned_variance=True)


def test_prediction() -> None:
    """The channels are split and the variance is interpolated in the logarithm; Nichol & Dhariwal 2021, eq. 15."""
    model, level = denoiser(), TABLE.level(torch.tensor([0.0, 1, 5, 400, 998, 999]))
    x = some(1)
    prediction = model.predict(x, level)
    assert prediction.raw.shape == prediction.x0.shape == x.shape
    torch.testing.assert_close(prediction.raw, 0.2 * x)
    buffers = TABLE.buffers()  # type: ignore[attr-defined]
    t = level.time.long()
    least = buffers["posterior_variance"][t.clamp(min=1)].double().log().view(-1, 1, 1, 1)
    most = buffers["betas"][t].double().log().view(-1, 1, 1, 1)
    share = (0.4 + 0.1 * torch.tanh(x) + 1) / 2
    torch.testing.assert_close(prediction.log_variance, share * most + (1 - share) * least, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction.variance_share, share)


def reference_term(model: Denoiser, x0: Tensor, x: Tensor, t: int, bins: int | None) -> Tensor:
    """One term of L_vlb in bits, from the published tables and torch.distributions."""
    b = {k: v.double() for k, v in TABLE.buffers().items()}  # type: ignore[attr-defined]
    prediction = model.predict(x, TABLE.level(torch.full((x.shape[0],), float(t))))
    assert prediction.log_variance is not None
    mean = lambda known: b["posterior_mean_coef1"][t] * known + b["posterior_mean_coef2"][t] * x  # noqa: E731
    deviation = (0.5 * prediction.log_variance).exp()
    model_step = Normal(mean(prediction.x0), deviation)
    if t == 0:
        if bins is None:
            nats = -model_step.log_prob(x0)
        else:
            half = 1 / (bins - 1)
            upper = torch.where(x0 > 0.999, torch.ones_like(x0), model_step.cdf(x0 + half))
            lower = torch.where(x0 < -0.999, torch.zeros_like(x0), model_step.cdf(x0 - half))
            nats = -(upper - lower).clamp(min=1e-12).log()
    else:
        nats = kl_divergence(Normal(mean(x0), b["posterior_variance"][t].sqrt()), model_step)
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("bins", [None, 256])
@pytest.mark.parametrize("t", [0, 1, 37, 999])
def test_terms_of_the_bound(t: int, bins: int | None) -> None:
    model = denoiser()
    level = TABLE.level(torch.full((6,), float(t)))
    x0, noise = some(1).clamp(-1.5, 1.5) / 1.5, some(2)
    if bins:
        x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    expected = reference_term(model, x0, add_noise(x0, noise, level), t, bins)
    full = denoising_loss(model, x0, noise, level, None, ObjectiveConfig(loss_weighting="vlb", likelihood_bins=bins))
    torch.testing.assert_close(full, 1000 * expected, rtol=2e-4, atol=1e-4)
    simple = (0.2 * add_noise(x0, noise, level) - noise).square().flatten(1).mean(1)
    hybrid = denoising_loss(model, x0, noise, level, None, ObjectiveConfig(likelihood_bins=bins))
    torch.testing.assert_close(hybrid, simple + expected, rtol=2e-4, atol=1e-6)
    off = denoising_loss(model, x0, noise, level, None, ObjectiveConfig(vlb_weight=0.0))
    torch.testing.assert_close(off, simple)


def test_in_the_hybrid_the_bound_reaches_the_variance_alone() -> None:
    level = TABLE.level(torch.tensor([0.0, 1, 5, 400, 998, 999]))

    def gradients(config: ObjectiveConfig) -> tuple[float, float]:
        model = denoiser()
        denoising_loss(model, some(1), some(2), level, None, config).mean().backward()
        return float(model.network.answer.grad), float(model.network.variance.grad)  # type: ignore[arg-type, union-attr]

    hybrid, simple = gradients(ObjectiveConfig()), gradients(ObjectiveConfig(vlb_weight=0.0))
    assert hybrid[0] == pytest.approx(simple[0], rel=1e-12) and simple[1] == 0 and hybrid[1] != 0
    whole = gradients(ObjectiveConfig(loss_weighting="vlb"))
    assert whole[1] == pytest.approx(1000 * hybrid[1], rel=1e-9)
    assert abs(whole[0] - hybrid[0]) > 1


def test_the_best_variance_is_found() -> None:
    """Data N(0, 1) and its exact denoiser: the reverse step is normal with variance beta. L_vlb is least there."""

    class Exact(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
            sigma = TABLE.level(time.cpu()).like(x).sigma
            return torch.cat([sigma * x, torch.full_like(x, 2 * self.share - 1)], dim=1)

    x0, noise = some(3, 4000), some(4, 4000)
    level = TABLE.level(torch.full((4000,), 12.0))
    config = ObjectiveConfig(loss_weighting="vlb")
    losses = [
        float(denoising_loss(Denoiser(Exact(s), TABLE, learned_variance=True), x0, noise, level, None, config).mean())
        for s in (0.0, 0.8, 1.0, 1.2)
    ]
    assert min(losses) == losses[2], losses


@pytest.mark.parametrize("steps", [1000, 10])
def test_sampling_with_it(steps: int) -> None:
    """Shares 0 and 1 are the fixed variances, also between distant levels; between them logarithms are mixed."""
    grid = make_grid(TABLE, steps, "trailing")
    grid = grid_from_levels([grid[i] for i in range(3, 6)], TABLE)
    x = some(5)
    noise = lambda i: some(10 + i)  # noqa: E731

    class Fixed(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
            return torch.cat([0.2 * x, torch.full_like(x, self.value)], dim=1)

    results = {v: SOLVERS["ddpm"](Denoiser(Fixed(v), TABLE, learned_variance=True), x, grid, noise, variance="learned")
               for v in (-1.0, 0.0, 1.0)}  # fmt: skip
    plain = Denoiser(Fixed(0.0), TABLE, learned_variance=True)
    for value, name in ((-1.0, "beta_tilde"), (1.0, "beta")):
        torch.testing.assert_close(results[value], SOLVERS["ddpm"](plain, x, grid, noise, variance=name))
    one = grid_from_levels([grid[0], grid[1]], TABLE)
    spread = [
        SOLVERS["ddpm"](Denoiser(Fixed(v), TABLE, learned_variance=True), x, one, noise, variance="learned")
        - SOLVERS["ddpm"](plain, x, one, lambda i: 0 * x, variance="beta")
        for v in (-1.0, 0.0, 1.0)
    ]
    torch.testing.assert_close(spread[1] ** 2, spread[0].abs() * spread[2].abs())


def test_who_cannot_sample_with_it() -> None:
    grid = make_grid(TABLE, 4, "trailing")
    fixed = Denoiser(Network(), TABLE, "epsilon")
    fixed.network.forward = lambda x, time, conditioning: x  # type: ignore[method-assign]
    for denoise in (lambda x, level: x, fixed):
        with pytest.raises(DarkroomError, match="learned variance"):
            SOLVERS["ddpm"](denoise, some(1), grid, some, variance="learned")
    flow = make_schedule(ScheduleConfig(kind="flow"))
    with pytest.raises(DarkroomError, match="learned_variance"):
        Denoiser(Network(), flow, "velocity", learned_variance=True)


# ---- bits per dimension


class ExactNormal(nn.Module):
    """x0 of data N(m, s^2), at the levels of a schedule; with the best learned variance for it."""

    def __init__(self, schedule: object, m: float, s: float) -> None:
        super().__init__()
        self.schedule, self.m, self.s = schedule, m, s

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        at = self.schedule.level(time.cpu()).like(x)  # type: ignore[attr-defined]
        return self.m + at.alpha * self.s**2 * (x - at.alpha * self.m) / ((at.alpha * self.s) ** 2 + at.sigma**2)


CASES = {
    "ldm": (ScheduleConfig(), "trailing", 0.02),
    "flow": (ScheduleConfig(kind="flow"), "karras", 0.05),
    "edm": (ScheduleConfig(kind="edm"), "karras", 0.3),
}


@pytest.mark.parametrize("kind", CASES)
def test_bits_per_dimension_approach_the_entropy(kind: str) -> None:
    """The exact model of N(m, s^2): the bound is above the entropy and reaches it as steps grow finer. The variance
    beta is nearly the right one for small steps, beta-tilde is not."""
    config, spacing, tight = CASES[kind]
    schedule = make_schedule(config)
    m, s = 0.3, 0.5
    model = Denoiser(ExactNormal(schedule, m, s), schedule, "x0")
    x0 = m + s * some(1, 400)
    entropy = (0.5 * math.log(2 * math.pi) + math.log(s) + 0.5 * ((x0 - m) / s).square().mean()) / math.log(2)

    def gap(steps: int, variance: Literal["beta", "beta_tilde"]) -> float:
        grid = make_grid(schedule, steps, spacing)
        bound = bits_per_dimension(model, x0, grid, lambda i: some(100 + i, 400), variance=variance)
        assert bound.total.shape == (400,) and bound.steps.shape == (400, steps - 1)
        return float(bound.total.mean() - entropy)

    coarse, fine = gap(20, "beta"), gap(200, "beta")
    assert coarse > fine > -0.01 and fine < tight
    assert gap(200, "beta_tilde") > fine + 0.1


def test_the_prior_is_what_the_last_level_tells() -> None:
    model = Denoiser(ExactNormal(TABLE, 0.0, 1.0), TABLE, "x0")
    x0 = some(1)
    bound = bits_per_dimension(model, x0, make_grid(TABLE, 3, "trailing"), some)
    level = TABLE.level(999.0)
    q = Normal(float(level.alpha) * x0, float(level.sigma))
    expected = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bound.prior, expected)


def test_bound_of_a_learned_variance() -> None:
    """Over the whole table its parts are the terms of the objective."""
    model, x0 = denoiser(), some(1) / 2
    grid = make_grid(TABLE, 1000, "trailing")
    bound = bits_per_dimension(model, x0, grid, some, variance="learned")
    for i in (0, 500, 998, 999):
        level = TABLE.level(grid[i].time.expand(6))
        config = ObjectiveConfig(loss_weighting="vlb")
        term = denoising_loss(model, x0, some(i), level, None, config) / 1000
        torch.testing.assert_close(bound.data if i == 999 else bound.steps[:, i], term, rtol=1e-6, atol=1e-9)


def test_what_the_bound_cannot_be_asked() -> None:
    fixed = Denoiser(Network(), TABLE, "epsilon")
    with pytest.raises(DarkroomError, match="learned"):
        bits_per_dimension(fixed, some(1), make_grid(TABLE, 4, "trailing"), some, variance="learned")
    for grid in (make_grid(TABLE, 4, "ddim"), make_grid(TABLE, 1, "trailing")):
        with pytest.raises(DarkroomError, match="ends at the data"):
            bits_per_dimension(fixed, some(1), grid, some)


def test_level_type() -> None:
    """A batch of levels and one level for all give one prediction."""
    model, x = denoiser(), some(1)
    one = model.predict(x, TABLE.level(7.0))
    batch = model.predict(x, TABLE.level(torch.full((6,), 7.0)))
    assert isinstance(TABLE.level(7.0), NoiseLevel) and one.log_variance is not None and batch.log_variance is not None
    torch.testing.assert_close(one.log_variance, batch.log_variance)
