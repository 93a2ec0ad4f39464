"""Text: a tokenizer and a text tower, trained jointly with the network (Rombach et al. 2022, sec. 4.3.1).

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts
from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.conditioning.tokens import SpecialIds, is_ids, pad_rows, real_tokens, text_body
from darkroom.conditioning.types import Conditioning
from darkroom.conditioning.vocabularies import find_vocabulary, missing_vocabulary, read_vocabulary
from darkroom.errors import DarkroomError

BERT = SpecialIds(101, 102, 0)  # of bert-base-uncased


class Tokenizer(Protocol):
    """What `TextEncoder` needs of a tokenizer."""

    @property
    def cls_id(self) -> int: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, length) int64, mask (B, length) bool."""
        ...


@dataclass
class TextEncoderConfig(EncoderConfig):
    """width, depth, heads, head_width: the tower, see `TextTransformerConfig`
    length:          tokens per text, with [CLS] and [SEP]
    vocabulary_size: the most tokens that the tokenizer may learn; the tower has as many as it did learn
    use_mask:        hide padding from the tower and from the network. Off in the paper: padding is read like words
    vector:          also give the result at [CLS] as `vector`, which modulates every residual block (as in SDXL and
                     SD 3; not in the paper): what holds for the whole picture is then learned sooner
    vocabulary:      "learned" from the captions; "bert": the published one of BERT, which text2img-large uses, from the
                     folder that DARKROOM_VOCABULARIES names; or the path of its folder or file
    logits_head:     also hold the unused output layer that the paper's checkpoints contain
    tokenizer:       a trained tokenizer as `WordPieceTokenizer.to_json` gives it; null: see `vocabulary`
    """

    kind: str = "text"
    field: str = "text"
    width: int = 256
    depth: int = 4
    heads: int = 4
    head_width: int = 64
    length: int = 32
    vocabulary_size: int = 4096
    use_mask: bool = True
    dropout: float = 0.0
    vector: bool = False
    vocabulary: str = "learned"
    logits_head: bool = False
    tokenizer: Any = None

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.tokenizer is not None:
            return self
        if self.vocabulary != "learned":
            published = find_vocabulary("bert") if self.vocabulary == "bert" else Path(self.vocabulary)
            if published is None:
                return self
            return replace(self, tokenizer=read_vocabulary(published, "bert").to_str())
        captions = data.captions()
        if not captions:
            raise DarkroomError(
                f'"conditioner.{name}" needs captions, but the data has none: add metadata.jsonl or .txt files'
            )
        return replace(self, tokenizer=WordPieceTokenizer.train(captions, self.vocabulary_size).to_json())


class TextEncoder(ConditionEncoder):
    """Texts -> `context` (B, L, D), with `use_mask` also `context_mask` (B, L), with `vector` also `vector` (B, D).
    Null is the empty text.

    `tower`: a module `tower(ids (B, L), mask (B, L) or None) -> (B, L, D)` with an attribute or property `width`.
    A text is a string, None (the empty text) or token ids. Without a tokenizer it reads ids and the empty text.
    """

    config_class = TextEncoderConfig

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Tokenizer | None,
        length: int,
        drop_rate: float = 0.1,
        use_mask: bool = True,
        field: str = "text",
        vector: bool = False,
        guidance_scale: float | None = None,
    ) -> None:
        width = int(tower.width)  # type: ignore[arg-type]
        widths = {"context": width} | ({"vector": width} if vector else {})
        super().__init__(field, widths, drop_rate, guidance_scale)
        self.gives_vector = vector
        self.tower = tower
        self.tokenizer = tokenizer
        self.length = length
        self.use_mask = use_mask

    @classmethod
    def build(cls, config: TextEncoderConfig, parts: Parts) -> TextEncoder:
        if config.tokenizer is None and config.vocabulary == "learned":
            raise DarkroomError(
                "a text encoder needs its tokenizer: train it on captions, or keep it in the model's config"
            )
        assert parts.transformer is not None
        tokenizer = None if config.tokenizer is None else WordPieceTokenizer.from_json(config.tokenizer)
        tower = parts.transformer(
            vocabulary_size=config.vocabulary_size if tokenizer is None else tokenizer.vocabulary_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            head_width=config.head_width,
            length=config.length,
            dropout=config.dropout,
            logits_head=config.logits_head,
        )
        return cls(
            tower,
            tokenizer,
            config.length,
            config.drop_rate,
            config.use_mask,
            config.field,
            config.vector,
            config.guidance_scale,
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        unused: list[nn.Parameter] = getattr(self.tower, "unused", list)()
        return [p for p in self.parameters() if not any(p is other for other in unused)]

    @property
    def special(self) -> SpecialIds:
        """[CLS], [SEP] and [PAD] of the tokenizer, else BERT's."""
        known = self.tokenizer
        return BERT if known is None else SpecialIds(known.cls_id, known.sep_id, known.pad_id)

    def ready(self) -> None:
        if self.tokenizer is None:
            published = find_vocabulary("bert")
            if published is None:
                raise missing_vocabulary("bert", "`vocabulary`")
            self.tokenizer = WordPieceTokenizer.from_json(read_vocabulary(published, "bert").to_str())

    def set_vocabulary(self, path: str | Path, family: str) -> dict[str, Any]:
        if family != "bert":
            return {}
        text = read_vocabulary(path, family).to_str()
        tokenizer, size = WordPieceTokenizer.from_json(text), self._size
        if tokenizer.vocabulary_size != size:
            raise DarkroomError(
                f"the vocabulary has {tokenizer.vocabulary_size} tokens, but the tower was built for {size}; give the "
                "one that it was trained with"
            )
        self.tokenizer = tokenizer
        return {"tokenizer": text}

    @property
    def _size(self) -> int:
        """Ids are below this; towers of other kinds do not say."""
        return int(getattr(getattr(self.tower, "config", None), "vocabulary_size", 2**31))

    def tokens(self, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, L) int64, mask (B, L) bool: True at everything but padding."""
        special = self.special
        rows = [value if is_ids(value) else self._ids_of(value, special) for value in values]
        ids = pad_rows(rows, self.length, special.pad, self._size)
        return ids, real_tokens(ids, special.end)

    def _ids_of(self, text: Any, special: SpecialIds) -> Sequence[int] | Tensor:
        if not (text is None or isinstance(text, str)):
            raise DarkroomError(f"a text is a string or a list of token ids, not {text!r}")
        if not text:
            return text_body("", lambda _: [], special, self.length)
        self.ready()
        assert self.tokenizer is not None
        ids, mask = self.tokenizer.encode([text], self.length)
        return ids[0][mask[0]]

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        """B texts, or token ids (B, L) as one tensor."""
        ids, mask = self.tokens(list(values))
        device = next(self.tower.parameters()).device
        ids = ids.to(device)
        seen = mask.to(device) if self.use_mask else None
        context = self.tower(ids, seen)
        return Conditioning(context=context, context_mask=seen, vector=context[:, 0] if self.gives_vector else None)

    def null(self, batch_size: int) -> Conditioning:
        one = self.encode([None])
        return one.map(lambda t: t.expand(batch_size, *t.shape[1:]))

    def encode_kept(self, values: Sequence[Any] | Tensor, keep: Tensor) -> Conditioning:
        return self.encode([text if kept else None for text, kept in zip(values, keep.tolist(), strict=True)])
