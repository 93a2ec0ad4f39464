"""T5's encoder against the transformers library with copied weights, and what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from darkroom.errors import DarkroomError
from darkroom.networks.t5 import T5_SIZES, T5Encoder, T5EncoderConfig, distance_buckets

SMALL = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 6,  # heads x d_kv is not d_model, as in the small version
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
}


def t5(**options: Any) -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(T5EncoderConfig(**{**SMALL, **options}))


def some_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["relu", "gated-gelu", "gated-silu"])
@torch.no_grad()
def test_equals_transformers(kind: str) -> None:
    from transformers import T5Config, T5EncoderModel

    tower = t5(feed_forward_proj=kind)
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs = T5EncoderModel(T5Config(**SMALL, feed_forward_proj=kind)).eval()
    missing, unexpected = theirs.load_state_dict(tower.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    ids = some_ids()
    expected = theirs(ids).last_hidden_state
    torch.testing.assert_close(tower(ids).context, expected, atol=1e-5, rtol=1e-5)
    assert tower(ids).pooled is None and tower.width == 32
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(tower(ids, mask.bool()).context, expected, atol=1e-5, rtol=1e-5)
    # And back: the names of a file that transformers writes are read strictly, both names of the table included.
    again = t5(feed_forward_proj=kind)
    again.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(again(ids).context, tower(ids).context)


@torch.no_grad()
def test_a_shorter_tower_is_the_same_up_to_its_end() -> None:
    tower, short = t5(), t5(num_layers=2)
    short.load_state_dict({k: v for k, v in tower.state_dict().items() if ".block.2." not in k}, strict=True)
    assert torch.equal(tower(some_ids(), skip_layers=1).context, short(some_ids()).context)
    with pytest.raises(DarkroomError, match="3 layers"):
        tower(some_ids(), skip_layers=3)


def test_buckets_by_hand() -> None:
    """8 buckets up to distance 16: behind 0 1 2-5 6.., ahead the same plus 4."""
    row = distance_buckets(20, 8, 16)[0].tolist()
    assert row[0] == 0 and row[1:3] == [5, 6] and row[5] == 6 and row[6] == 7 and row[19] == 7
    column = distance_buckets(20, 8, 16)[:, 0].tolist()
    assert column == [0, *[bucket - 4 for bucket in row[1:]]]


@torch.no_grad()
def test_mask_hides_padding() -> None:
    tower, ids = t5(), some_ids(9)
    mask = torch.arange(9).expand(2, 9) < 6
    other = torch.where(mask, ids, 0)
    torch.testing.assert_close(tower(ids, mask).context[:, :6], tower(other, mask).context[:, :6])
    torch.testing.assert_close(tower(ids, mask).context[:, :6], tower(ids[:, :6]).context, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tower(ids).context[:, :6], tower(other).context[:, :6])


def test_the_token_table_has_two_names() -> None:
    state = t5().state_dict()
    renamed = dict(state)
    renamed["encoder.embed_tokens.weight"] = renamed.pop("shared.weight")
    t5().load_state_dict(renamed, strict=True)
    t5().load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_unused_parameters_are_those_without_gradient(skip: int) -> None:
    tower = t5()
    tower(some_ids(), skip_layers=skip).context.square().sum().backward()
    unused = {id(p) for p in tower.unused(skip)}
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in unused), name


@pytest.mark.parametrize(
    ("name", "count"),
    [("t5-v1_1-small", 35_332_800), ("t5-v1_1-base", 109_628_544), ("t5-v1_1-xxl", 4_762_310_656)],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        tower = T5Encoder(T5_SIZES[name])
    assert sum(p.numel() for p in tower.parameters()) == count


def test_initial_scores_are_of_order_one() -> None:
    """There is no 1/sqrt(d): the initial q makes up for it."""
    tower = T5Encoder(T5EncoderConfig(vocab_size=200, d_model=256, d_kv=32, d_ff=64, num_layers=1, num_heads=8))
    attention = tower.encoder.block[0].layer[0].SelfAttention
    x = torch.randn(1, 200, 256, generator=torch.Generator().manual_seed(0))
    q, k = (layer(x).unflatten(-1, (8, -1)).transpose(1, 2) for layer in (attention.q, attention.k))
    assert (q @ k.transpose(-1, -2)).std().item() == pytest.approx(1.0, rel=0.15)
