"""`darkroom doctor`: is this machine and this installation fit to work?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

REQUIRED = ("torch", "numpy", "pillow", "safetensors", "pyyaml", "tokenizers", "rich", "click")
OPTIONAL = {"tensorboard": "event files of training runs"}
LOW_DISK_GB = 2.0


@click.command(short_help="Check this machine.")
@click.option("--json", "as_json", is_flag=True, help="For programs and bug reports.")
def doctor(as_json: bool) -> int:
    """Check Python, torch, devices, speed, disk space, packages and the bundled models.

    Leaves with status 1 if something will not work.
    """
    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(len(name) for name in facts["checks"])
        for name, value in facts["checks"].items():
            click.echo(f"{name.ljust(width)}  {value}")
        for problem in facts["problems"]:
            click.echo(f"PROBLEM: {problem}")
        click.echo("Something needs mending." if facts["problems"] else "All is well.")
    return 1 if facts["problems"] else 0


def examine() -> dict[str, Any]:
    """{"checks": {name: what was found}, "problems": [one line each]}."""
    import torch

    from darkroom import __version__

    checks: dict[str, str] = {
        "darkroom": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {_memory()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    problems: list[str] = []
    _packages(checks, problems)
    _devices(checks, problems)
    _disk(checks, problems)
    _bundled(checks, problems)
    return {"checks": checks, "problems": problems}


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{total / 2**30:.0f} GiB memory"


def _packages(checks: dict[str, str], problems: list[str]) -> None:
    found = []
    for package in REQUIRED:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"the package {package} is missing: install darkroom-ldm again")
    checks["packages"] = ", ".join(found)
    checks["optional"] = ", ".join(
        f"{name} {'is there' if importlib.util.find_spec(name) else 'is absent'} ({use})"
        for name, use in OPTIONAL.items()
    )


def _devices(checks: dict[str, str], problems: list[str]) -> None:
    import torch

    devices = [torch.device("cpu")]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        devices.append(accelerator)
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        try:
            full, half = (_gflops(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        except RuntimeError as error:
            problems.append(f"{name} cannot multiply matrices: {str(error).splitlines()[0]}")
            continue
        verdict = "bfloat16 pays" if half > 1.2 * full else "bfloat16 does not pay"
        checks[name] = f"{full:.0f} GFLOP/s in float32, {half:.0f} in bfloat16: {verdict}"


def _gflops(device: Any, dtype: Any, seconds: float = 0.15) -> float:
    """Matrix products of 1024x1024 per second, in units of 1e9 operations (a product takes 2*1024^3); the best run."""
    import torch

    n = 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return 2 * n**3 / best / 1e9


def _disk(checks: dict[str, str], problems: list[str]) -> None:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    checks["disk here"] = f"{free:.1f} GB free"
    if free < LOW_DISK_GB:
        problems.append(f"only {free:.1f} GB are free in {Path.cwd()}: a training run needs more")


def _bundled(checks: dict[str, str], problems: list[str]) -> None:
    from darkroom.errors import DarkroomError
    from darkroom.model_folder import BUNDLED, bundled, describe_folder
    from darkroom.model_io import load

    names = bundled()
    checks["bundled models"] = ", ".join(names) or "none"
    for name in names:
        try:
            if changed := describe_folder(BUNDLED / name)["changed_files"]:
                problems.append(
                    f"the bundled model {name} is damaged ({', '.join(changed)}): install darkroom-ldm again"
                )
            load(name, device="cpu")
        except DarkroomError as error:
            problems.append(f"the bundled model {name} does not load: {error}")
