"""Modules without numbers: names and shapes of what a config describes, before any memory is taken for it.

A config may come from a stranger and ask for a billion layers. On the meta device they cost no memory, but time; so the
work of building is bounded by the number of tensors that the weights beside the config have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from darkroom.config import understanding
from darkroom.errors import DarkroomError

Shape = tuple[int, ...]
# Calls of torch functions while a module is built: its tensors, their initialisation, tables that are derived.
CALLS_PER_TENSOR, CALLS_OF_ITS_OWN = 50, 5000


class BoundedBuilding(TorchFunctionMode):
    """Raises when building takes many more steps than a module of so many tensors can need."""

    def __init__(self, tensors: int, source: object) -> None:
        super().__init__()
        self.left, self.tensors, self.source = CALLS_OF_ITS_OWN + CALLS_PER_TENSOR * tensors, tensors, source

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise DarkroomError(f"{self.source} describes far more tensors than the {self.tensors} of its weights")
        return function(*args, **(kwargs or {}))


def hollow(build: Callable[[], nn.Module], tensors: int, source: object, what: str) -> nn.Module:
    """What `build` makes, on the meta device. `source`: the file of its config, for messages."""
    with understanding(source, what), torch.device("meta"), BoundedBuilding(tensors, source):
        return build()


def check_fit(module: nn.Module, stored: Mapping[str, Shape], weights: object, config: object) -> None:
    """Whether a hollow module takes stored tensors of these names and shapes, all of them and no others; an error names
    what does not fit. Asked of the module itself, which may know older names."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise DarkroomError(f"{weights} does not fit {config}: {problems[0] if problems else error}") from None
