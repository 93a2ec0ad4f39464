"""VQ: the codebook against the official one (golden vectors) and against plain formulas; dead codes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from first_stage_golden import TOLERANCE, assert_golden, autoencoder_config, load_topic, make_inputs, state_dict
from parity_data import PARITY, load_case

from darkroom.errors import DarkroomError
from darkroom.first_stage import quantizer
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.quantizer import (
    Codebook,
    code_counts,
    codebook_loss,
    perplexity,
    revive_codes,
    straight_through,
)

CASES = load_topic("autoencoder_vq")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_official_outputs(name: str, channels_last: bool) -> None:
    case = CASES[name]
    arguments = case.args
    model = Autoencoder(autoencoder_config(arguments["ddconfig"], arguments["embed_dim"], arguments["n_embed"])).eval()
    model.load_state_dict(state_dict(case), strict=True)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    given = make_inputs(case)
    codebook = model.codebook
    assert codebook is not None and codebook.size == arguments["n_embed"]
    with torch.no_grad():
        posterior = model.encode(given["x"])
        z = posterior.mode()
        assert posterior.logvar is None and float(posterior.kl().sum()) == 0
        indices, indices_of_z = codebook.nearest(z), codebook.nearest(given["z"])
        checks = {
            "prequant": z,
            "quantised": codebook(z),
            "decode_of_z": model.decode(given["z"]),
            "decode_of_z_not_quantised": model.decode(given["z"], quantize=False),
            "reconstruction": model.decode(z),
        }
        losses = {"codebook_loss": codebook_loss(z, codebook.lookup(indices))}
        if "codebook_loss_of_z" in case.spec["outputs"]:
            losses["codebook_loss_of_z"] = codebook_loss(given["z"], codebook.lookup(indices_of_z))
    seen = {"indices", "indices_of_z", "smallest_margin", *checks, *losses}
    assert set(case.spec["outputs"]) <= seen
    for output, value in checks.items():
        if output in case.spec["outputs"]:
            assert_golden(value, case, output)
    for output, value in losses.items():
        assert float(value) == pytest.approx(case.output(output), rel=TOLERANCE)
    assert indices.flatten().equal(case.output("indices"))
    if "indices_of_z" in case.spec["outputs"]:
        assert indices_of_z.flatten().equal(case.output("indices_of_z"))


@pytest.mark.parametrize("name", ["vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16"])
def test_official_layouts(name: str) -> None:
    spec = json.loads((PARITY / "layouts" / f"{name}.json").read_text())
    arguments = spec["hyper_parameters"]["args"]
    with torch.device("meta"):
        model = Autoencoder(autoencoder_config(arguments["ddconfig"], arguments["embed_dim"], arguments["n_embed"]))
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert ours == {k: v for k, v in spec["layout"].items() if not k.startswith("loss.")}


def test_nearest_is_the_nearest_in_float64_and_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = Codebook(37, 5).double()
    torch.nn.init.normal_(codebook.embedding.weight, generator=generator(1))
    z = torch.randn(3, 5, 4, 6, generator=generator(2), dtype=torch.float64)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 5)
    expected = torch.cdist(rows, codebook.embedding.weight).argmin(1).view(3, 4, 6)
    assert codebook.nearest(z).equal(expected)
    monkeypatch.setattr(quantizer, "DISTANCES", 100)
    assert codebook.nearest(z).equal(expected)
    assert codebook.lookup(expected)[1, :, 2, 3].equal(codebook.embedding.weight[expected[1, 2, 3]])


def test_straight_through_has_the_value_of_the_codes_and_the_gradient_of_z() -> None:
    z = torch.randn(1, 2, 3, 3, generator=generator(), requires_grad=True)
    quantised = torch.randn(1, 2, 3, 3, generator=generator(1), requires_grad=True)
    upstream = torch.randn(1, 2, 3, 3, generator=generator(2))
    result = straight_through(z, quantised)
    result.backward(upstream)
    assert result.equal(quantised) and z.grad is not None and z.grad.equal(upstream) and quantised.grad is None


def test_codebook_loss_moves_each_side_with_its_own_weight() -> None:
    z = torch.tensor([[[[1.0, 3.0]]]], requires_grad=True)
    quantised = torch.tensor([[[[2.0, 0.0]]]], requires_grad=True)
    loss = codebook_loss(z, quantised, beta=0.25)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((1 + 9) / 2 * 1.25)
    assert z.grad is not None and z.grad.flatten().tolist() == [-1.0, 3.0]  # 2 (z - q) / 2
    assert quantised.grad is not None and quantised.grad.flatten().tolist() == [0.25, -0.75]


def test_official_perplexity_and_its_extremes() -> None:
    case = load_case("autoencoder_losses", "measure_perplexity")
    counts = code_counts(case.input("indices"), 16)
    assert float(perplexity(counts)) == pytest.approx(case.output("perplexity"), rel=1e-5)
    assert int((counts > 0).sum()) == case.output("cluster_use")
    assert float(perplexity(torch.full((8,), 3))) == pytest.approx(8.0)
    assert float(perplexity(torch.tensor([0, 5, 0]))) == pytest.approx(1.0)
    assert math.isfinite(float(perplexity(torch.zeros(4, dtype=torch.int64))))


@pytest.mark.parametrize("positions", [2, 5])
def test_dead_codes_move_onto_latents(positions: int) -> None:
    codebook = Codebook(8, 3)
    before = codebook.embedding.weight.detach().clone()
    counts = torch.tensor([1, 0, 4, 0, 0, 0, 2, 9])
    z = 10 + torch.randn(positions, 3, 1, 1, generator=generator(3))
    assert revive_codes(codebook, counts, z, generator(4)) == 4
    dead = counts == 0
    assert codebook.embedding.weight[~dead].equal(before[~dead])
    distance = torch.cdist(codebook.embedding.weight[dead], z.flatten(1)).amin(1)
    assert float(distance.max()) < 0.3
    assert len(codebook.embedding.weight[dead].unique(dim=0)) == 4  # copies of one latent are kept apart
    assert revive_codes(codebook, torch.ones(8), z, generator(4)) == 0


def test_a_vq_first_stage_normalises_the_continuous_latent() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        channels=4, channel_mult=(1, 2), num_res_blocks=1, z_channels=2, embed_dim=3, norm_groups=2, codebook_size=7
    )
    first_stage = FirstStage(Autoencoder(config), shift=0.5, scale=torch.tensor([1.0, 2.0, 4.0])).eval()
    image = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    with torch.no_grad():
        latent = first_stage.encode(image).sample(generator())
        own = first_stage.autoencoder.encode(image).mean
        assert latent.equal((own - 0.5) * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1))
        codebook = first_stage.autoencoder.codebook
        assert codebook is not None
        expected = first_stage.autoencoder.decode(codebook(own), quantize=False)
        torch.testing.assert_close(first_stage.decode(latent), expected)


def test_without_quant_conv_the_latent_is_what_the_encoder_gives() -> None:
    config = AutoencoderConfig(
        channels=4, channel_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=3, norm_groups=2, quant_conv=False
    )
    model = Autoencoder(config).eval()
    assert not any("quant_conv" in name for name in model.state_dict())
    image = torch.rand(1, 3, 4, 4, generator=generator())
    with torch.no_grad():
        assert model.moments(image).equal(model.encoder(image))
        z = model.encode(image).mode()
        assert model.decode(z).equal(model.decoder(z))
    with pytest.raises(DarkroomError, match="must be equal"):
        Autoencoder(AutoencoderConfig(z_channels=3, embed_dim=4, quant_conv=False))
    with pytest.raises(DarkroomError, match="codebook_size=0"):
        Autoencoder(AutoencoderConfig(codebook_size=0))


def test_the_identity_gives_the_image_back() -> None:
    first_stage = FirstStage(IdentityAutoencoder(2), scale=2.0)
    image = torch.rand(1, 2, 5, 7, generator=generator())
    assert (first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels) == (1, 2, 2)
    assert first_stage.encode(image).sample(generator()).equal(2 * image)
    assert first_stage.decode(first_stage.encode(image).mode()).equal(image)
    with pytest.raises(DarkroomError, match="2 channel"):
        first_stage.encode(image[:, :1])
