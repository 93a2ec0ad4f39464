"""Large images through the official kl-f8 shape: the whole image at once, exact strips, and blended tiles.

    python benchmarks/tiling.py [--sizes 512] [--tasks decode encode] [--ways whole exact blended] [--threads 1]
                                [--memory-gb 2.2] [--tile 512] [--spill FOLDER] [--check]

Every row is a process of its own. Its peak memory is all of it: Python, torch, the weights (0.34 GB) and the result.
Seconds are those of the clock and of the processor (on a busy machine they differ); files are what was spilled in all.
The difference is the largest, and the root mean square, to the whole image; a way that is left out is not compared.
`whole` takes about 4.5 GB at 1024 and 17 GB and more at 2048 pixels, and is left out where that is not free;
`whole-in-place` takes half: the same operations one after the other on whole maps, with norms that overwrite their
input (only where `whole` is not asked for are the others compared with it). Weights are made
from the tensors' names (tests/parity), the input is noise for `decode` and a smooth picture with noise for `encode`.
With --check the exit status is 1 if an exact row differs by more than 1e-4, or takes more than 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "whole": "the whole image",
    "whole-in-place": "the whole image, in place",
    "exact": "exact strips",
    "exact-no-files": "exact strips, no files",
    "blended": "blended tiles",
}
LARGEST_DIFFERENCE, LARGEST_MEMORY_GB = 1e-4, 4.0


def run_in_place(operations: Sequence[Any], x: Any) -> Any:
    """The operations on whole maps, none of them in parts; (1, C, H, W) -> the last one's shape. Not the library's way:
    norms are computed here, from sums in float64, and overwrite the map."""
    import torch
    import torch.nn.functional as F

    from darkroom.first_stage.operations import Add, Convolution, Norm, Remember

    x = x.contiguous(memory_format=torch.channels_last)
    remembered = x
    for operation in operations:
        match operation:
            case Remember(shortcut):
                remembered = x.clone() if shortcut is None else shortcut(x)
            case Add():
                x = x.add_(remembered)
                remembered = x
            case Norm(norm, silu):
                rows = x[0].split(16, 1)
                sums = torch.stack(
                    [torch.stack([r.double().sum((1, 2)), r.double().square().sum((1, 2))]) for r in rows]
                )
                count = x.shape[1] // norm.num_groups * x.shape[2] * x.shape[3]
                mean, square = sums.sum(0).view(2, norm.num_groups, -1).sum(2) / count
                scale = (square - mean.square() + norm.eps).rsqrt().repeat_interleave(x.shape[1] // norm.num_groups)
                scale = scale * norm.weight
                shift = norm.bias - mean.repeat_interleave(x.shape[1] // norm.num_groups) * scale
                x = x.mul_(scale.float().view(1, -1, 1, 1)).add_(shift.float().view(1, -1, 1, 1))
                x = F.silu(x, inplace=True) if silu else x
            case Convolution(conv, (1, 1, 1, 1)):
                x = F.conv2d(x, conv.weight, conv.bias, conv.stride, 1)
            case _:
                x = operation(x)
    return x


def measure(options: argparse.Namespace, size: int, task: str, way: str, result: Path) -> dict[str, Any]:
    """One row, in this process."""
    import resource

    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from parity_data import weights

    from darkroom.first_stage import maps, tiling
    from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
    from darkroom.first_stage.operations import decoder_operations, encoder_operations

    torch.set_num_threads(options.threads)
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig()).eval()
    autoencoder.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        parameter.copy_(torch.from_numpy(weights().make_array(name, parameter.shape)))
    f = autoencoder.downsampling
    if task == "decode":
        x = torch.from_numpy(weights().make_input(0, (1, autoencoder.latent_channels, size // f, size // f)))
        operations = decoder_operations(autoencoder)
    else:
        noise = torch.from_numpy(weights().make_input(0, (1, 3, size, size), scale=0.1))
        coarse = torch.from_numpy(weights().make_input(1, (1, 3, 9, 9), scale=0.4))
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
        x = (smooth + noise).clamp(-1, 1)
        operations = encoder_operations(autoencoder)
    if way == "whole":
        need, free = tiling.untiled_bytes(operations, x.shape[1:], 4), tiling.available_memory(x.device)
        if need > 0.9 * free:
            return {"skipped": f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"}
    spill = options.spill or True
    tile = {
        "whole": None,
        "whole-in-place": None,
        "exact": tiling.Tiling(options.tile, memory_gb=options.memory_gb, spill=spill),
        "exact-no-files": tiling.Tiling(options.tile, memory_gb=options.memory_gb, spill=False),
        "blended": tiling.Tiling(min(options.tile, size // 2), mode="blended"),
    }[way]
    spilled = 0
    leave = maps.Workspace.__exit__

    def note(self: maps.Workspace, *error: Any) -> None:
        nonlocal spilled
        spilled += self.spilled
        leave(self, *error)

    maps.Workspace.__exit__ = note  # type: ignore[method-assign]
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        if way == "whole-in-place":
            coded = run_in_place(operations, x)
        else:
            coded = tiling.decode(autoencoder, x, tile) if task == "decode" else tiling.encode(autoencoder, x, tile)
    row = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "files": spilled / 1e9}
    row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    y = coded if isinstance(coded, torch.Tensor) else coded.moments
    if way == "whole" or (way == "whole-in-place" and not result.exists()):
        torch.save(y, result)
    elif result.exists():
        difference = y.sub_(torch.load(result, mmap=True))
        row["largest"] = float(difference.abs().max())
        row["rms"] = float(difference.square().mean().sqrt())
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="sides in pixels, multiples of 8")
    parser.add_argument("--tasks", nargs="+", choices=("decode", "encode"), default=["decode", "encode"])
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=["whole", "exact", "blended"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-gb", type=float, default=None, help="for maps and strips (default: the library's)")
    parser.add_argument("--tile", type=int, default=512, help="blended: at most half the image")
    parser.add_argument("--spill", type=Path, default=None, help="folder for files (default: the temporary folder)")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # size, task, way, file of the result
    options = parser.parse_args(arguments)
    if options.one is not None:
        size, task, way, result = options.one
        print(json.dumps(measure(options, int(size), task, way, Path(result))))
        return 0

    print(f"threads: {options.threads}")
    print("| task | pixels | way | seconds | processor | peak memory | files | largest difference | rms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = False
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    ways = [way for way in WAYS if way in options.ways]  # `whole` first: the others are compared with it
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            for task in options.tasks:
                for way in ways:
                    one = ["--one", str(size), task, way, f"{folder}/{size}-{task}.pt"]
                    command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), *one]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
                    head = f"| {task} | {size} | {WAYS[way]} |"
                    if done.returncode:
                        print(f"{head} failed with status {done.returncode} |", flush=True)
                        failed = True
                        continue
                    row = json.loads(done.stdout.splitlines()[-1])
                    if "skipped" in row:
                        print(f"{head} left out: {row['skipped']} |", flush=True)
                        continue
                    compared = f"{row['largest']:.1e} | {row['rms']:.1e}" if "largest" in row else " | "
                    print(
                        f"{head} {row['seconds']:.0f} s | {row['cpu']:.0f} s | {row['memory']:.2f} GB | "
                        f"{row['files']:.1f} GB | {compared} |",
                        flush=True,
                    )
                    if way.startswith("exact"):
                        failed |= row.get("largest", 0.0) > LARGEST_DIFFERENCE or row["memory"] > LARGEST_MEMORY_GB
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
