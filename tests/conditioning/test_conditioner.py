"""Class and text encoders, and the conditioner that merges them and drops them in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_facts import Facts
from parity_data import PARITY, load_case, weights
from torch import Tensor, nn

from darkroom.build import build_conditioner, conditioner_config
from darkroom.conditioning.classes import ClassEncoder, ClassEncoderConfig
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import ConditionEncoder
from darkroom.conditioning.text import TextEncoder, TextEncoderConfig
from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.conditioning.types import Conditioning
from darkroom.config import to_dict
from darkroom.errors import DarkroomError

CAPTIONS = ["a red fox", "a blue box", "two red boxes", "a fox"]
CLASSES = ["fox", "box", "cat"]


class Tower(nn.Module):
    """(B, L) ids -> (B, L, 8), with a mask that replaces padding by its own vector, so that it can be seen."""

    def __init__(self, size: int, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(size, width)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.embedding(ids)
        return tokens if mask is None else torch.where(mask[:, :, None], tokens, -1.0)


def text_encoder(drop_rate: float = 0.1, use_mask: bool = True, vector: bool = False) -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = WordPieceTokenizer.train(CAPTIONS, 60)
    return TextEncoder(Tower(tokenizer.vocabulary_size), tokenizer, 6, drop_rate, use_mask, vector=vector)


def class_encoder(**options: Any) -> ClassEncoder:
    torch.manual_seed(1)
    return ClassEncoder(ClassEncoderConfig(**{"classes": CLASSES, "width": 8, **options}))


class ConcatEncoder(ConditionEncoder):
    """A modality that a user might add, on the default `encode_kept`."""

    def __init__(self, field: str, channels: int, drop_rate: float = 0.0) -> None:
        super().__init__(field, {"concat": channels}, drop_rate)

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        assert isinstance(values, Tensor)
        return Conditioning(concat=values)

    def null(self, batch_size: int) -> Conditioning:
        return Conditioning(concat=torch.zeros(batch_size, self.widths["concat"], 4, 4))


class FlatEncoder(ConcatEncoder):
    """One number per example, the same at every place."""

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        assert isinstance(values, Tensor)
        return Conditioning(concat=values[:, None, None, None])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 4) -> dict[str, Any]:
    return {"text": [CAPTIONS[i % 4] for i in range(size)], "class_label": torch.arange(size) % 3}


# ---- classes


def test_class_embedder_golden() -> None:
    case = load_case("conditioners_ldm", "class_embedder")
    encoder = ClassEncoder(ClassEncoderConfig(classes=[str(i) for i in range(10)], width=case.args["embed_dim"]))
    encoder.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    case.check("context", encoder.encode(case.input("class_label")).context, atol=2e-5)


def test_class_null_is_the_last_row() -> None:
    encoder = class_encoder()
    null = encoder.null(2).context
    assert null is not None and null.shape == (2, 1, 8)
    assert encoder.embedding is not None and encoder.embedding.num_embeddings == 4
    assert torch.equal(null[0, 0], encoder.embedding.weight[3])


def test_class_names_and_numbers_agree() -> None:
    encoder = class_encoder()
    expected = encoder.encode(torch.tensor([1, 2, 3])).context
    assert torch.equal(encoder.encode(["box", 2, None]).context, expected)
    assert torch.equal(encoder.encode(["1", "cat", None]).context, expected)


def test_class_slots() -> None:
    assert class_encoder(slot="vector").encode(["fox"]).vector.shape == (1, 8)
    encoder = class_encoder(slot="label", width=None)
    assert encoder.encode(["cat"]).label.tolist() == [2] and encoder.null(2).label.tolist() == [3, 3]
    assert encoder.widths == {"label": 4} and encoder.slots == ("label",) and not list(encoder.parameters())


def test_class_errors() -> None:
    with pytest.raises(DarkroomError, match="unknown class 'foxx'; the nearest are 'fox'"):
        class_encoder().encode(["foxx"])
    with pytest.raises(DarkroomError, match="0 to 2"):
        class_encoder().encode([3])
    with pytest.raises(DarkroomError, match="no classes"):
        class_encoder(classes=[])
    with pytest.raises(DarkroomError, match="unique"):
        class_encoder(classes=["a", "a"])
    with pytest.raises(DarkroomError, match="slot"):
        class_encoder(slot="concat")
    with pytest.raises(DarkroomError, match="null class"):
        class_encoder(null_class=False)
    with pytest.raises(DarkroomError, match="scale of 1"):
        class_encoder(null_class=False, drop_rate=0.0).null(1)


# ---- text


def test_text_null_is_the_empty_prompt() -> None:
    encoder = text_encoder()
    null, empty = encoder.null(3), encoder.encode(["", "", ""])
    assert torch.equal(null.context, empty.context) and torch.equal(null.context_mask, empty.context_mask)
    assert empty.context_mask.sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(encoder.encode([None, "a fox"]).context[0], empty.context[0])


def test_text_mask_is_passed_to_the_tower() -> None:
    masked, plain = text_encoder().encode(["a fox"]), text_encoder(use_mask=False).encode(["a fox"])
    assert plain.context_mask is None
    assert bool((masked.context[0, 4:] == -1).all()) and not bool((plain.context == -1).any())
    assert torch.equal(masked.context[0, :4], plain.context[0, :4])


def test_pooled_text_is_the_first_token_as_a_vector() -> None:
    encoder = text_encoder(vector=True)
    conditioning = Conditioner({"text": encoder})({"text": ["a fox", "an owl"]})
    assert torch.equal(conditioning.vector, conditioning.context[:, 0]) and conditioning.vector.shape == (2, 8)
    assert Conditioner({"text": encoder}).vector_dim == 8 and encoder.null(2).vector.shape == (2, 8)
    assert text_encoder().encode(["a fox"]).vector is None and Conditioner({"text": text_encoder()}).vector_dim is None


# ---- dropping


def test_drop_rate_is_kept() -> None:
    """Over 4000 examples the share of nulls lies within 4 standard deviations of each rate, independently."""
    conditioner = Conditioner({"text": text_encoder(0.1), "class": class_encoder(drop_rate=0.3, slot="label")})
    size = 4000
    with torch.no_grad():
        result = conditioner(batch(size), generator())
    text_dropped = result.context_mask.sum(1) == 2
    class_dropped = result.label == 3
    for dropped, rate in ((text_dropped, 0.1), (class_dropped, 0.3), (text_dropped & class_dropped, 0.03)):
        assert abs(dropped.float().mean().item() - rate) < 4 * (rate * (1 - rate) / size) ** 0.5


def test_one_condition_alone() -> None:
    """With three of drop rate 1/2, each is alone in alone_rate / 3 + (1 - alone_rate) / 8 of the examples; one that is
    never dropped stays beside all, and is none of those that are drawn."""
    size, rate = 3000, 0.6
    rates = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.0}
    conditioner = Conditioner({name: FlatEncoder(name, 1, drop_rate) for name, drop_rate in rates.items()})
    values = {name: torch.ones(size) for name in rates}
    concat = conditioner(values, generator(), alone_rate=rate).concat
    assert concat is not None
    kept = concat[:, :, 0, 0] == 1  # null is 0
    assert bool(kept[:, 3].all())
    for i in range(3):
        expected = rate / 3 + (1 - rate) / 8
        alone = kept[:, i] & (kept[:, :3].sum(1) == 1)
        assert abs(float(alone.float().mean()) - expected) < 4 * (expected * (1 - expected) / size) ** 0.5
    in_use = conditioner(values, alone_rate=rate).concat
    assert in_use is not None and bool((in_use == 1).all())


def test_no_generator_no_dropping() -> None:
    conditioner = Conditioner({"class": class_encoder(drop_rate=1.0, slot="label")})
    assert conditioner(batch()).label.tolist() == [0, 1, 2, 0]
    assert conditioner(batch(), generator()).label.tolist() == [3, 3, 3, 3]


def test_dropping_is_reproducible_and_streams_are_independent() -> None:
    """Changing one encoder's rate leaves the other's draws alone, even from and to 0."""

    def labels(text_rate: float) -> list[int]:
        conditioner = Conditioner(
            {"text": text_encoder(text_rate), "class": class_encoder(drop_rate=0.5, slot="label")}
        )
        return conditioner(batch(64), generator(5)).label.tolist()

    assert labels(0.0) == labels(0.0) == labels(0.9)


@pytest.mark.parametrize("kind", ["text", "class", "concat"])
def test_dropped_examples_are_null_and_the_others_untouched(kind: str) -> None:
    concat = torch.randn(4, 2, 4, 4, generator=generator())
    encoder: ConditionEncoder = {
        "text": text_encoder,
        "class": class_encoder,
        "concat": lambda: ConcatEncoder("low_resolution", 2),
    }[kind]()
    values = {**batch(), "low_resolution": concat}[encoder.field]
    keep = torch.tensor([True, False, True, False])
    mixed, kept, null = encoder.encode_kept(values, keep), encoder.encode(values), encoder.null(4)
    expected = Conditioning.where(keep, kept, null)
    for slot in ("context", "context_mask", "concat"):
        a, b = getattr(mixed, slot), getattr(expected, slot)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ---- merging


def test_text_and_class_share_the_context() -> None:
    conditioner = Conditioner({"text": text_encoder(), "class": class_encoder()})
    assert conditioner.context_dim == 8 and conditioner.vector_dim is None and conditioner.label_count is None
    result = conditioner(batch())
    assert result.context.shape == (4, 7, 8) and result.context_mask.shape == (4, 7)
    assert result.context_mask[:, 6].all()  # the class token is never padding
    assert torch.equal(result.context[:, 6:], class_encoder().encode(batch()["class_label"]).context)
    null = conditioner.null(4)
    assert null.context.shape == result.context.shape and null.context_mask.shape == result.context_mask.shape


def test_vectors_and_maps_are_joined() -> None:
    encoders = {
        "class": class_encoder(slot="vector", width=8),
        "group": class_encoder(slot="vector", width=3, field="group"),
        "low": ConcatEncoder("low_resolution", 3),
        "edges": ConcatEncoder("edges", 1),
    }
    conditioner = Conditioner(encoders)
    assert conditioner.vector_dim == 11 and conditioner.concat_channels == 4 and conditioner.context_dim is None
    maps = {"low_resolution": torch.ones(4, 3, 4, 4), "edges": torch.zeros(4, 1, 4, 4), "group": ["fox"] * 4}
    result = conditioner({**batch(), **maps})
    assert result.vector.shape == (4, 11) and result.concat.shape == (4, 4, 4, 4)
    assert result.concat[:, :3].all() and not result.concat[:, 3:].any()


def test_a_map_of_one_pixel_is_spread() -> None:
    conditioner = Conditioner({"low": ConcatEncoder("low_resolution", 3), "edges": FlatEncoder("edges", 1)})
    low = torch.randn(2, 3, 4, 6)
    result = conditioner({"low_resolution": low, "edges": torch.tensor([2.0, 5.0])})
    assert torch.equal(result.concat[:, :3], low)
    assert torch.equal(result.concat[:, 3], torch.tensor([2.0, 5.0])[:, None, None].expand(2, 4, 6))
    alone = Conditioner({"edges": FlatEncoder("edges", 1)})({"edges": torch.tensor([2.0, 5.0])})
    assert alone.concat.shape == (2, 1, 1, 1) and torch.equal(alone.spread(4, 6).concat, result.concat[:, 3:])
    assert result.spread(4, 6) is result and Conditioning().spread(4, 6) == Conditioning()
    with pytest.raises(DarkroomError, match=r"differ in size \(6x4, 8x8\)"):
        Conditioner({"a": ConcatEncoder("a", 3), "b": ConcatEncoder("b", 3)})({"a": low, "b": torch.zeros(2, 3, 8, 8)})


def test_absent_encoders_are_null_and_the_others_untouched() -> None:
    conditioner = Conditioner({"text": text_encoder(), "class": class_encoder()})
    whole, null, result = conditioner(batch()), conditioner.null(4), conditioner(batch(), absent=["class"])
    assert torch.equal(result.context[:, :6], whole.context[:, :6])
    assert torch.equal(result.context[:, 6:], null.context[:, 6:])


def test_an_encoder_of_two_fields_gets_both_and_is_null_without_one() -> None:
    class Sum(ConcatEncoder):
        def encode(self, values: Any) -> Conditioning:
            return Conditioning(concat=values["image"] + values["repaint_mask"])

    encoder = Sum("image", 3)
    encoder.fields = ("image", "repaint_mask")
    conditioner = Conditioner({"sum": encoder})
    assert conditioner.fields == ("image", "repaint_mask") and encoder.field == "repaint_mask"
    two = {"image": torch.ones(2, 3, 4, 4), "repaint_mask": torch.ones(2, 1, 4, 4)}
    assert bool((conditioner(two).concat == 2).all())
    assert bool((conditioner(two | {"repaint_mask": None}).concat == 0).all())


def test_values_are_augmented_in_training_only() -> None:
    class Noisy(ConcatEncoder):
        def augment(self, values: Any, generator: torch.Generator) -> Any:
            return values + torch.rand(1, generator=generator)

    conditioner = Conditioner({"low": Noisy("low_resolution", 3)})
    values = {"low_resolution": torch.zeros(2, 3, 4, 4)}
    assert not conditioner(values).concat.any()
    first, again = (conditioner(values, generator(9)).concat for _ in range(2))
    assert bool((first > 0).all()) and torch.equal(first, again)


def test_empty_conditioner() -> None:
    conditioner = Conditioner()
    assert conditioner({"image": torch.zeros(2, 3, 4, 4)}, generator()) == Conditioning() == conditioner.null(3)
    assert conditioner.context_dim is None and conditioner.fields == ()


def test_a_field_that_is_none_is_null() -> None:
    """Generation from a prompt alone, with a model that also knows classes."""
    conditioner = Conditioner({"text": text_encoder(), "class": class_encoder()})
    result, null = conditioner({"text": ["a fox"] * 2, "class_label": None}), conditioner.null(2)
    assert torch.equal(result.context[:, 6], null.context[:, 6])
    assert not torch.equal(result.context[:, :6], null.context[:, :6])
    with pytest.raises(DarkroomError, match=r"null\(batch_size\)"):
        conditioner({"text": None, "class_label": None})


def test_gradient_reaches_the_encoders() -> None:
    conditioner = Conditioner({"text": text_encoder(), "class": class_encoder()})
    conditioner(batch(), generator()).context.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in conditioner.parameters())


def test_every_parameter_is_used_at_every_step() -> None:
    """Also a learned null when, by chance, nothing is dropped: processes that train together wait for its gradient."""

    class Learned(ConcatEncoder):
        def __init__(self) -> None:
            super().__init__("low_resolution", 2, drop_rate=0.01)
            self.nothing = nn.Parameter(torch.ones(1, 2, 1, 1))

        def null(self, batch_size: int) -> Conditioning:
            return Conditioning(concat=self.nothing.expand(batch_size, -1, -1, -1))

    encoder = Learned()
    result = Conditioner({"low": encoder})({"low_resolution": torch.zeros(3, 2, 4, 4)}, generator())
    assert not result.concat.any()
    result.concat.sum().backward()
    assert encoder.nothing.grad is not None


def test_conditioner_errors() -> None:
    with pytest.raises(DarkroomError, match="text has 8, class has 4"):
        Conditioner({"text": text_encoder(), "class": class_encoder(width=4)})
    with pytest.raises(DarkroomError, match="'label'"):
        Conditioner({"a": class_encoder(slot="label"), "b": class_encoder(slot="label")})
    with pytest.raises(DarkroomError, match="'class_label', but the data has image, text"):
        Conditioner({"class": class_encoder()})({"text": ["a"], "image": None})
    with pytest.raises(DarkroomError, match="differ in length"):
        Conditioner({"text": text_encoder(), "class": class_encoder()})({"text": ["a"], "class_label": ["fox"] * 2})
    with pytest.raises(DarkroomError, match="drop_rate"):
        text_encoder(1.5)


# ---- token ids in the place of text


def test_text_encoder_takes_token_ids() -> None:
    encoder = text_encoder()
    ids, mask = encoder.tokens(["a red fox", ""])
    expected = encoder.encode(["a red fox", ""])
    for given in (ids, [ids[0].tolist(), None], [ids[0][mask[0]], ids[1][:2]]):
        result = encoder.encode(given)
        assert torch.equal(result.context, expected.context) and torch.equal(result.context_mask, expected.context_mask)
    with pytest.raises(DarkroomError, match="7 token ids for a text of at most 6"):
        encoder.encode([[1] * 7])
    with pytest.raises(DarkroomError, match="a string or a list of token ids"):
        encoder.encode([b"fox"])


def test_bert_vocabulary_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """text2img-large's tower: ids and the empty text work, text names the file; then the file is there."""
    monkeypatch.delenv("DARKROOM_VOCABULARIES", raising=False)
    small = {"width": 16, "depth": 1, "heads": 1, "head_width": 16, "length": 8, "use_mask": False}
    config = TextEncoderConfig(vocabulary="bert", vocabulary_size=30522, logits_head=True, **small)
    conditioner = build_conditioner(conditioner_config({"text": config}, Facts()))
    encoder = conditioner.encoders["text"]
    assert isinstance(encoder, TextEncoder)
    assert encoder.tokens([None])[0].tolist() == [[101, 102, 0, 0, 0, 0, 0, 0]]
    assert encoder.encode([[101, 2417, 102]]).context.shape == (1, 8, 16)
    with pytest.raises(DarkroomError, match="token id 30522 is not in the vocabulary"):
        encoder.encode([[30522]])
    for act in (lambda: encoder.encode(["red"]), encoder.ready):
        with pytest.raises(DarkroomError, match=r"BERT's vocabulary.*vocab\.txt.*token ids"):
            act()
    assert {n for n, p in encoder.named_parameters() if not p.requires_grad} == {
        "tower.transformer.to_logits.weight", "tower.transformer.to_logits.bias",
    }  # fmt: skip
    encoder.requires_grad_(False)
    encoder.unfreeze()
    assert (
        not encoder.tower.transformer.to_logits.weight.requires_grad
        and encoder.tower.transformer.norm.weight.requires_grad
    )

    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 2417: "red"}
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words.get(i, f"[unused{i}]") for i in range(30522)), encoding="utf-8")
    monkeypatch.setenv("DARKROOM_VOCABULARIES", str(tmp_path))
    assert encoder.tokens(["RED"])[0].tolist() == [[101, 2417, 102, 0, 0, 0, 0, 0]]
    for stated in ("bert", str(folder), str(folder / "vocab.txt")):
        completed = replace(config, vocabulary=stated).completed("text", Facts())
        built = build_conditioner({"encoders": {"text": to_dict(completed)}}).encoders["text"]
        assert completed.tokenizer and built.tokens(["RED"])[0].tolist() == encoder.tokens(["RED"])[0].tolist()


def test_parameters_of_text2img_large() -> None:
    config = TextEncoderConfig(
        width=1280,
        depth=32,
        heads=8,
        head_width=64,
        length=77,
        vocabulary="bert",
        vocabulary_size=30522,
        logits_head=True,
    )
    with torch.device("meta"):
        encoder = build_conditioner({"encoders": {"text": to_dict(config)}}).encoders["text"]
    layout = weights().load_layout(PARITY / "layouts" / "text2img-large.json.gz")["layout"]
    official = {k.removeprefix("cond_stage_model."): v for k, v in layout.items() if k.startswith("cond_stage_model.")}
    assert {k.removeprefix("tower."): list(v.shape) for k, v in encoder.state_dict().items()} == official
