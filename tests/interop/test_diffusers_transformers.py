"""Our DiT and MMDiT and diffusers' transformers are the same networks: names, configs, outputs, gradients."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from parity_data import PARITY, weights
from renamed_states import to_ours, to_theirs
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_transformers import (
    DIT_NEUTRAL,
    DIT_TRANSLATED,
    DIT_UNREAD,
    SD3_TRANSLATED,
    dit_from_diffusers_config,
    dit_table,
    dit_to_diffusers_config,
    sd3_from_diffusers_config,
    sd3_table,
    sd3_to_diffusers_config,
)
from darkroom.networks.dit import DIT_SIZES, DiT, DiTConfig
from darkroom.networks.mmdit import MMDIT_SIZES, MMDiT, MMDiTConfig


def dit(**options: Any) -> DiTConfig:
    defaults: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 11}
    return DiTConfig(**{**defaults, **options})


def mmdit(**options: Any) -> MMDiTConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "context_dim": 24,
        "adm_in_channels": 12,
        "pos_embed_max_size": 12,
        "pos_embed_base_size": 4,
    }
    return MMDiTConfig(**{**defaults, **options})


DITS = {
    "like_xl_2": dit(out_channels=8),
    "patch_4": dit(patch_size=4, input_size=16),
    "more_channels_and_heads": dit(in_channels=6, out_channels=3, hidden_size=48, num_heads=4, depth=1),
}
MMDITS = {
    "like_sd3": mmdit(),
    "like_sd3.5_large": mmdit(qk_norm="rms"),
    "like_sd3.5_medium": mmdit(qk_norm="rms", x_block_self_attn_layers=(0, 1), pos_embed_max_size=24),
    "dual_to_the_end": mmdit(x_block_self_attn_layers=(2,), patch_size=1, in_channels=4, out_channels=4),
    "layer_norms": mmdit(qk_norm="ln", depth=1, pos_embed_base_size=12),
}


def randomised(network: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return network.eval()


def dit_pair(config: DiTConfig) -> tuple[DiT, DiTTransformer2DModel]:
    network = randomised(DiT(config))
    other = DiTTransformer2DModel.from_config(dit_to_diffusers_config(config))
    other.load_state_dict(to_theirs(network.state_dict(), dit_table(config)), strict=True)
    for block in other.transformer_blocks:
        # diffusers' own frequencies, 10000^(-i/127), are not those of the official code.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return network, other.eval()


def mmdit_pair(config: MMDiTConfig) -> tuple[MMDiT, SD3Transformer2DModel]:
    network = randomised(MMDiT(config))
    other = SD3Transformer2DModel.from_config(sd3_to_diffusers_config(config))
    theirs = to_theirs(network.state_dict(), sd3_table(config))
    torch.testing.assert_close(theirs["pos_embed.pos_embed"], other.pos_embed.pos_embed, atol=2e-6, rtol=0)
    other.load_state_dict(theirs, strict=True)
    return network, other.eval()


def noisy(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3.0, 900.5])


def slots(config: MMDiTConfig) -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    assert config.context_dim is not None and config.adm_in_channels is not None
    return Conditioning(
        context=torch.randn(2, 5, config.context_dim, generator=generator),
        vector=torch.randn(2, config.adm_in_channels, generator=generator),
    )


def check_equal(network: nn.Module, other: nn.Module, a: Tensor, b: Tensor, renamed: Any) -> None:
    """Outputs and gradients; `renamed` maps our gradients to their names."""
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    out_grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(2)) / a.numel() ** 0.5
    (a * out_grad).sum().backward()
    (b * out_grad).sum().backward()
    buffers = dict(network.named_buffers())
    theirs = renamed({k: p.grad for k, p in network.named_parameters()} | buffers)
    checked = 0
    for key, parameter in other.named_parameters():
        if "norm1.emb." not in key:  # DiT: copies in each block share what is one gradient here
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(theirs[key], grad, atol=1e-4, rtol=1e-4)
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("size", [None, (12, 12)], ids=["own_size", "larger"])
@pytest.mark.parametrize("name", DITS)
def test_dit_outputs_and_gradients(name: str, size: tuple[int, int] | None) -> None:
    """At the table's own size and another (theirs takes squares alone)."""
    config = DITS[name]
    network, other = dit_pair(config)
    x, time = noisy(config.in_channels, size or (config.input_size, config.input_size))
    label = torch.tensor([3, 10])
    a, b = network(x, time, Conditioning(label=label)), other(x, time, class_labels=label).sample
    check_equal(network, other, a, b, lambda grads: to_theirs(grads, dit_table(config)))


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (4, 2)], ids=str)
@pytest.mark.parametrize("name", MMDITS)
def test_sd3_outputs_and_gradients(name: str, size: tuple[int, int]) -> None:
    config = MMDITS[name]
    if config.patch_size == 1:
        size = (size[0] // 2, size[1] // 2)
    network, other = mmdit_pair(config)
    x, time = noisy(config.in_channels, size)
    given = slots(config)
    a = network(x, time, given)
    b = other(x, encoder_hidden_states=given.context, pooled_projections=given.vector, timestep=time).sample

    def renamed(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
        zeros = dict(network.named_parameters())
        whole = {k: torch.zeros_like(zeros[k]) if grad is None else grad for k, grad in grads.items()}
        return to_theirs(whole, sd3_table(config))

    check_equal(network, other, a, b, renamed)


@pytest.mark.slow
@torch.no_grad()
def test_real_widths() -> None:
    """Two blocks as wide as the published models, on latents of their size: relative to outputs of order 1."""
    wide = replace(DIT_SIZES["DiT-XL/2"], depth=2)
    network, other = dit_pair(wide)
    x, time = noisy(4, (32, 32))
    label = torch.tensor([3, 1000])
    a, b = network(x, time, Conditioning(label=label)), other(x, time, class_labels=label).sample
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    joint = replace(MMDIT_SIZES["sd3.5-medium"], depth=2, x_block_self_attn_layers=(0,))
    transformer, theirs = mmdit_pair(joint)
    x, time = noisy(16, (64, 48))
    given = slots(joint)
    a = transformer(x, time, given)
    b = theirs(x, encoder_hidden_states=given.context, pooled_projections=given.vector, timestep=time).sample
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DITS)
def test_dit_round_trips_are_exact(name: str) -> None:
    config, state = DITS[name], randomised(DiT(DITS[name])).state_dict()
    table = dit_table(config)
    stored = {name: tensor for name, tensor in state.items() if name != "pos_embed"}  # which they compute
    check_round_trip(stored, to_ours(to_theirs(state, table), table, state))
    assert dit_from_diffusers_config(dit_to_diffusers_config(config)) == config
    other = DiTTransformer2DModel.from_config(dit_to_diffusers_config(config))
    assert dit_from_diffusers_config(json.loads(other.to_json_string())) == config


@pytest.mark.parametrize("name", MMDITS)
def test_sd3_round_trips_are_exact(name: str) -> None:
    config, state = MMDITS[name], randomised(MMDiT(MMDITS[name])).state_dict()
    table = sd3_table(config)
    check_round_trip(state, to_ours(to_theirs(state, table), table, state))
    assert sd3_from_diffusers_config(sd3_to_diffusers_config(config)) == config
    other = SD3Transformer2DModel.from_config(sd3_to_diffusers_config(config))
    assert sd3_from_diffusers_config(json.loads(other.to_json_string())) == config


def check_round_trip(state: dict[str, Tensor], back: dict[str, Tensor]) -> None:
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", MMDIT_SIZES)
def test_sd3_sizes_have_their_tensors(name: str) -> None:
    """Full size on the meta device: names and shapes of diffusers' model, and of the published layout."""
    config = MMDIT_SIZES[name]
    with torch.device("meta"):
        ours = to_theirs(MMDiT(config).state_dict(), sd3_table(config))
        theirs = SD3Transformer2DModel.from_config(sd3_to_diffusers_config(config)).state_dict()
    shapes = {k: list(v.shape) for k, v in ours.items()}
    assert shapes == {k: list(v.shape) for k, v in theirs.items()}
    if name == "sd3-medium":
        layout = weights().load_layout(PARITY / "layouts" / "diffusers-sd3-transformer.json")
        assert shapes == layout["layout"]
        published = {k: v for k, v in layout["hyper_parameters"].items() if k != "class"}
        assert sd3_from_diffusers_config(published) == config


def test_dit_xl_2_has_its_tensors() -> None:
    config = DIT_SIZES["DiT-XL/2"]
    with torch.device("meta"):
        ours = to_theirs(DiT(config).state_dict(), dit_table(config))
        theirs = DiTTransformer2DModel.from_config(dit_to_diffusers_config(config)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert dit_from_diffusers_config({"out_channels": 8}) == config  # diffusers' defaults are this model's


def test_every_entry_of_a_diffusers_config_is_accounted_for() -> None:
    for cls, read, unread in (
        (DiTTransformer2DModel, DIT_NEUTRAL | DIT_TRANSLATED, DIT_UNREAD),
        (SD3Transformer2DModel, SD3_TRANSLATED, ()),
    ):
        parameters = inspect.signature(cls.__init__).parameters.items()
        entries = {name: p.default for name, p in parameters if name != "self"}
        assert entries.keys() == {*read, *unread}
        for key, value in read.items():
            # The published DiT has biases; diffusers' class happens to default to them being there or not.
            assert entries[key] == value or key in DIT_NEUTRAL, key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": None}, "without classes"),
        ({"adm_in_channels": 4}, "vector"),
        ({"context_dim": 4}, "context"),
        ({"qk_norm": "rms"}, "qk_norm"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"position_fit": "crop"}, "position_fit"),
        ({"target_time": True}, "target_time"),
    ],
)
def test_dits_that_diffusers_lacks(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words):
        dit_to_diffusers_config(dit(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_dim": None}, "context"),
        ({"adm_in_channels": None}, "vector"),
        ({"num_classes": 3}, "num_classes"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"position_fit": "stretch"}, "position_fit"),
        ({"target_time": True}, "target_time"),
    ],
)
def test_mmdits_that_diffusers_lacks(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words):
        sd3_to_diffusers_config(mmdit(**options))


@pytest.mark.parametrize(
    ("read", "config", "words"),
    [
        (dit_from_diffusers_config, {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        (dit_from_diffusers_config, {"activation_fn": "geglu"}, "activation_fn"),
        (dit_from_diffusers_config, {"num_layer": 3}, "num_layers"),
        (dit_from_diffusers_config, {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        (sd3_from_diffusers_config, {"caption_projection_dim": 7}, "caption_projection_dim"),
        (sd3_from_diffusers_config, {"qk_norm": "l2"}, "l2"),
    ],
)
def test_configs_without_an_equivalent(read: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words) as error:
        read(config)
    assert "\n" not in str(error.value)


def test_copies_that_differ_are_refused() -> None:
    config = dit()
    own, table = DiT(config).state_dict(), dit_table(config)
    state = to_theirs(own, table)
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    state[key] = state[key] + 1
    with pytest.raises(DarkroomError, match=f"and {key} should be one tensor and differ"):
        to_ours(state, table, own)
