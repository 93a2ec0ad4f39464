"""Our U-Net and diffusers' `UNet2DConditionModel` are the same network: names, configs, outputs, gradients."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from renamed_states import renaming, to_ours, to_theirs
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_unet import (
    NEUTRAL,
    TRANSLATED,
    UNREAD,
    from_diffusers_config,
    key_table,
    to_diffusers_config,
)
from darkroom.model_io import load
from darkroom.networks.blocks import timestep_embedding
from darkroom.networks.unet import UNet, UNetConfig
from darkroom.safe_files import read_safetensors, write_safetensors


def config(**options: Any) -> UNetConfig:
    defaults: dict[str, Any] = {
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (1, 2),
        "num_heads": 4,
        "use_spatial_transformer": True,
        "context_dim": 24,
        "legacy": False,
    }
    return UNetConfig(**{**defaults, **options})


# As `from_diffusers_config` writes them, so that configs survive the round trip literally.
CONFIGS = {
    "like_sd1": config(
        channel_mult=(1, 2, 4), num_res_blocks=2, attention_resolutions=(1, 2), num_heads=8, in_channels=9
    ),
    "like_sd2": config(
        channel_mult=(1, 2, 4),
        attention_resolutions=(1, 2, 4),
        num_heads=None,
        num_head_channels=16,
        use_linear_in_transformer=True,
    ),
    "deep_in_places": config(transformer_depth=(1, 2), num_res_blocks=(1, 2), attention_resolutions=(2,)),
    "scale_shift_and_classes": config(use_scale_shift_norm=True, num_classes=10),
    "vector": config(num_classes="sequential", adm_in_channels=12, attention_resolutions=()),
    "continuous": config(num_classes="continuous"),
    "like_x4_upscaler": config(num_classes=20, disable_self_attentions=(True, False), in_channels=7),
    "one_level": config(channel_mult=(1,), attention_resolutions=(1,), num_heads=1, out_channels=6),
}


def pair(ours: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    """Our network with random weights everywhere, and theirs with the same."""
    torch.manual_seed(0)
    network = UNet(ours)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            )
    other = UNet2DConditionModel.from_config(to_diffusers_config(ours))
    other.load_state_dict(to_theirs(network.state_dict(), renaming(key_table(ours))), strict=True)
    return network.eval(), other.eval()


def inputs(ours: UNetConfig, batch: int = 2, size: tuple[int, int] = (8, 12)) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    assert ours.context_dim is not None
    slots = {"context": torch.randn(batch, 5, ours.context_dim, generator=generator)}
    if isinstance(ours.num_classes, int):
        slots["label"] = torch.arange(batch) + 3
    elif ours.num_classes is not None:
        slots["vector"] = torch.randn(batch, ours.adm_in_channels or 1, generator=generator)
    x = torch.randn(batch, ours.in_channels, *size, generator=generator)
    return x, torch.linspace(3, 900, batch), Conditioning(**slots)


def call(other: UNet2DConditionModel, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
    labels = conditioning.label if conditioning.label is not None else conditioning.vector
    return other(x, time, encoder_hidden_states=conditioning.context, class_labels=labels).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_equal(name: str) -> None:
    ours = CONFIGS[name]
    network, other = pair(ours)
    x, time, conditioning = inputs(ours)
    a, b = network(x, time, conditioning), call(other, x, time, conditioning)
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    out_grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(2)) / a.numel() ** 0.5
    (a * out_grad).sum().backward()
    (b * out_grad).sum().backward()
    grads = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    theirs = to_theirs(grads, renaming(key_table(ours)))
    for key, parameter in other.named_parameters():
        torch.testing.assert_close(theirs[key], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_exact(name: str) -> None:
    ours = CONFIGS[name]
    state = UNet(ours).state_dict()
    table = key_table(ours)
    assert list(table) != list(table.values()) and len(set(table.values())) == len(table)
    back = to_ours(to_theirs(state, renaming(table)), renaming(table), state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    assert from_diffusers_config(to_diffusers_config(ours)) == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_diffusers_own_file(name: str) -> None:
    """What diffusers makes of our config and writes to config.json is read back."""
    other = UNet2DConditionModel.from_config(to_diffusers_config(CONFIGS[name], sample_size=8))
    written = json.loads(other.to_json_string())
    assert written["sample_size"] == 8 and written["_class_name"] == "UNet2DConditionModel"
    assert from_diffusers_config(written) == CONFIGS[name]


def test_every_entry_of_a_diffusers_config_is_accounted_for() -> None:
    signature = inspect.signature(UNet2DConditionModel.__init__)
    entries = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    assert entries.keys() == {*NEUTRAL, *UNREAD, *TRANSLATED}
    for key, value in (NEUTRAL | TRANSLATED).items():
        assert entries[key] == value, key


def test_defaults_are_stable_diffusion_1() -> None:
    """An old config.json names few entries."""
    got = from_diffusers_config({"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768})
    assert got == UNetConfig(
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(1, 2, 4),
        num_heads=8,
        use_spatial_transformer=True,
        context_dim=768,
        legacy=False,
    )


def test_table_names_every_tensor_of_stable_diffusion_1() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768)
        ours = from_diffusers_config(theirs.config)
        network = UNet(ours)
    renamed = to_theirs(network.state_dict(), renaming(key_table(ours)))
    assert len(renamed) == 686
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_stable_diffusion_2_heads() -> None:
    got = from_diffusers_config(
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        }
    )
    assert (got.num_heads, got.num_head_channels, got.use_linear_in_transformer) == (None, 64, True)
    assert to_diffusers_config(got)["attention_head_dim"] == [5, 10, 20, 20]


def test_other_spellings_of_heads_give_the_same_network() -> None:
    """Ours has three ways to say it, theirs has one."""
    ours = config(num_heads=None, channel_mult=(1, 2))
    back = from_diffusers_config(to_diffusers_config(ours))
    assert back == replace(ours, num_head_channels=32)
    network, other = pair(ours)
    x, time, conditioning = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(
            network(x, time, conditioning), call(other, x, time, conditioning), atol=1e-4, rtol=0
        )


def test_vector_alone_is_exported() -> None:
    ours = config(adm_in_channels=12)
    network, other = pair(ours)
    x, time, conditioning = inputs(config(num_classes="sequential", adm_in_channels=12))
    with torch.no_grad():
        torch.testing.assert_close(
            network(x, time, conditioning), call(other, x, time, conditioning), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_spatial_transformer": False, "context_dim": None}, "use_spatial_transformer"),
        ({"context_dim": None}, "context_dim"),
        ({"channel_mult": (2, 4)}, "first level"),
        ({"resblock_updown": True}, "resblock_updown"),
        ({"conv_resample": False}, "convolution"),
        ({"disable_middle_self_attn": True}, "disable_middle_self_attn"),
        ({"num_classes": 5, "adm_in_channels": 8}, "label and a vector"),
        ({"model_channels": 48, "num_heads": 2}, "16 and 32 groups"),
        ({"position_embedding": True}, "position_embedding"),
        ({"target_time": True}, "target_time"),
    ],
)
def test_what_diffusers_lacks_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(DarkroomError, match=word):
        to_diffusers_config(config(**options))
    with pytest.raises(DarkroomError, match=word):
        key_table(config(**options))


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"attention_head_dims": 8}, "did you mean"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "mirror"),
        ({"block_out_channels": [64, 96, 128, 128]}, "multiples"),
        ({"attention_head_dim": [1, 2, 8, 8]}, "neither"),
        ({"attention_head_dim": [1, 2]}, "each of 4 levels"),
        ({"cross_attention_dim": [8, 8, 16, 16]}, "cross_attention_dim"),
        ({"cross_attention_dim": None}, "context_dim"),
        ({"norm_num_groups": 16}, "norm_num_groups"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
        ({"class_embed_type": "identity"}, "identity"),
        ({"addition_embed_type": "text_image"}, "text_image"),
        ({"addition_embed_type": "text_time", "class_embed_type": "timestep"}, "beside a class"),
        ({"addition_embed_type": "text_time"}, "beside a class"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "transformer_layers_per_block"),
    ],
)
def test_what_we_lack_is_refused(entries: dict[str, Any], word: str) -> None:
    with pytest.raises(DarkroomError, match=word) as error:
        from_diffusers_config(entries)
    assert "\n" not in str(error.value)


def test_weights_must_fit_the_config(tmp_path: Path) -> None:
    """In the folder of a network alone, as diffusers saves it."""
    ours = CONFIGS["like_sd2"]
    pair(ours)[1].save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = read_safetensors(weights)
    assert load(tmp_path, device="cpu").denoiser.config_dict["network"]["context_dim"] == ours.context_dim  # type: ignore
    for changed, words in (
        ({k: v for k, v in whole.items() if k != "conv_out.bias"}, r"1 tensor missing \(unet/conv_out\.bias\)"),
        ({**whole, "extra": torch.zeros(1)}, r"1 tensors of no known part \(unet/extra\)"),
        ({**whole, "conv_out.bias": torch.zeros(7)}, r"1 tensor of another shape or type \(unet/conv_out\.bias"),
    ):
        weights.unlink()
        write_safetensors(weights, changed)
        with pytest.raises(DarkroomError, match=words):
            load(tmp_path, device="cpu")


# ---- the shapes of the published models: every option of their configs at a tenth of the width, so that heads, depths,
# levels and inputs are theirs

PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "sd1": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (1, 2, 4), "num_heads": 8,
             "context_dim": 77}, None),
    "sd1_inpainting": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (1, 2, 4),
                        "num_heads": 8, "context_dim": 77, "in_channels": 9}, None),
    "sd2": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (1, 2, 4), "num_heads": None,
             "num_head_channels": 8, "context_dim": 102, "use_linear_in_transformer": True}, None),
    "sd2_depth": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (1, 2, 4),
                   "num_heads": None, "num_head_channels": 8, "context_dim": 102, "use_linear_in_transformer": True,
                   "in_channels": 5}, None),
    "sd2_unclip": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (1, 2, 4),
                    "num_heads": None, "num_head_channels": 8, "context_dim": 102, "use_linear_in_transformer": True,
                    "num_classes": "sequential", "adm_in_channels": 64}, None),
    "x4_upscaler": ({"channel_mult": (1, 2, 2, 4), "num_res_blocks": 2, "attention_resolutions": (2, 4, 8),
                     "num_heads": 8, "context_dim": 102, "use_linear_in_transformer": True, "in_channels": 7,
                     "num_classes": 1000, "disable_self_attentions": (True, True, True, False)}, None),
    "sdxl": ({"channel_mult": (1, 2, 4), "num_res_blocks": 2, "attention_resolutions": (2, 4), "num_heads": None,
              "num_head_channels": 8, "context_dim": 205, "use_linear_in_transformer": True,
              "transformer_depth": (1, 2, 10), "num_classes": "sequential", "adm_in_channels": 80 + 6 * 8}, 8),
    "sdxl_refiner": ({"channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (2, 4),
                      "num_heads": None, "num_head_channels": 8, "context_dim": 128,
                      "use_linear_in_transformer": True, "transformer_depth": 4, "num_classes": "sequential",
                      "adm_in_channels": 80 + 5 * 8}, 8),
}  # fmt: skip


def timestep_embedding_of_sizes(sizes: Tensor, width: int) -> Tensor:
    return timestep_embedding(sizes.flatten(), width).reshape(sizes.shape[0], -1)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_shapes_of_published_models(name: str) -> None:
    options, added = PUBLISHED[name]
    ours = config(**options)
    torch.manual_seed(0)
    network = UNet(ours).eval()
    for parameter in network.parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    other = UNet2DConditionModel.from_config(to_diffusers_config(ours, addition_time_embed_dim=added)).eval()
    other.load_state_dict(to_theirs(network.state_dict(), renaming(key_table(ours, added))), strict=True)
    x, time, conditioning = inputs(ours, size=(16, 24))
    if added is None:
        theirs = call(other, x, time, conditioning)
    else:
        # SDXL: pooled text and the embedded sizes, joined by the pipeline there and by the conditioner here.
        count = (ours.adm_in_channels - 80) // added  # type: ignore[operator]
        pooled, sizes = (
            torch.randn(2, 80),
            torch.tensor([[1024.0, 768, 0, 16, 512, 640], [64, 32, 7, 0, 1, 6]])[:, :count],
        )
        vector = torch.cat([pooled, timestep_embedding_of_sizes(sizes, added)], dim=1)
        conditioning = replace(conditioning, vector=vector)
        theirs = other(
            x,
            time,
            encoder_hidden_states=conditioning.context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
    mine = network(x, time, conditioning)
    assert mine.std() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    written = json.loads(other.to_json_string())
    assert from_diffusers_config(written) == ours
    state = network.state_dict()
    back = to_ours(other.state_dict(), renaming(key_table(ours, added)), state)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_names_and_parameters_of_full_sdxl() -> None:
    """stabilityai/stable-diffusion-xl-base-1.0: 2 567 463 684 parameters."""
    ours = UNetConfig(
        model_channels=320,
        channel_mult=(1, 2, 4),
        attention_resolutions=(2, 4),
        num_head_channels=64,
        use_spatial_transformer=True,
        transformer_depth=(1, 2, 10),
        context_dim=2048,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
        legacy=False,
    )
    with torch.device("meta"):
        network = UNet(ours)
        other = UNet2DConditionModel.from_config(to_diffusers_config(ours, 128, 256))
    assert sum(p.numel() for p in network.parameters()) == 2_567_463_684
    renamed = to_theirs(network.state_dict(), renaming(key_table(ours, 256)))
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in other.state_dict().items()}


def test_only_a_vector_can_be_an_added_condition() -> None:
    with pytest.raises(DarkroomError, match="adm_in_channels"):
        to_diffusers_config(config(), addition_time_embed_dim=256)
