"""DiT: the official formulas written out, the published sizes, and what each option does.

There is no golden of the official code for DiT; diffusers is the second opinion in tests/interop.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_checks import (
    changes_output,
    check_batch,
    check_gradients,
    check_precision,
    check_slots,
    check_target_time,
    conditioning,
    inputs,
    opened,
    randn,
)

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError
from darkroom.networks.dit import DIT_SIZES, DiT, DiTConfig


def small(**options: Any) -> DiT:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    return opened(DiT(DiTConfig(**{**defaults, **options})))


FULL: dict[str, Any] = {"num_classes": 5, "adm_in_channels": 6, "context_dim": 24, "in_channels": 6}


def official(state: dict[str, Tensor], x: Tensor, time: Tensor, label: Tensor, heads: int, patch: int) -> Tensor:
    """The forward pass of Peebles & Xie 2023, from a state dict with the official names, in plain formulas."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    angles = time[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = c + state["y_embedder.embedding_table.weight"][label]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    rows, columns = h.shape[2:]
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        m = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
        a = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + m[1]) + m[0])
        q, k, v = a.reshape(*a.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        a = linear(f"blocks.{i}.attn.proj", (scores @ v).transpose(1, 2).reshape(h.shape))
        h = h + m[2] * a
        f = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])
        h = h + m[5] * linear(f"blocks.{i}.mlp.fc2", F.gelu(f, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    h = h.reshape(len(h), rows, columns, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), -1, rows * patch, columns * patch)


@pytest.mark.parametrize("options", [{}, {"patch_size": 4}, {"patch_size": 1, "num_heads": 4}, {"out_channels": 8}])
@torch.no_grad()
def test_it_is_the_official_function(options: dict[str, Any]) -> None:
    network = small(num_classes=5, **options).double()
    x, time = (t.double() for t in inputs())
    label = torch.tensor([4, 1])
    expected = official(network.state_dict(), x, time, label, network.config.num_heads, network.config.patch_size)
    got = network(x, time, Conditioning(label=label))
    assert got.shape[1] == network.config.out_channels and got.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)  # the time's features are float32 in between


@torch.no_grad()
def test_it_has_the_official_names() -> None:
    """A block, the ends, and nothing else."""
    names = {name.replace("blocks.0.", "") for name in small(num_classes=5, depth=1).state_dict()}
    layers = (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2",
        "adaLN_modulation.1", "final_layer.linear", "final_layer.adaLN_modulation.1",
    )  # fmt: skip
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_published_sizes() -> None:
    """675,129,632 parameters of DiT-XL/2 with its position table, which the official code counts; without it 33, 130
    and 458 million for S, B, L (Peebles & Xie 2023, table 1)."""
    with torch.device("meta"):
        networks = {name: DiT(config) for name, config in DIT_SIZES.items()}
    assert sum(t.numel() for t in networks["DiT-XL/2"].state_dict().values()) == 675_129_632
    millions = {name: round(sum(p.numel() for p in network.parameters()) / 1e6) for name, network in networks.items()}
    assert (millions["DiT-S/4"], millions["DiT-B/2"], millions["DiT-L/4"]) == (33, 130, 458)
    assert len(networks) == 12 and DIT_SIZES["DiT-XL/2"].out_channels == 8


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (14, 6), (2, 2), (20, 20)])
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_any_size_and_aspect_ratio(size: tuple[int, int], fit: str) -> None:
    network = small(position_fit=fit)
    x, time = inputs(size=size)
    result = network(x, time)
    assert result.shape == x.shape and result.isfinite().all()
    # Turned pictures give other results: positions are read.
    assert (network(x.flip(-1), time).flip(-1) - result).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_positions_are_made_where_the_network_is(size: tuple[int, int]) -> None:
    x, time = (t.to("meta") for t in inputs(size=size))
    assert small().to("meta")(x, time).device.type == "meta"


def test_starts_closed() -> None:
    """As officially: the output is 0, and opening the last layer alone shows blocks that do nothing yet."""
    torch.manual_seed(0)
    network = DiT(DiTConfig(**{"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, **FULL}))
    x, time = inputs()
    assert not network(x, time, conditioning()).any()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    assert not changes_output(network, conditioning(), conditioning(label=torch.tensor([1, 2])))
    tokens = network.x_embedder(torch.cat([x, randn(2, 2, 8, 8)], 1))
    emb = randn(2, 32)
    assert torch.equal(network.blocks[0](tokens, emb, randn(2, 5, 24), None), tokens)


def test_every_slot_is_read() -> None:
    check_slots(small(**FULL))


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_batch(small(**FULL))


def test_gradients_and_checkpointing() -> None:
    options = {**FULL, "target_time": True, "qk_norm": "rms"}
    check_gradients(small(**options), small(**options, use_checkpoint=True))


def test_target_time() -> None:
    check_target_time(small(**FULL), DiT(DiTConfig(**{**vars(small(**FULL).config), "target_time": True})))


def test_precision() -> None:
    check_precision(small(**FULL))


@pytest.mark.parametrize("kind", ["rms", "ln"])
def test_qk_norm_bounds_the_scores(kind: str) -> None:
    """Queries and keys of any length give the same attention."""
    network = small(qk_norm=kind)
    attn: Any = network.blocks[0].attn
    x = randn(2, 6, 32)
    expected = attn(x)
    with torch.no_grad():
        attn.qkv.weight[:64] *= 1000
        attn.qkv.bias[:64] *= 1000
    torch.testing.assert_close(attn(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "num_heads=4"),
        ({"hidden_size": 30, "num_heads": 2}, "multiple of 4"),
        ({"input_size": 9}, "input_size 9"),
        ({"depth": 0}, "depth is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_impossible_configs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words) as error:
        small(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "slots", "size", "words"),
    [
        ({}, Conditioning(context=randn(2, 5, 24)), (8, 8), "'context'"),
        ({"context_dim": 24}, None, (8, 8), "'context'"),
        ({}, Conditioning(label=torch.zeros(2, dtype=torch.int64)), (8, 8), "num_classes"),
        ({"num_classes": 3}, None, (8, 8), "'label'"),
        ({"adm_in_channels": 6}, Conditioning(), (8, 8), "'vector'"),
        ({"in_channels": 6}, None, (8, 8), "takes 6"),
        ({}, None, (8, 7), "multiples of the patch size 2"),
    ],
)
def test_wrong_inputs(options: dict[str, Any], slots: Conditioning | None, size: tuple[int, int], words: str) -> None:
    x, time = inputs(size=size)
    with pytest.raises(DarkroomError, match=words):
        small(**options)(x, time, slots)


def test_a_target_time_that_nothing_reads() -> None:
    x, time = inputs()
    with pytest.raises(DarkroomError, match="target_time"):
        small()(x, time, None, time)
