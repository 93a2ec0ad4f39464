"""Classifier-free guidance: what is combined, how often the network runs, and on what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.guidance import Guide, Guided, combine


class ContextNetwork(nn.Module):
    """raw = tanh(x) + mean of the context: every example answers for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        self.batches.append(x.shape[0])
        assert conditioning is not None
        if conditioning.context is None:
            return torch.tanh(x)
        return torch.tanh(x) + conditioning.context.flatten(1).mean(1).view(-1, 1, 1, 1)


X = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def context(seed: int, length: int = 5) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(context=torch.randn(3, length, 6, dtype=torch.float64, generator=generator))


def denoiser(prediction_type: str = "v") -> Denoiser:
    return Denoiser(ContextNetwork(), make_schedule(ScheduleConfig()), prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0", "velocity", "edm"])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5])
def test_raw_outputs_are_combined(prediction_type: str, scale: float) -> None:
    model, level = denoiser(prediction_type), make_schedule(ScheduleConfig()).level(400.0)
    ours = Guided(model, context(1), context(2), scale)(X, level)
    conditional, unconditional = (model.predict(X, level, context(i)).raw for i in (1, 2))
    expected = model.x0_from_raw(unconditional + scale * (conditional - unconditional), X, level)
    torch.testing.assert_close(ours, expected)
    # x0 is affine in the raw output, so guiding x0 would be the same; this is what makes one rule enough.
    x0, x0_null = (model(X, level, context(i)) for i in (1, 2))
    torch.testing.assert_close(ours, x0_null + scale * (x0 - x0_null))


def test_number_of_calls() -> None:
    level = make_schedule(ScheduleConfig()).level(400.0)
    for scale, null, batches, nfe in (
        (1.0, context(2), [3], 1),
        (0.0, context(2), [3], 1),
        (4.0, None, [3], 1),
        (4.0, context(2), [6], 2),
        (4.0, context(2, length=7), [3, 3], 2),
        (4.0, Conditioning(), [3, 3], 2),
    ):
        model = denoiser()
        denoise = Guided(model, context(1), null, scale)
        denoise(X, level)
        assert model.network.batches == batches and denoise.nfe == nfe  # type: ignore[union-attr]
        denoise(X, level)
        assert denoise.nfe == 2 * nfe


def test_unconditional_half_comes_first() -> None:
    """As in the official code: kernels that treat rows alike then give the very same pixels."""
    seen: list[Tensor] = []

    class Spy(ContextNetwork):
        def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
            assert conditioning is not None and conditioning.context is not None
            seen.append(conditioning.context)
            return super().forward(x, time, conditioning)

    model = Denoiser(Spy(), make_schedule(ScheduleConfig()), "v")
    Guided(model, context(1), context(2), 3.0)(X, model.schedule.level(10.0))
    assert torch.equal(seen[0], torch.cat([context(2).context, context(1).context]))  # type: ignore[list-item]


def test_without_any_conditioning() -> None:
    model = Denoiser(nn.Module(), make_schedule(ScheduleConfig()), "v")
    model.network.forward = lambda x, time, conditioning: x  # type: ignore[method-assign]
    assert Guided(model, None)(X, model.schedule.level(10.0)).shape == X.shape


def test_interval() -> None:
    """Kynkaanniemi et al. 2024: guidance for sigma in (low, high], off elsewhere, and at pure noise."""
    schedule = make_schedule(ScheduleConfig(kind="flow"))
    model = Denoiser(ContextNetwork(), schedule, "velocity")
    # sigma/alpha of a flow: s/(1-s)
    for s, active in ((0.1, False), (0.4, True), (0.75, True), (0.8, False), (1.0, False)):
        level = schedule.level(1000 * s)
        denoise = Guided(model, context(1), context(2), 3.0, interval=(0.2, 3.0))
        ours = denoise(X, level)
        assert denoise.nfe == (2 if active else 1)
        expected = Guided(model, context(1), context(2), 3.0 if active else 1.0)(X, level)
        assert torch.equal(ours, expected)


def test_rescale() -> None:
    """Lin et al. 2024, eq. 15-16: with share 1 each image has the deviation of the conditional output."""
    generator = torch.Generator().manual_seed(1)
    conditional, unconditional = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=generator)
    plain = combine(conditional, unconditional, 6.0)
    full = combine(conditional, unconditional, 6.0, rescale=1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), conditional.std((1, 2, 3)))
    half = combine(conditional, unconditional, 6.0, rescale=0.5)
    torch.testing.assert_close(half, (full + plain) / 2)
    assert combine(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), 6.0, rescale=1.0).isfinite().all()
    model, level = denoiser(), make_schedule(ScheduleConfig()).level(400.0)
    assert Guided(model, context(1), context(2), 6.0, rescale=0.7)(X, level).isfinite().all()


def test_chain_of_modalities() -> None:
    """null + s1 (c1 - null) + s2 (full - c1), in one batch of three; Brooks et al. 2023, eq. 3."""
    model, level = denoiser(), make_schedule(ScheduleConfig()).level(400.0)
    null, first, full = context(1), context(2), context(3)
    raw = [model.predict(X, level, c).raw for c in (null, first, full)]
    model.network.batches.clear()  # type: ignore[union-attr]
    denoise = Guided(model, full, null, 5.0, between=[(first, 2.0)])
    expected = raw[0] + 2.0 * (raw[1] - raw[0]) + 5.0 * (raw[2] - raw[1])
    torch.testing.assert_close(denoise(X, level), model.x0_from_raw(expected, X, level))
    assert denoise.nfe == 3 and model.network.batches == [9]  # type: ignore[union-attr]
    # Equal scales are one step: the part between is not even evaluated.
    even = Guided(model, full, null, 3.0, between=[(first, 3.0), (context(7), 3.0)])
    torch.testing.assert_close(even(X, level), Guided(model, full, null, 3.0)(X, level))
    assert even.nfe == 2
    # A scale of 1 for all is no guidance; one of 0 leaves a modality out.
    off = Guided(model, full, null, 1.0, between=[(first, 1.0)])
    assert torch.equal(off(X, level), Guided(model, full)(X, level)) and off.nfe == 1
    without = Guided(model, full, null, 0.0, between=[(first, 2.0)])
    torch.testing.assert_close(without(X, level), Guided(model, first, null, 2.0)(X, level))
    # Prompts of other lengths run one after the other.
    uneven = Guided(model, context(3, length=7), null, 5.0, between=[(first, 2.0)])
    assert uneven(X, level).isfinite().all() and uneven.nfe == 3


class Weaker(nn.Module):
    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0", "edm"])
def test_autoguidance(prediction_type: str) -> None:
    """Karras et al. 2024, eq. 3: D0 + w (D1 - D0), for guides that predict the same thing and others."""
    model = denoiser("v")
    guide = Denoiser(Weaker(), make_schedule(ScheduleConfig()), prediction_type)
    level = model.schedule.level(400.0)
    denoise = Guided(model, context(1), scale=2.5, guide=Guide(guide))
    strong, weak = model(X, level, context(1)), guide(X, level)
    torch.testing.assert_close(denoise(X, level), weak + 2.5 * (strong - weak))
    assert denoise.nfe == 2
    inside = Guided(model, context(1), scale=2.5, guide=Guide(guide), interval=(1e3, 1e4), rescale=0.3)
    assert torch.equal(inside(X, level), strong) and inside.nfe == 1
    with pytest.raises(DarkroomError, match="takes the place"):
        Guided(model, context(1), context(2), 2.0, guide=Guide(guide))
    other = Denoiser(Weaker(), make_schedule(ScheduleConfig(kind="cosine")), "v")
    with pytest.raises(DarkroomError, match="schedule"):
        Guided(model, context(1), scale=2.0, guide=Guide(other))


def test_learned_variance_is_that_of_the_condition() -> None:
    class Both(ContextNetwork):
        def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
            return torch.cat([super().forward(x, time, conditioning)] * 2, dim=1)

    model = Denoiser(Both(), make_schedule(ScheduleConfig()), "epsilon", learned_variance=True)
    level = model.schedule.level(400.0)
    guided = Guided(model, context(1), context(2), 4.0).predict(X, level)
    plain = model.predict(X, level, context(1))
    assert guided.variance_share is not None and plain.variance_share is not None
    torch.testing.assert_close(guided.variance_share, plain.variance_share)
    assert not torch.allclose(guided.x0, plain.x0)


def test_bad_options() -> None:
    for options in ({"interval": (2.0, 1.0)}, {"rescale": 1.5}):
        with pytest.raises(DarkroomError):
            Guided(denoiser(), None, **options)  # type: ignore[arg-type]
