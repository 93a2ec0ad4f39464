"""What it brings to keep freed memory during training (`training.freed_memory`): step time and peak with and without.

    python benchmarks/freed_memory.py [--rounds 3] [--steps 3] [--threads 1] [--check]

Two rows: the U-Net of the recipe inpaint-f1 on 8 random pictures of 128x128 (no first stage), and that of
clothing-inpaint on latents of 32x32, in bfloat16 where the processor has it. Each measurement is a process of its own,
with and without in turns; seconds are the median of the steps, peak memory is all of the process. With --check the exit
status is 1 if the first row gains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

ROWS = {"inpaint-f1, 8 x 128x128": ("inpaint-f1", 3, 128), "clothing-inpaint, 8 x 32x32": ("clothing-inpaint", 4, 32)}
BATCH = 8


def measure(name: str, channels: int, side: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds of a training step of the recipe's network, of them in the kernel, and the peak in GB."""
    import resource
    import time
    from dataclasses import replace

    import torch

    from darkroom.networks.unet import UNet, UNetConfig
    from darkroom.training.freed_memory import keep_freed_memory
    from darkroom.training.loop import autocast_dtype
    from darkroom.training.recipe import find_recipe, read_recipe, resolve

    keep_freed_memory()
    dtype = autocast_dtype("auto", torch.device("cpu"))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = resolve(read_recipe(find_recipe(name))).denoiser.network
    assert isinstance(config, UNetConfig)
    network = UNet(replace(config, in_channels=channels, out_channels=channels))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters())
    x, time_ = torch.randn(BATCH, channels, side, side), torch.rand(BATCH)
    seconds, kernel = [], 0.0
    for step in range(steps + 1):
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = (network(x, time_) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step:  # the first one warms up
            seconds.append(time.perf_counter() - started)
            kernel += resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": statistics.median(seconds), "kernel": kernel / steps, "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # of a child
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*ROWS[options.row], options.steps, options.threads)))
        return 0
    print("| training step | given back | kept | ratio | in the kernel | peak memory |\n|---|---|---|---|---|---|")
    ratios = {}
    for row in ROWS:
        found: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
        for _ in range(options.rounds):
            for keep, results in found.items():
                command = [sys.executable, __file__, "--row", row, "--steps", str(options.steps)]
                command += ["--threads", str(options.threads)]
                environment = os.environ | {"DARKROOM_KEEP_MEMORY": keep, "OMP_NUM_THREADS": str(options.threads)}
                output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
                results.append(json.loads(output))
        freed, kept = ({k: statistics.median(r[k] for r in found[keep]) for k in found[keep][0]} for keep in "01")
        ratios[row] = freed["seconds"] / kept["seconds"]
        print(
            f"| {row} | {freed['seconds']:.2f} s | {kept['seconds']:.2f} s | {ratios[row]:.2f} "
            f"| {freed['kernel']:.2f} and {kept['kernel']:.2f} s | {freed['peak']:.2f} and {kept['peak']:.2f} GB |",
            flush=True,
        )
    return int(options.check and next(iter(ratios.values())) <= 1)


if __name__ == "__main__":
    sys.exit(main())
