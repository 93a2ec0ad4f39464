"""Official files at full size, filled with the layouts' deterministic numbers: what we load computes what diffusers
computes from our export of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_runs import loaded, silence
from official_files import filled_layout
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.exchange import convert

SIDE = {"sd-v1": 64, "sd-v2-1-v768": 64, "text2img-large": 32}  # of the latent


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape and bool(ours.isfinite().all()) and ours.std() > 0
    return float((ours - other).abs().max() / other.abs().max())


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SIDE)
def test_outputs_at_full_size(name: str, big_path: Path) -> None:
    """One after the other, so that one model is in memory at a time."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    silence()
    path = filled_layout(big_path / f"{name}.safetensors", name)
    model = loaded(path)
    width = model.denoiser.network.config.context_dim
    assert isinstance(width, int) and model.first_stage is not None
    x, time, context = drawn(1, 4, SIDE[name], SIDE[name]), torch.tensor([501.0]), drawn(1, 77, width)
    ours = model.denoiser.network(x, time, Conditioning(context=context))
    z = drawn(1, 4, 16, 12)
    image, moments = model.first_stage.autoencoder.decode(z), model.first_stage.autoencoder.encode(drawn(1, 3, 64, 96))
    ids = torch.randint(0, 30000, (1, 77), generator=torch.Generator().manual_seed(2))
    text = model.conditioner({"text": ids.tolist()}).context
    del model

    convert(path, big_path / "theirs", "diffusers")
    path.unlink()

    def component(cls: Any, folder: str) -> Any:
        return cls.from_pretrained(big_path / "theirs" / folder, torch_dtype=torch.float32).eval()

    network = component(UNet2DConditionModel, "unet")
    assert relative(ours, network(x, time, encoder_hidden_states=context).sample) <= 1e-4
    del network
    vae = component(AutoencoderKL, next(n for n in ("vae", "vqvae") if (big_path / "theirs" / n).is_dir()))
    assert relative(image, vae.decode(z).sample) <= 1e-4
    assert relative(moments.mean, vae.encode(drawn(1, 3, 64, 96)).latent_dist.mean) <= 1e-4
    if name != "text2img-large":  # whose tower is not in the transformers library
        from transformers import CLIPTextModel

        assert text is not None
        tower = component(CLIPTextModel, "text_encoder")
        assert relative(text, tower(ids).last_hidden_state) <= 1e-4
