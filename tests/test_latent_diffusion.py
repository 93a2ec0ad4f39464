"""Generation: what an image may depend on, what a request may say, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data_facts import Facts

from darkroom.build import build_conditioner, build_denoiser, build_first_stage, conditioner_config, denoiser_config
from darkroom.conditioning.classes import ClassEncoderConfig
from darkroom.conditioning.text import TextEncoderConfig
from darkroom.denoiser import DenoiserConfig
from darkroom.diffusion.grids import Grid
from darkroom.diffusion.noise import SeededNoise
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.generation_request import Request
from darkroom.guidance import Guided
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.networks.unet import UNetConfig
from darkroom.objective import ObjectiveConfig
from darkroom.solvers import SOLVERS
from darkroom.training import denoiser_step

CAPTIONS = ["a red circle", "a blue square above a green ring"]


def make_model(conditions: tuple[str, ...] = ("text",), pixels: bool = False, kind: str = "flow") -> LatentDiffusion:
    """A model with random weights everywhere, also where training starts from zero, so that every input matters."""
    torch.manual_seed(3)
    configs: dict[str, Any] = {
        "text": TextEncoderConfig(width=32, depth=1, heads=2, head_width=16, length=12, vocabulary_size=64),
        "class": ClassEncoderConfig(width=32),
    }
    conditioner = build_conditioner(
        conditioner_config({c: configs[c] for c in conditions}, Facts(["cat", "dog", "snail"], CAPTIONS))
    )
    first_stage = None
    if not pixels:
        first_stage = build_first_stage({"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8})
    network = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=2
    )
    config = DenoiserConfig(
        network=network,
        schedule=ScheduleConfig(kind=kind),  # type: ignore[arg-type]
        prediction_type="velocity" if kind == "flow" else "epsilon",
    )
    denoiser = build_denoiser(denoiser_config(config, {}, 3 if pixels else 4, conditioner))
    for p in denoiser.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return LatentDiffusion(first_stage, denoiser, conditioner, {"defaults": {"size": [16, 16], "steps": 4}})


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return make_model()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_an_image_depends_on_its_own_seed_and_prompt_only(model: LatentDiffusion, solver: str) -> None:
    """Alone, in a batch, and in a batch that is cut in two: at most one step of 255 apart."""
    options = {"solver": solver, "steps": 4} | ({"eta": 0.7} if solver == "ddim" else {})
    if solver == "ddpm":
        options["steps"] = 5
    together = model.generate([*CAPTIONS, "a ring"], seed=[5, 6, 7], **options)
    cut = model.generate([*CAPTIONS, "a ring"], seed=[5, 6, 7], batch_size=2, **options)
    alone = model.generate(CAPTIONS[1], seed=6, **options)
    assert together.images.std() > 5
    assert difference(together.images, cut.images) <= 1
    assert difference(together.images[1], alone.images[0]) <= 1
    assert difference(together.images[0], together.images[1]) > 10


def test_the_same_request_gives_the_same_bytes(model: LatentDiffusion) -> None:
    request = Request(prompts=CAPTIONS, seeds=[1, 2], solver="ddim", eta=1.0, steps=4)
    one, two = model.generate(request), model.generate(request)
    assert np.array_equal(one.images, two.images) and torch.equal(one.latents, two.latents)
    record = one.settings[1]["request"]
    again = model.generate(Request(**{**record, "size": tuple(record["size"])}))
    assert np.array_equal(one.images, again.images)


def test_prompt_negative_prompt_and_guidance_matter(model: LatentDiffusion) -> None:
    base = model.generate(CAPTIONS[0], seed=1)
    assert base.nfe == 8  # four steps, guided: two calls each
    assert model.generate(CAPTIONS[0], seed=1, guidance_scale=1.0).nfe == 4
    for change in ({"negative_prompt": "a blue ring"}, {"guidance_scale": 9.0}, {"seed": 2}):
        assert difference(base.images, model.generate(CAPTIONS[0], **({"seed": 1} | change)).images) > 0
    assert difference(base.images, model.generate(CAPTIONS[1], seed=1).images) > 0


def test_size_progress_and_defaults(model: LatentDiffusion) -> None:
    seen: list[tuple[int, int]] = []
    result = model.generate(
        CAPTIONS, seed=[0, 1], size=(24, 8), batch_size=1, progress=lambda d, t: seen.append((d, t))
    )
    assert result.images.shape == (2, 8, 24, 3) and result.images.dtype == np.uint8
    assert result.latents.shape == (2, 4, 4, 12)
    assert seen == [(i, 8) for i in range(1, 9)]


def test_a_shift_that_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and generation tell the schedule how large the latents are."""
    model = make_model()
    model.denoiser.schedule = make_schedule(ScheduleConfig(kind="flow", shift_rule="sqrt", shift_places=(16, 64)))
    grids: list[Grid] = []

    def spy(denoise: Any, x: Any, grid: Grid, noise: Any, **options: Any) -> Any:
        grids.append(grid)
        return x

    monkeypatch.setitem(SOLVERS, "euler", spy)
    for size in ((8, 8), (16, 16), (24, 32)):  # 16, 64 and 192 places
        model.generate(CAPTIONS[0], seed=1, solver="euler", size=size)
    steepness = [float(g[1].sigma / (1 - g[1].sigma)) for g in grids]
    assert steepness[1] / steepness[0] == pytest.approx(2) and steepness[2] / steepness[0] == pytest.approx(12**0.5)

    seen: list[int | None] = []

    def times(config: Any, schedule: Any, batch: int, generator: Any, places: int | None = None) -> Any:
        seen.append(places)
        return torch.full((batch,), 500.0, dtype=torch.float64)

    monkeypatch.setattr(denoiser_step, "sample_time", times)
    phase = denoiser_step.DenoiserPhase(model.denoiser, model.conditioner, model.first_stage, ObjectiveConfig())
    phase({"image": torch.zeros(2, 3, 16, 24), "text": CAPTIONS}, torch.Generator().manual_seed(0), 0)
    assert seen == [8 * 12]


def test_class_and_unconditional_and_pixel_models() -> None:
    classes = make_model(("class",))
    named = classes.generate(class_label=["dog", "snail"], seed=[1, 1])
    numbered = classes.generate(class_label=[1, 2], seed=[1, 1])
    assert np.array_equal(named.images, numbered.images)
    assert named.settings[0]["request"]["class_labels"] == ["dog", "snail"]
    free = make_model((), kind="ldm")
    assert free.generate(seed=[1, 2], solver="ddim").nfe == 4
    pixels = make_model(("class",), pixels=True)
    assert pixels.generate(class_label="cat", seed=3).images.shape == (1, 16, 16, 3)


def test_text_and_class_together() -> None:
    both = make_model(("text", "class"))
    one = both.generate("a red circle", class_label="dog", seed=1)
    text_only = both.generate("a red circle", seed=1)
    assert difference(one.images, text_only.images) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "x", "size": (17, 16)}, "the nearest are 16 and 20"),
        ({"prompt": "x", "size": (16, 2)}, "height 2"),
        ({"prompt": "x", "solver": "dpm++ 2m"}, 'did you mean "dpm++2m"'),
        ({"prompt": "x", "steps": 0}, "steps is 0"),
        ({"prompt": "x", "batch_size": 0}, "batch size is 0"),
        ({"prompt": "x", "seed": -1}, "seed -1"),
        ({"prompt": "x", "seed": []}, "seed"),
        ({"class_label": "cat"}, "does not take a class"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts for 3 images"),
    ],
)
def test_bad_requests_are_one_line(model: LatentDiffusion, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError) as error:
        model.generate(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_a_model_does_not_take() -> None:
    classes = make_model(("class",))
    with pytest.raises(DarkroomError, match="does not take a prompt"):
        classes.generate("a cat")
    with pytest.raises(DarkroomError, match="negative prompt"):
        classes.generate(class_label="cat", negative_prompt="dog")
    with pytest.raises(DarkroomError, match="'snail'"):
        classes.generate(class_label="snial")


def test_seeded_noise_is_the_images_own_and_can_be_asked_in_any_order() -> None:
    both, one = SeededNoise([4, 9], (2, 3)), SeededNoise([9], (2, 3))
    draws = [both(i) for i in range(3)]
    assert torch.equal(both(1), draws[1]) and torch.equal(both(2), draws[2]) and torch.equal(both(0), draws[0])
    assert all(torch.equal(one(i)[0], draws[i][1]) for i in range(3))
    generator = torch.Generator().manual_seed(9)
    assert torch.equal(one(0)[0], torch.randn(2, 3, generator=generator))


def test_a_model_without_a_null_class_generates_at_scale_one() -> None:
    model = make_model(("class",))
    encoder = model.conditioner.encoders["class"]
    encoder.config.null_class = False  # type: ignore[union-attr]
    assert model.generate(class_label="dog", guidance_scale=1.0, steps=2).nfe == 2
    with pytest.raises(DarkroomError, match="no null class"):
        model.generate(class_label="dog", guidance_scale=2.0, steps=2)


def test_an_image_that_is_not_finite_is_no_black_image(model: LatentDiffusion) -> None:
    broken = make_model()
    with torch.no_grad():
        broken.denoiser.network.out[2].bias.fill_(torch.nan)  # type: ignore[union-attr, index]
    with pytest.raises(DarkroomError, match="seed 4 is not finite"):
        broken.generate("a red circle", seed=4, steps=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.5, "solver": "euler"}, "option of ddim, euler_ancestral"),
        ({"eta": 2.0, "solver": "ddim"}, "eta is 2.0"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
    ],
)
def test_options_that_would_do_nothing_or_harm(model: LatentDiffusion, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words):
        model.generate("a red circle", **options)


# ---- guidance


def test_guidance_of_each_condition() -> None:
    model = make_model(("text", "class"))
    ask: dict[str, Any] = {"class_label": "cat", "seed": 3, "steps": 2, "solver": "ddim"}
    both = model.generate("a red fox", guidance_scale=3.0, **ask)
    assert both.nfe == 4
    # Equal scales by name are one scale for all, and 1 is off.
    same = model.generate("a red fox", guidance={"text": 3.0, "class": 3.0}, **ask)
    assert np.array_equal(both.images, same.images) and same.nfe == 4
    assert model.generate("a red fox", guidance={"text": 1.0, "class": 1.0}, **ask).nfe == 2
    # Two scales: three evaluations, and what Guided makes of the three conditionings.
    chain = model.generate("a red fox", guidance={"class": 6.0}, guidance_scale=2.0, **ask)
    assert chain.nfe == 6 and difference(chain.images, both.images) > 3
    request = model.validate(Request(["a red fox"], ["cat"], [3], 2, 2.0, "ddim", guidance={"class": 6.0}))
    batch: dict[str, Any] = {"text": ["a red fox"], "class_label": [0]}
    null, text = model.conditioner.null(1), model.conditioner(batch, absent=["class"])
    expected = Guided(model.denoiser, model.conditioner(batch), null, 6.0, between=[(text, 2.0)])
    x, level = torch.randn(1, 4, 8, 8), model.denoiser.schedule.level(300.0)
    with torch.no_grad():
        torch.testing.assert_close(model.guided(request, slice(0, 1))(x, level), expected(x, level))
    # A condition that is not asked for takes no part.
    alone = model.generate("a red fox", guidance={"class": 6.0}, guidance_scale=2.0, seed=3, steps=2, solver="ddim")
    assert alone.nfe == 4
    record = chain.settings[0]["request"]
    assert record["guidance"] == {"class": 6.0} and record["guidance_rescale"] == 0.0


def test_an_encoder_may_have_its_own_scale() -> None:
    model = make_model(("text", "class"))
    ask: dict[str, Any] = {"class_label": "cat", "seed": 3, "steps": 2, "guidance_scale": 2.0}
    asked = model.generate("a red fox", guidance={"class": 6.0}, **ask)
    model.conditioner.encoders["class"].guidance_scale = 6.0
    assert np.array_equal(model.generate("a red fox", **ask).images, asked.images)


def test_a_negative_prompt_in_a_chain() -> None:
    """It stands where the text is absent, also beside the class."""
    model = make_model(("text", "class"))
    request = model.validate(
        Request(["a red fox"], ["cat"], [3], 2, 2.0, "ddim", guidance={"class": 6.0}, negative_prompt="a snail")
    )
    part = slice(0, 1)
    negative = model.conditioner({"text": ["a snail"], "class_label": [0]}, absent=["class"])
    found = model.encode_negative(request, part)
    assert found is not None and torch.equal(found.context, negative.context)  # type: ignore[arg-type]
    beside = model.conditioner({"text": ["a snail"], "class_label": [0]})
    assert torch.equal(model._partly(request, part, ["class"]).context, beside.context)  # type: ignore[arg-type]


def test_guidance_interval_and_rescale(model: LatentDiffusion) -> None:
    ask: dict[str, Any] = {"seed": 3, "steps": 4, "guidance_scale": 5.0}
    plain = model.generate("a red fox", **ask)
    some = model.generate("a red fox", guidance_interval=(0.3, 3.0), **ask)
    assert 4 < some.nfe < plain.nfe == 8
    none = model.generate("a red fox", guidance_interval=(1e6, 1e7), **ask)
    off = model.generate("a red fox", seed=3, steps=4, guidance_scale=1.0)
    assert none.nfe == 4 and np.array_equal(none.images, off.images)
    rescaled = model.generate("a red fox", guidance_rescale=0.7, **ask)
    assert difference(rescaled.images, plain.images) > 1


def test_autoguidance(model: LatentDiffusion) -> None:
    weaker = make_model()
    weaker.info["name"] = "weak"
    with torch.no_grad():
        for parameter in weaker.denoiser.parameters():
            parameter.mul_(0.9)
    ask: dict[str, Any] = {"seed": 3, "steps": 2, "solver": "ddim", "guidance_scale": 2.0}
    guided = model.generate("a red fox", guide=weaker, **ask)
    assert guided.nfe == 4 and guided.settings[0]["guide"] == {"name": "weak"}
    assert difference(guided.images, model.generate("a red fox", **ask).images) > 1
    # A model guided away from itself is not guided; unconditional models take a guide too.
    itself = model.generate("a red fox", guide=model, **ask)
    plain = model.generate("a red fox", seed=3, steps=2, solver="ddim", guidance_scale=1.0)
    assert difference(itself.images, plain.images) <= 1
    free = make_model(())
    assert free.generate(seed=1, steps=2, guide=make_model(()), guidance_scale=2.0).nfe == 4
    other = make_model()
    other.denoiser.schedule = make_schedule(ScheduleConfig(kind="cosine"))
    with pytest.raises(DarkroomError, match="noise schedule"):
        model.generate("a red fox", guide=other, **ask)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance": {"txt": 3.0}}, 'did you mean "text"'),
        ({"guidance": {"text": float("nan")}}, "finite"),
        ({"guidance_interval": (3.0, 1.0)}, "the lower one first"),
        ({"guidance_rescale": 1.5}, "from 0 (off) to 1"),
    ],
)
def test_bad_guidance(model: LatentDiffusion, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError) as error:
        model.generate("a red fox", **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_learned_variance_is_half_of_the_channels() -> None:
    model = make_model(())
    config = DenoiserConfig(network=UNetConfig(model_channels=32, channel_mult=(1,)), learned_variance=True)
    denoiser = build_denoiser(denoiser_config(config, {}, 4, model.conditioner))
    assert denoiser.network.config.out_channels == 8  # type: ignore[union-attr]
    learned = LatentDiffusion(model.first_stage, denoiser, model.conditioner, model.info)
    assert learned.latent_channels == 4
    assert learned.generate(seed=[1, 2], steps=2, solver="ddim").images.shape == (2, 16, 16, 3)
    # DDPM takes it, and hears of a change in it.
    with torch.no_grad():
        learned.denoiser.network.out[2].weight[4:].normal_()  # type: ignore[union-attr, index]
        one = learned.generate(seed=1, steps=5, solver="ddpm").latents
        learned.denoiser.network.out[2].bias[4:].add_(0.5)  # type: ignore[union-attr, index]
    assert not torch.equal(one, learned.generate(seed=1, steps=5, solver="ddpm").latents)
