"""Training checkpoints: one safetensors file that holds everything a bit-equal resume needs.

Weights, optimiser state and averages are tensors under path-like names; counters are JSON in the file's metadata.
No random state is stored, because none exists: every draw comes from a generator seeded by (seed, stage, step).
The file is written to a temporary name, synced, and renamed, so a crash leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.training.ema import EMA


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW state as flat tensors: "{parameter index}/{state name}"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; the parameter groups (rates, decay) stay those of the running config."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape and value.ndim > 0:
            # The fused optimiser walks memory, not indices: its state must lie in memory as its parameter does.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: EMA | None,
    counters: Mapping[str, Any],
) -> None:
    """Write atomically. Raises DarkroomError when the disk is full; the earlier checkpoint is untouched."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        tensors |= {f"optimizer/{name}/{k}": v for k, v in optimizer_tensors(optimizer).items()}
    if ema is not None:
        tensors |= {f"ema/{k}": v for k, v in ema.averages.items()}
    tensors = {k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    meta = {**counters, "ema_updates": ema.updates if ema is not None else 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, temporary, metadata={"darkroom": json.dumps(meta)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "No space" in str(error) or "os error" in str(error).lower():
            raise DarkroomError(
                f"{path}: the checkpoint could not be written ({error}); free some space and go on with --resume"
            ) from error
        raise


def read_counters(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint without its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["darkroom"])


def load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: EMA | None,
) -> dict[str, Any]:
    """Fill modules, optimisers and averages in place (strict) and return the counters."""
    try:
        with safe_open(path, framework="pt") as file:
            take = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        counters = read_counters(path)
    except Exception as error:
        raise DarkroomError(f"{path}: not a readable checkpoint ({error}); delete it to use the one before") from error

    def under(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in take.items() if k.startswith(prefix)}

    try:
        for name, module in modules.items():
            module.load_state_dict(under(f"module/{name}/"), strict=True)
        for name, optimizer in optimizers.items():
            load_optimizer_tensors(optimizer, under(f"optimizer/{name}/"))
        if ema is not None:
            averages = under("ema/")
            if averages.keys() != ema.averages.keys():
                raise ValueError("other averaged weights")
            for key, value in averages.items():
                ema.averages[key].copy_(value)
            ema.updates = counters["ema_updates"]
    except (RuntimeError, IndexError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise DarkroomError(
            f"{path}: does not fit the networks of this config ({reason}); a run keeps its networks: undo the change, "
            "or start a new run"
        ) from error
    return counters


def all_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, by step number."""
    found = all_checkpoints(folder)
    return found[-1] if found else None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and any half-written file a kill left behind."""
    for old in all_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    for part in folder.glob(".step-*.part"):
        part.unlink(missing_ok=True)
