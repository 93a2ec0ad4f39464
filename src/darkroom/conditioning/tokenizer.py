"""WordPiece: text to token ids, with a vocabulary learned from the captions of a data set.

Source: Devlin et al. 2019 (BERT), whose normaliser and special tokens this uses; the pieces are learned by merging the
most frequent pair first (Sennrich et al. 2016). Text is lower-cased, accents are removed, punctuation stands alone.

Training is our own because that of the `tokenizers` library visits words in the order of a randomly seeded hash map:
the same captions then give other ids in every run. Encoding is the library's greedy longest match.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from darkroom.errors import DarkroomError

PAD, UNK, CLS, SEP = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CONTINUES = "##"


class WordPieceTokenizer:
    """`encode` gives [CLS] pieces [SEP] and padding. An empty text is [CLS] [SEP]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self._special(token) for token in SPECIAL_TOKENS)

    def _special(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise DarkroomError(f"tokenizer: the vocabulary has no {token}; give one with {', '.join(SPECIAL_TOKENS)}")
        return int(index)

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary_size: int) -> WordPieceTokenizer:
        """Learn at most `vocabulary_size` tokens. The same captions, in any order, give the same tokenizer."""
        normalizer, splitter = BertNormalizer(), BertPreTokenizer()
        words = Counter(
            word
            for caption, count in Counter(captions).items()
            for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
            for _ in range(count)
        )
        if vocabulary_size <= len(SPECIAL_TOKENS):
            raise DarkroomError(f"tokenizer: vocabulary_size {vocabulary_size} is too small; give at least 100")
        return cls.from_vocabulary([*SPECIAL_TOKENS, *_learn_pieces(words, vocabulary_size - len(SPECIAL_TOKENS))])

    @classmethod
    def from_vocabulary(cls, tokens: Sequence[str]) -> WordPieceTokenizer:
        """Tokens in the order of their ids, like the lines of BERT's vocab.txt."""
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
        tokenizer.normalizer = BertNormalizer()
        tokenizer.pre_tokenizer = BertPreTokenizer()
        if CLS in vocabulary and SEP in vocabulary:
            # Only for other programs that read the saved file; `encode` adds these tokens itself.
            tokenizer.post_processor = TemplateProcessing(
                single=f"{CLS} $A {SEP}", special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])]
            )
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> WordPieceTokenizer:
        try:
            return cls(Tokenizer.from_str(text))
        except DarkroomError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DarkroomError(f"tokenizer: cannot be read ({error}); give the JSON that to_json wrote") from None

    def to_json(self) -> str:
        """The `tokenizer.json` format of the tokenizers library."""
        return self._tokenizer.to_str()

    @property
    def vocabulary_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def vocabulary(self) -> list[str]:
        """All tokens in the order of their ids."""
        ids = self._tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens: "a redfox" -> ["a", "red", "##fox"]."""
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that become [UNK], in the user's spelling."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for index, (start, end) in pairs if index == self.unk_id]

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, length) int64 and mask (B, length) bool, True at everything but padding.

        Long texts lose their end; [SEP] stays.
        """
        if length < 2:
            raise DarkroomError(f"tokenizer: length {length} has no room for {CLS} and {SEP}; give at least 2")
        ids = torch.full((len(texts), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(texts), length), dtype=torch.bool)
        for row, text in enumerate(texts):
            # One by one: a batch call would start the library's threads, which do not survive a fork.
            body = self._tokenizer.encode(text, add_special_tokens=False).ids[: length - 2]
            tokens = [self.cls_id, *body, self.sep_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


def _learn_pieces(words: Counter[str], size: int) -> list[str]:
    """At most `size` pieces: single characters, most frequent first, then merged pairs, most frequent first.

    Equal counts are ordered by the text of the pieces, so that the result depends on nothing but the counts.
    """
    ordered = sorted(words.items())
    spelled = [[word[0], *(_CONTINUES + c for c in word[1:])] for word, _ in ordered]
    counts = [count for _, count in ordered]
    characters: Counter[str] = Counter()
    for symbols, count in zip(spelled, counts, strict=True):
        for symbol in symbols:
            characters[symbol] += count
    pieces = sorted(characters, key=lambda symbol: (-characters[symbol], symbol))[:size]
    known = set(pieces)
    # A word with a character outside the vocabulary is [UNK] as a whole, so nothing is learned from it.
    alive = [i for i, symbols in enumerate(spelled) if known.issuperset(symbols)]

    pair_counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for i in alive:
        for pair in pairwise(spelled[i]):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    # Counts in the heap may be out of date: an entry is checked when it comes up and put back if it was too high.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    while heap and len(pieces) < size:
        negative, pair = heappop(heap)
        count = pair_counts[pair]
        if count < 2:
            continue  # a pair seen once says nothing about language
        if -negative != count:
            if count < -negative:
                heappush(heap, (-count, pair))
            continue
        merged = pair[0] + pair[1].removeprefix(_CONTINUES)
        if merged not in known:
            known.add(merged)
            pieces.append(merged)
        changed: set[tuple[str, str]] = set()
        for i in sorted(where[pair]):
            old = spelled[i]
            new = _merge(old, pair, merged)
            for p in pairwise(old):
                pair_counts[p] -= counts[i]
            for p in pairwise(new):
                pair_counts[p] += counts[i]
                where[p].add(i)
                changed.add(p)
            spelled[i] = new
        for p in sorted(changed):
            heappush(heap, (-pair_counts[p], p))
    return pieces


def _merge(symbols: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    """Replace each occurrence of `pair`, from the left."""
    result: list[str] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            result.append(merged)
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result
