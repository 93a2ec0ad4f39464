"""Encoders of published towers: SD 1, SD 2, SDXL and SD 3 against transformers and diffusers with the same weights,
token ids, what stands for no text, what is trained, and what is said where a vocabulary is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_facts import Facts
from text_tower_files import (
    CLIP_G,
    CLIP_L,
    IDS,
    OPEN_G,
    SIZE,
    T5,
    clip_model,
    clip_tokenizer,
    encoder,
    t5_model,
    t5_tokenizer,
    write_clip_vocabulary,
    write_t5_vocabulary,
)

from darkroom.build import build_conditioner, conditioner_config
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoders import ENCODERS
from darkroom.conditioning.text_towers import TextTowers
from darkroom.conditioning.vocabularies import VOCABULARIES
from darkroom.config import from_dict
from darkroom.errors import DarkroomError
from darkroom.interop.text_towers import open_clip_from_clip

TEXTS = ["the red fox", "a cat sleeping in the box, " * 9, ""]
SMALL_SD3 = {"clip_l": {"network": CLIP_L}, "clip_g": {"network": {**CLIP_G, "pad_token_id": 0}}, "t5": {"network": T5}}


@pytest.fixture(autouse=True)
def vocabularies(tmp_path_factory: Any, monkeypatch: Any) -> Path:
    """Both vocabularies, where the environment says."""
    root = tmp_path_factory.mktemp("vocabularies")
    write_clip_vocabulary(root / "clip")
    write_t5_vocabulary(root / "t5")
    monkeypatch.setenv(VOCABULARIES, str(root))
    return root


def close(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


# ---- against the libraries


@torch.no_grad()
def test_sd1_equals_transformers() -> None:
    theirs = clip_model(CLIP_L, projection=False)
    ours = encoder(kind="clip", network=CLIP_L, vector="plain")
    ours.towers.tower.network.load_state_dict({f"text_model.{k.removeprefix('text_model.')}": v
                                               for k, v in theirs.state_dict().items()}, strict=True)  # fmt: skip
    ids = clip_tokenizer()(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.towers.tower.tokens(TEXTS)[0], ids)
    expected, result = theirs(ids), ours.encode(TEXTS)
    close(result.context, expected.last_hidden_state)
    close(result.vector, expected.pooler_output)
    close(ours.encode(ids).context, expected.last_hidden_state)  # ids in the place of text
    assert ours.widths == {"context": 32, "vector": 32} and result.context_mask is None
    close(ours.null(2).context, expected.last_hidden_state[2:].expand(2, -1, -1))


@torch.no_grad()
def test_sd2_pads_with_zero_and_reads_the_penultimate_state() -> None:
    ours = encoder(kind="open_clip", network=OPEN_G)
    tower = ours.towers.tower
    ids = clip_tokenizer("!")(
        TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tower.tokens(TEXTS)[0], ids) and (ids[2, 2:] == 0).all()
    close(ours.encode(TEXTS).context, tower.network(ids, skip_layers=1).context)


@torch.no_grad()
def test_sdxl_equals_diffusers() -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = dict.fromkeys(("vae", "unet", "scheduler"))
    models = clip_model(CLIP_L, projection=False), clip_model(CLIP_G)
    pipeline = StableDiffusionXLPipeline(
        text_encoder=models[0], tokenizer=clip_tokenizer(),
        text_encoder_2=models[1], tokenizer_2=clip_tokenizer("!"), **parts,
    )  # fmt: skip
    ours = encoder(kind="sdxl_text", clip_l={"network": CLIP_L}, clip_g={"network": OPEN_G})
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in models[0].state_dict().items()}
    ours.towers.clip_l.network.load_state_dict(state, strict=True)
    logit_scale = {"logit_scale": torch.tensor(1.0)}
    ours.towers.clip_g.network.load_state_dict(open_clip_from_clip(models[1].state_dict()) | logit_scale, strict=True)
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(TEXTS, device="cpu")
    result = ours.encode(TEXTS)
    close(result.context, context)
    close(result.vector, pooled)
    assert ours.widths == {"context": 80, "vector": 48}
    null = ours.null(3)
    close(null.context, negative)
    close(null.vector, negative_pooled)
    assert not negative.any() and not negative_pooled.any()
    # And the same tower under the names of transformers.
    other = encoder(kind="sdxl_text", clip_l={"network": CLIP_L}, clip_g={"family": "clip", "network": {**CLIP_G, "pad_token_id": 0}})  # fmt: skip  # noqa: E501
    other.towers.clip_l.network.load_state_dict(state, strict=True)
    other.towers.clip_g.network.load_state_dict(models[1].state_dict(), strict=True)
    close(other.encode(TEXTS).context, context)
    close(other.encode(TEXTS).vector, pooled)


@torch.no_grad()
@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_equals_diffusers(with_t5: bool) -> None:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models import SD3Transformer2DModel

    models = clip_model(CLIP_L), clip_model(CLIP_G), t5_model() if with_t5 else None
    parts = dict.fromkeys(("vae", "scheduler"))
    transformer = SD3Transformer2DModel(
        sample_size=4, num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=96,
        caption_projection_dim=8, pooled_projection_dim=80, pos_embed_max_size=4,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        text_encoder=models[0], tokenizer=clip_tokenizer(), text_encoder_2=models[1], tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=models[2], tokenizer_3=t5_tokenizer() if with_t5 else None, transformer=transformer, **parts,
    )  # fmt: skip
    small = {"clip_l": {"network": CLIP_L}, "clip_g": {"network": {**CLIP_G, "pad_token_id": 0}}}
    t5 = {"t5": {"network": T5, "length": 50}} if with_t5 else {"t5": None, "t5_length": 50, "context_dim": 96}
    ours = encoder(kind="sd3_text", project_l=True, **small, **t5)
    for tower, model in zip(ours.towers.values(), models, strict=False):
        tower.network.load_state_dict(model.state_dict(), strict=True)
    context, _, pooled, _ = pipeline.encode_prompt(TEXTS, TEXTS, TEXTS, device="cpu", max_sequence_length=50,
                                                   do_classifier_free_guidance=False)  # fmt: skip
    result = ours.encode(TEXTS)
    close(result.context, context)
    close(result.vector, pooled)
    assert result.context.shape[1:] == (77 + 50, 96) and ours.widths == {
        "context": 96,
        "vector": 80,
    }
    assert not result.context[:, :77, 80:].any()  # filled up with zeros
    assert with_t5 or not result.context[:, 77:].any()
    null = ours.null(1)
    close(null.context, result.context[2:])
    # The official code leaves CLIP-L's pooled text as it is.
    official = encoder(kind="sd3_text", **small, **t5)
    official.towers.clip_l.network.load_state_dict(
        {k: v for k, v in models[0].state_dict().items() if "projection" not in k}, strict=True
    )
    official.towers.clip_g.network.load_state_dict(models[1].state_dict(), strict=True)
    ids = clip_tokenizer()(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    vector = official.encode(TEXTS).vector
    close(vector[:, :32], models[0].text_model(ids).pooler_output)
    close(vector[:, 32:], pooled[:, 32:])


@torch.no_grad()
def test_t5_alone_with_and_without_mask() -> None:
    theirs = t5_model()
    inputs = t5_tokenizer()(TEXTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    for use_mask in (False, True):
        ours = encoder(kind="t5", network=T5, length=40, use_mask=use_mask)
        ours.towers.tower.network.load_state_dict(theirs.state_dict(), strict=True)
        result = ours.encode(TEXTS)
        assert torch.equal(ours.towers.tower.tokens(TEXTS)[0], inputs.input_ids)
        mask = inputs.attention_mask if use_mask else None
        expected = theirs(inputs.input_ids, attention_mask=mask).last_hidden_state
        close(result.context, expected)
        assert (result.context_mask is not None) == use_mask
        if use_mask:
            assert torch.equal(result.context_mask, inputs.attention_mask.bool())


# ---- named sizes


@pytest.mark.parametrize(
    ("config", "widths", "parameters"),
    [
        ({"kind": "clip"}, {"context": 768}, 123_060_480),
        ({"kind": "clip", "vector": "projected"}, {"context": 768, "vector": 768}, 123_060_480 + 768**2),
        ({"kind": "open_clip"}, {"context": 1024}, 352_984_064 + 1024**2 + 1),
        ({"kind": "t5"}, {"context": 4096}, 4_762_310_656),
        ({"kind": "sdxl_text"}, {"context": 2048, "vector": 1280}, 123_060_480 + 693_021_440 + 1280**2 + 1),
        ({"kind": "sdxl_text", "clip_l": None}, {"context": 1280, "vector": 1280}, 693_021_440 + 1280**2 + 1),
        (
            {"kind": "sd3_text"},
            {"context": 4096, "vector": 2048},
            123_060_480 + 693_021_440 + 1280**2 + 4_762_310_656,
        ),
        ({"kind": "sd3_text", "t5": None}, {"context": 4096, "vector": 2048}, 123_060_480 + 693_021_440 + 1280**2),
    ],
)
def test_published_arrangements(config: dict[str, Any], widths: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        ours = build_conditioner({"encoders": {"text": config}}).encoders["text"]
    assert isinstance(ours, TextTowers)
    assert ours.widths == widths
    assert sum(p.numel() for p in ours.parameters()) == parameters


# ---- token ids and missing vocabularies


def test_ids_stand_for_text_without_any_vocabulary(monkeypatch: Any) -> None:
    reader = encoder(kind="clip", network=CLIP_L, length=9)
    text = reader.encode(["the red fox", ""]).context
    monkeypatch.delenv(VOCABULARIES)
    ours = encoder(kind="clip", network=CLIP_L, length=9)  # another one, which has not read the files
    ours.load_state_dict(reader.state_dict())
    start, end, words = SIZE - 2, SIZE - 1, [513, 515, 517]
    ids = [start, *words, end]
    a = ours.encode([ids, None]).context
    b = ours.encode(torch.tensor([[*ids, end, end, end, end], [start, *[end] * 8]])).context
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.null(1).context, a[1:])
    torch.testing.assert_close(a, text)
    with pytest.raises(DarkroomError, match=r"vocab\.json and merges\.txt, or tokenizer\.json.*token ids") as error:
        ours.encode(["the red fox"])
    assert "\n" not in str(error.value) and VOCABULARIES in str(error.value)
    with pytest.raises(DarkroomError, match="CLIP's vocabulary"):
        ours.ready()
    t5 = encoder(kind="t5", network=T5)
    with pytest.raises(DarkroomError, match=r"tokenizer\.json, or spiece\.model"):
        t5.encode(["the"])


def test_a_vocabulary_can_be_given_later_and_is_kept(vocabularies: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(VOCABULARIES)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"width": 8, "depth": 1, "heads": 1, "head_width": 8, "length": 4}
    conditioner = build_conditioner({"encoders": {"text": {"kind": "sd3_text", **SMALL_SD3}}}).eval()
    with pytest.raises(DarkroomError, match='no text tower that reads the vocabulary "bert"'):
        conditioner.set_vocabulary(tmp_path, "bert")
    conditioner.set_vocabulary(vocabularies / "clip")
    with pytest.raises(DarkroomError, match="T5's vocabulary"):
        conditioner({"text": ["the red fox"]})
    conditioner.set_vocabulary(vocabularies / "t5" / "tokenizer.json", "t5")
    expected = conditioner({"text": ["the red fox"]})
    again = build_conditioner(json.loads(json.dumps(conditioner.config_dict)))  # as a model folder keeps it
    again.load_state_dict(conditioner.state_dict())
    assert torch.equal(again({"text": ["the red fox"]}).context, expected.context)

    own = build_conditioner(
        {"encoders": {"own": {"kind": "text", "vocabulary": "bert", "vocabulary_size": 5, **small}}}
    )
    own.set_vocabulary(tmp_path, "bert")
    kept = build_conditioner(own.config_dict)
    kept.load_state_dict(own.state_dict())
    assert torch.equal(kept({"text": ["RED"]}).context, own({"text": ["RED"]}).context)
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "one", "more"]))
    with pytest.raises(DarkroomError, match="7 tokens, but the tower was built for 5"):
        own.set_vocabulary(tmp_path, "bert")


def test_wrong_ids() -> None:
    ours = encoder(kind="clip", network=CLIP_L, length=6)
    with pytest.raises(DarkroomError, match=f"token id {SIZE} is not in the vocabulary; ids are 0 to {SIZE - 1}"):
        ours.encode([[SIZE]])
    with pytest.raises(DarkroomError, match="token id -1"):
        ours.encode([[-1]])
    with pytest.raises(DarkroomError, match="7 token ids for a text of at most 6"):
        ours.encode([[1] * 7])
    with pytest.raises(DarkroomError, match="a string or a list of token ids"):
        ours.encode([3.5])


@torch.no_grad()
def test_ids_of_several_towers() -> None:
    """One list for CLIP's vocabulary, padded as each tower wants it; T5 has its own."""
    xl = encoder(kind="sdxl_text", clip_l={"network": CLIP_L}, clip_g={"network": OPEN_G})
    ids = xl.towers.clip_l.tokens(["the red fox"])[0][0]
    text = xl.encode(["the red fox"])
    for given in (ids, ids.tolist(), ids[:5].tolist(), {"clip": ids}):
        result = xl.encode([given])
        assert torch.equal(result.context, text.context) and torch.equal(result.vector, text.vector)
    exact = {name: tower.tokens(["the red fox"])[0][0] for name, tower in xl.towers.items()}
    assert torch.equal(xl.encode([exact]).context, text.context)

    sd3 = encoder(kind="sd3_text", **SMALL_SD3)
    both = {"clip": ids, "t5": sd3.towers.t5.tokens(["the red fox"])[0][0]}
    assert torch.equal(sd3.encode([both]).context, sd3.encode(["the red fox"]).context)
    with pytest.raises(DarkroomError, match=r"\{\"clip\": \[\.\.\.\], \"t5\""):
        sd3.encode([ids])
    with pytest.raises(DarkroomError, match="also needs some for t5"):
        sd3.encode([{"clip": ids}])


def test_a_larger_vocabulary_is_refused() -> None:
    ours = encoder(
        kind="clip", network={**CLIP_L, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    )
    with pytest.raises(DarkroomError, match=f"{SIZE} tokens, but the tower ViT-L-14 was built for 300"):
        ours.encode(["a"])


# ---- configs


def test_completed_reads_vocabularies(vocabularies: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(VOCABULARIES)
    write_clip_vocabulary(tmp_path / "model" / "tokenizer")
    write_t5_vocabulary(tmp_path / "model" / "tokenizer_3")
    facts = Facts()

    def complete(**config: Any) -> dict[str, Any]:
        given = from_dict(ENCODERS[config["kind"]].config_class, config)
        return conditioner_config({"text": given}, facts)["encoders"]["text"]

    assert complete(kind="clip")["tokenizer"] is None  # nowhere to be found: ids only
    assert complete(kind="clip", vocabulary=str(vocabularies / "clip"))["tokenizer"]
    assert complete(kind="clip", weights=str(tmp_path / "model" / "text_encoder"))["tokenizer"]
    assert complete(kind="t5", weights=str(tmp_path / "model" / "text_encoder_3" / "model.safetensors"))["tokenizer"]
    found = complete(kind="sd3_text", weights=str(tmp_path / "model"))
    assert all(found[name]["tokenizer"] for name in ("clip_l", "clip_g", "t5"))
    assert found == complete(**found)  # complete already
    without = complete(kind="sd3_text", t5=None)
    assert without["t5"] is None and without["clip_l"]["tokenizer"] is None
    with pytest.raises(DarkroomError, match="is not there"):
        complete(kind="clip", vocabulary=str(tmp_path / "nowhere"))


def test_config_errors() -> None:
    with pytest.raises(DarkroomError, match='"ViT-Q" is not a size of clip'):
        encoder(kind="clip", model="ViT-Q")
    with pytest.raises(DarkroomError, match=r'unknown key "clip\.network\.width"'):
        encoder(kind="clip", network={"width": 3})
    with pytest.raises(DarkroomError, match=rf"id 49407 .* vocabulary of {SIZE}; set network\.bos_token_id"):
        encoder(kind="clip", network={**CLIP_L, "pad_token_id": 49407})
    with pytest.raises(DarkroomError, match='family "bert" is not known'):
        encoder(kind="clip", family="bert")
    with pytest.raises(DarkroomError, match="length 78 is more than the tower ViT-L-14 reads, 77"):
        encoder(kind="clip", network=CLIP_L, length=78)
    with pytest.raises(DarkroomError, match="no pooled vector"):
        encoder(kind="t5", network=T5, vector="plain")
    with pytest.raises(DarkroomError, match="80 wide, more than the width of 50"):
        encoder(kind="sd3_text", clip_l={"network": CLIP_L}, clip_g={"network": CLIP_G}, t5=None, context_dim=50)
    with pytest.raises(DarkroomError, match=r"lengths \[20, 77\]"):
        encoder(kind="sdxl_text", clip_l={"network": CLIP_L, "length": 20}, clip_g={"network": OPEN_G})
    with pytest.raises(DarkroomError, match="no room for a text"):
        encoder(kind="clip", network=CLIP_L, length=1).encode([""])


# ---- dropping and training


@torch.no_grad()
@pytest.mark.parametrize("no_text", ["empty", "zeros"])
def test_dropped_texts(no_text: str) -> None:
    ours = encoder(kind="clip", network=CLIP_L, vector="plain", no_text=no_text, use_mask=True)
    keep = torch.tensor([True, False])
    mixed, null, kept = ours.encode_kept(["the fox", "the cat"], keep), ours.null(1), ours.encode(["the fox"])
    close(mixed.context, torch.cat([kept.context, null.context]))
    close(mixed.vector, torch.cat([kept.vector, null.vector]))
    assert bool(null.context.any()) == (no_text == "empty") and torch.equal(mixed.context_mask[1:], null.context_mask)
    assert null.context_mask.sum() == 2  # start and end
    conditioner = Conditioner({"text": ours})
    ours.drop_rate = 1.0
    close(conditioner({"text": ["the fox"]}, torch.Generator()).context, null.context)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"kind": "clip", "network": CLIP_L},
        {"kind": "open_clip", "network": OPEN_G},
        {"kind": "open_clip", "network": OPEN_G, "vector": "projected", "final_norm": False},
        {"kind": "t5", "network": T5, "skip_layers": 1},
        {"kind": "sdxl_text", "clip_l": {"network": CLIP_L}, "clip_g": {"network": OPEN_G}},
    ],
)
def test_what_is_trained(config: dict[str, Any], trainable: bool) -> None:
    """Frozen towers make no graph; of trained ones every parameter that asks for a gradient gets one."""
    ours = encoder(**config, trainable=trainable)
    result = ours.encode(["the fox"])
    wanted = {name for name, p in ours.named_parameters() if p.requires_grad}
    if not trainable:
        assert not wanted and not result.context.requires_grad
        ours.unfreeze()
        assert not any(p.requires_grad for p in ours.parameters())
        return
    (result.context.square().sum() + (0 if result.vector is None else result.vector.square().sum())).backward()
    assert wanted and {name for name, p in ours.named_parameters() if p.grad is not None} == wanted


@torch.no_grad()
def test_precision_of_weights() -> None:
    exact = encoder(kind="clip", network=CLIP_L)
    half = encoder(kind="clip", network=CLIP_L, dtype="bfloat16")
    half.load_state_dict(exact.state_dict())
    a, b = exact.encode(["the fox"]).context, half.encode(["the fox"]).context
    assert b.dtype == torch.float32 and next(half.parameters()).dtype == torch.bfloat16
    assert 1e-4 < (a - b).abs().max() < 0.2


def test_ids_are_known() -> None:
    assert IDS["eos_token_id"] == SIZE - 1
    old = encoder(kind="clip", network={**CLIP_L, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1})
    assert (old.towers.tower.special.start, old.towers.tower.special.end, old.towers.tower.special.pad) == (
        SIZE - 2, SIZE - 1, SIZE - 1,
    )  # fmt: skip
