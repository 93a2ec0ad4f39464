"""A JSON schema of recipes, for editors that complete and check YAML: `python -m darkroom.training.recipe_schema`.

It is made from the dataclasses that read recipes: their names, types and defaults, described by their docstrings.
What the strict reader knows beyond that (which values go together) only the reader says.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from darkroom.training.recipe import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# YAML 1.1 reads 1e-4, without a point, as text; the strict reader takes it as the number that was meant.
_NUMBER_TEXT = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_NUMBER = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _NUMBER_TEXT}]}
_SCALARS: dict[Any, dict[str, Any]] = {
    float: _NUMBER,
    int: {"type": "integer"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}
_ENTRY = re.compile(r"^ {0,4}(\w+(?:, \w+)*): +(.+)$")


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file. Nothing is required, because a `base` may say it."""
    definitions: dict[str, Any] = {}
    top = _definition(Recipe, definitions)
    top["properties"]["base"] = {"type": "string", "description": "Another recipe (name or file) that this one changes"}
    return {"$schema": DIALECT, "title": "Darkroom recipe", **top, "$defs": dict(sorted(definitions.items()))}


def _definition(cls: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, about = get_type_hints(cls), descriptions(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        # null switches a setting off or means its default, so it is allowed everywhere.
        schema = _or_null(_schema(hints[field.name], definitions))
        if field.name in about:
            schema = {"description": about[field.name], **schema}
        if field.default is not dataclasses.MISSING and _is_plain(field.default):
            schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        properties[field.name] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return dict(_SCALARS[hint])
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(option, definitions) for option in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _or_null(_schema(args[1], definitions))}
    if origin in (list, tuple):
        if origin is tuple and args[-1] is not Ellipsis:
            items = [_schema(a, definitions) for a in args]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": _schema(args[0], definitions)}
    assert dataclasses.is_dataclass(hint), hint
    name = hint.__name__  # type: ignore[union-attr]
    if name not in definitions:
        definitions[name] = {}  # a place of its own, should it contain itself
        definitions[name] = _definition(hint, definitions)
        if get_type_hints(hint).get("kind") is str:  # the key by which one of several dataclasses is chosen
            chosen = {f.name: f.default for f in dataclasses.fields(hint)}["kind"]
            definitions[name]["properties"]["kind"] = {"const": chosen}
    return {"$ref": f"#/$defs/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema:
        return schema
    options = schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
    return {"anyOf": options if {"type": "null"} in options else [*options, {"type": "null"}]}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def descriptions(cls: Any) -> dict[str, str]:
    """What the docstring of a dataclass (and of those that it extends) says about its fields: lines `name: text`, going
    on in lines that are indented further."""
    names = {field.name for field in dataclasses.fields(cls)}
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        current: list[str] = []
        for line in (inspect.cleandoc(base.__doc__ or "")).splitlines():
            match = _ENTRY.match(line)
            if match and set(match[1].split(", ")) & names:
                current = [name for name in match[1].split(", ") if name in names]
                found.update(dict.fromkeys(current, match[2].strip()))
            elif current and line.startswith("   ") and line.strip():
                found.update({name: f"{found[name]} {line.strip()}" for name in current})
            else:
                current = []
    return found


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2))
