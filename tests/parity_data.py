"""Reads the golden vectors in tests/parity. Whatever is missing raises: a test that needs it fails, it never skips."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARITY = Path(__file__).parent / "parity"

# (topic, case, output) of every golden that a test of this session looked at; see test_goldens_are_used.py.
USED: set[tuple[str, str, str]] = set()


class _Outputs(dict[str, Any]):
    """The outputs of a case, which note that they were read."""

    def __init__(self, outputs: dict[str, Any], topic: str, case: str) -> None:
        super().__init__(outputs)
        self.place = topic, case

    def __getitem__(self, name: str) -> Any:
        USED.add((*self.place, name))
        return super().__getitem__(name)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


@cache
def weights() -> ModuleType:
    """tests/parity/deterministic_weights.py"""
    spec = importlib.util.spec_from_file_location("deterministic_weights", PARITY / "deterministic_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _topic(topic: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    plain, packed = PARITY / "goldens" / f"{topic}.json", PARITY / "goldens" / f"{topic}.json.gz"
    text = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    content = json.loads(text)
    for name, case in content["cases"].items():
        case["outputs"] = _Outputs(case["outputs"], topic, name)
    with np.load(PARITY / "goldens" / f"{topic}.npz") as arrays:
        return content, dict(arrays)


def topics() -> list[str]:
    return sorted(path.stem for path in (PARITY / "goldens").glob("*.npz"))


def case_names(topic: str) -> list[str]:
    return list(_topic(topic)[0]["cases"])


def make_input(seed: int, shape: list[int] | tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Standard normal float32 of PCG64(seed), scaled and shifted."""
    return torch.from_numpy(weights().make_input(seed, shape, scale, shift))


@dataclass(frozen=True)
class Case:
    """One golden: its JSON entry and the arrays of its topic."""

    name: str
    spec: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def args(self) -> dict[str, Any]:
        return self.spec["args"]

    def input(self, name: str) -> Tensor:
        entry = self.spec["inputs"][name]
        if "make_input" in entry:
            return make_input(**entry["make_input"])
        if "make_ints" in entry:
            return torch.from_numpy(weights().make_ints(**entry["make_ints"]))
        return torch.tensor(entry["literal"])

    def output(self, name: str) -> Any:
        """A tensor, or the plain value. Outputs that are stored with a stride are refused: use `check`."""
        entry = self.spec["outputs"][name]
        if "value" in entry:
            return entry["value"]
        assert "flat_stride" not in entry, f"{self.name}/{name} is stored in part"
        return torch.from_numpy(self.arrays[entry["array"]].copy())

    def check(self, name: str, actual: Tensor, *, atol: float = 2e-5, relative: float = 0.0) -> None:
        """`actual` agrees with the output within atol + relative * (root mean square of the output)."""
        entry = self.spec["outputs"][name]
        expected = torch.from_numpy(self.arrays[entry["array"]].copy()).double()
        assert list(actual.shape) == list(entry["shape"]), (self.name, name, actual.shape, entry["shape"])
        actual = actual.detach().cpu().double()
        if "flat_stride" in entry:
            actual, expected = actual.flatten()[:: entry["flat_stride"]], expected.flatten()
        bound = atol + relative * float(expected.square().mean().sqrt())
        worst = float((actual - expected).abs().max())
        assert worst <= bound, f"{self.name}/{name}: largest difference {worst:.3g} is above {bound:.3g}"


def load_case(topic: str, name: str) -> Case:
    """A golden by topic and name; KeyError or FileNotFoundError if it is not there."""
    spec, arrays = _topic(topic)
    return Case(name, spec["cases"][name], arrays)
