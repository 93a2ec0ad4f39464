"""Published feature weights: where they lie, and how they are read. Nothing is downloaded.

A file is known by its published name. What it holds is tensors alone: safetensors, or torch's own format without any
code, both that of today and that of before torch 1.6, in which VGG16 and the Inception of FID were published.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.safe_files import read_safetensors
from darkroom.safe_pickle import iter_stored, read_structure, stored_table


def weights_folder() -> Path:
    """Where downloaded feature weights live: $DARKROOM_WEIGHTS, else ~/.cache/darkroom/weights."""
    return Path(os.environ.get("DARKROOM_WEIGHTS") or Path.home() / ".cache" / "darkroom" / "weights").expanduser()


def find_weights(names: Sequence[str]) -> Path | None:
    """The first of these files that is in `weights_folder()`; a name may have folders in it."""
    return next((path for name in names if (path := weights_folder() / name).is_file()), None)


def need_weights(names: Sequence[str], what: str, source: str) -> Path:
    """The same, or a DarkroomError that says which file of `source` to put where."""
    found = find_weights(names)
    if found is None:
        raise DarkroomError(
            f"{what}: no weights here; put {' or '.join(names)} (from {source}) into {weights_folder()}, or set "
            "DARKROOM_WEIGHTS to the folder that has it"
        )
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, in the dtype they are stored in; no code in it is run."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if _is_zip(path):
        stored = stored_table(read_structure(path))
        return dict(iter_stored(path, stored))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # tensors only, as by our own reader
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DarkroomError(
            f"{path}: not a readable weights file ({str(error).splitlines()[0]}); download it again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise DarkroomError(f"cannot read {path}: {error.strerror or error}") from None


@torch.no_grad()
def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Strictly: every tensor of the network is in `state`, with its shape, and nothing else is. path: for messages."""
    own = network.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unknown or wrong:
        problem = (
            f"has no {missing[0]}"
            if missing
            else f"has {unknown[0]}, which has no place"
            if unknown
            else f"has {wrong[0]} of shape {list(state[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}"
        )
        raise DarkroomError(f"{path}: it {problem}; it is not the published file, download it again")
    for name, value in own.items():
        value.copy_(state[name])
