"""The encoder's fingerprint says whether two autoencoders give the same latents."""

from __future__ import annotations

import pytest
import torch

from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.statistics import encoder_fingerprint

KL = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=2, norm_groups=4)
VQ = AutoencoderConfig(**{**KL.__dict__, "codebook_size": 16})


@pytest.mark.parametrize("config", [KL, VQ])
def test_only_what_decides_the_latent_counts(config: AutoencoderConfig) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    before = encoder_fingerprint(autoencoder)
    behind = [autoencoder.decoder, autoencoder.post_quant_conv, autoencoder.quantize]
    with torch.no_grad():
        for module in behind:
            for p in module.parameters() if module is not None else ():
                p.add_(1.0)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert encoder_fingerprint(autoencoder) == before
    for part in (autoencoder.encoder, autoencoder.quant_conv):
        assert part is not None
        last = list(part.parameters())[-1]
        with torch.no_grad():
            last[0] += 1e-3
        changed = encoder_fingerprint(autoencoder)
        assert changed != before
        before = changed


def test_of_weights_that_are_saved_in_half() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(KL)
    saved = {k: v.half() for k, v in autoencoder.state_dict().items()}
    expected = encoder_fingerprint(autoencoder, stored_as=torch.float16)
    assert expected != encoder_fingerprint(autoencoder)
    autoencoder.load_state_dict(saved)
    assert encoder_fingerprint(autoencoder) == expected


def test_shapes_count_where_there_are_no_weights() -> None:
    assert encoder_fingerprint(IdentityAutoencoder(3)) == encoder_fingerprint(IdentityAutoencoder(3))
