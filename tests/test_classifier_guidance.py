"""Classifier guidance against the Gaussian mixture, whose posterior over components is a perfect noisy classifier."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture, make_mixture
from tiny_models import one_line, tiny_model
from torch import Tensor

from darkroom.classifier_guidance import ClassifierGuide, ClassifierGuided, classifier_loss
from darkroom.denoiser import Prediction
from darkroom.diffusion.grids import make_grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.networks.classifier import ClassifierConfig, NoisyClassifier
from darkroom.solvers import SOLVERS

MIXTURE = make_mixture()
SCHEDULES = {kind: make_schedule(ScheduleConfig(kind=kind)) for kind in ("ldm", "cosine", "flow")}  # type: ignore
X = torch.randn(4, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def component(k: int) -> GaussianMixture:
    part = slice(k, k + 1)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), MIXTURE.means[part], MIXTURE.stds[part])


class Exact:
    """logits (B, K) = log p(component k) + log N(x_t of that component): softmax gives p(k | x_t) exactly."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.schedule.level(time)
        logs = [component(k).log_density(x, level) + MIXTURE.weights[k].log() for k in range(len(MIXTURE.weights))]
        return torch.stack(logs, dim=1)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_scale_1_with_a_perfect_classifier_is_the_class(kind: str) -> None:
    """Bayes: grad log p(x | y) = grad log p(x) + grad log p(y | x). Guided, the mixture's x0 is the component's x0."""
    schedule, labels = SCHEDULES[kind], [0, 1, 2, 1]
    denoise = ClassifierGuided(MIXTURE.x0, Exact(schedule), labels)
    for time in (50.0, 400.0, 900.0):
        level = schedule.level(time)
        expected = torch.cat([component(k).x0(X[i : i + 1], level) for i, k in enumerate(labels)])
        torch.testing.assert_close(denoise(X, level), expected)


def test_is_the_formula_for_epsilon() -> None:
    """epsilon - sqrt(1 - alphas_cumprod) * scale * grad log p(y | x_t), the gradient by central differences."""
    schedule, scale = SCHEDULES["ldm"], 3.5
    level = schedule.level(300.0)
    time = level.time.expand(4)
    classify = Exact(schedule)

    def log_probability(x: Tensor) -> Tensor:
        return classify(x, time).log_softmax(1)[:, 2]

    step = 1e-5
    gradient = torch.zeros_like(X)
    for axis in range(2):
        offset = torch.zeros_like(X)
        offset[..., axis] = step
        gradient[..., 0, axis] = (log_probability(X + offset) - log_probability(X - offset))[:, None] / (2 * step)
    alpha, sigma = float(level.alpha), float(level.sigma)
    epsilon = (X - alpha * MIXTURE.x0(X, level)) / sigma - sigma * scale * gradient
    guided = ClassifierGuided(MIXTURE.x0, classify, [2] * 4, scale)(X, level)
    torch.testing.assert_close((X - alpha * guided) / sigma, epsilon, rtol=1e-6, atol=1e-8)


def test_samples_are_of_the_class() -> None:
    """A solver that is given the wrapper draws from one component of the mixture it was built on."""
    schedule, count, generator = SCHEDULES["ldm"], 4000, torch.Generator().manual_seed(0)
    grid = make_grid(schedule, 40, "karras")
    start = torch.randn(count, 1, 1, 2, dtype=torch.float64, generator=generator)
    denoise = ClassifierGuided(MIXTURE.x0, Exact(schedule), [1] * count)
    samples = SOLVERS["heun"](denoise, start, grid, None).flatten(1)
    torch.testing.assert_close(samples.mean(0), MIXTURE.means[1], atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), MIXTURE.stds[1].expand(2), atol=0.03, rtol=0)


def test_pure_noise_and_scale_0_are_left_alone() -> None:
    def never(x: Tensor, time: Tensor) -> Tensor:
        raise AssertionError("not needed")

    flow = SCHEDULES["flow"]
    for level, scale in ((flow.level(1000.0), 2.0), (flow.level(300.0), 0.0)):
        denoise = ClassifierGuided(MIXTURE.x0, never, [0] * 4, scale)
        assert torch.equal(denoise(X, level), MIXTURE.x0(X, level)) and denoise.nfe == 0


def test_a_learned_variance_passes_through() -> None:
    level = SCHEDULES["ldm"].level(300.0)

    class Both:
        nfe = 5

        def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
            return MIXTURE.x0(x, level)

        def predict(self, x: Tensor, level: NoiseLevel) -> Prediction:
            return Prediction(raw=x, x0=self(x, level), variance_share=0.25 * x)

    denoise = ClassifierGuided(Both(), Exact(SCHEDULES["ldm"]), [0] * 4, 2.0)
    prediction = denoise.predict(X, level)
    assert prediction.variance_share is not None and torch.equal(prediction.variance_share, 0.25 * X)
    assert torch.equal(prediction.x0, denoise(X, level)) and not torch.allclose(prediction.x0, MIXTURE.x0(X, level))
    assert denoise.nfe == 7


def test_loss_is_the_cross_entropy_of_noisy_data() -> None:
    """Its mean over data and noise is smallest for the exact posterior, where it is its entropy."""
    schedule, generator = SCHEDULES["ldm"], torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1])
    noise = torch.randn(4, 1, 1, 2, dtype=torch.float64, generator=generator)
    level = schedule.level(torch.tensor([10.0, 200.0, 600.0, 999.0]))
    loss = classifier_loss(Exact(schedule), X, noise, level, labels)
    x = add_noise(X, noise, level)
    total = MIXTURE.log_density(x, level)
    for i, k in enumerate(labels.tolist()):
        one = schedule.level(level.time[i])
        own = component(k).log_density(x[i : i + 1], one)[0] + MIXTURE.weights[k].log()
        torch.testing.assert_close(loss[i], total[i] - own)


# ---- through generate


def tiny_classifier() -> NoisyClassifier:
    torch.manual_seed(0)
    config = ClassifierConfig(
        image_size=8, in_channels=3, model_channels=32, out_channels=4, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(2,), pool="spatial",
    )  # fmt: skip
    return NoisyClassifier(config).eval()


def test_generate() -> None:
    """An unconditional model gets classes; every image its own, whatever the batch; the settings say so."""
    model, classifier = tiny_model(None), tiny_classifier()
    seeds = [1, 1, 2]
    plain = model.generate(seed=seeds)
    guide = ClassifierGuide(classifier, [0, 3, 3], scale=30.0)
    guided = model.generate(seed=seeds, classifier=guide)
    assert plain.nfe == 3 and guided.nfe == 6
    assert not np.array_equal(guided.images[0], guided.images[1])
    cut = model.generate(seed=seeds, classifier=guide, batch_size=2)
    assert np.abs(cut.images.astype(int) - guided.images.astype(int)).max() <= 1
    assert [s["classifier"] for s in guided.settings] == [{"label": k, "scale": 30.0} for k in (0, 3, 3)]
    assert "classifier" not in plain.settings[0]

    def certainty(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return classifier(latents, torch.zeros(3)).log_softmax(1)[torch.arange(3), torch.tensor([0, 3, 3])]

    assert (certainty(guided.latents) > certainty(plain.latents)).all()
    # One label for all, and with classifier-free guidance at once.
    both = tiny_model("class").generate(class_label="boot", seed=seeds, classifier=ClassifierGuide(classifier, 2))
    assert both.nfe == 9
    assert all(p.grad is None for p in [*model.parameters(), *classifier.parameters()])


@pytest.mark.parametrize(("labels", "message"), [([0, 1], "2 labels"), (4, "0 to 3"), (-1, "0 to 3")])
def test_bad_labels(labels: int | list[int], message: str) -> None:
    with pytest.raises(DarkroomError, match=message) as error:
        tiny_model(None).generate(seed=[1, 2, 3], classifier=ClassifierGuide(tiny_classifier(), labels))
    one_line(error)


def test_the_example_of_the_docs_trains_a_classifier() -> None:
    text = (Path(__file__).parent.parent / "docs" / "guidance.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "def train_classifier" in c)
    names: dict[str, object] = {}
    exec(code, names)
    schedule = SCHEDULES["ldm"]
    torch.manual_seed(0)

    def batches():  # type: ignore[no-untyped-def]
        """Upright or lying stripes."""
        generator = torch.Generator().manual_seed(1)
        stripes = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(2).expand(1, 3, 8, 8)
        for _ in range(40):
            labels = torch.randint(0, 2, (16,), generator=generator)
            yield torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.mT), labels

    config = ClassifierConfig(
        image_size=8, model_channels=32, out_channels=2, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(),
        pool="attention",
    )  # fmt: skip
    classifier = names["train_classifier"](config, schedule, batches(), 2e-3)  # type: ignore[operator]
    assert isinstance(classifier, NoisyClassifier)
    x0, labels = next(iter(batches()))
    level = schedule.level(torch.full((16,), 100.0))
    loss = classifier_loss(classifier, x0, torch.randn(x0.shape), level, labels)
    assert float(loss.detach().mean()) < 0.3  # log 2 without knowledge
