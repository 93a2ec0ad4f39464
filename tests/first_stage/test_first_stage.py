"""Shift and scale: measured as computed directly, applied in both directions."""

from __future__ import annotations

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


@pytest.mark.parametrize("per_channel", [False, True])
def test_measure_is_the_direct_computation(per_channel: bool) -> None:
    first_stage, batches = make()
    first_stage.measure(batches, torch.Generator().manual_seed(1), per_channel=per_channel)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        z = torch.cat([first_stage.autoencoder.encode(b).sample(g) for b in batches]).double()
    dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    torch.testing.assert_close(first_stage.shift.double(), z.mean(dims), rtol=1e-6, atol=0)
    torch.testing.assert_close(first_stage.scale.double(), 1 / z.std(dims, unbiased=False), rtol=1e-6, atol=0)
    assert first_stage.shift.dtype == torch.float32 and first_stage.shift.shape == ((2,) if per_channel else ())

    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = torch.cat([first_stage.encode(b).sample(g) for b in batches]).double()
    torch.testing.assert_close(latents.mean(dims), torch.zeros_like(z.mean(dims)), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dims, unbiased=False), torch.ones_like(z.mean(dims)), atol=1e-4, rtol=0)


def test_measure_takes_batch_dicts_and_keeps_the_mode() -> None:
    first_stage, batches = make()
    first_stage.train()
    first_stage.measure(({"image": b} for b in batches), torch.Generator().manual_seed(0))
    assert first_stage.training
    with pytest.raises(DarkroomError, match="no images"):
        first_stage.measure([], torch.Generator())


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


@pytest.mark.parametrize("per_channel", [False, True])
def test_shift_and_scale_are_saved_with_the_weights(per_channel: bool) -> None:
    first_stage, batches = make()
    first_stage.measure(batches, torch.Generator().manual_seed(0), per_channel=per_channel)
    copy = FirstStage(Autoencoder(TINY))
    copy.load_state_dict(first_stage.state_dict(), strict=True)
    assert torch.equal(copy.shift, first_stage.shift) and torch.equal(copy.scale, first_stage.scale)
    assert torch.equal(copy.encode(batches[0]).mode(), first_stage.encode(batches[0]).mode())


def test_facts_and_bad_input() -> None:
    first_stage, _ = make()
    assert (first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels) == (2, 2, 3)
    with pytest.raises(DarkroomError, match="6x6 or 8x6"):
        first_stage.encode(torch.zeros(1, 3, 6, 7))
    with pytest.raises(DarkroomError, match="scale has shape"):
        FirstStage(first_stage.autoencoder, scale=torch.ones(5))
