"""Noise that a decoder may draw texture from."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_autoencoders import make_autoencoder
from torch import Tensor

from darkroom import load
from darkroom.build import build_first_stage, with_grain
from darkroom.first_stage.grain import SIDE, Grain, OutputGrain, noise_bands
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


def test_grain_on_the_image_is_noise_of_the_stated_strength() -> None:
    """Two bands of variance 1 that share no frequency but a few: sum_k softplus(s_k) n_k, continued at the seams."""
    noise = noise_bands()
    torch.testing.assert_close(noise.var((2, 3), correction=0), torch.ones(1, 2))
    spectrum = torch.fft.fft2(noise).abs().square().mean(0)
    radius = torch.fft.fftfreq(SIDE).abs().view(-1, 1).maximum(torch.fft.fftfreq(SIDE).abs().view(1, -1))
    means = (spectrum * radius).sum((1, 2)) / spectrum.sum((1, 2))
    assert float(means[1]) < 0.3 < float(means[0])  # cycles a pixel: the one is finer than the other
    grain = OutputGrain(6)
    with torch.no_grad():
        grain.strength.bias.copy_(torch.tensor([1.0, -2.0]))  # type: ignore[union-attr]
        added = grain(torch.zeros(2, 6, 70, 130))
        strength = torch.log1p(torch.exp(torch.tensor([1.0, -2.0])))
        expected = torch.einsum("k,khw->hw", strength, grain.noise[0])
    torch.testing.assert_close(added[1, 0, :SIDE, :SIDE], expected)
    torch.testing.assert_close(added[0, 0, SIDE:, SIDE:128], expected[: 70 - SIDE])


def test_an_image_that_is_given_grain_changes_by_the_faintest() -> None:
    first_stage = build_first_stage(CONFIG)
    given = with_grain(first_stage, "output")
    z = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        image, (mean, grain) = first_stage.decode(z), given.autoencoder.decode_parts(given.denormalise(z))
        torch.testing.assert_close(mean, image)
        torch.testing.assert_close(given.decode(z), mean + grain)
    assert grain is not None and grain.shape == (1, 1, *image.shape[2:])
    assert 0 < float(grain.std()) < 0.02
    assert encoder_fingerprint(given.autoencoder) == encoder_fingerprint(first_stage.autoencoder)
    assert first_stage.autoencoder.decode_parts(z)[1] is None


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
