"""CLIP's text towers: golden vectors, transformers with copied weights, the official layouts, and what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_data import PARITY, load_case, weights
from torch import Tensor

from darkroom.errors import DarkroomError
from darkroom.networks.clip import (
    CLIP_TEXT_SIZES,
    OPEN_CLIP_TEXT_SIZES,
    CLIPText,
    CLIPTextConfig,
    OpenCLIPText,
    OpenCLIPTextConfig,
    end_of_text,
)

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "projection_dim": 24,
    "eos_token_id": 98,
}


def clip(**options: Any) -> CLIPText:
    torch.manual_seed(0)
    return CLIPText(CLIPTextConfig(**{**SMALL, **options}))


def open_clip(**options: Any) -> OpenCLIPText:
    torch.manual_seed(0)
    defaults = {"vocab_size": 99, "width": 32, "heads": 4, "layers": 3, "context_length": 11, "embed_dim": 24}
    return OpenCLIPText(OpenCLIPTextConfig(**{**defaults, **options}))


def some_ids() -> Tensor:
    return torch.tensor([[97, 5, 17, 3, 98, 98, 98, 98, 98, 98, 98], [97, 1, 2, 3, 4, 5, 6, 7, 8, 9, 98]])


def official(layout: str, prefix: str) -> dict[str, list[int]]:
    full = weights().load_layout(PARITY / "layouts" / f"{layout}.json.gz")["layout"]
    return {k.removeprefix(prefix): v for k, v in full.items() if k.startswith(prefix)}


# ---- golden vectors


@pytest.mark.parametrize("name", ["clip_quick_gelu", "clip_gelu"])
@torch.no_grad()
def test_clip_golden(name: str) -> None:
    case = load_case("text_encoders", name)
    tower = CLIPText(CLIPTextConfig(**case.args))
    tower.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    ids = case.input("input_ids")
    last = tower(ids, pool="plain")
    case.check("last_hidden_state", last.context, atol=2e-5)
    case.check("pooled", last.pooled, atol=2e-5)
    case.check("hidden_minus_2", tower(ids, skip_layers=1, final_norm=False).context, atol=2e-5)


@torch.no_grad()
def test_open_clip_golden() -> None:
    case = load_case("text_encoders", "openclip_penultimate")
    tower = OpenCLIPText(OpenCLIPTextConfig(**case.args))
    tower.load_state_dict(weights().make_state_dict(case.spec["layout"], case.spec["derived"]), strict=True)
    ids = case.input("input_ids")
    case.check("penultimate_then_ln_final", tower(ids, skip_layers=1).context, atol=2e-5)
    case.check("last_then_ln_final", tower(ids).context, atol=2e-5)
    case.check("penultimate_raw", tower(ids, skip_layers=1, final_norm=False).context, atol=2e-5)


# ---- the transformers library


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new"])
@pytest.mark.parametrize("eos", [2, 98])
@torch.no_grad()
def test_clip_equals_transformers(act: str, eos: int) -> None:
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModelWithProjection

    tower = clip(hidden_act=act, with_projection=True, eos_token_id=eos)
    options = {**SMALL, "hidden_act": act, "eos_token_id": eos}
    theirs = CLIPTextModelWithProjection(TheirConfig(**options)).eval()
    state = tower.state_dict()
    if not any(k.startswith("text_model.embeddings") for k in theirs.state_dict()):
        pytest.fail("transformers names its tensors in another way")
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.load_state_dict(state, strict=True)
    ids = some_ids()
    expected = theirs(ids, output_hidden_states=True)
    for skip in range(4):
        ours = tower(ids, skip_layers=skip, final_norm=False).context
        torch.testing.assert_close(ours, expected.hidden_states[-1 - skip], atol=1e-5, rtol=1e-5)
    ours = tower(ids, skip_layers=2, pool="projected")
    torch.testing.assert_close(ours.pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower(ids).context, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_open_clip_is_a_stack_of_torch_layers() -> None:
    """Independent of the goldens, with the projection: torch's own encoder layers under a causal mask."""
    tower = open_clip()
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = some_ids()
    x = tower.token_embedding(ids) + tower.positional_embedding
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11)
    for i in range(3):
        layer = torch.nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        names = {
            "ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"
        }  # fmt: skip
        block = tower.transformer.resblocks[i].state_dict()
        for ours, their in names.items():
            block = {k.replace(f"{ours}.", f"{their}.", 1) if k.startswith(ours) else k: v for k, v in block.items()}
        layer.load_state_dict(block)
        x = layer(x, src_mask=mask)
    last = tower.ln_final(x)
    features = tower(ids, skip_layers=1, pool="projected")
    expected = last[[0, 1], [4, 10]] @ tower.text_projection
    torch.testing.assert_close(features.pooled, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower(ids, pool="plain").pooled, last[[0, 1], [4, 10]], atol=1e-5, rtol=1e-5)


# ---- official layouts


def test_names_and_shapes_of_sd1() -> None:
    expected = official("sd-v1", "cond_stage_model.transformer.")
    del expected["text_model.embeddings.position_ids"]
    with torch.device("meta"):
        tower = CLIPText(CLIP_TEXT_SIZES["ViT-L-14"])
    assert {k: list(v.shape) for k, v in tower.state_dict().items()} == expected


def test_names_and_shapes_of_sd2() -> None:
    expected = official("sd-v2-1-v768", "cond_stage_model.model.")
    with torch.device("meta"):
        tower = OpenCLIPText(OPEN_CLIP_TEXT_SIZES["ViT-H-14"])
    assert {k: list(v.shape) for k, v in tower.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [("ViT-L-14", 123_060_480), ("ViT-H-14", 352_984_064), ("ViT-bigG-14", 693_021_440)],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    """Without projection; known of transformers' CLIPTextModel for L and bigG, of the SD 2 layout for H."""
    with torch.device("meta"):
        tower = CLIPText(CLIP_TEXT_SIZES[name])
        open_tower = OpenCLIPText(OPEN_CLIP_TEXT_SIZES[name])
    assert sum(p.numel() for p in tower.parameters()) == count
    extra = open_tower.text_projection.numel() + 1
    assert sum(p.numel() for p in open_tower.parameters()) == count + extra


def test_position_ids_of_old_files_are_accepted() -> None:
    tower = clip()
    state = tower.state_dict() | {"text_model.embeddings.position_ids": torch.arange(11)[None]}
    clip().load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="position_idx"):
        clip().load_state_dict(state | {"position_idx": torch.zeros(1)}, strict=True)


# ---- what must hold


@pytest.mark.parametrize("tower", [clip(), open_clip()], ids=["clip", "open_clip"])
@torch.no_grad()
def test_padding_does_not_change_a_text(tower: CLIPText | OpenCLIPText) -> None:
    ids = some_ids()[:1]
    other = ids.clone()
    other[0, 5:] = 7
    a, b = tower(ids, pool="plain"), tower(other, pool="plain")
    torch.testing.assert_close(a.context[:, :5], b.context[:, :5])
    torch.testing.assert_close(a.pooled, b.pooled)
    assert not torch.allclose(a.context[:, 5:], b.context[:, 5:])
    torch.testing.assert_close(tower(ids[:, :5]).context, a.context[:, :5])


def test_the_first_end_token_ends_the_text() -> None:
    ids = torch.tensor([[1, 98, 3, 98], [1, 2, 3, 98]])
    assert end_of_text(ids, 98).tolist() == end_of_text(ids, None).tolist() == [1, 3]
    assert end_of_text(ids, 3).tolist() == [2, 2]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pool", ["none", "plain", "projected"])
@pytest.mark.parametrize("make", [lambda: clip(with_projection=True), open_clip], ids=["clip", "open_clip"])
def test_unused_parameters_are_those_without_gradient(make: Any, skip: int, norm: bool, pool: Any) -> None:
    tower = make()
    tower.requires_grad_(True)
    features = tower(some_ids(), skip, norm, pool)
    loss = features.context.square().sum() + (0 if features.pooled is None else features.pooled.square().sum())
    loss.backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    unused = {id(p) for p in tower.unused(skip, norm, pool)}
    assert {name for name, p in tower.named_parameters() if id(p) in unused} == without


def test_initial_weights_shrink_with_depth() -> None:
    """The residual branches of a fresh tower: width^-1/2 (2 layers)^-1/2, biases 0; norms untouched."""
    deep = OpenCLIPText(OpenCLIPTextConfig(vocab_size=50, width=64, heads=2, layers=8, context_length=8))
    same = CLIPText(CLIPTextConfig(50, 64, 256, 8, 2, 8))
    for parameter in (
        deep.transformer.resblocks[0].attn.out_proj.weight,
        same.text_model.encoder.layers[0].self_attn.out_proj.weight,
        same.text_model.encoder.layers[0].mlp.fc2.weight,
    ):
        assert parameter.std().item() == pytest.approx(64**-0.5 * 16**-0.5, rel=0.1)
    assert same.text_model.encoder.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    for tower in (deep, same):
        for name, parameter in tower.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            if name.endswith(("ln_1.weight", "layer_norm1.weight")):
                assert bool((parameter == 1).all()), name


def test_errors() -> None:
    with pytest.raises(DarkroomError, match="12 tokens for a tower of length 11"):
        clip()(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(DarkroomError, match="3 layers"):
        open_clip()(some_ids(), skip_layers=4)
    with pytest.raises(DarkroomError, match="no projection"):
        clip()(some_ids(), pool="projected")
    with pytest.raises(DarkroomError, match="5 heads"):
        clip(num_attention_heads=5)
    with pytest.raises(DarkroomError, match='"swish" is not known'):
        clip(hidden_act="swish")
