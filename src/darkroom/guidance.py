"""`Guided`: a denoiser with conditioning and guidance bound: the (x, level) -> x0 that solvers see.

Raw outputs of the network are combined and converted to x0 once. What is guided away from is the absence of conditions
(classifier-free guidance), a chain of them that grows by one modality at a time, or a weaker model (autoguidance).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser, Prediction
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.prediction import epsilon_from_x0
from darkroom.errors import DarkroomError


def combine(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """(B, ...): uncond + scale*(cond - uncond); Ho & Salimans 2022, eq. 6 with scale = 1 + w.

    rescale: share in which the result gets the per-image standard deviation of `cond`; Lin et al. 2024, eq. 15-16.
    """
    return rescaled(unconditional + scale * (conditional - unconditional), conditional, rescale)


def combine_chain(outputs: Sequence[Tensor], scales: Sequence[float], rescale: float = 0.0) -> Tensor:
    """outputs (B, ...) of K + 1 conditionings, from the null to the full one, and K scales: out_0 +
    sum_k scale_k (out_k - out_(k-1)); Brooks et al. 2023 (InstructPix2Pix), eq. 3. With equal scales it is `combine`.
    """
    guided = outputs[0]
    for scale, one, before in zip(scales, outputs[1:], outputs[:-1], strict=True):
        guided = guided + scale * (one - before)
    return rescaled(guided, outputs[-1], rescale)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`guided` with, in part, the per-image standard deviation of `conditional`; Lin et al. 2024, eq. 15-16."""
    if share == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    # An image that is constant has no deviation to keep: the tiny bound leaves it as it is instead of dividing by 0.
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
    return guided * (share * factor + (1 - share))


@dataclass(frozen=True)
class Guide:
    """A weaker model of the same latents and schedule, and its own conditioning; Karras et al. 2024 (autoguidance)."""

    denoiser: Denoiser
    conditioning: Conditioning | None = None


class Guided:
    """(x, level) -> x0 with guidance on the raw outputs.

    null: the conditioning that is guided away from: the conditioner's null, or a negative prompt. Without it, or with
        scale 1, the network runs once per level; otherwise on a doubled batch, unconditional half first.
    between: (conditioning, scale) pairs between the null and the full conditioning, which has `scale`; see
        `combine_chain`. Neighbours of equal scale are one step of the chain.
    guide: a weaker model in place of `null`.
    interval: (low, high) of sigma/alpha inside which guidance acts; outside the scale is 1 (Kynkaanniemi et al. 2024).
    rescale: see `combine`.
    nfe: network evaluations per image so far, the guide's included.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning | None,
        null: Conditioning | None = None,
        scale: float = 1.0,
        *,
        between: Sequence[tuple[Conditioning, float]] = (),
        guide: Guide | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:
        if interval is not None and not interval[0] < interval[1]:
            raise DarkroomError(f"guidance interval {interval} is empty; give it as (low, high) of sigma")
        if not 0 <= rescale <= 1:
            raise DarkroomError(f"guidance rescale is {rescale}; it must be between 0 and 1")
        if guide is not None and (null is not None or between):
            raise DarkroomError("a guide takes the place of null conditioning; give one of them")
        if guide is not None and guide.denoiser.schedule.config != denoiser.schedule.config:
            raise DarkroomError("the guide has another noise schedule than the model; take one that was trained alike")
        self.denoiser = denoiser
        self.conditioning = conditioning
        self.null = null
        self.scale = float(scale)
        self.guide = guide
        self.interval = interval
        self.rescale = rescale
        self.nfe = 0
        full = conditioning if conditioning is not None else Conditioning()
        chain = [*between, (full, self.scale)]
        # out_k - out_(k-1) + out_(k+1) - out_k: where both have one factor the one between is never needed.
        last = len(chain) - 1
        self._chain = [link for k, link in enumerate(chain) if k == last or link[1] != chain[k + 1][1]]

    def mapped(self, function: Callable[[Conditioning], Conditioning]) -> Guided:
        """The same with every conditioning replaced by a function of it, such as the part that a window sees. It counts
        its own evaluations. A guide model is not taken along."""
        if self.guide is not None:
            raise DarkroomError("a guide model works on whole images; leave it out")
        other = copy.copy(self)
        other.nfe = 0
        other.conditioning = None if self.conditioning is None else function(self.conditioning)
        other.null = None if self.null is None else function(self.null)
        other._chain = [(function(conditioning), scale) for conditioning, scale in self._chain]
        return other

    def _active(self, level: NoiseLevel) -> bool:
        if self.guide is None and self.null is None:
            return False
        if all(scale == 1 for _, scale in self._chain):
            return False
        if self.interval is None:
            return True
        low, high = self.interval
        # Multiplied out, so that alpha = 0 is a level like any other.
        alpha, sigma = float(level.alpha), float(level.sigma)
        return low * alpha < sigma <= high * alpha

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """x (B, C, H, W) at a scalar level -> x0 (B, C, H, W)."""
        return self.predict(x, level).x0

    def predict(self, x: Tensor, level: NoiseLevel) -> Prediction:
        """The guided raw output and x0. A learned variance is that of the full conditioning, as in the official DiT."""
        if not self._active(level):
            self.nfe += 1
            return self.denoiser.predict(x, level, self.conditioning)
        if self.guide is not None:
            return self._away_from_guide(x, level, self.guide)
        assert self.null is not None
        if len(self._chain) == 1 and self.scale == 0:
            self.nfe += 1
            return self.denoiser.predict(x, level, self.null)
        predictions = self._each(x, level, [self.null, *(conditioning for conditioning, _ in self._chain)])
        raw = combine_chain([p.raw for p in predictions], [scale for _, scale in self._chain], self.rescale)
        return replace(predictions[-1], raw=raw, x0=self.denoiser.x0_from_raw(raw, x, level))

    def _each(self, x: Tensor, level: NoiseLevel, conditionings: list[Conditioning]) -> list[Prediction]:
        """One prediction per conditioning; in one batch where all have the same slots and sizes."""
        count = len(conditionings)
        self.nfe += count
        if not all(_joinable(conditionings[0], other) for other in conditionings[1:]):
            return [self.denoiser.predict(x, level, conditioning) for conditioning in conditionings]
        joined = self.denoiser.predict(torch.cat([x] * count), level, Conditioning.cat(conditionings))
        parts = [
            [None] * count if value is None else value.chunk(count)
            for value in (getattr(joined, f.name) for f in fields(Prediction))
        ]
        return [Prediction(*values) for values in zip(*parts, strict=True)]

    def _away_from_guide(self, x: Tensor, level: NoiseLevel, guide: Guide) -> Prediction:
        """raw_guide + scale (raw - raw_guide); Karras et al. 2024 (autoguidance), eq. 3. A guide that predicts
        something else is asked for x0 first, of which every raw output is an affine function."""
        self.nfe += 2
        own = self.denoiser.predict(x, level, self.conditioning)
        other = guide.denoiser.predict(x, level, guide.conditioning)
        alike = guide.denoiser.prediction_type == self.denoiser.prediction_type != "edm"
        raw_guide = other.raw if alike else self.denoiser.target(other.x0, epsilon_from_x0(x, other.x0, level), level)
        raw = combine(own.raw, raw_guide, self.scale, self.rescale)
        return replace(own, raw=raw, x0=self.denoiser.x0_from_raw(raw, x, level))


def _joinable(one: Conditioning, other: Conditioning) -> bool:
    """Whether both fill the same slots with the same shapes: prompts of another length run on their own."""
    for f in fields(Conditioning):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
            return False
    return True
