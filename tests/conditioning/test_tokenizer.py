"""WordPiece: deterministic training, exact encoding, round trip through JSON."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.errors import DarkroomError

CAPTIONS = [
    "A red fox",
    "a red fox, sleeping",
    "a blue Café",
    "two blue foxes above a red box",
    "日本の flag",
    "flag: 日本",
    "naïve façade",
    "a naïve fox",
] * 2


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.train(CAPTIONS, 120)


def test_frequent_words_are_whole(tokenizer: WordPieceTokenizer) -> None:
    assert tokenizer.pieces("A RED fox, sleeping!") == ["a", "red", "fox", ",", "sleeping", "[UNK]"]
    assert tokenizer.pieces("redfox") == ["red", "##f", "##ox"]


def test_ids_of_special_tokens(tokenizer: WordPieceTokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)
    assert tokenizer.vocabulary[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert len(set(tokenizer.vocabulary)) == tokenizer.vocabulary_size <= 120


def test_order_of_captions_does_not_matter(tokenizer: WordPieceTokenizer) -> None:
    shuffled = CAPTIONS.copy()
    random.Random(1).shuffle(shuffled)
    assert WordPieceTokenizer.train(shuffled, 120).to_json() == tokenizer.to_json()


def test_another_process_learns_the_same(tokenizer: WordPieceTokenizer) -> None:
    """Hash seeds differ between processes; the vocabulary may not."""
    code = (
        "from darkroom.conditioning.tokenizer import WordPieceTokenizer as W; import sys;"
        f"sys.stdout.buffer.write(W.train({CAPTIONS!r}, 120).to_json().encode())"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.decode()
    assert output == tokenizer.to_json()


def test_merges_follow_counts() -> None:
    """By hand: 'ab' 5x and 'abc' 3x: a + ##b (8) first, then ab + ##c (3)."""
    learned = WordPieceTokenizer.train(["ab"] * 5 + ["abc"] * 3, 100).vocabulary[4:]
    assert learned == ["##b", "a", "##c", "ab", "abc"]


def test_size_is_a_limit() -> None:
    for size in (8, 20, 60):
        assert WordPieceTokenizer.train(CAPTIONS, size).vocabulary_size <= size
    with pytest.raises(DarkroomError, match="too small"):
        WordPieceTokenizer.train(CAPTIONS, 4)


def test_padding_truncation_and_empty(tokenizer: WordPieceTokenizer) -> None:
    ids, mask = tokenizer.encode(["a red fox", "", "fox " * 50], 8)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (3, 8)
    a, red, fox = (tokenizer.vocabulary.index(w) for w in ("a", "red", "fox"))
    assert ids[0].tolist() == [2, a, red, fox, 3, 0, 0, 0]
    assert ids[1].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert ids[2].tolist() == [2, *[fox] * 6, 3]
    assert mask.sum(1).tolist() == [5, 2, 8]


def test_non_ascii(tokenizer: WordPieceTokenizer) -> None:
    assert tokenizer.pieces("NAÏVE café") == ["naive", "cafe"]  # accents are folded
    assert tokenizer.pieces("日本") == ["日", "本"]  # each such character is a word
    assert tokenizer.pieces("fox 🦊 fox") == ["fox", "[UNK]", "fox"]
    ids, _ = tokenizer.encode(["\x00\ufffd \u200d🦊"], 6)
    assert ids.shape == (1, 6)


def test_unknown_words_are_named_as_typed(tokenizer: WordPieceTokenizer) -> None:
    assert tokenizer.unknown_words("a Red Quokka 🦊") == ["Quokka", "🦊"]
    assert tokenizer.unknown_words("a red fox") == []


def test_special_tokens_in_a_caption_are_text(tokenizer: WordPieceTokenizer) -> None:
    ids, mask = tokenizer.encode(["fox [SEP] [PAD] fox"], 20)
    assert (ids == tokenizer.sep_id).sum() == 1 and int(mask.sum()) > 4
    assert not (ids[mask] == tokenizer.pad_id).any()


def test_json_round_trip(tokenizer: WordPieceTokenizer) -> None:
    text = tokenizer.to_json()
    again = WordPieceTokenizer.from_json(text)
    assert again.to_json() == text and again.vocabulary == tokenizer.vocabulary
    for a, b in zip(tokenizer.encode(CAPTIONS, 12), again.encode(CAPTIONS, 12), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 3}'])
def test_broken_json(text: str) -> None:
    with pytest.raises(DarkroomError, match="cannot be read"):
        WordPieceTokenizer.from_json(text)


def test_published_vocabulary() -> None:
    """Ids are line numbers of vocab.txt, wherever the special tokens stand."""
    tokenizer = WordPieceTokenizer.from_vocabulary(["[PAD]", "x", "[UNK]", "[CLS]", "[SEP]", "fox"])
    assert tokenizer.encode(["fox ?"], 6)[0].tolist() == [[3, 5, 2, 4, 0, 0]]
    with pytest.raises(DarkroomError, match=r"no \[CLS\]"):
        WordPieceTokenizer.from_vocabulary(["[PAD]", "[UNK]", "[SEP]"])


def test_no_captions() -> None:
    assert WordPieceTokenizer.train([], 100).encode(["a"], 4)[0].tolist() == [[2, 1, 3, 0]]
