"""Noise that a decoder may draw texture from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_autoencoders import make_autoencoder
from torch import Tensor

from darkroom import load
from darkroom.build import build_first_stage, with_grain, without_output_grain
from darkroom.errors import DarkroomError
from darkroom.evaluation.metrics import gradient_energy
from darkroom.first_stage.grain import FAINT, SIDE, UNIT, Grain, OutputGrain, fine_noise, fit_output_grain
from darkroom.first_stage.posterior import Posterior
from darkroom.first_stage.statistics import encoder_fingerprint
from darkroom.model_io import save

CONFIG = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "embed_dim": 2, "norm_groups": 4}


@torch.no_grad()
def grained() -> Grain:
    grain = Grain(6)
    torch.nn.init.normal_(grain.project.weight)
    torch.nn.init.normal_(grain.project.bias)  # type: ignore[arg-type]
    return grain


def test_it_adds_a_projection_of_its_noise_which_repeats_itself() -> None:
    grain, x = grained(), torch.rand(2, 6, 70, 130)
    with torch.no_grad():
        added = grain(x) - x
        expected = torch.einsum("oi,ihw->ohw", grain.project.weight[:, :, 0, 0], grain.noise[0])
        expected += grain.project.bias.view(-1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(added[0, :, :SIDE, :SIDE], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added[1, :, SIDE:, 2:8], expected[:, : 70 - SIDE, 2:8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added[0, :, :, SIDE:128], added[0, :, :, :SIDE], atol=1e-5, rtol=1e-5)


def test_rows_are_those_of_the_whole() -> None:
    grain = grained()
    whole = grain.rows(0, 200, 90)
    assert torch.equal(grain.rows(50, 140, 90), whole[:, :, 50:140])


def test_a_decoder_that_is_given_grain_does_not_use_it_yet(tmp_path: Path) -> None:
    first_stage = build_first_stage(CONFIG)
    given = with_grain(first_stage, "levels")
    z = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(given.decode(z), first_stage.decode(z))
        for module in given.modules():
            if isinstance(module, Grain):
                torch.nn.init.normal_(module.project.weight)
        used = given.decode(z)
        assert not torch.equal(used, first_stage.decode(z))
    assert encoder_fingerprint(given.autoencoder) == encoder_fingerprint(first_stage.autoencoder)
    save(given, tmp_path / "model")
    again = load(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again.decode(z), used)  # type: ignore[operator]


def test_grain_on_the_image_is_noise_of_the_stated_variance() -> None:
    """sqrt(v) n with v from features and their squares, n fine, of variance 1 and continued at the seams."""
    noise = fine_noise()
    torch.testing.assert_close(noise.var(correction=0), torch.tensor(1.0))
    spectrum = torch.fft.fft2(noise).abs().square()[0, 0]
    radius = torch.fft.fftfreq(SIDE).abs().view(-1, 1).maximum(torch.fft.fftfreq(SIDE).abs().view(1, -1))
    assert float((spectrum * radius).sum() / spectrum.sum()) > 0.35  # cycles a pixel; of white noise: 0.33
    assert float(spectrum[radius < 0.05].sum() / spectrum.sum()) < 1e-3
    grain = OutputGrain(2)
    with torch.no_grad():
        grain.variance.weight[0, :, 1, 1] = torch.tensor([0.0, 3.0, 0.5, 0.0])
        features = torch.stack([torch.full((70, 130), 2.0), torch.full((70, 130), 1.5)])[None]
        added = grain(features)
    expected = math.sqrt(UNIT * (3.0 * 1.5 + 0.5 * 2.0**2 + FAINT)) * grain.noise[0, 0]
    torch.testing.assert_close(added[0, 0, :SIDE, :SIDE], expected)
    torch.testing.assert_close(added[0, 0, SIDE:, SIDE:128], expected[: 70 - SIDE])
    with torch.no_grad():  # no variance is below 0
        grain.variance.bias.fill_(-100.0)  # type: ignore[union-attr]
        assert float(grain(features).abs().max()) < 1e-3


def test_an_image_that_is_given_grain_changes_by_the_faintest() -> None:
    first_stage = build_first_stage(CONFIG)
    given = with_grain(first_stage, "output")
    z = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        image, mean = first_stage.decode(z), given.autoencoder.decode_mean(given.denormalise(z))
        torch.testing.assert_close(mean, image)
        grain = given.decode(z) - mean
    torch.testing.assert_close(grain, grain[:, :1].expand_as(grain))  # alike in all channels
    assert 0 < float(grain.std()) < 0.02
    assert encoder_fingerprint(given.autoencoder) == encoder_fingerprint(first_stage.autoencoder)


def test_grain_on_the_image_is_taken_away_for_good(tmp_path: Path) -> None:
    first_stage = build_first_stage(CONFIG).eval()
    plain = without_output_grain(with_grain(first_stage, "output").eval())
    assert not plain.training and without_output_grain(plain) is plain
    again = load(save(plain, tmp_path / "model"))
    z = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        image = first_stage.decode(z)
        torch.testing.assert_close(plain.decode(z), image)
        torch.testing.assert_close(again.decode(z), image)  # type: ignore[operator]


def test_one_grain_for_each_level_that_is_upsampled_to() -> None:
    autoencoder = make_autoencoder("grain")
    assert [level.grain is not None for level in autoencoder.decoder.up] == [True, True, False]  # type: ignore[union-attr]
    assert not any("grain" in name for name in autoencoder.encoder.state_dict())


def test_noise_makes_one_latent_everywhere_another_picture_at_each_place() -> None:
    """The same numbers at all positions of the latent: without grain the inside of the picture repeats every f."""

    def inside(name: str) -> Tensor:
        autoencoder = make_autoencoder(name)
        f = autoencoder.downsampling
        with torch.no_grad():
            image = autoencoder.decode(torch.ones(1, 2, 24, 24, dtype=torch.float64))
        middle = image[..., 8 * f : 12 * f, 8 * f : 12 * f]
        return (middle - middle.roll(f, -1)).abs().max()

    assert float(inside("three levels")) < 1e-6 < 1e-3 < float(inside("grain"))


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_the_grain_that_images_lack_is_found(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are the decoder's own plus noise of a variance that its features tell: it comes back, and with it the
    gradient energy. What is fitted is the variance, so a share of the grain has its square of the energy."""
    torch.manual_seed(0)
    codes = {"kind": "vq", "codebook_size": 32} if kind == "vq" else {}
    autoencoder = build_first_stage(CONFIG | codes | {"output_grain": True}).trainable.eval()
    latents = list(torch.randn(12, 4, 2, 48, 48))
    truth, images, energies = [], [], torch.zeros(2, dtype=torch.float64)

    def features_of(z: Tensor) -> Tensor:
        if autoencoder.codebook is not None:
            z = autoencoder.codebook.lookup(autoencoder.codebook.nearest(z))
        return autoencoder.decoder_features(z)

    with torch.no_grad():
        for z in latents:
            features = features_of(z)
            truth.append(0.004 + 0.04 * F.avg_pool2d(features[:, 3:4].square(), 3, 1, 1))  # of 3x3 places
            noise = torch.cat([fine_noise() for _ in range(4)]).repeat(1, 1, 2, 2)[..., :96, :96]  # another draw
            images.append(autoencoder.decoder.conv_out(features) + truth[-1].sqrt() * noise)
            energies[0] += gradient_energy(images[-1]).sum()
            energies[1] += gradient_energy(autoencoder.decoder.conv_out(features)).sum()
    given = iter(latents)
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "encode", lambda _: Posterior(next(given)))
        fit_output_grain(autoencoder, images, share)
    with torch.no_grad():
        painted = torch.stack([gradient_energy(autoencoder.decode(z)).sum() for z in latents]).sum()
        features, grain = features_of(latents[0]), autoencoder.decoder.grain
        assert grain is not None
        found = UNIT * grain.variance(torch.cat([features, features.square()], 1))
    lacking = energies[0] - energies[1]
    assert float(painted - energies[1]) == pytest.approx(share**2 * float(lacking), rel=0.05)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    both = torch.stack([found[inside].flatten(), truth[0][inside].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95
    assert float(both[0].mean()) == pytest.approx(share**2 * float(both[1].mean()), rel=0.1)


def test_grain_that_cannot_be_measured_is_one_line() -> None:
    with_it = build_first_stage(CONFIG | {"output_grain": True}).trainable
    image = torch.zeros(1, 3, 16, 16)
    for autoencoder, images, share, message in (
        (build_first_stage(CONFIG).trainable, [image], 1.0, "no grain on its image"),
        (with_it, [], 1.0, "at least one batch"),
        (with_it, [image], 3.0, "a share of 3"),
    ):
        with pytest.raises(DarkroomError, match=message):
            fit_output_grain(autoencoder, images, share)
