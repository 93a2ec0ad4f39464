"""Plain dicts <-> dataclasses, strictly: an unknown key, a wrong type or a missing value is one clear line.

Configs are plain dataclasses beside what they configure. A field annotated with a union of dataclasses is chosen by
the `kind` key, whose value is the default of the dataclass's own field `kind`; without it the field's default counts.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from darkroom.errors import DarkroomError

T = TypeVar("T")


# What code raises that was handed a value of another kind, size or range than it was written for.
_MISFITS = (*(TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError),)


@contextmanager
def understanding(source: object, what: str) -> Iterator[None]:
    """Around what is made of a file that anybody may have written: whatever it stumbles over becomes one line.

    The checks inside name the problem; this is for the values that nobody thought of.
    """
    try:
        yield
    except DarkroomError:
        raise
    except _MISFITS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DarkroomError(f"{source} cannot be understood as {what}: {reason[:300]}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the closest known word, or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f' (did you mean "{close[0]}"?)'
    return f" (known: {', '.join(known)})" if known else ""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `data`. `where` is the dotted path that error messages name.

    None turns a setting off where it can be off, takes an entry out of a mapping, and otherwise means the default.

    Raises DarkroomError for unknown keys (with the nearest known one), wrong types and missing values.
    """
    if not isinstance(data, Mapping):
        raise DarkroomError(f"{where or cls.__name__}: expected a mapping of settings, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    target: Any = cls
    hints = _hints(target)
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise DarkroomError(f'unknown key "{path}"{nearest(str(key), fields)}')
        if value is None and not _takes_none(hints[key]):
            continue  # cannot be off: its default
        default = fields[key].default_factory
        if isinstance(value, Mapping) and default in _alternatives(hints[key]):
            value = {"kind": kind_of(default), **value}
        values[key] = _convert(hints[key], value, path)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise DarkroomError(f'missing key "{where + "." if where else ""}{name}"')
    return cls(**values)


def _alternatives(hint: Any) -> list[Any]:
    """The dataclasses of a union, of which `kind` chooses one; none where there is no choice."""
    classes = [option for option in get_args(hint) if dataclasses.is_dataclass(option)]
    return classes if len(classes) > 1 else []


def kind_of(cls: Any) -> str:
    """The `kind` by which a dataclass is chosen from a union."""
    return str(next(f.default for f in dataclasses.fields(cls) if f.name == "kind"))


def _takes_none(hint: Any) -> bool:
    return hint is Any or hint is type(None) or type(None) in get_args(hint)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise DarkroomError(f'"{path}" is {value!r}{nearest(str(value), [str(a) for a in args])}')
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise DarkroomError(f'"{path}" is a list, got {value!r}')
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            if len(value) != len(args):
                raise DarkroomError(f'"{path}" takes {len(args)} values, got {value!r}')
            return tuple(_convert(a, v, f"{path}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        items = [_convert(args[0], v, f"{path}.{i}") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, Mapping):
            raise DarkroomError(f'"{path}" is a mapping, got {value!r}')
        kept = {k: v for k, v in value.items() if v is not None or _takes_none(args[1])}
        return {_convert(args[0], k, path): _convert(args[1], v, f"{path}.{k}") for k, v in kept.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise DarkroomError(f'"{path}" is {_KINDS[hint]}, got {value!r}')
    return value


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise DarkroomError(f'"{path}" needs a value')
    options = [a for a in args if a is not type(None)]
    classes = [a for a in options if dataclasses.is_dataclass(a)]
    if classes and isinstance(value, tuple(c for c in classes if isinstance(c, type))):
        return value
    if len(classes) > 1 and isinstance(value, Mapping):
        kinds = {kind_of(c): c for c in classes}
        kind = value.get("kind")
        if kind not in kinds:
            raise DarkroomError(f'"{path}.kind" is {kind!r}{nearest(str(kind), [str(k) for k in kinds])}')
        chosen: Any = kinds[kind]
        return from_dict(chosen, value, path)
    # Exact scalar types first, so that `int | float` keeps 3 an int and `str | float` keeps "x" a string.
    options.sort(key=lambda a: a is not type(value))
    error: DarkroomError | None = None
    for option in options:
        try:
            return _convert(option, value, path)
        except DarkroomError as e:
            error = error or e
    assert error is not None
    raise error


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars, ready for JSON or YAML; `from_dict` gives it back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`: mappings merge, everything else is replaced. None replaces too: see `from_dict`."""
    result = copy.deepcopy(dict(base))
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def with_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys: {"optimizer.learning_rate": 1e-4}. The strict reading afterwards reports misspelt ones."""
    result = copy.deepcopy(dict(data))
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = result
        for parent in parents:
            inner = place.setdefault(parent, {})
            if inner is None:
                inner = place[parent] = {}
            if not isinstance(inner, dict):
                raise DarkroomError(f'cannot set "{dotted}": "{parent}" is {inner!r}, not a mapping')
            place = inner
        place[last] = copy.deepcopy(value)
    return result
