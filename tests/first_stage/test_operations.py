"""The list of operations is the network: run one after the other they give what `forward` gives."""

from __future__ import annotations

import pytest
import torch
from tiny_autoencoders import AUTOENCODERS, make_autoencoder

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.operations import (
    Add,
    Attend,
    Convolution,
    Norm,
    Quantise,
    Remember,
    Upsample,
    decoder_operations,
    encoder_operations,
    run,
    shapes,
)


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_the_list_is_the_network(name: str) -> None:
    autoencoder = make_autoencoder(name)
    f = autoencoder.downsampling
    image = torch.randn(2, autoencoder.image_channels, 5 * f, 3 * f, dtype=torch.float64)
    latent = torch.randn(2, autoencoder.latent_channels, 5, 3, dtype=torch.float64)
    exact = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(run(encoder_operations(autoencoder), image), autoencoder.moments(image), **exact)
    torch.testing.assert_close(run(decoder_operations(autoencoder), latent), autoencoder.decode(latent), **exact)
    plain = autoencoder.decode(latent, quantize=False)
    torch.testing.assert_close(run(decoder_operations(autoencoder, quantize=False), latent), plain, **exact)


def test_operations_in_order() -> None:
    autoencoder = make_autoencoder("vq")
    block = [Remember, Norm, Convolution, Norm, Convolution, Add]
    attention = [Remember, Norm, Attend, Add]
    bottleneck = [*block, *attention, *block]
    kinds = [type(o) for o in encoder_operations(autoencoder)]
    level = [*block, Convolution]  # and downsampling
    assert kinds == [Convolution, *level, *block, *bottleneck, Norm, Convolution, Convolution]
    kinds = [type(o) for o in decoder_operations(autoencoder)]
    level = [*block, *block, Upsample, Convolution]
    ends = ([Quantise, Convolution, Convolution], [Norm, Convolution])
    assert kinds == [*ends[0], *bottleneck, *level, *block, *block, *ends[1]]
    down = encoder_operations(autoencoder)[7]
    assert isinstance(down, Convolution) and down.padding == (0, 1, 0, 1) and down.conv.stride == (2, 2)


@torch.no_grad()
def test_shapes_are_those_of_the_maps() -> None:
    autoencoder = make_autoencoder("three levels")
    operations = encoder_operations(autoencoder)
    x = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    for i, shape in enumerate(shapes(operations, 3, 12, 20)):
        if not isinstance(operations[i], Remember):
            assert shape == run(operations[: i + 1], x).shape[1:], operations[i]


def test_dropout_has_no_place_in_it() -> None:
    autoencoder = Autoencoder(
        AutoencoderConfig(channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4, dropout=0.1)
    )
    with pytest.raises(DarkroomError, match=r"dropout: call eval\(\)"):
        encoder_operations(autoencoder)
    encoder_operations(autoencoder.eval())
