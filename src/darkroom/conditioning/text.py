"""Text: a tokenizer and a text tower, trained jointly with the network (Rombach et al. 2022, sec. 4.3.1).

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts
from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError


class Tokenizer(Protocol):
    """What `TextEncoder` needs of a tokenizer."""

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
    tokenizer:       a trained tokenizer as `WordPieceTokenizer.to_json` gives it; null: trained on the captions
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
    tokenizer: Any = None

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.tokenizer is not None:
            return self
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
    """

    config_class = TextEncoderConfig

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Tokenizer,
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
        if config.tokenizer is None:
            raise DarkroomError(
                "a text encoder needs its tokenizer: train it on captions, or keep it in the model's config"
            )
        assert parts.transformer is not None
        tokenizer = WordPieceTokenizer.from_json(config.tokenizer)
        tower = parts.transformer(
            vocabulary_size=tokenizer.vocabulary_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            head_width=config.head_width,
            length=config.length,
            dropout=config.dropout,
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

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        """Strings; None is read as the empty text."""
        ids, mask = self.tokenizer.encode([text or "" for text in values], self.length)
        device = next(self.tower.parameters()).device
        ids = ids.to(device)
        seen = mask.to(device) if self.use_mask else None
        context = self.tower(ids, seen)
        return Conditioning(context=context, context_mask=seen, vector=context[:, 0] if self.gives_vector else None)

    def null(self, batch_size: int) -> Conditioning:
        one = self.encode([""])
        return one.map(lambda t: t.expand(batch_size, *t.shape[1:]))

    def encode_kept(self, values: Sequence[Any] | Tensor, keep: Tensor) -> Conditioning:
        return self.encode([text if kept else "" for text, kept in zip(values, keep.tolist(), strict=True)])
