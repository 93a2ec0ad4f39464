"""The autoencoder against the official one: outputs (golden vectors) and state-dict layouts; then our own options."""

from __future__ import annotations

import json

import pytest
import torch
from first_stage_golden import assert_golden, autoencoder_config, load_topic, make_inputs, state_dict
from parity_data import PARITY

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig, nearest_sizes

CASES = load_topic("autoencoder_kl")
TINY = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=2, norm_groups=4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if n != "diagonal_gaussian"])
def test_official_outputs(name: str, channels_last: bool) -> None:
    case = CASES[name]
    model = Autoencoder(autoencoder_config(case.args["ddconfig"], case.args["embed_dim"])).eval()
    model.load_state_dict(state_dict(case), strict=True)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    given = make_inputs(case)
    with torch.no_grad():
        posterior = model.encode(given["x"])
        checks = {
            "encoder_h": model.encoder(given["x"]),
            "moments": model.moments(given["x"]),
            "mode": posterior.mode(),
            "std": posterior.std,
            "sample_with_eps": posterior.sample_with(given["eps"]),
            "kl": posterior.kl(),
            "nll_of_eps": posterior.nll(given["eps"]),
            "decode": model.decode(given["z"]),
            "decode_of_mode": model.decode(posterior.mode()),
        }
        if "moments_scaled" in case.spec["outputs"]:  # tiny activations, so that the epsilon of the norms shows
            for conv in (model.encoder.conv_in, model.decoder.conv_in):
                conv.weight.mul_(1e-3)
                assert conv.bias is not None
                conv.bias.mul_(1e-3)
            checks |= {"moments_scaled": model.moments(given["x"]), "decode_scaled": model.decode(given["z"])}
    assert set(checks) == set(case.spec["outputs"])
    for output, value in checks.items():
        assert_golden(value, case, output)


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "kl-f16", "kl-f32"])
def test_official_layouts(name: str) -> None:
    spec = json.loads((PARITY / "layouts" / f"{name}.json").read_text())
    arguments = spec["hyper_parameters"]["args"]
    with torch.device("meta"):
        model = Autoencoder(autoencoder_config(arguments["ddconfig"], arguments["embed_dim"]))
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert ours == {k: v for k, v in spec["layout"].items() if not k.startswith("loss.")}
    assert model.downsampling == int(name.removeprefix("kl-f"))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_downsampling_1_to_32(levels: int) -> None:
    config = AutoencoderConfig(
        channels=4, channel_mult=(1,) * levels, num_res_blocks=1, z_channels=2, embed_dim=2, norm_groups=2
    )
    model = Autoencoder(config)
    f = 2 ** (levels - 1)
    image = torch.zeros(1, 3, f, 2 * f)
    latent = model.encode(image).mode()
    assert model.downsampling == f and latent.shape == (1, 2, 1, 2)
    assert model.decode(latent).shape == image.shape


def test_a_wider_and_deeper_decoder() -> None:
    config = AutoencoderConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=2, embed_dim=2, norm_groups=4,
        attention_levels=(1,), bottleneck_attention=False, decoder_channels=12, decoder_num_res_blocks=2,
    )  # fmt: skip
    model = Autoencoder(config)
    assert len(model.encoder.down[0].block) == 1 and len(model.decoder.up[0].block) == 3
    assert model.encoder.conv_out.in_channels == 16 and model.decoder.conv_in.out_channels == 24
    assert model.decoder.conv_out.in_channels == 12
    assert not any("mid.attn_1" in key for key in model.state_dict()) and len(model.encoder.down[1].attn) == 1
    assert model.decode(model.encode(torch.zeros(1, 3, 8, 8)).mode()).shape == (1, 3, 8, 8)


def test_forward_is_a_function_of_the_generator() -> None:
    model = Autoencoder(TINY)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    one, _ = model(image, torch.Generator().manual_seed(1))
    again, _ = model(image, torch.Generator().manual_seed(1))
    other, _ = model(image, torch.Generator().manual_seed(2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_bfloat16_autocast_keeps_the_posterior_in_float32() -> None:
    torch.manual_seed(0)
    model = Autoencoder(TINY).to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    exact = model.encode(image)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(image)
        reconstruction = model.decode(posterior.mode())
    assert posterior.mean.dtype == torch.float32 and posterior.kl().dtype == torch.float32
    assert reconstruction.dtype == torch.bfloat16
    torch.testing.assert_close(posterior.mean, exact.mean, atol=0.05, rtol=0.05)
    reconstruction.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


def test_every_parameter_is_used() -> None:
    model = Autoencoder(TINY)
    image, posterior = model(torch.rand(1, 3, 8, 8), torch.Generator().manual_seed(0))
    (image.square().sum() + posterior.kl().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_sizes_that_do_not_fit() -> None:
    model = Autoencoder(TINY)
    with pytest.raises(DarkroomError, match=r"cannot take 9x8 pixels.*multiples of 2, for example 8x8 or 10x8"):
        model.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(DarkroomError, match=r"\(batch, 3, height, width\)"):
        model.encode(torch.zeros(1, 1, 8, 8))
    assert nearest_sizes(100, 3, 8) == [(96, 8), (104, 8)]


@pytest.mark.parametrize("change", [{"channel_mult": ()}, {"attention_levels": (2,)}, {"embed_dim": 0}])
def test_impossible_configs(change: dict[str, object]) -> None:
    with pytest.raises(DarkroomError, match=next(iter(change))):
        Autoencoder(AutoencoderConfig(**(vars(TINY) | change)))
