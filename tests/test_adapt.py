"""Fine-tuning a first stage: its decoder alone, where what was made with its latents goes on working, or all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FIRST_STAGE, one_line, tiny_first_stage, tiny_model
from torch import Tensor

import darkroom
from darkroom.build import build_first_stage, build_preview
from darkroom.data.batches import collate
from darkroom.data.latent_cache import LatentCache, cached_moments
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.statistics import encoder_fingerprint
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import save
from darkroom.recipe_source import new_recipe
from darkroom.train_job import train

SHORT: dict[str, Any] = {
    "data.source": "shapes",
    "data.validation": None,
    "data.size": 32,
    "data.count": 16,
    "first_stage.train.steps": 3,
    "first_stage.train.batch_size": 4,
    "first_stage.train.objective.crop": None,
    "first_stage.train.objective.perceptual": "laplacian",
    "first_stage.train.objective.discriminator_weight": 0.0,
}


def images() -> Tensor:
    data = open_dataset(DataConfig(size=32, count=16))
    return collate([data[i] for i in range(16)])["image"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a preview decoder, untrained."""
    made = tiny_model()
    assert made.first_stage is not None
    sizes = {"latent_channels": 3, "image_channels": 3, "downsampling": 2, "channels": 8}
    made.first_stage.preview = build_preview(sizes, made.first_stage.shift, made.first_stage.scale)
    return made.save(tmp_path_factory.mktemp("models") / "old")


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "decoder"
    train("first-stage-decoder", folder, init_from=model, overrides=SHORT, quiet=True)
    return folder / "model"


@torch.no_grad()
def test_a_tuned_decoder_leaves_the_latents_alone(model: Path, tuned: Path) -> None:
    """Bit for bit: latents, shift and scale, what the denoiser generates. Only the decoded images differ."""
    old, new = darkroom.load(model), darkroom.load(tuned)
    assert isinstance(new, LatentDiffusion)
    before, after = (m.first_stage.encode(images()) for m in (old, new))
    assert torch.equal(before.mean, after.mean) and torch.equal(before.logvar, after.logvar)
    assert torch.equal(old.first_stage.shift, new.first_stage.shift)
    assert torch.equal(old.first_stage.scale, new.first_stage.scale)
    one, two = (m.generate("a red fox", seed=[1, 2], steps=3) for m in (old, new))
    assert torch.equal(one.latents, two.latents) and not np.array_equal(one.images, two.images)
    expected = old.first_stage.autoencoder.decode(old.first_stage.denormalise(one.latents))
    assert not torch.equal(expected, new.first_stage.decode(two.latents))
    # What belongs to the latents goes on with them.
    assert encoder_fingerprint(old.first_stage.autoencoder) == encoder_fingerprint(new.first_stage.autoencoder)
    assert new.first_stage.preview is not None
    assert torch.equal(old.first_stage.preview_of(one.latents), new.first_stage.preview_of(two.latents))


def test_a_run_tells_how_flat_colours_come_out(tuned: Path) -> None:
    run = tuned.parent
    found = darkroom.load(tuned).info["decoder"]["training"]["flat_colours"]
    assert len(found["colours"]) == 8 and found["ripple"] > 0
    assert (run / "samples" / "flat-colours.png").is_file() and "Flat colours" in (run / "report.html").read_text()


@pytest.mark.parametrize("recipe", ["first-stage-finetune", "first-stage-sharpen"])
def test_tuning_all_of_it_makes_new_latents(recipe: str, model: Path, tmp_path: Path) -> None:
    changes = SHORT | {"first_stage.train.latents": "channel"}
    train(recipe, tmp_path / "run", init_from=model, overrides=changes, quiet=True)
    new = darkroom.load(tmp_path / "run")
    assert isinstance(new, FirstStage)  # no denoiser knows these latents
    assert new.preview is None and new.scale.shape == (3,)
    with torch.no_grad():
        posterior = new.encode(images())
    latents = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=0.05, rtol=0)


def test_grain_is_given_to_a_decoder_whose_latents_stay(model: Path, tmp_path: Path) -> None:
    short = {key: value for key, value in SHORT.items() if "steps" not in key}
    train("first-stage-grain", tmp_path / "run", init_from=model, overrides=short, quiet=True)
    old, new = darkroom.load(model), darkroom.load(tmp_path / "run")
    one, other = (getattr(m, "first_stage", m) for m in (old, new))
    assert one.autoencoder.decoder.grain is None and other.autoencoder.decoder.grain is not None
    assert encoder_fingerprint(one.autoencoder) == encoder_fingerprint(other.autoencoder)
    mean = {name: p for name, p in other.autoencoder.decoder.state_dict().items() if not name.startswith("grain.")}
    assert all(torch.equal(p, mean[name]) for name, p in one.autoencoder.decoder.state_dict().items())
    weight = other.autoencoder.decoder.grain.variance.weight
    assert float(weight.abs().max()) > 0  # it began as zeros


def test_the_codebook_stays_with_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first_stage = build_first_stage(FIRST_STAGE | {"kind": "vq", "codebook_size": 8})
    save(first_stage, tmp_path / "vq")
    changes = SHORT | {"first_stage.train.objective.revive_codes_every": 1}
    train("first-stage-decoder", tmp_path / "run", init_from=tmp_path / "vq", overrides=changes, quiet=True)
    new = darkroom.load(tmp_path / "run").autoencoder
    old = darkroom.load(tmp_path / "vq").autoencoder
    assert torch.equal(old.codebook.embedding.weight, new.codebook.embedding.weight)
    with torch.no_grad():
        assert torch.equal(old.encode(images()).mean, new.encode(images()).mean)
    assert not torch.equal(old.decoder.conv_out.weight, new.decoder.conv_out.weight)


def test_init_from_in_a_recipe_of_a_first_stage(model: Path, tmp_path: Path) -> None:
    recipe, _ = new_recipe("first-stage-decoder", init_from=model, data=tmp_path)
    assert recipe.first_stage.train is not None and recipe.first_stage.train.init_from == str(model)
    assert recipe.init_from is None and recipe.steps == 0
    grey = tmp_path / "grey"
    save(build_first_stage(FIRST_STAGE | {"in_channels": 1, "out_channels": 1}), grey)
    assert new_recipe("first-stage-decoder", init_from=grey, data=tmp_path)[0].data.channels == 1  # those of the model
    assert new_recipe("preview", first_stage=grey, data=tmp_path)[0].data.channels == 1
    with pytest.raises(DarkroomError, match="holds only a first stage"):
        new_recipe("shapes-tiny", init_from=grey)


# --- statistics and caches --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    build_cache(tiny_first_stage(), tmp_path / "latents")
    return tmp_path / "latents"


def build_cache(first_stage: FirstStage, folder: Path, **options: Any) -> LatentCache:
    data = open_dataset(DataConfig(size=32, count=16))
    autoencoder = first_stage.autoencoder

    def encode(image: Tensor) -> Tensor:
        with torch.no_grad():
            return autoencoder.encode(image).moments

    return LatentCache.build(data, encode, folder, autoencoder=encoder_fingerprint(autoencoder), **options)


def test_statistics_change_and_the_cache_stays(cache: Path, tmp_path: Path) -> None:
    """Measured again in each way from the same files, which are neither changed nor made again."""
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cache.iterdir() if p.name != ".lock"}
    direct = tiny_first_stage()
    save(tiny_first_stage(), tmp_path / "model")
    for kind in ("channel", "std", "global"):
        found = darkroom.measure(tmp_path / "model", cache, kind, tmp_path / kind)
        direct.measure([images()], kind)  # type: ignore[arg-type]
        for name in ("shift", "scale"):
            torch.testing.assert_close(getattr(found, name), getattr(direct, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(darkroom.load(tmp_path / kind).scale, found.scale)
        said: list[str] = []
        build_cache(found, cache, say=said.append)
        assert not said
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cache.iterdir() if p.name != ".lock"} == before


def test_a_cache_of_another_autoencoder(cache: Path) -> None:
    """Refused where it would be read, made again where it is built; both name both encoders."""
    other = tiny_first_stage()
    with torch.no_grad():
        next(iter(other.autoencoder.encoder.parameters())).add_(0.1)  # type: ignore[union-attr]
    prints = [encoder_fingerprint(f.autoencoder) for f in (tiny_first_stage(), other)]
    with pytest.raises(DarkroomError, match="another autoencoder") as error:
        darkroom.measure(other, cache)
    assert all(p[:12] in one_line(error) for p in prints)
    said: list[str] = []
    build_cache(other, cache, say=said.append)
    assert len(said) == 1 and all(p[:12] in said[0] for p in prints)
    moments = torch.cat(list(cached_moments(cache, prints[1])))
    with torch.no_grad():
        torch.testing.assert_close(moments, other.autoencoder.encode(images()).moments, rtol=1e-4, atol=1e-5)
    with pytest.raises(DarkroomError, match="no such folder"):
        darkroom.measure(other, cache / "none")
    with pytest.raises(DarkroomError, match="no latent cache"):
        darkroom.measure(other, cache.parent)


def test_the_command_measures_and_info_shows(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from darkroom.cli.main import main

    save(tiny_first_stage(), tmp_path / "model")
    words = ["measure", str(tmp_path / "model"), str(cache), "--latents", "channel", "-o", str(tmp_path / "new")]
    assert main(words) == 0
    scale = darkroom.load(tmp_path / "new").scale
    assert main(["info", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert f"scale: {', '.join(f'{s:.5g}' for s in scale.tolist())}" in shown
    assert "channel 2: shift " in shown and f"scale {float(scale[2]):.5g}" in shown


def test_a_given_first_stage_is_measured_again_for_a_denoiser(tmp_path: Path) -> None:
    save(tiny_first_stage(), tmp_path / "given")
    overrides = {
        "first_stage.latents": "channel",
        "data.count": 16,
        "steps": 2,
        "batch_size": 4,
        "evaluate.samples": 1,
        "evaluate.steps": 1,
    }
    train("shapes-tiny", tmp_path / "run", first_stage=tmp_path / "given", overrides=overrides, quiet=True)
    found = darkroom.load(tmp_path / "run").first_stage
    direct = tiny_first_stage()
    direct.measure([images()], "channel")
    torch.testing.assert_close(found.scale, direct.scale, rtol=1e-5, atol=1e-6)
    with pytest.raises(DarkroomError, match=r"first_stage\.train\.latents"):
        new_recipe("shapes-tiny", changes={"first_stage.latents": "std"})
