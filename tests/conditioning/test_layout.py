"""Boxes as tokens: the ids of the paper's models, by the rules written out; what is dropped, hidden and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_facts import Facts
from parity_data import PARITY, weights

from darkroom.build import build_conditioner, conditioner_config
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.layout import BoxTokens, LayoutEncoder, LayoutEncoderConfig
from darkroom.errors import DarkroomError, DarkroomWarning
from darkroom.networks.text import TextTransformer, TextTransformerConfig

CLASSES = ["fox", "box", "cat"]
BOXES = [torch.tensor([[2, 0.0, 0.25, 0.5, 1.0], [0, 0.1, 0.1, 0.9, 0.9]]), torch.zeros(0, 5)]


def config(**options: Any) -> LayoutEncoderConfig:
    defaults = {"classes": CLASSES, "max_objects": 2, "sections": 5, "width": 16, "depth": 1, "heads": 2}
    return LayoutEncoderConfig(**{**defaults, "head_width": 8, **options})


def encoder(**options: Any) -> LayoutEncoder:
    torch.manual_seed(0)
    built = build_conditioner({"encoders": {"boxes": vars(config(**options))}}).encoders["boxes"]
    assert isinstance(built, LayoutEncoder)
    return built


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ids_of_their_own() -> None:
    """Classes first, then the 5x5 places row by row, then "none"."""
    tokens = BoxTokens(config())
    assert tokens.vocabulary_size == 3 + 25 + 1 and tokens.none == 28 and tokens.length == 6
    # (0, .25) is column 0 of row 1; (.5, 1) column 2 of row 4; 0.1 * 4 rounds to 0 and 0.9 * 4 to 4.
    assert tokens.encode(BOXES[0]).tolist() == [2, 3 + 5, 3 + 4 * 5 + 2, 0, 3 + 0, 3 + 4 * 5 + 4]
    assert tokens.encode(BOXES[1]).tolist() == [28] * 6


def test_the_ids_of_the_paper() -> None:
    """layout2img: 8192 ids, 30 objects, the crop: 92 tokens; y * 90 + x of the rounded corner; 8191 for no object."""
    tokens = BoxTokens(config(tokens=8192, max_objects=30, crop=True, use_mask=False))
    assert (tokens.sections, tokens.length, tokens.none) == (90, 92, 8191)
    ids = tokens.encode(torch.tensor([[2.0, 0.2, 0.4, 0.7, 0.95]])).tolist()
    corners = [round(0.4 * 89) * 90 + round(0.2 * 89), round(0.95 * 89) * 90 + round(0.7 * 89)]
    assert ids[:3] == [2, *corners] and ids[3:90] == [8191] * 87 and ids[90:] == [0, 89 * 90 + 89]


def test_places_are_rounded_as_python_rounds() -> None:
    """Half-way values go to the even neighbour, in double precision, as in the official data code."""
    tokens = BoxTokens(config(tokens=8192))
    numbers = torch.rand(200, generator=generator()).tolist() + [k / 178 for k in range(179)]
    for number in numbers:
        x = torch.tensor([number], dtype=torch.float64)
        assert tokens.places(x, torch.zeros(1)).item() == round(number * 89)


@pytest.mark.parametrize("shared", [None, 50])
def test_decode_gives_the_places_back(shared: int | None) -> None:
    tokens = BoxTokens(config(tokens=shared, sections=7))
    last = tokens.sections - 1
    boxes = torch.tensor([[1, 0 / last, 1 / last, 3 / last, 1.0], [2, 2 / last, 0.0, 1.0, 5 / last]])
    torch.testing.assert_close(tokens.decode(tokens.encode(boxes)), boxes)
    assert tokens.decode(tokens.encode(BOXES[1])).shape == (0, 5)


def test_attributes_raise_the_number_of_classes() -> None:
    tokens = BoxTokens(config(attributes=1))
    assert tokens.classes == 6 and tokens.encode(torch.tensor([[5, 0.0, 0.0, 1.0, 1.0]]))[0] == 5


def test_names_and_sizes_of_the_official_tower() -> None:
    """The layout model's BERTEmbedder: n_embed 512, 16 layers, 8192 tokens, length 92; the names are text2img's."""
    names = weights().load_layout(PARITY / "layouts" / "text2img-large.json.gz")["layout"]
    official = {k.removeprefix("cond_stage_model.") for k in names if k.startswith("cond_stage_model.")}
    options = {"tokens": 8192, "max_objects": 30, "crop": True, "width": 512, "depth": 16, "heads": 8, "head_width": 64}
    with torch.device("meta"):
        tower = encoder(**options).tower
        same = TextTransformer(TextTransformerConfig(8192, 512, 16, length=92))
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in same.state_dict().items()} and set(shapes) < official
    assert shapes["transformer.pos_emb.emb.weight"] == (92, 512)


def test_context_is_what_the_tower_says_of_the_tokens() -> None:
    built = encoder()
    ids = torch.stack([built.tokens.encode(b) for b in BOXES])
    seen = ids != built.tokens.none
    assert seen[1].sum() == 0
    seen[1, 0] = True  # never nothing to look at
    result = built.encode(BOXES)
    assert torch.equal(result.context, built.tower(ids, seen)) and torch.equal(result.context_mask, seen)
    assert torch.isfinite(result.context).all()
    plain = encoder(use_mask=False)
    assert plain.encode(BOXES).context_mask is None
    assert torch.equal(plain.encode(BOXES).context, plain.tower(ids, None))


def test_null_is_no_object_and_dropping_gives_it() -> None:
    built = encoder()
    null = built.null(3)
    assert null.context.shape == (3, 6, 16)
    torch.testing.assert_close(null.context[0], built.encode(BOXES).context[1])
    mixed = built.encode_kept([BOXES[0]] * 2, torch.tensor([False, True]))
    torch.testing.assert_close(mixed.context, torch.stack([null.context[0], built.encode(BOXES).context[0]]))
    assert mixed.context_mask.sum(1).tolist() == [1, 6]


def test_more_objects_than_there_is_room_for() -> None:
    tokens = BoxTokens(config())
    three = torch.cat([BOXES[0], torch.tensor([[1, 0.0, 0.0, 1.0, 1.0]])])
    assert torch.equal(tokens.encode(three), tokens.encode(BOXES[0]))


def test_more_boxes_than_there_is_room_for_are_told() -> None:
    rows = [("cat", 0, 0, 0.5, i / 8) for i in (1, 2, 3, 4)]
    with pytest.warns(DarkroomWarning, match="4 boxes for one image, but this model takes 3"):
        read = encoder(max_objects=3).from_request("boxes", rows, (8, 8))
    assert read[:, 4].tolist() == [1 / 8, 2 / 8, 3 / 8]


def test_objects_come_in_any_order_in_training_only() -> None:
    conditioner = Conditioner({"boxes": encoder(drop_rate=0.0)})
    batch = {"boxes": [BOXES[0]] * 16}
    one, other = (conditioner(b).context[0] for b in (batch, {"boxes": [BOXES[0].flip(0)]}))
    seen = conditioner(batch, generator()).context
    swapped = [bool(torch.allclose(row, other, atol=1e-5)) for row in seen]
    assert all(torch.allclose(row, other if s else one, atol=1e-5) for row, s in zip(seen, swapped, strict=True))
    assert 0 < sum(swapped) < 16
    torch.testing.assert_close(conditioner(batch).context[0], one)
    still = Conditioner({"boxes": encoder(drop_rate=0.0, shuffle=False)})
    torch.testing.assert_close(still(batch, generator()).context, one.expand(16, -1, -1))


def test_neighbouring_places_begin_alike() -> None:
    built = encoder(sections=33, width=64, heads=2)
    rows = built.tower.transformer.token_emb.weight.detach()[3 : 3 + 33**2].view(33, 33, -1)
    near = torch.cosine_similarity(rows[10, 10], rows[10, 11], 0)
    far = torch.cosine_similarity(rows[10, 10], rows[30, 2], 0)
    assert near > 0.8 and far < 0.5 and abs(float(rows.std()) - 1) < 0.01
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    TextTransformer(TextTransformerConfig(3 + 33**2 + 1, 64, 1, 2, 8, 6))
    after = torch.random.get_rng_state()
    encoder(sections=33, width=64, heads=2)
    assert torch.equal(torch.random.get_rng_state(), after)  # the places draw nothing from the global stream
    torch.random.set_rng_state(state)


def test_boxes_as_someone_writes_them() -> None:
    built = encoder()
    expected = BOXES[0]
    written = [{"class": "cat", "bbox": [0, 0.25, 0.5, 1]}, {"cls": 0, "bbox": [0.1, 0.1, 0.9, 0.9]}]
    rows = [("cat", 0, 0.25, 0.5, 1), ("0", 0.1, 0.1, 0.9, 0.9)]
    for value in (written, rows, expected, expected.numpy()):
        assert torch.equal(built.from_request("boxes", value, (8, 8)), expected)
    assert built.from_request("boxes", [], (8, 8)).shape == (0, 5)
    assert built.several([written, rows]) and built.several([expected]) and built.several([[], written])
    assert not any(built.several(one) for one in (written, rows, expected, [], 3, [3], [expected.numpy()[0]]))
    assert torch.equal(built.from_request("boxes", written[0], (8, 8)), expected[:1])  # one, without a list
    recorded = built.record("boxes", expected)
    assert recorded[0] == {"class": "cat", "bbox": [0.0, 0.25, 0.5, 1.0]}
    torch.testing.assert_close(built.from_request("boxes", recorded, (8, 8)), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fox", "give a list"),
        (3, "give a list"),
        ([3], "3 is not a box"),
        ({"boxes": []}, "is not a box"),
        ([("dog", 0, 0, 1, 1)], r"'dog' is not known \(known: fox, box, cat\)"),
        ([("Cat", 0, 0, 1, 1)], r"'Cat' is not known \(did you mean \"cat\"\?\)"),
        ([(3, 0, 0, 1, 1)], "3 is not known"),
        ([("fox", 0, 0, 1)], "is not a box"),
        ([{"class": "fox"}], "is not a box"),
        ([("fox", 0.5, 0, 0.5, 1)], "with x0 < x1 and y0 < y1"),
        ([("fox", 10, 10, 30, 30)], "divided by width and height"),
    ],
)
def test_what_is_no_box_is_refused(value: Any, message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        encoder().from_request("boxes", value, (8, 8))


def test_config_errors() -> None:
    with pytest.raises(DarkroomError, match="no classes"):
        encoder(classes=[])
    with pytest.raises(DarkroomError, match="4 classes do not fit in 4 tokens"):
        BoxTokens(config(tokens=4, classes=[*CLASSES, "dog"]))
    with pytest.raises(DarkroomError, match="max_objects is 0"):
        BoxTokens(config(max_objects=0))
    with pytest.raises(DarkroomError, match=r'"conditioner\.places" needs boxes'):
        conditioner_config({"places": LayoutEncoderConfig()}, Facts(CLASSES))
    complete = conditioner_config({"places": LayoutEncoderConfig()}, Facts(box_names=CLASSES))
    assert complete["encoders"]["places"]["classes"] == CLASSES
