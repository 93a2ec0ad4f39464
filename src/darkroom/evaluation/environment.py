"""On what a number was made, in the words of a record."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

from darkroom import __version__
from darkroom.evaluation.protocol import Environment


def hardware(device: torch.device) -> str:
    """What the numbers were made on, in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def precision_words(device: torch.device, precision: torch.dtype) -> str:
    """ "float32", and whether a GPU rounds what goes into products and convolutions of it, which moves scores."""
    words = str(precision).removeprefix("torch.")
    if device.type != "cuda" or precision != torch.float32:
        return words
    rounded = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    which = " and ".join(name for name, so in rounded.items() if so)
    return f"{words}, {which} in TF32" if which else words


def environment(device: torch.device, batch_size: int, precision: torch.dtype = torch.float32) -> Environment:
    """Versions and hardware of this process."""
    return Environment(
        darkroom=__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        hardware=hardware(device),
        device=str(device),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        precision=precision_words(device, precision),
    )
