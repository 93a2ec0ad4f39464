"""The text tower: golden vectors of the official BERTEmbedder, its layout in text2img-large, and the padding mask."""

from __future__ import annotations

import pytest
import torch
from parity_data import PARITY, load_case, weights

from darkroom.errors import DarkroomError
from darkroom.networks.text import TextTransformer, TextTransformerConfig


def small(**options: int) -> TextTransformer:
    torch.manual_seed(0)
    defaults = {"vocabulary_size": 50, "width": 32, "depth": 2, "heads": 2, "head_width": 16, "length": 12}
    return TextTransformer(TextTransformerConfig(**{**defaults, **options}))


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["bert_embedder", "bert_embedder_wide"])
@torch.no_grad()
def test_golden(name: str) -> None:
    case = load_case("conditioners_ldm", name)
    a = case.args
    config = TextTransformerConfig(
        a["vocab_size"], a["n_embed"], a["n_layer"], length=a["max_seq_len"], logits_head=True
    )
    tower = TextTransformer(config)
    tower.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    tokens = case.input("tokens")
    case.check("context", tower(tokens), atol=2e-5)
    case.check("context_short", tower(tokens[:, :5]), atol=2e-5)


def test_names_and_shapes_of_text2img_large() -> None:
    layout = weights().load_layout(PARITY / "layouts" / "text2img-large.json.gz")
    prefix = "cond_stage_model."
    expected = {k.removeprefix(prefix): v for k, v in layout["layout"].items() if k.startswith(prefix)}
    with torch.device("meta"):
        tower = TextTransformer(TextTransformerConfig(30522, 1280, 32, logits_head=True))
    assert {k: list(v.shape) for k, v in tower.state_dict().items()} == expected


def test_mask_hides_padding() -> None:
    tower, tokens = small(), ids(2, 9)
    mask = torch.tensor([[True] * 5 + [False] * 4] * 2)
    other = torch.where(mask, tokens, 7)
    with torch.no_grad():
        expected = tower(tokens[:, :5])
        for long in (tokens, other):
            torch.testing.assert_close(tower(long, mask)[:, :5], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(tower(tokens)[:, :5], expected, atol=1e-3)


def test_position_matters() -> None:
    tower, tokens = small(), torch.tensor([[4, 9, 4]])
    context = tower(tokens)
    assert not torch.allclose(context[:, 0], context[:, 2], atol=1e-3)


@pytest.mark.parametrize(("heads", "head_width"), [(1, 8), (3, 20), (8, 64)])
def test_gradient_reaches_every_parameter(heads: int, head_width: int) -> None:
    tower = small(heads=heads, head_width=head_width)
    tower(ids(2, 12)).square().sum().backward()  # a plain sum is constant after a LayerNorm
    assert all(p.grad is not None and p.grad.any() for p in tower.parameters())


def test_the_unused_head_is_frozen() -> None:
    tower = TextTransformer(TextTransformerConfig(20, 8, 1, 1, 8, 4, logits_head=True))
    assert {n for n, p in tower.named_parameters() if not p.requires_grad} == {
        "transformer.to_logits.weight",
        "transformer.to_logits.bias",
    }


def test_too_long() -> None:
    with pytest.raises(DarkroomError, match="13 tokens for a tower of length 12"):
        small()(ids(1, 13))


def test_tokens_of_one_text_differ_from_the_start() -> None:
    """Small embeddings drown in what the first attention adds: then 2 % of the variance lies between the tokens."""
    torch.manual_seed(0)
    tower = TextTransformer(TextTransformerConfig(vocabulary_size=128, width=128, depth=3, heads=4, head_width=32))
    ids = torch.randint(5, 120, (64, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = tower(ids)
    between = (context - context.mean(1, keepdim=True)).square().mean() / context.square().mean()
    assert between > 0.5
