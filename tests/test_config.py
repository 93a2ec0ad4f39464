"""The strict reader of configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from darkroom.config import from_dict, merge, to_dict, with_overrides
from darkroom.errors import DarkroomError


@dataclass(frozen=True)
class Cat:
    kind: str = "cat"
    lives: int = 9


@dataclass(frozen=True)
class Dog:
    kind: str = "dog"
    tricks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    size: int | tuple[int, int] = 64
    mode: Literal["fast", "slow"] = "fast"
    pet: Cat | Dog | None = None
    guest: Cat | Dog = field(default_factory=Dog)


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    names: dict[str, Cat | Dog] = field(default_factory=dict)


def test_round_trip_keeps_every_value() -> None:
    outer = Outer(3, Inner(0.25, (64, 32), "slow", Dog(tricks=("sit",))), {"a": Cat(lives=7)})
    assert from_dict(Outer, to_dict(outer)) == outer


def test_without_a_kind_the_default_one_is_meant() -> None:
    assert from_dict(Inner, {"guest": {"tricks": ["sit"]}}).guest == Dog(tricks=("sit",))
    assert from_dict(Inner, {"guest": {"kind": "cat"}}).guest == Cat()
    for where in ("pet", "guest"):  # no default, and the other one's option
        with pytest.raises(DarkroomError):
            from_dict(Inner, {where: {"lives": 3}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"steps": 1, "iner": {}}, ['"iner"', 'did you mean "inner"']),
        ({"steps": 1, "inner": {"rat": 1}}, ['"inner.rat"', 'did you mean "rate"']),
        ({}, ['missing key "steps"']),
        ({"steps": "many"}, ['"steps" is a whole number', "'many'"]),
        ({"steps": True}, ['"steps" is a whole number']),
        ({"steps": 1, "inner": {"mode": "fsat"}}, ['"inner.mode"', "fsat"]),
        ({"steps": 1, "inner": {"pet": {"kind": "cow"}}}, ['"inner.pet.kind"', "cow"]),
        ({"steps": 1, "inner": {"size": [1, 2, 3]}}, ["inner.size"]),
        ({"steps": 1, "inner": 5}, ["expected a mapping"]),
    ],
)
def test_mistakes_name_the_key_and_the_cure(data: dict, words: list[str]) -> None:
    with pytest.raises(DarkroomError) as error:
        from_dict(Outer, data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_numbers_written_as_yaml_reads_them() -> None:
    """YAML 1.1 reads 1e-4 as text, and 2.0 may stand for a whole number."""
    assert from_dict(Inner, {"rate": "1e-4"}).rate == 1e-4
    assert from_dict(Outer, {"steps": 2.0}).steps == 2
    assert isinstance(from_dict(Inner, {"rate": 1}).rate, float)


def test_merge_replaces_lists_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merge(base, {"a": {"y": [9], "x": None}, "b": None}) == {"a": {"x": None, "y": [9]}, "b": None}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_null_is_off_where_that_exists_and_the_default_elsewhere() -> None:
    base = {"steps": 2, "inner": {"rate": 0.1, "pet": {"kind": "dog"}}, "names": {"a": {"kind": "cat"}}}
    off = merge(base, {"inner": {"rate": None, "pet": None}, "names": {"a": None, "b": {"kind": "dog"}}})
    assert from_dict(Outer, off) == Outer(2, Inner(0.5, pet=None), {"b": Dog()})
    with pytest.raises(DarkroomError, match='missing key "steps"'):
        from_dict(Outer, merge(base, {"steps": None}))


def test_overrides_set_dotted_keys_without_touching_the_original() -> None:
    base = {"a": {"b": 1}}
    assert with_overrides(base, {"a.b": 2, "c.d": 3}) == {"a": {"b": 2}, "c": {"d": 3}}
    assert base == {"a": {"b": 1}}
    with pytest.raises(DarkroomError, match=r'cannot set "a\.b\.c"'):
        with_overrides(base, {"a.b.c": 1})
