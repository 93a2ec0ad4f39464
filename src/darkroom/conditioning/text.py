"""Text: a tokenizer and a text tower, trained jointly with the network (Rombach et al. 2022, sec. 4.3.1).

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder
from darkroom.conditioning.types import Conditioning


class Tokenizer(Protocol):
    """What `TextEncoder` needs of a tokenizer."""

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, length) int64, mask (B, length) bool."""
        ...


@dataclass
class TextEncoderConfig:
    """width, depth, heads, head_width: the tower, see `TextTransformerConfig`
    length:          tokens per text, with [CLS] and [SEP]
    vocabulary_size: the most tokens that the tokenizer may learn; the tower has as many as it did learn
    use_mask:        hide padding from the tower and from the network. Off in the paper: padding is read like words
    vector:          also give the result at [CLS] as `vector`, which modulates every residual block (as in SDXL and
                     SD 3; not in the paper): what holds for the whole picture is then learned sooner
    """

    kind: str = "text"
    width: int = 256
    depth: int = 4
    heads: int = 4
    head_width: int = 64
    length: int = 32
    vocabulary_size: int = 4096
    drop_rate: float = 0.1
    use_mask: bool = True
    dropout: float = 0.0
    field: str = "text"
    vector: bool = False


class TextEncoder(ConditionEncoder):
    """Texts -> `context` (B, L, D), with `use_mask` also `context_mask` (B, L), with `vector` also `vector` (B, D).
    Null is the empty text.

    `tower`: a module `tower(ids (B, L), mask (B, L) or None) -> (B, L, D)` with an attribute or property `width`.
    """

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Tokenizer,
        length: int,
        drop_rate: float = 0.1,
        use_mask: bool = True,
        field: str = "text",
        vector: bool = False,
    ) -> None:
        width = int(tower.width)  # type: ignore[arg-type]
        super().__init__(field, {"context": width} | ({"vector": width} if vector else {}), drop_rate)
        self.gives_vector = vector
        self.tower = tower
        self.tokenizer = tokenizer
        self.length = length
        self.use_mask = use_mask

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
