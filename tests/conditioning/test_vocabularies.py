"""Published vocabularies: CLIP's and T5's against the transformers library, BERT's by hand; finding and refusing."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from darkroom.conditioning.vocabularies import (
    VOCABULARIES,
    byte_characters,
    clip_from_merges,
    find_vocabulary,
    read_vocabulary,
)
from darkroom.errors import DarkroomError

# In the order in which they are applied, as BPE learns them: common pairs first.
MERGES = [
    ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("o", "x</w>"), ("f", "ox</w>"), ("i", "n"),
    ("in", "g</w>"), ("c", "a"), ("ca", "f"), ("Ã", "©</w>"), ("caf", "Ã©</w>"), ("'", "s</w>"), ("1", "2"),
    ("!", "!</w>"), ("d", "o"), ("do", "n</w>"), ("'", "t</w>"), ("ð", "Ł"), ("ðŁ", "¦"), ("ðŁ¦", "Ĭ</w>"),
]  # fmt: skip
TEXTS = [
    "the red fox",
    "The   RED\tfox,\nsleeping!! ",
    "don't the fox's café 12 123",
    "cafe\u0301 Café",
    "🦊 日本 a",
    "<|startoftext|> the <|endoftext|> fox",
    "under_score #tag @x 3.5%",
    "I'LL WE'VE",
    "",
    "   ",
]


def clip_vocabulary() -> dict[str, int]:
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in MERGES)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_clip(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(pair) for pair in MERGES]
    if kind == "pair":
        (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    elif kind == "bpe":
        data = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines, ""]).encode()
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(data))
    elif kind == "plain":
        data = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines]).encode()
        (folder / "bpe_simple_vocab_16e6.txt").write_bytes(data)
    else:
        clip_from_merges(MERGES).save(str(folder / "tokenizer.json"))
    return folder


def body(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---- CLIP


@pytest.mark.parametrize("kind", ["pair", "bpe", "plain", "json"])
def test_clip_equals_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer(vocab=clip_vocabulary(), merges=MERGES)
    ours = read_vocabulary(write_clip(tmp_path, kind), "clip")
    assert ours.get_vocab_size() == 512 + len(MERGES) + 2
    generator = random.Random(0)
    alphabet = "therdfoxing 'st!!12é🦊日 <|>\n_.CAFÉ"
    texts = TEXTS + ["".join(generator.choices(alphabet, k=30)) for _ in range(200)]
    for text in texts:
        assert body(ours, text) == theirs(text, add_special_tokens=False).input_ids, repr(text)


def test_clip_by_hand(tmp_path: Path) -> None:
    """Ids are positions: 256 characters, 256 that end a word, merges."""
    ours = read_vocabulary(write_clip(tmp_path, "bpe"), "clip")
    assert body(ours, "The red f") == [512 + 1, 512 + 3, 256 + ord("f") - ord("!")]
    assert body(ours, "foxes") == [ord(c) - ord("!") for c in "foxe"] + [256 + ord("s") - ord("!")]
    assert body(ours, "<|endoftext|>") == [512 + len(MERGES) + 1]


def test_byte_characters_are_all_bytes_once() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256 and characters[0] == "!" and not any(c.isspace() for c in characters)
    # The tokenizers library has the same table in its byte-level pre-tokenizer.
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(characters) == set(ByteLevel.alphabet())


def test_only_the_published_number_of_merges_counts(tmp_path: Path) -> None:
    """The published file goes on behind the merges that CLIP uses."""
    lines = ["header", *(f"{chr(0x100 + i // 300)} {chr(0x1000 + i % 300)}" for i in range(60_000))]
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DarkroomError, match="do not fit each other"):
        read_vocabulary(tmp_path, "clip")  # pieces that no byte gives
    characters = byte_characters()
    pairs = [(a, b) for a in characters for b in characters][:60_000]
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text("\n".join(["header", *map(" ".join, pairs)]), encoding="utf-8")
    assert read_vocabulary(tmp_path, "clip").get_vocab_size() == 49408


# ---- T5


def write_t5(path: Path) -> list[tuple[str, float]]:
    """A model file by protobuf's own classes; gives its pieces."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    words = [
        "▁the",
        "▁red",
        "▁fox",
        "es",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁a",
        "▁r",
        "ed",
        "ox",
        ",",
        "é",
        "▁日本",
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0 - 0.37 * i**0.5 - (3 if len(word) == 1 else 0)) for i, word in enumerate(words)]
    model = proto.ModelProto()
    for i, (piece, score) in enumerate(pieces):
        model.pieces.add(piece=piece, score=score, type=(3, 3, 2)[i] if i < 3 else 1)
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id = 2
    model.normalizer_spec.name = "identity"
    path.write_bytes(model.SerializeToString())
    return pieces


def test_t5_pieces_equal_transformers(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    pieces = write_t5(tmp_path / "spiece.model")
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    theirs = T5Tokenizer(vocab=pieces + extra)
    ours = read_vocabulary(tmp_path / "spiece.model", "t5")
    assert ours.get_vocab_size() == len(pieces) + 100
    for text in ("the red foxes, a é", " the   red ", "日本 the", "theredfox ☃ x", "a</s> b", ""):
        assert body(ours, text) == theirs(text, add_special_tokens=False).input_ids, text
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert body(read_vocabulary(tmp_path, "t5"), "the red foxes") == body(ours, "the red foxes")


def test_t5_damage(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    write_t5(path)
    whole = path.read_bytes()
    for damaged in (whole[:50], b"\xff" * 20, b"", b"\x0b\x01"):
        path.write_bytes(damaged)
        with pytest.raises(DarkroomError, match="cannot be read as T5's vocabulary") as error:
            read_vocabulary(path, "t5")
        assert "\n" not in str(error.value)


# ---- BERT


def test_bert_is_lines_of_vocab_txt(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "red", "fox", "##es", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    assert body(read_vocabulary(tmp_path, "bert"), "A red FOXES ?") == [8, 5, 6, 7, 2]


# ---- finding


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=r"holds no CLIP's vocabulary: vocab\.json and merges\.txt, or tokenizer"):
        read_vocabulary(tmp_path, "clip")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DarkroomError, match="holds no CLIP"):
        read_vocabulary(tmp_path, "clip")  # the pair is not whole
    with pytest.raises(DarkroomError, match=r"is not there.*spiece\.model"):
        read_vocabulary(tmp_path / "nowhere", "t5")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DarkroomError, match="is not BERT's vocabulary"):
        read_vocabulary(tmp_path / "notes.txt", "bert")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"vocab.json": "[1]", "merges.txt": "a b"}, "not a vocabulary"),
        ({"vocab.json": '{"a": 1, "<|startoftext|>": 2}', "merges.txt": "a b"}, "endoftext"),
        ({"vocab.json": json.dumps(clip_vocabulary()), "merges.txt": "a b c"}, "not a list of merges"),
        ({"vocab.json": json.dumps(clip_vocabulary()), "merges.txt": "q z"}, "do not fit each other"),
        ({"vocab.json": "{", "merges.txt": "a b"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
    ],
)
def test_broken_clip_files(files: dict[str, str], match: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DarkroomError, match=match):
        read_vocabulary(tmp_path, "clip")


def test_finding(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(VOCABULARIES, raising=False)
    assert find_vocabulary("clip") is None and find_vocabulary("clip", [tmp_path, None]) is None
    write_clip(tmp_path / "root" / "clip", "bpe")
    monkeypatch.setenv(VOCABULARIES, str(tmp_path / "root"))
    assert find_vocabulary("clip") == tmp_path / "root" / "clip" and find_vocabulary("t5") is None
    write_clip(tmp_path / "near", "pair")
    assert find_vocabulary("clip", [tmp_path / "near"]) == tmp_path / "near"
    assert read_vocabulary(tmp_path / "near" / "merges.txt", "clip").get_vocab_size() == 512 + len(MERGES) + 2
