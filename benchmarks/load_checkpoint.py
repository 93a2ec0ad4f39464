"""How long `darkroom.load` takes for a whole Stable Diffusion 1 checkpoint, and how much memory.

    python benchmarks/load_checkpoint.py [--kind safetensors|ckpt] [--layout sd-v1] [--rounds 3] [--dtype float32]

Writes a file of the official names and shapes (tests/parity/layouts), 4.3 GB in float32, any numbers; reads it once,
so that it is in the page cache; then loads it in fresh processes. Per round: seconds by the clock and of the processor
(other work on the machine stretches the former), those of a plain read of the file, and the peak of the process's
memory over what it had before. The limits: 15 seconds, and the size of the model in its target precision plus 1 GB. The
exit status says whether they hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"
SECONDS, GIGABYTE = 15.0, 10**9

CHILD = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
import darkroom, darkroom.model_io
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
def reset():
    open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
reset()
begun, busy = time.perf_counter(), time.process_time()
if sys.argv[1] == "load":
    model = darkroom.load(sys.argv[2], device="cpu", dtype=sys.argv[3])
    size = sum(t.nbytes for t in {p.data_ptr(): p for p in (*model.parameters(), *model.buffers())}.values())
else:
    with open(sys.argv[2], "rb", buffering=0) as file:
        part, size = bytearray(2**24), 0
        while count := file.readinto(part):
            size += count
seconds = time.perf_counter() - begun
busy = time.process_time() - busy
print(json.dumps({"seconds": seconds, "processor": busy, "peak": status("VmHWM") - before, "size": size}))
"""


def layout(name: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("deterministic_weights", PARITY / "deterministic_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (path,) = (PARITY / "layouts").glob(f"{name}.json*")
    result: dict[str, Any] = module.load_layout(path)
    return result


def write(path: Path, spec: dict[str, Any]) -> int:
    """A file of these names and shapes; gives the number of elements. Its numbers are any, tensor by tensor."""
    import torch

    whole = {"int64": torch.int64}
    kinds = {name: whole.get(kind, torch.float32) for name, kind in spec.get("dtypes", {}).items()}
    shapes = {name: tuple(shape) for name, shape in spec["layout"].items()}
    if path.suffix == ".ckpt":
        tensors = {name: torch.full(s, 0.25).to(kinds.get(name, torch.float32)) for name, s in shapes.items()}
        torch.save({"state_dict": tensors, "global_step": 1}, path)
        return sum(math.prod(shape) for shape in shapes.values())
    import struct

    header: dict[str, Any] = {}
    end = 0
    for name, shape in sorted(shapes.items(), key=lambda item: kinds.get(item[0]) != torch.int64):
        kind, width = ("I64", 8) if kinds.get(name) == torch.int64 else ("F32", 4)
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.full((2**22,), 0.25).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(end // len(block)):
            file.write(block)
        file.write(block[: end % len(block)])
    return sum(math.prod(shape) for shape in shapes.values())


def measure(what: str, path: Path, dtype: str, threads: int) -> dict[str, float]:
    """One fresh process."""
    command = [sys.executable, "-c", CHILD, what, str(path), dtype, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("safetensors", "ckpt"), default="safetensors")
    parser.add_argument("--layout", default="sd-v1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the file is written [default: the system's temporary one]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / f"{given.layout}.{given.kind}"
        elements = write(path, layout(given.layout))
        size = path.stat().st_size
        print(f"{path.name}: {elements / 1e9:.3f} billion elements, {size / GIGABYTE:.2f} GB; {os.cpu_count()} CPUs")
        measure("read", path, given.dtype, given.threads)  # into the page cache
        rounds = [(measure("read", path, given.dtype, given.threads), measure("load", path, given.dtype, given.threads))
                  for _ in range(given.rounds)]  # fmt: skip
    for read, load in rounds:
        print(f"  load {load['seconds']:.1f} s, {load['processor']:.1f} s of processor time", end="; ")
        print(f"a plain read {read['seconds']:.1f} s", end="; ")
        print(f"peak +{load['peak'] / GIGABYTE:.2f} GB for a model of {load['size'] / GIGABYTE:.2f} GB")
    seconds = statistics.median(load["seconds"] for _, load in rounds)
    over = max(load["peak"] - load["size"] for _, load in rounds)
    print(
        f"median {seconds:.1f} s (limit {SECONDS:g}), peak over the model's size {over / GIGABYTE:+.2f} GB (limit +1)"
    )
    return 0 if seconds <= SECONDS and over <= GIGABYTE else 1


if __name__ == "__main__":
    sys.exit(main())
