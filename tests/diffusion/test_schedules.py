"""Noise schedules: closed forms in float64, limits, inverses, and the official tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from parity_data import case_names, load_case

from darkroom.diffusion.schedules import DDPMSchedule, NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError

KINDS = ("ldm", "linear", "sqrt", "cosine", "flow", "edm")
OFFICIAL_KINDS = {"linear": "ldm", "sqrt_linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}
BETA_CASES = [n for n in case_names("schedules_ldm") if n.startswith(("linear_", "sqrt_", "cosine_"))]
BUFFER_CASES = [n for n in case_names("schedules_ldm") if n.startswith("buffers_")]


def table(**options: object) -> DDPMSchedule:
    schedule = make_schedule(ScheduleConfig(**options))  # type: ignore[arg-type]
    assert isinstance(schedule, DDPMSchedule)
    return schedule


def all_schedules() -> list[NoiseSchedule]:
    return [make_schedule(ScheduleConfig(kind=kind)) for kind in KINDS] + [table(zero_terminal_snr=True)]


def test_goldens_are_all_here() -> None:
    assert len(BETA_CASES) == 14 and len(BUFFER_CASES) == 4


@pytest.mark.parametrize("name", BETA_CASES)
def test_betas_are_the_official_ones(name: str) -> None:
    case = load_case("schedules_ldm", name)
    args = case.args
    ours = table(
        kind=OFFICIAL_KINDS[args["schedule"]],
        timesteps=args["n_timestep"],
        beta_start=args["linear_start"],
        beta_end=args["linear_end"],
        cosine_offset=args["cosine_s"],
    )
    case.check("betas", ours.betas, atol=1e-15)
    case.check("alphas_cumprod", ours.alphas_cumprod, atol=1e-14)


@pytest.mark.parametrize("name", BUFFER_CASES)
def test_buffers_are_the_official_ones(name: str) -> None:
    case = load_case("schedules_ldm", name)
    options = {
        "buffers_linear_ldm": {"kind": "ldm", "beta_start": 0.0015, "beta_end": 0.0195},
        "buffers_linear_sd": {"kind": "ldm", "beta_start": 0.00085, "beta_end": 0.012},
        "buffers_cosine": {"kind": "cosine"},
        "buffers_linear_ldm_vposterior0.5": {"kind": "ldm", "beta_start": 0.0015, "beta_end": 0.0195},
    }[name]
    ours = table(**options).buffers(posterior_mix=0.5 if "vposterior" in name else 0.0)
    for key in case.spec["outputs"]:
        expected = case.output(key)
        torch.testing.assert_close(ours[key], expected, rtol=2e-7, atol=0)
    assert set(ours) == set(case.spec["outputs"])


def test_x0_models_carry_the_official_vlb_weights() -> None:
    case = load_case("latent_diffusion_tiny", "tiny_x0")
    expected = case.output("lvlb_weights")
    # LDM's default betas: the tiny checkpoints say which they used.
    config = ScheduleConfig(kind="ldm", beta_start=0.0015, beta_end=0.0195)
    ours = DDPMSchedule(config).buffers(prediction_type="x0")["lvlb_weights"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_cosine_table_follows_its_closed_form() -> None:
    """alphas_cumprod(t) = f((t+1)/T)/f(0), f(u) = cos^2(pi/2 (u+s)/(1+s)); Nichol & Dhariwal 2021, eq. 17."""
    schedule = table(kind="cosine")
    u = torch.arange(1, 901, dtype=torch.float64) / 1000
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    # The clamp of beta at 0.999 acts at the very end only.
    torch.testing.assert_close(schedule.alphas_cumprod[:900], f, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: f"{s.config.kind}{s.config.zero_terminal_snr:d}")
def test_levels(schedule: NoiseSchedule) -> None:
    low, high = schedule.time_range
    time = torch.linspace(low, high, 4001, dtype=torch.float64)
    level = schedule.level(time)
    assert level.alpha.dtype == level.sigma.dtype == torch.float64
    assert level.alpha.isfinite().all() and level.sigma.isfinite().all()
    if schedule.variance_preserving:
        torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(time), rtol=1e-14, atol=0)
    # Noise grows with time, without jumps.
    assert (level.half_log_snr.diff() < 0).all()
    assert torch.atan2(level.sigma, level.alpha).diff().max() < 0.05
    # The inverse finds the time again, infinite ends included.
    torch.testing.assert_close(
        schedule.time_at_half_log_snr(level.half_log_snr), time, rtol=0, atol=1e-6 * (high - low)
    )
    ends = schedule.finite_half_log_snr_range
    assert math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]
    again = schedule.level_at_half_log_snr(torch.tensor(ends, dtype=torch.float64))
    torch.testing.assert_close(again.half_log_snr, torch.tensor(ends, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    clean = schedule.clean()
    assert float(clean.alpha) == 1 and float(clean.sigma) == 0 and math.isfinite(float(clean.time))
    assert float(clean.time) <= low


def test_scalars_and_batches_agree() -> None:
    for schedule in all_schedules():
        low, high = schedule.time_range
        times = torch.tensor([low, 0.3 * low + 0.7 * high, high], dtype=torch.float64)
        batch = schedule.level(times)
        for i, time in enumerate(times):
            one = schedule.level(float(time))
            assert one.alpha.shape == () and one.alpha == batch.alpha[i] and one.sigma == batch.sigma[i]


def test_table_is_exact_at_integers() -> None:
    for schedule in (table(), table(kind="cosine"), table(zero_terminal_snr=True)):
        level = schedule.level(torch.arange(1000))
        assert torch.equal(level.alpha, schedule.alphas_cumprod.sqrt())
        assert torch.equal(level.sigma, (1 - schedule.alphas_cumprod).sqrt())


def test_table_below_time_zero_runs_to_the_data() -> None:
    schedule = table()
    level = schedule.level(torch.tensor([-1.0, -0.5, 0.0], dtype=torch.float64))
    assert level.sigma[0] == 0 and level.alpha[0] == 1
    angle = torch.atan2(level.sigma, level.alpha)
    torch.testing.assert_close(angle[1], angle[2] / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.time_at_half_log_snr(level.half_log_snr), level.time, rtol=0, atol=1e-9)


def test_zero_terminal_snr() -> None:
    """Lin et al. 2024, alg. 1: the last entry is pure noise, the first is unchanged."""
    plain, rescaled = table(), table(zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0 and float(rescaled.level(999).alpha) == 0
    assert float(rescaled.level(999).sigma) == 1
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - rescaled.betas, 0), rescaled.alphas_cumprod, rtol=1e-9, atol=1e-12)
    between = rescaled.level(998.5)
    assert 0 < between.alpha < rescaled.level(998).alpha


def test_interpolation_is_that_of_k_diffusion() -> None:
    case = load_case("solvers_k_diffusion", "discrete_schedule_sd")
    schedule = table()
    level = schedule.level(case.input("t").double())
    case.check("t_to_sigma", level.sigma / level.alpha, relative=1e-5)
    case.check("sigma_to_t", schedule.time_at_half_log_snr(-case.input("sigma").double().log()), atol=2e-2)
    whole = schedule.level(torch.arange(1000))
    case.check("all_sigmas", whole.sigma / whole.alpha, relative=1e-5)


def test_flow_and_edm_closed_forms() -> None:
    flow = make_schedule(ScheduleConfig(kind="flow"))
    level = flow.level(torch.tensor([0.0, 250.0, 1000.0]))
    assert level.sigma.tolist() == [0.0, 0.25, 1.0] and level.alpha.tolist() == [1.0, 0.75, 0.0]
    edm = make_schedule(ScheduleConfig(kind="edm"))
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    level = edm.level(sigma.log() / 4)
    torch.testing.assert_close(level.sigma, sigma, rtol=1e-13, atol=0)
    assert level.alpha.tolist() == [1.0] * 3
    assert edm.prior_std(edm.level(edm.time_range[1])) == pytest.approx(80.0)
    assert make_schedule(ScheduleConfig()).prior_std(edm.level(0.0)) == 1.0
    assert flow.prior_std(flow.level(1000.0)) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "nonsense"},
        {"timesteps": 1},
        {"kind": "flow", "zero_terminal_snr": True},
        {"kind": "flow", "shift": 0.0},
        {"kind": "edm", "sigma_min": 1.0, "sigma_max": 0.5},
        {"beta_start": 0.5, "beta_end": 0.1},
    ],
)
def test_impossible_schedules_are_refused_in_one_line(options: dict[str, object]) -> None:
    with pytest.raises(DarkroomError) as error:
        make_schedule(ScheduleConfig(**options))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_tables_do_not_depend_on_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        narrow = table().alphas_cumprod
    finally:
        torch.set_default_dtype(before)
    assert np.array_equal(narrow.numpy(), table().alphas_cumprod.numpy())
