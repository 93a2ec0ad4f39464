"""Freed memory is kept for the next training step, in a process of its own: the C library does not forget."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from darkroom.training import freed_memory

# Page faults of taking and freeing 64 MiB ten times, before and after.
PROGRAM = """
import json, resource, torch
from darkroom.training.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, agreed = faults(), keep_freed_memory()
faults()
print(json.dumps([agreed, before, faults()]))
"""


def run(**environment: str) -> tuple[bool, int, int]:
    source = str(Path(freed_memory.__file__).parents[2])
    inherited = {name: value for name, value in os.environ.items() if name != freed_memory.SWITCH}
    known = inherited | {"PYTHONPATH": source} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=known, check=True, capture_output=True, text=True)
    agreed, before, after = json.loads(done.stdout)
    return agreed, before, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they like")
def test_the_kernel_is_asked_once() -> None:
    agreed, before, after = run()
    assert agreed and after < 0.05 * before
    agreed, before, after = run(DARKROOM_KEEP_MEMORY="0")
    assert not agreed and after > 0.5 * before


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_other_systems_say_no(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.delenv("DARKROOM_KEEP_MEMORY", raising=False)
    assert not freed_memory.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere peak memory has another unit")
def test_the_benchmark_times_training_steps() -> None:
    """What it starts for each measurement; in a process of its own, since it sets threads and seed."""
    program = Path(__file__).parents[2] / "benchmarks" / "freed_memory.py"
    command = [sys.executable, str(program), "--row", "clothing-inpaint, 8 x 32x32", "--steps", "1"]
    known = os.environ | {"PYTHONPATH": str(Path(freed_memory.__file__).parents[2])}
    found = json.loads(subprocess.run(command, env=known, check=True, capture_output=True, text=True).stdout)
    assert 0 < found["seconds"] < 600 and found["kernel"] >= 0 and 0.05 < found["peak"] < 64
