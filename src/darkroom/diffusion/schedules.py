"""Noise schedules: the map between network time, half log-SNR and (alpha, sigma).

No grid and no solver in here. Tables and levels are float64 on the CPU; whoever uses a level moves it with
`NoiseLevel.like`. Time grows with noise. Units of time: 0..T-1 for DDPM tables, 0..T for flow (T*sigma, as in SD3),
log(sigma)/4 for EDM, so that `level.time` is always what the network is given.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel
from darkroom.errors import DarkroomError

# Of every table, also where the default device is another: networks are built on the meta device.
TABLE: Any = {"dtype": torch.float64, "device": "cpu"}

MAX_TIMESTEPS = 1_000_000  # some tens of megabytes of tables
SCHEDULE_KINDS = ("ldm", "linear", "sqrt", "cosine", "flow", "edm")


@dataclass(frozen=True)
class ScheduleConfig:
    """One noise schedule.

    kind: `ldm` betas linear in sqrt(beta) (the paper; called "linear" in its code and "scaled_linear" elsewhere),
        `linear` ordinary linear betas (Ho et al. 2020), `sqrt` square roots of linear betas, `cosine` (Nichol &
        Dhariwal 2021), `flow` rectified flow, `edm` variance-exploding (Karras et al. 2022).
    timesteps: length of the DDPM table; for `flow` the factor from sigma to network time.
    beta_start, beta_end: of `ldm`, `linear` and `sqrt`.
    cosine_offset: s of `cosine`.
    zero_terminal_snr: rescale a table so that its last entry is pure noise (Lin et al. 2024, alg. 1).
    shift: `flow`: where times and grid points are placed, s -> shift*s / (1 + (shift-1)*s) (Esser et al. 2024, eq. 23).
    shift_rule: `flow`: how the shift follows the size of latents, as larger ones need more noise to be hidden:
        `constant`; `sqrt` shift * sqrt(places / shift_places[0]) (the same eq.); `linear` log(shift) on the straight
        line from `shift` at shift_places[0] to `shift_end` at shift_places[1] (FLUX's mu).
    shift_places: numbers of places h*w of latents; (1024, 16384) are pictures of 256 and of 1024 pixels at f = 8, or
        256 and 4096 tokens of patch 2.
    sigma_min, sigma_max: of `edm`.
    sigma_data: standard deviation of x0 assumed by the `edm` prediction type.
    """

    kind: Literal["ldm", "linear", "sqrt", "cosine", "flow", "edm"] = "ldm"
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    cosine_offset: float = 0.008
    zero_terminal_snr: bool = False
    shift: float = 1.0
    shift_rule: Literal["constant", "sqrt", "linear"] = "constant"
    shift_places: tuple[int, int] = (1024, 16384)
    shift_end: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5


class NoiseSchedule(ABC):
    """alpha(t) and sigma(t)."""

    variance_preserving: ClassVar[bool]

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def time_range(self) -> tuple[float, float]:
        """Lowest and highest time that the network is trained on."""

    @abstractmethod
    def level(self, time: Tensor | float) -> NoiseLevel:
        """Level at a time () or (B,), continuous; float64 on the CPU."""

    @abstractmethod
    def time_at_half_log_snr(self, half_log_snr: Tensor | float) -> Tensor:
        """Inverse of `level(time).half_log_snr`; +inf gives the clean level's time, -inf that of the noisiest."""

    @abstractmethod
    def clean(self) -> NoiseLevel:
        """The data itself: alpha = 1, sigma = 0. A network is never asked here."""

    def level_at_half_log_snr(self, half_log_snr: Tensor | float) -> NoiseLevel:
        return self.level(self.time_at_half_log_snr(half_log_snr))

    @property
    def finite_half_log_snr_range(self) -> tuple[float, float]:
        """Lowest and highest half log-SNR with a finite value: the ends for grids that are spaced in it."""
        low, high = self.time_range
        return float(self.level(high).half_log_snr), float(self.level(low).half_log_snr)

    def prior_std(self, level: NoiseLevel) -> float:
        """Standard deviation of the pure noise that generation starts from at `level`.

        Variance-preserving schedules start from N(0, 1) although sigma is slightly below 1 there, as the official code.
        """
        return 1.0 if self.variance_preserving else float(level.sigma)


def _float64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _betas(config: ScheduleConfig) -> Tensor:
    """(T,) float64. LDM's `make_beta_schedule`; its "linear" is our `ldm`, its "sqrt_linear" our `linear`."""
    start, end, count = config.beta_start, config.beta_end, config.timesteps
    if config.kind == "ldm":
        return torch.linspace(start**0.5, end**0.5, count, **TABLE) ** 2
    if config.kind == "linear":
        return torch.linspace(start, end, count, **TABLE)
    if config.kind == "sqrt":
        return torch.linspace(start, end, count, **TABLE).sqrt()
    steps = torch.arange(count + 1, **TABLE) / count + config.cosine_offset
    cumulative = torch.cos(steps / (1 + config.cosine_offset) * math.pi / 2) ** 2
    return (1 - cumulative[1:] / cumulative[:-1]).clamp(0, 0.999)


class DDPMSchedule(NoiseSchedule):
    """A table of T variance-preserving levels; alpha^2 = alphas_cumprod, sigma^2 = 1 - alphas_cumprod.

    Between integer times the half log-SNR is interpolated linearly (as k-diffusion's DiscreteSchedule, which
    interpolates log(sigma/alpha)); in an interval where one end has infinite SNR or none, the angle atan(sigma/alpha)
    is. Time -1 is the clean level.
    """

    variance_preserving = True

    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__(config)
        betas = _betas(config)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        if config.zero_terminal_snr:
            # Lin et al. 2024, alg. 1: shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first stays.
            root = alphas_cumprod.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
            betas = 1 - alphas_cumprod / torch.cat([torch.ones(1, **TABLE), alphas_cumprod[:-1]])
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        # Entry k of these tables belongs to time k - 1: the clean level is the first.
        one, zero = torch.ones(1, **TABLE), torch.zeros(1, **TABLE)
        self._alpha = torch.cat([one, alphas_cumprod.sqrt()])
        self._sigma = torch.cat([zero, (1 - alphas_cumprod).sqrt()])
        self._half_log_snr = torch.log(self._alpha) - torch.log(self._sigma)
        self._angle = torch.atan2(self._sigma, self._alpha)

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, float(self.config.timesteps - 1)

    @property
    def finite_half_log_snr_range(self) -> tuple[float, float]:
        finite = self._half_log_snr[self._half_log_snr.isfinite()]
        return float(finite[-1]), float(finite[0])

    def level(self, time: Tensor | float) -> NoiseLevel:
        time = _float64(time)
        position = (time + 1).clamp(0, self.config.timesteps)
        below = position.floor().clamp(max=self.config.timesteps - 1).long()
        weight = position - below
        low, high = self._half_log_snr[below], self._half_log_snr[below + 1]
        between = torch.lerp(low, high, weight)
        angle = torch.lerp(self._angle[below], self._angle[below + 1], weight)
        finite = low.isfinite() & high.isfinite()
        alpha = torch.where(finite, torch.sigmoid(2 * between).sqrt(), angle.cos())
        sigma = torch.where(finite, torch.sigmoid(-2 * between).sqrt(), angle.sin())
        nearest = position.round().long()
        exact = position == nearest
        return NoiseLevel(
            torch.where(exact, self._alpha[nearest], alpha), torch.where(exact, self._sigma[nearest], sigma), time
        )

    def time_at_half_log_snr(self, half_log_snr: Tensor | float) -> Tensor:
        target = _float64(half_log_snr)
        # searchsorted wants ascending values: the table descends.
        above = torch.searchsorted(-self._half_log_snr, -target, right=True).clamp(1, self.config.timesteps)
        low, high = self._half_log_snr[above - 1], self._half_log_snr[above]
        finite = low.isfinite() & high.isfinite()
        angle_low, angle_high = self._angle[above - 1], self._angle[above]
        by_angle = (torch.atan(torch.exp(-target)) - angle_low) / (angle_high - angle_low)
        weight = torch.where(finite, (low - target) / (low - high), by_angle).clamp(0, 1)
        return above - 2 + weight

    def clean(self) -> NoiseLevel:
        return self.level(-1.0)

    def buffers(self, posterior_mix: float = 0.0, prediction_type: str = "epsilon") -> dict[str, Tensor]:
        """The float32 buffers that LDM checkpoints carry, by their official names.

        posterior_mix: LDM's `v_posterior`: 0 gives the variance beta-tilde, 1 gives beta.
        """
        betas, cumulative = self.betas, self.alphas_cumprod
        previous = torch.cat([torch.ones(1, **TABLE), cumulative[:-1]])
        variance = (1 - posterior_mix) * betas * (1 - previous) / (1 - cumulative) + posterior_mix * betas
        tables = {
            "betas": betas,
            "alphas_cumprod": cumulative,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": cumulative.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - cumulative).sqrt(),
            "log_one_minus_alphas_cumprod": torch.log(1 - cumulative),
            "sqrt_recip_alphas_cumprod": (1 / cumulative).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / cumulative - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": torch.log(variance.clamp(min=1e-20)),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumulative),
            "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - cumulative),
        }
        buffers = {name: table.float() for name, table in tables.items()}
        # In float32 and from the float32 buffers, as the official code: checkpoints then agree to the last bit.
        if prediction_type == "epsilon":
            vlb = buffers["betas"] ** 2 / (
                2 * buffers["posterior_variance"] * (1 - betas).float() * (1 - buffers["alphas_cumprod"])
            )
        elif prediction_type == "x0":
            # 2 - abar instead of 2 (1 - abar): the operator precedence of the official code, kept for its checkpoints.
            vlb = 0.5 * buffers["alphas_cumprod"].sqrt() / (2 - buffers["alphas_cumprod"])
        else:
            # Stability's v models: no bound was implemented, the buffer holds ones.
            vlb = torch.ones_like(buffers["betas"])
        vlb[0] = vlb[1]
        return buffers | {"lvlb_weights": vlb}


class FlowSchedule(NoiseSchedule):
    """Rectified flow: alpha = 1 - s, sigma = s, time = timesteps*s, s in [0, 1]; Liu et al. 2023, Esser et al. 2024."""

    variance_preserving = False

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, float(self.config.timesteps)

    @property
    def finite_half_log_snr_range(self) -> tuple[float, float]:
        # Both ends of the flow are infinite; one unit of time inside them is where SD3's tables begin and end.
        count = self.config.timesteps
        return -math.log(count - 1), math.log(count - 1)

    def shift_at(self, places: int | None = None) -> float:
        """The shift for latents of so many places h*w; None: the config's own."""
        c = self.config
        if places is None or c.shift_rule == "constant":
            return c.shift
        low, high = c.shift_places
        if c.shift_rule == "sqrt":
            return c.shift * math.sqrt(places / low)
        share = (places - low) / (high - low)
        return c.shift ** (1 - share) * c.shift_end**share

    def level(self, time: Tensor | float) -> NoiseLevel:
        time = _float64(time)
        sigma = (time / self.config.timesteps).clamp(0, 1)
        return NoiseLevel(1 - sigma, sigma, time)

    def time_at_half_log_snr(self, half_log_snr: Tensor | float) -> Tensor:
        target = _float64(half_log_snr)
        return torch.sigmoid(-target) * self.config.timesteps

    def clean(self) -> NoiseLevel:
        return self.level(0.0)


def shifted(s: Tensor, shift: float) -> Tensor:
    """s in [0, 1] -> shift*s / (1 + (shift-1)*s); Esser et al. 2024, eq. 23."""
    return shift * s / (1 + (shift - 1) * s)


class EDMSchedule(NoiseSchedule):
    """Variance exploding: alpha = 1, any sigma > 0, time = log(sigma)/4 (c_noise of Karras et al. 2022, table 1)."""

    variance_preserving = False

    @property
    def time_range(self) -> tuple[float, float]:
        return math.log(self.config.sigma_min) / 4, math.log(self.config.sigma_max) / 4

    def level(self, time: Tensor | float) -> NoiseLevel:
        time = _float64(time)
        sigma = torch.exp(4 * time)
        return NoiseLevel(torch.ones_like(sigma), sigma, time)

    def time_at_half_log_snr(self, half_log_snr: Tensor | float) -> Tensor:
        return _float64(half_log_snr) / -4

    def level_at_half_log_snr(self, half_log_snr: Tensor | float) -> NoiseLevel:
        target = _float64(half_log_snr)
        sigma = torch.exp(-target)
        time = (target / -4).clamp(min=self.clean().time)
        return NoiseLevel(torch.ones_like(sigma), sigma, time)

    def clean(self) -> NoiseLevel:
        # log(0)/4 is not a number a network could take: the time of a far smaller sigma stands for it.
        zero = torch.zeros((), **TABLE)
        return NoiseLevel(zero + 1, zero, zero + math.log(self.config.sigma_min * 1e-6) / 4)


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """Build a schedule, or say which value cannot be."""
    if config.kind not in SCHEDULE_KINDS:
        raise DarkroomError(f"unknown schedule kind {config.kind!r}; choose one of {', '.join(SCHEDULE_KINDS)}")
    if config.timesteps < 2:
        raise DarkroomError(f"schedule timesteps is {config.timesteps}; it must be at least 2")
    if config.timesteps > MAX_TIMESTEPS:
        raise DarkroomError(f"schedule timesteps is {config.timesteps}; at most {MAX_TIMESTEPS} can be tabulated")
    if config.zero_terminal_snr and config.kind in ("flow", "edm"):
        raise DarkroomError(f"zero_terminal_snr applies to DDPM tables, not to schedule {config.kind!r}; remove it")
    if config.kind == "flow":
        for name in ("shift", "shift_end"):
            if getattr(config, name) <= 0:
                raise DarkroomError(f"schedule {name} is {getattr(config, name)}; it must be positive (1 is off)")
        low, high = config.shift_places
        if low < 1 or (config.shift_rule == "linear" and high <= low):
            raise DarkroomError(f"schedule shift_places is {low}, {high}; give two numbers of places, the lower first")
        return FlowSchedule(config)
    if config.kind == "edm":
        if not 0 < config.sigma_min < config.sigma_max:
            raise DarkroomError(
                f"schedule sigma_min {config.sigma_min} and sigma_max {config.sigma_max} must satisfy 0 < min < max"
            )
        return EDMSchedule(config)
    if config.kind != "cosine" and not 0 < config.beta_start <= config.beta_end < 1:
        raise DarkroomError(
            f"schedule beta_start {config.beta_start} and beta_end {config.beta_end} must satisfy 0 < start <= end < 1"
        )
    return DDPMSchedule(config)
