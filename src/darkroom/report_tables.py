"""Values from JSON as text and tables, for the report and the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeGuard


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (label, scalar) rows: {"a": {"b": 1}} -> [("a: b", 1)].

    {"psnr": {"value": 25, "protocol": "..."}} and [{"name": "psnr", "value": 25, "protocol": "..."}] both give the rows
    ("psnr", 25) and ("psnr: protocol", "...").
    """
    if value is None and not prefix:
        return []
    if isinstance(value, Mapping):
        rows = [(prefix, value["value"])] if prefix and "value" in value else []
        rest = {k: v for k, v in value.items() if not (rows and k == "value")}
        return rows + [row for k, v in rest.items() for row in flatten(v, f"{prefix}: {k}" if prefix else str(k))]
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, Mapping) for v in value):
            entries = {_entry_name(v, i): _without_name(v) for i, v in enumerate(value, 1)}
            return [row for k, v in entries.items() for row in flatten(v, f"{prefix}: {k}" if prefix else k)]
        more = f" and {len(value) - 24:,} more" if len(value) > 24 else ""
        return [(prefix, ", ".join(show(v) for v in value[:24]) + more)]
    return [(prefix, value)]


def _entry_name(entry: Any, place: int) -> str:
    return str(entry.get("name") or place) if isinstance(entry, Mapping) else str(place)


def _without_name(entry: Any) -> Any:
    return {k: v for k, v in entry.items() if k != "name"} if isinstance(entry, Mapping) else entry


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """An HTML table of two columns."""
    cells = "".join(
        f"<tr><th>{escape(label.replace('_', ' '))}</th><td>{escape(show(value))}</td></tr>" for label, value in rows
    )
    return f'<div class="table"><table>{cells}</table></div>'


def grid_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table with a head; the first cell of a row names it."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return f'<div class="table grid"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def show(value: Any) -> str:
    """A scalar as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    return str(value)


def as_list(value: Any) -> list[Any]:
    """A list as it is, nothing as [], one thing as [thing]."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value in (None, "") else [value]


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plural(count: int, one: str, many: str | None = None) -> str:
    return one if count == 1 else many or f"{one}s"
