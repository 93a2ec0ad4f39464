"""Whole state dicts under the names of others and back, by the tables and the maps that conversions go through."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from darkroom.interop.tensor_source import Place, Table, inverse, same, taken


def to_theirs(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """What a file of theirs holds for this state of ours."""
    shapes = {name: tuple(state[name].shape) for name in table}
    targets = inverse(table, shapes, dict.fromkeys(table, "float32"))
    return {name: target.made(state) for name, target in targets.items()}


def to_ours(theirs: Mapping[str, Tensor], table: Table, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is loaded of theirs; strictly all of it. `like`: a state of ours, for the shapes."""
    assert {name for place in table.values() for name in place.names} == theirs.keys()
    return {name: taken(place, theirs, tuple(like[name].shape)) for name, place in table.items()}


def renaming(names: Mapping[str, str]) -> dict[str, Place]:
    """The table of a network whose tensors change their names alone."""
    return {ours: same(theirs) for ours, theirs in names.items()}
