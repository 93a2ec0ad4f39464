"""Text, or token ids in its place, to the ids that a text tower reads.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from darkroom.errors import DarkroomError


@dataclass(frozen=True)
class SpecialIds:
    """start: before each text, None for none; end: behind it; pad: fills up to the length. BERT's are 101, 102, 0,
    CLIP's 49406, 49407, 49407, OpenCLIP's the same with pad 0, T5's None, 1, 0."""

    start: int | None
    end: int
    pad: int


def is_ids(value: Any) -> bool:
    """Whether one text is given as numbers: [49406, 320, ...] or a tensor of them."""
    if isinstance(value, Tensor):
        return value.ndim == 1 and not value.is_floating_point()
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is int for v in value)


def text_body(text: str, tokenize: Callable[[str], Sequence[int]], special: SpecialIds, length: int) -> list[int]:
    """start, the ids of a text, end. A long text loses its end; the end token stays."""
    start = [] if special.start is None else [special.start]
    if length < len(start) + 1:
        raise DarkroomError(f"text: length {length} has no room for a text; give at least {len(start) + 1}")
    return [*start, *tokenize(text)[: length - len(start) - 1], special.end]


def split_words(text: str, learned: Mapping[str, list[int]]) -> list[tuple[str, list[int]]]:
    """("a photo of <cat> here", {"<cat>": [9, 10]}) -> [("a photo of ", [9, 10]), (" here", [])].

    A learned word counts where it stands alone: not inside of a longer one. The longest that fits wins.
    """
    if not learned:
        return [(text, [])]
    words = sorted(learned, key=len, reverse=True)
    alone = [
        (r"(?<!\w)" if word[0].isalnum() else "") + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")
        for word in words
    ]
    pieces, at = [], 0
    for match in re.finditer("|".join(alone), text):
        pieces.append((text[at : match.start()], learned[match[0]]))
        at = match.end()
    return [*pieces, (text[at:], [])]


def pad_rows(rows: Sequence[Sequence[int] | Tensor], length: int, pad: int, size: int) -> Tensor:
    """Rows of at most `length` ids below `size` -> (B, length) int64; shorter ones are filled up with `pad`."""
    result = torch.full((len(rows), length), pad, dtype=torch.int64)
    for row, ids in zip(result, rows, strict=True):
        given = torch.as_tensor(ids, dtype=torch.int64)
        if len(given) > length:
            raise DarkroomError(f"{len(given)} token ids for a text of at most {length}; leave out the last ones")
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < size:
            wrong = int(given.max()) if int(given.max()) >= size else int(given.min())
            raise DarkroomError(f"token id {wrong} is not in the vocabulary; ids are 0 to {size - 1}")
        row[: len(given)] = given
    return result


def real_tokens(ids: Tensor, end: int) -> Tensor:
    """(B, L) ids -> (B, L) bool: True up to the first end token; all of a row without one."""
    is_end = ids == end
    ended = is_end.cumsum(1) - is_end.long()  # end tokens before this one
    return ended == 0


def without_padding(ids: Sequence[int] | Tensor, end: int) -> Tensor:
    """One text's ids up to its first end token."""
    row = torch.as_tensor(ids, dtype=torch.int64)
    return row[real_tokens(row[None], end)[0]]


def plain_text(value: Any) -> Any:
    """One text of a request: a string, token ids as a list, or such lists by tower; tensors become lists, so that the
    settings inside an image can say it."""
    if value is None or isinstance(value, str):
        return value
    if is_ids(value):
        return [int(v) for v in value]
    if isinstance(value, Mapping) and value and all(is_ids(ids) for ids in value.values()):
        return {str(name): [int(v) for v in ids] for name, ids in value.items()}
    raise DarkroomError(f"a text is a string or a list of token ids, not {value!r}")


def plain_texts(value: Any) -> list[Any] | None:
    """What someone gives as texts -> a list of them: one text, a list of texts, or ids (B, L)."""
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or is_ids(value):
        return [plain_text(value)]
    return [plain_text(text) for text in value]
