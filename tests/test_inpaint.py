"""`Inpaint` and what edits begin with: against conditional distributions in closed form, and in a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gaussian_mixture import GaussianMixture
from tiny_models import tiny_model
from torch import Tensor

from darkroom.conditioning.filling import filled
from darkroom.diffusion.grids import make_grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.guidance import Guided
from darkroom.inpaint import Inpaint, Start, begin, covering
from darkroom.solvers import SOLVERS, default_spacing, solver_nfe
from darkroom.solvers.repaint import repaint

FLOW = make_schedule(ScheduleConfig(kind="flow"))
LDM = make_schedule(ScheduleConfig())
RIGHT = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)  # the first of two pixels is repainted


def draws(count: int) -> Any:
    return lambda i: torch.randn(count, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + i))


def known(value: float, count: int = 1) -> Tensor:
    return torch.tensor([99.0, value], dtype=torch.float64).expand(count, 1, 1, 2)


def repainted(
    denoise: Any, value: float, count: int, schedule: NoiseSchedule, solver: str, steps: int, **options: Any
) -> Tensor:
    """(count, 2): the second pixel is known to be `value`."""
    grid = make_grid(schedule, steps, default_spacing(solver, schedule))
    noise = draws(count)
    std = schedule.prior_std(grid[0])
    start = Start(known(value), RIGHT.double())
    wrapped, x, left = begin(denoise, start, known(value), noise(0), grid, std, 1)
    return SOLVERS[solver](wrapped, x, left, lambda i: noise(i + 1), **options).flatten(1)


# ---- the wrapper


@pytest.mark.parametrize("schedule", [LDM, FLOW])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_known_part_is_exact(solver: str, schedule: NoiseSchedule, gaussian_mixture: GaussianMixture) -> None:
    """Whatever the solver draws and remembers, and although it never sees the mask."""
    pixels = repainted(gaussian_mixture.x0, 0.625, 4, schedule, solver, 6)
    last = make_grid(schedule, 6, default_spacing(solver, schedule))[-1]
    tolerance = 1e-9 if float(last.sigma) == 0 else 5 * float(last.sigma)
    torch.testing.assert_close(pixels[:, 1], torch.full((4,), 0.625, dtype=torch.float64), atol=tolerance, rtol=0)
    assert pixels[:, 0].isfinite().all() and len(set(pixels[:, 0].tolist())) == 4 and float(pixels[:, 0].max()) < 9


def test_what_the_network_sees_and_what_is_under_the_mask() -> None:
    """Outside of the mask x stays the known part at every level, with the image's own noise; what the picture holds
    under the mask (99 here) is seen nowhere."""
    for schedule in (LDM, FLOW):
        grid = make_grid(schedule, 5, "linear" if schedule is FLOW else "trailing")
        seen: list[tuple[Tensor, NoiseLevel]] = []

        def denoise(x: Tensor, level: NoiseLevel, seen: list[tuple[Tensor, NoiseLevel]] = seen) -> Tensor:
            seen.append((x, level))
            return torch.full_like(x, 5.0)

        noise, start = draws(2)(0), Start(known(0.5), RIGHT.double())
        wrapped, x, left = begin(denoise, start, known(0.5), noise, grid, 1.0, 1)
        assert torch.equal(x[..., 0], noise[..., 0])
        out = SOLVERS["dpm++2m"](wrapped, x, left, draws(2))
        for x, level in seen:
            torch.testing.assert_close(x[..., 1], add_noise(known(0.5, 2), noise, level)[..., 1])
        torch.testing.assert_close(out, torch.tensor([5.0, 0.5], dtype=torch.float64).expand(2, 1, 1, 2))


def test_a_prediction_keeps_what_else_it_holds() -> None:
    model = tiny_model(None)
    x, level = torch.randn(1, 3, 4, 4), model.denoiser.schedule.level(torch.tensor(300.0))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    guided = Guided(model.denoiser, None)
    with torch.no_grad():
        prediction = Inpaint(guided, torch.full((1, 3, 4, 4), 0.25), mask).predict(x, level)
        plain = model.denoiser.predict(x, level)
    assert torch.equal(prediction.raw, plain.raw) and torch.equal(prediction.x0[..., 1:3, 1:3], plain.x0[..., 1:3, 1:3])
    assert bool((prediction.x0[..., 0, :] == 0.25).all()) and Inpaint(guided, x, mask).nfe == 1


@dataclass(frozen=True)
class Correlated:
    """Two pixels, normal with variance 1 and a correlation: E[x0 | x] = a S (a^2 S + s^2 I)^-1 x in closed form."""

    correlation: float

    def x0(self, x: Tensor, level: NoiseLevel) -> Tensor:
        covariance = torch.tensor([[1.0, self.correlation], [self.correlation, 1.0]], dtype=torch.float64)
        a, s = float(level.alpha), float(level.sigma)
        gain = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(2, dtype=torch.float64))
        return (x.flatten(1) @ gain.T).reshape(x.shape)


def test_resampling_gives_the_conditional_of_correlated_pixels() -> None:
    """Given y the other pixel is normal with mean r y and variance 1 - r^2. Plain solvers listen too little to the
    known pixel, whose noise hides it until the other is settled; steps taken back and made again mend that. What the
    variance lacks is that of 25 DDPM steps."""
    r, y = 0.8, 1.5
    errors = {
        times: repainted(Correlated(r).x0, y, 2000, FLOW, "repaint", 25, resample=times)[:, 0] - r * y
        for times in (1, 4, 40)
    }
    once, some, often = (abs(float(error.mean())) for error in errors.values())
    assert once > 0.4 and some < 0.7 * once and often < 0.06
    assert -0.2 < float(errors[40].var()) - (1 - r**2) < 0.05
    plain = repainted(Correlated(r).x0, y, 2000, FLOW, "dpm++2m", 25)[:, 0]
    assert 0.4 < r * y - float(plain.mean()) < 0.9


def test_resampling_gives_the_conditional_of_a_mixture(gaussian_mixture: GaussianMixture) -> None:
    """Given the second pixel each component has a new weight and keeps its first mean and deviation."""
    y, count = -0.6, 2000
    means, stds = gaussian_mixture.means, gaussian_mixture.stds
    logits = gaussian_mixture.weights.log() - stds.log() - 0.5 * ((y - means[:, 1]) / stds) ** 2
    weights = torch.softmax(logits, 0)
    mean = float((weights * means[:, 0]).sum())
    variance = float((weights * (means[:, 0] ** 2 + stds**2)).sum()) - mean**2
    pixels = repainted(gaussian_mixture.x0, y, count, FLOW, "repaint", 25, resample=40)[:, 0]
    assert abs(float(pixels.mean()) - mean) < 0.08 and abs(float(pixels.var()) - variance) < 0.2


def test_resampling_alone_changes_no_distribution(gaussian_mixture: GaussianMixture) -> None:
    """Without a mask, steps back and forth leave the data as they are, but for the error of 60 DDPM steps."""
    noise = draws(4000)
    grid = make_grid(FLOW, 60, "linear")
    out = repaint(gaussian_mixture.x0, noise(0), grid, lambda i: noise(i + 1), resample=3).flatten(1)
    expected = gaussian_mixture.sample(40000, (1, 1, 2), torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(out.mean(0), expected.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(out.T.cov(), expected.T.cov(), atol=0.09, rtol=0)
    assert solver_nfe("repaint", grid) == 59 * 4 + 1


# ---- beginnings


def test_strength_is_the_share_of_steps() -> None:
    grid, noise = make_grid(FLOW, 10, "linear"), draws(3)(0)
    for strength, steps in ((1.0, 10), (0.5, 5), (0.24, 2), (0.01, 1)):
        start = Start(known(1.0), strength=strength)
        denoise, x, left = begin(lambda x, level: x, start, known(1.0), noise, grid, 1.0, 1)
        assert left.steps == start.steps(10) == steps and not isinstance(denoise, Inpaint)
        expected = noise if strength == 1 else add_noise(known(1.0, 3), noise, left[0])
        assert torch.equal(x, expected)
    for strength in (0.0, 1.5, -1.0):
        with pytest.raises(DarkroomError, match=r"strength is .* above 0"):
            Start(known(1.0), strength=strength)


def test_a_block_is_repainted_if_one_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 9, 8)
    mask[0, 0, 3, 3] = mask[0, 0, 8, 0] = 1
    assert covering(mask, 4)[0, 0].tolist() == [[1, 0], [0, 0], [1, 0]]


def test_filling_is_smooth_and_keeps_what_is_known() -> None:
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(50.0), indexing="ij")
    slope = (rows + 2 * columns)[None, None] / 60
    mask = torch.zeros(1, 1, 37, 50)
    mask[..., 10:25, 12:30] = 1
    out = filled(torch.where(mask > 0, 1e6, slope), mask)
    assert torch.equal(out[mask == 0], slope[mask == 0])
    assert float((out - slope).abs().max()) < 0.3  # of a range of 2.2
    flat = filled(torch.full((1, 3, 5, 7), 0.3), torch.nn.functional.pad(torch.ones(1, 1, 3, 5), (1, 1, 1, 1)))
    torch.testing.assert_close(flat, torch.full((1, 3, 5, 7), 0.3))
    assert torch.equal(filled(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 6, 6)), torch.zeros(1, 1, 6, 6))


# ---- in a model


def test_a_model_keeps_what_is_known_and_an_image_its_seed() -> None:
    model = tiny_model("class")
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:9, 6:15] = 1
    options: dict[str, Any] = {"class_label": "coat", "size": (24, 16), "steps": 3, "start": Start(image, mask)}
    both = model.generate(seed=[4, 5], **options)
    alone = model.generate(seed=5, **options)
    torch.testing.assert_close(both.latents[1], alone.latents[0], atol=1e-3, rtol=0)
    latent, outside = model.encode_image(image)[0], covering(mask, 2)[0, 0] == 0
    for found in both.latents:
        torch.testing.assert_close(found[:, outside], latent[:, outside], atol=1e-5, rtol=0)
    assert not torch.allclose(both.latents[0][:, ~outside], both.latents[1][:, ~outside], atol=0.1)


def test_a_weaker_edit_stays_nearer_to_the_picture() -> None:
    model, steps = tiny_model(None), []
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = model.encode_image(image)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        result = model.generate(
            seed=[1, 2], steps=10, batch_size=1, start=Start(image, strength=strength),
            progress=lambda done, total: steps.append((done, total)),
        )  # fmt: skip
        distances.append(float((result.latents - latent).square().mean()))
    assert distances[0] < distances[1] < distances[2]
    assert steps[:2] == [(1, 2), (2, 2)] and steps[2:12] == [(i, 10) for i in range(1, 11)] and steps[-1] == (20, 20)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ((1, 3, 16, 18), None, r"start: the image is 3x16x18, it must be 3x16x16"),
        ((1, 1, 16, 16), None, r"start: the image is 1x16x16, it must be 3x16x16"),
        ((3, 3, 16, 16), None, r"start: the image has shape \(3, 3, 16, 16\); give one for all images or each"),
        ((1, 3, 16, 16), (1, 3, 16, 16), r"start: the mask is 3x16x16, it must be 1x16x16"),
    ],
)
def test_what_does_not_fit_is_said(image: tuple[int, ...], mask: tuple[int, ...] | None, message: str) -> None:
    start = Start(torch.zeros(image), None if mask is None else torch.zeros(mask))
    with pytest.raises(DarkroomError, match=message):
        tiny_model(None).generate(seed=[1, 2], steps=1, start=start)
