"""Small picture files and shards for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(number: int, size: tuple[int, int] = (12, 10), channels: int = 3) -> np.ndarray:
    """A smooth picture, uint8 (H, W, C) or (H, W), that differs from number to number."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    planes = [(x * (7 + c) + y * (3 + number % 5) + number * 29 + c * 50) % 256 for c in range(channels)]
    return np.squeeze(np.stack(planes, -1).astype(np.uint8))


def encoded(number: int, ending: str = "png", size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, size)).save(buffer, {"jpg": "JPEG"}.get(ending, ending.upper()))
    return buffer.getvalue()


def write(path: Path, data: bytes | str | dict[str, Any] | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict | list):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_shard(path: Path, members: dict[str, bytes | str | dict[str, Any]]) -> Path:
    """A tar (gzipped when the name ends in gz) of these members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as shard:
        for name, data in members.items():
            raw = (
                json.dumps(data).encode()
                if isinstance(data, dict)
                else data.encode()
                if isinstance(data, str)
                else data
            )
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            shard.addfile(info, io.BytesIO(raw))
    return path


def label_map(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
