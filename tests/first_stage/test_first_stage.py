"""Shift and scale: measured as computed directly, applied in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage

TINY = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=2, norm_groups=4)


def make() -> tuple[FirstStage, list[torch.Tensor]]:
    torch.manual_seed(0)
    first_stage = FirstStage(Autoencoder(TINY))
    with torch.no_grad():  # latents far from the standard normal, differently in each channel
        bias = first_stage.autoencoder.quant_conv.bias
        assert bias is not None
        bias.copy_(torch.tensor([50.0, -3.0, 4.0, -2.0]))
    return first_stage, [torch.rand(n, 3, 8, 8) * 2 - 1 for n in (3, 4, 2)]


@pytest.mark.parametrize("kind", ["global", "channel", "std"])
def test_measure_is_the_direct_computation(kind: Any) -> None:
    """The law of total variance over all positions; and posterior samples have what was measured."""
    first_stage, batches = make()
    first_stage.measure(batches, kind)
    with torch.no_grad():
        posteriors = [first_stage.autoencoder.encode(b) for b in batches]
    z, variance = (torch.cat([getattr(p, n) for p in posteriors]).double() for n in ("mean", "variance"))
    dims = (0, 2, 3) if kind == "channel" else (0, 1, 2, 3)
    std = (z.var(dims, unbiased=False) + variance.mean(dims)).sqrt()
    mean = torch.zeros(()).double() if kind == "std" else z.mean(dims)
    torch.testing.assert_close(first_stage.shift.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(first_stage.scale.double(), 1 / std, rtol=1e-6, atol=0)
    assert first_stage.shift.dtype == torch.float32 and first_stage.shift.shape == ((2,) if kind == "channel" else ())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = torch.cat([first_stage.encode(b).sample(g) for b in batches for _ in range(200)]).double()
    torch.testing.assert_close(latents.std(dims, unbiased=False), torch.ones_like(std), atol=0.02, rtol=0)
    if kind != "std":
        torch.testing.assert_close(latents.mean(dims), torch.zeros_like(mean), atol=0.02, rtol=0)


def test_measuring_cached_moments_is_measuring_the_images() -> None:
    first_stage, batches = make()
    first_stage.measure(batches, "channel")
    expected = first_stage.shift.clone(), first_stage.scale.clone()
    with torch.no_grad():
        cached = [{"moments": first_stage.autoencoder.encode(b).moments} for b in batches]
    first_stage._set(0.0, 1.0)
    first_stage.measure(cached, "channel")
    torch.testing.assert_close((first_stage.shift, first_stage.scale), expected, rtol=1e-6, atol=0)
    deterministic = [{"moments": first_stage.autoencoder.encode(b).mean} for b in batches]
    first_stage.measure(deterministic, "channel")  # a VQ encoder has no log-variance
    z = torch.cat([d["moments"] for d in deterministic]).double()
    torch.testing.assert_close(first_stage.scale.double(), 1 / z.std((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)
    with pytest.raises(DarkroomError, match='"chanel" is not known'):
        first_stage.measure(cached, "chanel")  # type: ignore[arg-type]


def test_measure_takes_batch_dicts_and_keeps_the_mode() -> None:
    first_stage, batches = make()
    first_stage.train()
    first_stage.measure({"image": b} for b in batches)
    assert first_stage.training
    with pytest.raises(DarkroomError, match="no images"):
        first_stage.measure([])


def test_decode_undoes_the_normalisation() -> None:
    first_stage, batches = make()
    first_stage = FirstStage(first_stage.autoencoder, shift=torch.tensor([1.0, -2.0]), scale=torch.tensor([0.5, 3.0]))
    posterior = first_stage.autoencoder.encode(batches[0])
    latent = first_stage.encode(batches[0])
    torch.testing.assert_close(first_stage.denormalise(latent.mode()), posterior.mode())
    torch.testing.assert_close(first_stage.normalise(posterior.mode()), latent.mode())
    torch.testing.assert_close(latent.std, posterior.std * torch.tensor([0.5, 3.0]).view(1, 2, 1, 1))
    noise = torch.randn(posterior.mean.shape)
    expected = posterior.sample_with(noise) - torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(latent.sample_with(noise), expected * torch.tensor([0.5, 3.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(first_stage.decode(latent.mode()), first_stage.autoencoder.decode(posterior.mode()))


@pytest.mark.parametrize("kind", ["global", "channel"])
def test_shift_and_scale_are_saved_with_the_weights(kind: Any) -> None:
    first_stage, batches = make()
    first_stage.measure(batches, kind)
    copy = FirstStage(Autoencoder(TINY))
    copy.load_state_dict(first_stage.state_dict(), strict=True)
    assert torch.equal(copy.shift, first_stage.shift) and torch.equal(copy.scale, first_stage.scale)
    assert torch.equal(copy.encode(batches[0]).mode(), first_stage.encode(batches[0]).mode())


def test_facts_and_bad_input() -> None:
    first_stage, _ = make()
    assert (first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels) == (2, 2, 3)
    with pytest.raises(DarkroomError, match="6x6 or 8x6"):  # FirstStage pads, the autoencoder does not
        first_stage.autoencoder.encode(torch.zeros(1, 3, 6, 7))
    with pytest.raises(DarkroomError, match=r"takes images of shape \(batch, 3"):
        first_stage.encode(torch.zeros(1, 4, 6, 7))
    with pytest.raises(DarkroomError, match="scale has shape"):
        FirstStage(first_stage.autoencoder, scale=torch.ones(5))
    with pytest.raises(DarkroomError, match="encode: the image has type uint8: convert it to"):
        first_stage.encode(torch.zeros(1, 3, 6, 7, dtype=torch.uint8))
    with pytest.raises(DarkroomError, match="decode: the latent is a list: give a tensor"):
        first_stage.decode([0.0])  # type: ignore[arg-type]
