"""The preview decoder's step: what it minimises, from cached and fresh latents alike, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from darkroom.features.psnr import psnr
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.preview import PreviewDecoder, PreviewDecoderConfig
from darkroom.training.preview_step import PreviewStep, PreviewTrainConfig

TINY = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=2, norm_groups=4)


def make(config: PreviewTrainConfig | None = None, codebook_size: int | None = None) -> PreviewStep:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(**{**TINY.__dict__, "codebook_size": codebook_size}))
    first_stage = FirstStage(autoencoder, 0.2, torch.tensor([1.5, 0.7]))
    preview = PreviewDecoder(PreviewDecoderConfig(2, 3, 2, channels=8), first_stage.shift, first_stage.scale)
    return PreviewStep(preview, first_stage, config or PreviewTrainConfig())


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("codebook_size", [None, 8])
def test_cached_moments_are_the_images_latents(codebook_size: int | None) -> None:
    step, image = make(codebook_size=codebook_size), images()
    moments = step.first_stage.autoencoder.encode(image).moments.detach()
    assert moments.shape[1] == (4 if codebook_size is None else 2)
    cached, _ = step.phases[0].module({"image": image, "moments": moments}, generator(), 0)
    fresh, _ = step.phases[0].module({"image": image}, generator(), 0)
    torch.testing.assert_close(cached, fresh)


@pytest.mark.parametrize("target", ["image", "decoder", "both"])
def test_the_target(target: Any) -> None:
    """The loss against a direct computation with the same draw of the posterior."""
    step, image = make(PreviewTrainConfig(target=target, perceptual="laplacian", perceptual_weight=0.3)), images()
    loss, metrics = step.phases[0].module({"image": image}, generator(3), 0)
    with torch.no_grad():
        latent = step.first_stage.encode(image).sample(generator(3))
        full = step.first_stage.decode(latent).clamp(-1, 1)
        output = step.preview(latent)
    targets = {"image": [image], "decoder": [full], "both": [image, full]}[target]
    expected = torch.stack([(output - t).abs().mean() for t in targets]).mean()
    torch.testing.assert_close(metrics["reconstruction"], expected)
    torch.testing.assert_close(loss.detach(), expected + 0.3 * metrics["perceptual"])


def test_only_the_preview_decoder_learns() -> None:
    step = make()
    before = {k: v.clone() for k, v in step.first_stage.state_dict().items()}
    assert {id(p) for p in step.phases[0].parameters} == {id(p) for p in step.preview.parameters()}
    assert set(step.modules) == {"preview"} and not any(p.requires_grad for p in step.first_stage.parameters())
    optimizer = torch.optim.AdamW(step.phases[0].parameters, lr=3e-3)
    batch = {"image": torch.nn.functional.interpolate(images(4, 4), size=16, mode="bilinear")}
    first = step.validation_loss([batch])
    for i in range(40):
        loss, _ = step.phases[0].module(batch, generator(i), i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = step.validation_loss([batch])
    assert last["psnr"] > first["psnr"] + 0.3 and last["validation_loss"] < 0.97 * first["validation_loss"]
    assert all(torch.equal(v, before[k]) for k, v in step.first_stage.state_dict().items())


def test_noise_on_the_latents_is_drawn_from_the_generator() -> None:
    step, batch = make(PreviewTrainConfig(latent_noise=0.5)), {"image": images()}
    with torch.no_grad():
        step.preview.conv_out.weight.mul_(50)
        one, same, other = (float(step.phases[0].module(batch, generator(s), 0)[0]) for s in (0, 0, 1))
        step.phases[0].module.config = PreviewTrainConfig()  # type: ignore[assignment]
        quiet = float(step.phases[0].module(batch, generator(0), 0)[0])
    assert one == same != other and one != quiet


def test_validation_is_the_direct_computation() -> None:
    step, image = make(), images(5)
    assert step.validation_loss([]) == {}
    found = step.validation_loss([{"image": image[:3]}, {"image": image[3:]}])
    with torch.no_grad():
        output = step.preview(step.first_stage.encode(image).mode()).clamp(-1, 1)
    assert found["psnr"] == pytest.approx(float(psnr(output, image).mean()), rel=1e-5)
