"""The U-Net: golden vectors of the official code, parameter names of published models, and what each option does."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from parity_data import PARITY, case_names, load_case, weights
from torch import Tensor, nn
from transformer_checks import check_target_time

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError
from darkroom.networks.blocks import AttentionBlock, ResBlock, SpatialTransformer, timestep_embedding
from darkroom.networks.unet import UNet, UNetConfig, position_features

OPTIONS = {f.name for f in fields(UNetConfig)}
# Entries of official configs that are no property of the network: sizes of the data set, precision of the run.
NO_OPTIONS = {"image_size", "use_fp16"}
LDM = [n for n in case_names("unet_ldm") if load_case("unet_ldm", n).spec.get("class") == "UNetModel"]
SD2 = [n for n in case_names("unet_sd2") if load_case("unet_sd2", n).spec.get("class") == "UNetModel (SD2)"]
SD2.remove("ddim10_v")  # a solver's trajectory
BLOCKS = [n for n in case_names("unet_ldm") if n not in LDM and "class" in load_case("unet_ldm", n).spec]
LAYOUTS = [
    "bsr_sr",
    "celeba256",
    "cin256",
    "inpainting_big",
    "sd-v1",
    "sd-v1-inpainting",
    "sd-v2-1-v768",
    "text2img-large",
]


def config_from(args: dict[str, Any]) -> UNetConfig:
    assert set(args) - NO_OPTIONS <= OPTIONS
    return UNetConfig(**{k: v for k, v in args.items() if k in OPTIONS})


def golden_network(topic: str, name: str) -> UNet:
    case = load_case(topic, name)
    network = UNet(config_from(case.args)).eval()
    network.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    return network


def golden_conditioning(case: Any) -> Conditioning:
    slots: dict[str, Tensor] = {}
    if "context" in case.spec["inputs"]:
        slots["context"] = case.input("context")
    if "y" in case.spec["inputs"]:
        y = case.input("y")
        slots["vector" if y.is_floating_point() else "label"] = y
    return Conditioning(**slots)


def small(**options: Any) -> UNet:
    """A network whose zero-initialised layers are random, so that everything shows in the output."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "in_channels": 4,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (1, 2),
        "num_heads": 2,
    }
    network = UNet(UNetConfig(**{**defaults, **options}))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def inputs(batch: int = 2, channels: int = 4, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator)
    return x, torch.linspace(3, 900, batch)


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the official code


def test_all_variants_are_covered() -> None:
    assert len(LDM) == 17 and len(SD2) == 7
    assert len(BLOCKS) == 8 + 4  # the four noisy classifiers have a file of their own


@pytest.mark.parametrize("name", LDM)
@torch.no_grad()
def test_ldm_variant(name: str) -> None:
    case, network = load_case("unet_ldm", name), golden_network("unet_ldm", name)
    case.check("eps", network(case.input("x"), case.input("t"), golden_conditioning(case)), atol=2e-5)


@pytest.mark.parametrize("name", SD2)
@torch.no_grad()
def test_sd2_variant(name: str) -> None:
    case, network = load_case("unet_sd2", name), golden_network("unet_sd2", name)
    case.check("model_output", network(case.input("x"), case.input("t"), golden_conditioning(case)), atol=2e-5)


@torch.no_grad()
def test_epsilon_of_the_first_norms() -> None:
    case, network = load_case("unet_ldm", "eps_probe"), golden_network("unet_ldm", "eps_probe")
    for parameter in network.input_blocks[0].parameters():
        parameter.mul_(1e-3)
    case.check("eps_scaled", network(case.input("x"), case.input("t")), atol=2e-5)


@pytest.mark.parametrize("name", [n for n in BLOCKS if not n.startswith("classifier")])
@torch.no_grad()
def test_block(name: str) -> None:
    case = load_case("unet_ldm", name)
    a, kind = dict(case.args), case.spec["class"]
    extra: tuple[Tensor, ...]
    if kind == "ResBlock":
        block: nn.Module = ResBlock(**a)
        extra = (case.input("emb"),)
    elif kind == "AttentionBlock":
        block, extra = AttentionBlock(**a), ()
    else:
        block = SpatialTransformer(a["in_channels"], a["n_heads"], a["d_head"], a["depth"], a["context_dim"])
        extra = (case.input("context"),)
    block.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    case.check("y", block(case.input("x"), *extra), atol=2e-5)


def test_timestep_embedding() -> None:
    case = load_case("unet_ldm", "timestep_embedding")
    for width in (32, 33):
        case.check(f"dim{width}", timestep_embedding(case.input("t"), width), atol=1e-6)


@pytest.mark.parametrize("model", LAYOUTS)
def test_names_and_shapes_of_published_models(model: str) -> None:
    """Built from the published configuration, our network has exactly the published tensors."""
    layout = weights().load_layout(PARITY / "layouts" / f"{model}.json.gz")
    args = layout["hyper_parameters"]["args"]["unet_config"]["args"]
    prefix = "model.diffusion_model."
    expected = {k.removeprefix(prefix): v for k, v in layout["layout"].items() if k.startswith(prefix)}
    with torch.device("meta"):
        network = UNet(config_from(args))
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == expected


def test_every_layout_with_a_unet_is_tested() -> None:
    files = {p.name.split(".")[0] for p in (PARITY / "layouts").glob("*.json.gz")}
    assert files - {"sd3-medium", "diffusers-sd1-unet"} == set(LAYOUTS)


# ---- layouts of memory, precision, sizes


@pytest.mark.parametrize("transformer", [True, False])
def test_channels_last_gives_the_same(transformer: bool) -> None:
    options = {"use_spatial_transformer": True, "context_dim": 24} if transformer else {}
    network, (x, time) = small(**options), inputs()
    conditioning = Conditioning(context=randn(2, 5, 24) if transformer else None)
    expected = network(x, time, conditioning)
    network.to(memory_format=torch.channels_last)
    ours = network(x.contiguous(memory_format=torch.channels_last), time, conditioning)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_no_layer_leaves_channels_last() -> None:
    """A layer that does costs a copy of everything after it."""
    network, (x, time) = small(use_spatial_transformer=True, context_dim=24), inputs()
    seen = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | ResBlock | SpatialTransformer):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: seen.append((name, out.is_contiguous(memory_format=torch.channels_last)))
            )
    network(x, time, Conditioning(context=randn(2, 5, 24)))
    assert len(seen) > 10 and all(kept for _, kept in seen), [name for name, kept in seen if not kept]


def test_same_input_same_output() -> None:
    network, (x, time) = small(use_spatial_transformer=True, context_dim=24), inputs()
    conditioning = Conditioning(context=randn(2, 5, 24))
    assert torch.equal(network(x, time, conditioning), network(x, time, conditioning))


def test_an_image_does_not_depend_on_its_batch() -> None:
    network, (x, time) = small(use_spatial_transformer=True, context_dim=24), inputs(5)
    conditioning = Conditioning(context=randn(5, 6, 24))
    whole = network(x, time, conditioning)
    alone = network(x[2:3], time[2:3], conditioning[2:3])
    torch.testing.assert_close(whole[2:3], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (5, 8)])
@pytest.mark.parametrize("options", [{}, {"resblock_updown": True}, {"conv_resample": False}], ids=str)
def test_sizes(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Odd sizes too: each level comes back to the size of its skip connection."""
    network, (x, time) = small(channel_mult=(1, 1, 2), **options), inputs(size=size)
    assert network(x, time).shape == (2, 4, *size)


def test_widths_that_32_does_not_divide() -> None:
    network, (x, time) = small(model_channels=24, num_heads=4), inputs()
    assert network(x, time).isfinite().all()


def test_bfloat16() -> None:
    """Weights in bfloat16, or autocast: near the float32 result, which keeps the dtype of x."""
    network, (x, time) = small(use_spatial_transformer=True, context_dim=24), inputs()
    conditioning = Conditioning(context=randn(2, 5, 24))
    with torch.no_grad():
        expected = network(x, time, conditioning)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = network(x, time, conditioning)
        low = network.bfloat16()(x, time, conditioning)
    for result in (mixed, low):
        assert result.dtype == x.dtype
        assert (result - expected).norm() / expected.norm() < 0.03


# ---- where a place lies


def test_position_features_are_the_formula() -> None:
    height, width, octaves = 3, 5, 3
    features = position_features(height, width, octaves)[0]
    assert features.shape == (4 * octaves, height, width)
    expected = []
    for k in range(octaves):
        for axis, count in ((0, height), (1, width)):
            for f in (math.sin, math.cos):
                place = lambda i, n: (i + 0.5) / n - 0.5  # noqa: E731
                period = 2.0 ** (2 - k)  # in picture sides
                values = [
                    [f(2 * math.pi / period * place((y, x)[axis], count)) for x in range(width)] for y in range(height)
                ]
                expected.append(torch.tensor(values))
    torch.testing.assert_close(features, torch.stack(expected))


def test_left_is_left_at_every_size() -> None:
    small_map, large = position_features(4, 4), position_features(8, 8)
    pooled = torch.nn.functional.avg_pool2d(large, 2)
    assert (pooled - small_map).abs().max() < 0.25  # the mean over a place is about the value at its centre
    columns = position_features(6, 9)[0].flatten(0, 1).T  # every column of places is told from the others
    assert len({tuple(c.tolist()) for c in columns}) == 9


def test_position_embedding_tells_places_apart() -> None:
    """On a constant input only the border differs without it; with it the two halves do."""
    x, time = torch.zeros(1, 4, 16, 16), torch.tensor([500.0])
    plain, with_places = (
        small(position_embedding=on, channel_mult=(1,), attention_resolutions=()) for on in (False, True)
    )
    centre = slice(7, 9)

    def contrast(network: UNet) -> float:
        h = network.input_blocks[0][0](x)
        if network.position_embed is not None:
            h = h + network.position_embed(position_features(16, 16))
        return float((h[0, :, centre, 4] - h[0, :, centre, 11]).detach().abs().max())

    assert contrast(plain) == 0.0 and contrast(with_places) > 1e-2
    # The output depends on it, and nothing else about the parameters changed.
    extra = set(dict(with_places.named_parameters())) - set(dict(plain.named_parameters()))
    assert extra == {"position_embed.weight"}
    with_places.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(plain(x, time), with_places(x, time))
    with torch.no_grad():
        with_places.position_embed.weight.zero_()
    assert torch.equal(plain(x, time), with_places(x, time))


# ---- training


def test_starts_at_zero() -> None:
    """As in the paper's code the last layer, and the end of every residual, is zero."""
    network, (x, time) = UNet(UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 1))), inputs()
    assert not network(x, time).any()
    zero = [name for name, p in network.named_parameters() if name.endswith("weight") and not p.any()]
    assert any("out_layers.3" in name for name in zero) and any("proj_out" in name for name in zero)


FULL = {
    "use_spatial_transformer": True,
    "context_dim": 24,
    "num_classes": 5,
    "adm_in_channels": 6,
    "in_channels": 6,
    "use_scale_shift_norm": True,
    "position_embedding": True,
}


def full_conditioning() -> Conditioning:
    return Conditioning(
        context=randn(2, 5, 24),
        context_mask=torch.ones(2, 5, dtype=torch.bool),
        vector=randn(2, 6),
        concat=randn(2, 2, 8, 8),
        label=torch.tensor([0, 4]),
    )


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradient_reaches_every_parameter(use_checkpoint: bool) -> None:
    network, (x, time) = small(**FULL, use_checkpoint=use_checkpoint), inputs()
    network(x, time, full_conditioning()).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_checkpointing_changes_nothing_but_memory() -> None:
    plain, thrifty = small(**FULL), small(**FULL, use_checkpoint=True)
    x, time = inputs()
    for network in (plain, thrifty):
        network(x, time, full_conditioning()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a, b) and torch.allclose(a.grad, b.grad, atol=1e-7), name


def test_gradient_reaches_the_inputs() -> None:
    """Needed by reconstruction guidance, and by a text tower that is trained jointly."""
    network, (x, time) = small(**FULL), inputs()
    conditioning = full_conditioning()
    leaves = [x.requires_grad_()] + [
        t.requires_grad_() for t in (conditioning.context, conditioning.vector, conditioning.concat) if t is not None
    ]
    for grad in torch.autograd.grad(network(x, time, conditioning).square().sum(), leaves):
        assert grad.isfinite().all() and grad.any()


# ---- conditioning slots


def changes(network: UNet, one: Conditioning, other: Conditioning) -> bool:
    x, time = inputs()
    with torch.no_grad():
        return bool((network(x, time, one) - network(x, time, other)).abs().max() > 1e-4)


def test_each_slot_is_read() -> None:
    network, base = small(**FULL), full_conditioning()
    for name, value in (
        ("context", randn(2, 5, 24, seed=9)),
        ("vector", randn(2, 6, seed=9)),
        ("concat", randn(2, 2, 8, 8, seed=9)),
        ("label", torch.tensor([1, 2])),
    ):
        slots = {f.name: getattr(base, f.name) for f in fields(base)}
        assert changes(network, base, Conditioning(**{**slots, name: value})), name


def test_time_is_read_and_may_be_fractional() -> None:
    network, (x, time) = small(), inputs()
    assert not torch.allclose(network(x, time), network(x, time + 0.5), atol=1e-6)


def test_concat_equals_more_channels() -> None:
    network, (x, time) = small(in_channels=6), inputs()
    concat = randn(2, 2, 8, 8)
    joined = network(torch.cat([x, concat], 1), time)
    assert torch.equal(network(x, time, Conditioning(concat=concat)), joined)


@pytest.mark.parametrize("disable", [None, (True, True)])
def test_mask_hides_padding(disable: tuple[bool, ...] | None) -> None:
    """Masked tokens may hold anything, and a masked long context is the short one."""
    network = small(use_spatial_transformer=True, context_dim=24, disable_self_attentions=disable)
    x, time = inputs()
    context = randn(2, 7, 24)
    mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
    spoilt = torch.where(mask[:, :, None], context, 100 * randn(2, 7, 24, seed=8))
    with torch.no_grad():
        short = network(x, time, Conditioning(context=context[:, :4]))
        for long in (context, spoilt):
            masked = network(x, time, Conditioning(context=long, context_mask=mask))
            torch.testing.assert_close(masked, short, atol=1e-5, rtol=1e-5)
    assert changes(network, Conditioning(context=context), Conditioning(context=context, context_mask=mask))


# ---- target time


def test_target_time_is_read_and_leaves_the_official_function() -> None:
    check_target_time(small(**FULL), UNet(UNetConfig(**{**vars(small(**FULL).config), "target_time": True})))


def test_gradient_reaches_the_target_time() -> None:
    network, (x, time) = small(**FULL, target_time=True), inputs()
    network(x, time, full_conditioning(), time / 2).square().mean().backward()
    own = [p for name, p in network.named_parameters() if name.startswith("target_time")]
    assert len(own) == 4 and all(p.grad is not None and p.grad.any() for p in own)


def test_a_target_time_that_nothing_reads() -> None:
    x, time = inputs()
    with pytest.raises(DarkroomError, match="target_time"):
        small()(x, time, None, time)


# ---- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_dim": 8}, "use_spatial_transformer"),
        ({"num_heads": 3}, "divisor of 32"),
        ({"num_heads": None, "num_head_channels": 24}, "divisor of 32"),
        ({"num_res_blocks": (1, 2, 3)}, "3 entries for 2 levels"),
        ({"num_classes": "many"}, "sequential"),
        ({"num_classes": "sequential"}, "adm_in_channels"),
    ],
)
def test_impossible_configs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words) as error:
        small(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "conditioning", "words"),
    [
        ({}, Conditioning(context=randn(2, 5, 24)), "no cross-attention"),
        ({"use_spatial_transformer": True, "context_dim": 24}, None, "needs a context"),
        ({}, Conditioning(label=torch.zeros(2, dtype=torch.int64)), "'label'"),
        ({"num_classes": 3}, None, "'label'"),
        ({"adm_in_channels": 6}, Conditioning(), "'vector'"),
        ({"in_channels": 6}, None, "takes 6"),
    ],
)
def test_wrong_conditioning(options: dict[str, Any], conditioning: Conditioning | None, words: str) -> None:
    x, time = inputs()
    with pytest.raises(DarkroomError, match=words):
        small(**options)(x, time, conditioning)
