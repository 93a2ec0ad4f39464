"""JSON from files that may be hostile: what it would become in memory is bounded before it is made.

Three bytes of text (`[],`) become some seventy of objects, so a bound on the text alone would bound little.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# Headers of the largest checkpoints have a few hundred kilobytes; a model's config with three vocabularies has 10 MB.
MAX_BYTES = 32 * 2**20
MAX_VALUES = 1_000_000
# Matches wherever it begins, in one pass: a string that never closes would else be tried again from each of its quotes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def parse_json(data: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value; ValueError for what is no JSON or too much of it."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MB of JSON")
    # Every value but the first stands behind one of these, outside of a string.
    if data.count(b'"') > 4 * MAX_VALUES:
        raise ValueError("too many values")
    outside = _STRING.sub(b"", data)
    if sum(outside.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError("too many values")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
