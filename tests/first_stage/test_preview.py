"""The preview decoder fits every latent space, stays small, and belongs to a first stage without being part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.preview import PreviewDecoder, PreviewDecoderConfig, fitted

TINY = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=2, norm_groups=4)


def preview(**changes: Any) -> PreviewDecoder:
    torch.manual_seed(1)
    return PreviewDecoder(PreviewDecoderConfig(2, 3, 2, **changes))


def first_stage() -> FirstStage:
    torch.manual_seed(0)
    return FirstStage(Autoencoder(TINY), shift=0.5, scale=2.0)


def latent() -> Tensor:
    return torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("f", [2, 4, 8, 16, 32])
@pytest.mark.parametrize(("latent_channels", "image_channels"), [(1, 1), (4, 3), (64, 6)])
def test_every_latent_space_within_the_limits(f: int, latent_channels: int, image_channels: int) -> None:
    decoder = PreviewDecoder(PreviewDecoderConfig(latent_channels, image_channels, f))
    count = sum(p.numel() for p in decoder.parameters())
    assert count <= 1_000_000 and 2 * count <= 2_000_000  # bytes in float16
    image = decoder(torch.randn(1, latent_channels, 3, 2))
    assert image.shape == (1, image_channels, 3 * f, 2 * f)


def test_what_it_refuses() -> None:
    for f, message in ((1, "the image already"), (3, "2, 4, 8, 16 or 32"), (None, "needs latent_channels")):
        with pytest.raises(DarkroomError, match=message):
            PreviewDecoder(PreviewDecoderConfig(4, 3, f))
    with pytest.raises(DarkroomError, match="more than 1,000,000"):
        PreviewDecoder(PreviewDecoderConfig(4, 3, 8, channels=128, max_channels=512))
    with pytest.raises(DarkroomError, match='"latent_channels" is 4 but 2 follows'):
        fitted(PreviewDecoderConfig(latent_channels=4), latent_channels=2, image_channels=3, downsampling=2)
    assert fitted(PreviewDecoderConfig(channels=8), 2, 3, 2) == PreviewDecoderConfig(2, 3, 2, channels=8)


def test_a_position_depends_on_its_surroundings_only() -> None:
    """So a part of a latent shows what the whole shows there."""
    decoder = preview()
    whole = torch.randn(1, 2, 40, 40)
    inner = decoder(whole[..., 10:30, 10:30])[..., 16:24, 16:24]
    torch.testing.assert_close(inner, decoder(whole)[..., 36:44, 36:44], rtol=1e-5, atol=1e-6)


def test_estimates_far_out_stay_finite_and_bounded() -> None:
    decoder = preview()
    assert torch.equal(decoder(latent() * 1e6), decoder(latent() * 1e7))


def test_it_is_attached_without_being_a_part() -> None:
    model, decoder = first_stage(), preview()
    before = list(model.state_dict())
    model.preview = decoder
    assert model.preview is decoder and list(model.state_dict()) == before
    assert not any(p.requires_grad for p in decoder.parameters())
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in first_stage().parameters())
    model.to(torch.float64)  # moves along
    assert next(decoder.parameters()).dtype == torch.float64
    model.preview = None
    with pytest.raises(DarkroomError, match="darkroom train preview"):
        model.preview_of(latent())
    with pytest.raises(DarkroomError, match="downsampling 4, the first stage has 2"):
        model.preview = PreviewDecoder(PreviewDecoderConfig(2, 3, 4))


def test_it_shows_the_same_when_latents_are_measured_again() -> None:
    """The same z, normalised by other numbers, is the same picture."""
    model, z = first_stage(), latent()
    model.preview = PreviewDecoder(PreviewDecoderConfig(2, 3, 2), model.shift, model.scale)
    before = model.preview_of(model.normalise(z))
    torch.testing.assert_close(before, model.preview(model.normalise(z)))
    model._set(torch.tensor([3.0, -1.0]), torch.tensor([0.1, 5.0]))
    torch.testing.assert_close(model.preview_of(model.normalise(z)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_statistics_are_saved_with_it(shape: tuple[int, ...]) -> None:
    decoder = PreviewDecoder(PreviewDecoderConfig(2, 3, 2), torch.full(shape, 0.3), torch.full(shape, 2.0))
    copy = preview()
    copy.load_state_dict(decoder.state_dict(), strict=True)
    assert torch.equal(copy.shift, decoder.shift) and torch.equal(copy(latent()), decoder(latent()))
