"""A short run of `tools/fuzz_checkpoints.py`, and that it sees what it watches for."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from darkroom.errors import DarkroomError

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", TOOLS / "fuzz_checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_checkpoints"] = module  # dataclasses look their module up, and pickles may name it
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def watch(fuzz: ModuleType) -> object:
    watch = fuzz.Watch()
    sys.addaudithook(watch)  # stays for ever, and does nothing unless a reader runs under it
    return watch


def test_changed_files_are_refused(fuzz: ModuleType, watch: object) -> None:
    with fuzz.unpacked_seeds() as seeds:
        assert len(seeds) >= 20
        using = fuzz.warm_up(seeds)
        tally = fuzz.run(seeds, using, files=2 * len(seeds), first=0, watch=watch, keep=None, show=print)
    assert tally.problems == []
    assert tally.refused >= 2 * len(seeds) and min(tally.by_seed.values()) >= 2


def test_a_case_is_known_by_its_number(fuzz: ModuleType, tmp_path: Path) -> None:
    seed = tmp_path / "a.json"
    seed.write_text('{"kind": "kl", "sizes": [1, 2, 3]}')
    for name in ("one.json", "two.json"):
        fuzz.make_case(seed, tmp_path / name, fuzz.Random("a:7"))
    one, two = ((tmp_path / name).read_bytes() for name in ("one.json", "two.json"))
    assert one == two != seed.read_bytes()


def _refuse(text: str) -> Callable[[Path], object]:
    def reader(path: Path) -> None:
        raise DarkroomError(text)

    return reader


def _stumble(path: Path) -> None:
    raise KeyError("weight")


def _spin(path: Path) -> None:
    while True:
        pass


def _import(path: Path) -> None:
    __import__("colorsys")


def _grow(path: Path) -> None:
    assert len(b"x" * (300 * 2**20)) > 0


@pytest.mark.parametrize(
    ("reader", "problem"),
    [
        (_refuse("the file is damaged"), None),
        (lambda path: None, None),
        (_refuse(""), "not one clear line"),
        (_refuse("DefaultCPUAllocator: can't allocate memory"), "memory was asked for"),
        (_stumble, "KeyError"),
        (_spin, "not done after"),
        (lambda path: time.sleep(3), "not done after"),
        (lambda path: os.system("true"), "os.system"),
        (lambda path: path.write_text("x"), "open for writing"),
        (lambda path: exec("1"), "it did something"),
        (_import, "import"),
        (_grow, "memory grew"),
    ],
)
def test_what_the_watch_sees(
    fuzz: ModuleType,
    watch: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reader: Callable[[Path], object],
    problem: str | None,
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "PATIENCE", 2.5)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    found = fuzz.read(reader, tmp_path / "file", watch).problem
    assert found is None if problem is None else problem in found
