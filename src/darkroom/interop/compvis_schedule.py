"""Noise schedules of official files: the tables that a file holds, told by few numbers, and made again of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from torch import Tensor

# Tables that LatentDiffusion of the official code registers; all follow from the betas.
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
KINDS = ("ldm", "linear", "sqrt")  # by first and last beta
ZERO_SNR = 1e-6  # the signal that is left, squared


def buffers(schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tables of a schedule's config, float32."""
    from darkroom.config import from_dict
    from darkroom.diffusion.schedules import DDPMSchedule, ScheduleConfig, make_schedule

    made = make_schedule(from_dict(ScheduleConfig, dict(schedule), "schedule"))
    if not isinstance(made, DDPMSchedule):
        raise DarkroomError(f"a schedule of kind {schedule.get('kind')!r} has no table of betas")
    tables = made.buffers()
    return {name: tables[name] for name in BUFFERS}


def read_schedule(betas: Tensor, usual: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config whose betas these are. `usual`: the family's, which is tried first."""
    import torch

    from darkroom.config import from_dict
    from darkroom.diffusion.schedules import DDPMSchedule, ScheduleConfig, make_schedule

    for candidate in _candidates(betas.double(), dict(usual)):
        made = make_schedule(from_dict(ScheduleConfig, candidate, "schedule"))
        assert isinstance(made, DDPMSchedule)
        if torch.equal(made.betas.float().to(betas.dtype), betas):
            return candidate
    raise DarkroomError(
        f"{where}: its {len(betas)} betas, {float(betas[0]):.6g} to {float(betas[-1]):.6g}, are of no known schedule"
    )


def _candidates(betas: Tensor, usual: dict[str, Any]) -> Iterator[dict[str, Any]]:
    count = {"timesteps": len(betas)}
    if usual.get("kind") not in ("flow", "edm"):
        yield usual | count
        yield usual | count | {"zero_terminal_snr": True}
    yield {"kind": "cosine"} | count
    first, last = float(betas[0]), float(betas[-1])
    for kind in KINDS:
        power = 2 if kind == "sqrt" else 1
        start, end = _short(first**power), _short(last**power)
        if 0 < start <= end < 1:
            yield {"kind": kind, "beta_start": start, "beta_end": end} | count


def _short(value: float) -> float:
    """With the digits that float32 has: 0.0015 for 0.001499999..."""
    return float(f"{value:.6g}")
