"""From a found model to a model: its parts are built without numbers, compared strictly, and filled tensor by tensor.

The modules are made on the meta device, so that memory is taken once, in the precision that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from darkroom.blueprint import BoundedBuilding
from darkroom.build import build_conditioner, build_denoiser, build_first_stage
from darkroom.config import understanding
from darkroom.errors import DarkroomError, warn
from darkroom.first_stage.first_stage import FirstStage
from darkroom.interop.darkroom_model import kept_of
from darkroom.interop.diffusers_first_stage import Number
from darkroom.interop.found_model import LATENTS, FoundModel, check_tables
from darkroom.interop.tensor_file import some
from darkroom.interop.tensor_source import Shape, Table, TensorSource, read_table
from darkroom.latent_diffusion import LatentDiffusion


class SkipInitialisation(TorchFunctionMode):
    """Random fills do nothing: every number is about to be read from a file, and the caller's random state stays."""

    _fills = frozenset(
        {Tensor.uniform_, Tensor.normal_}
        | {
            getattr(nn.init, name)
            for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "orthogonal_")
        }
        | {nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_}
    )

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._fills:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def hollow_parts(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """The parts of a model on the meta device: names, shapes and dtypes, no numbers."""
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"), SkipInitialisation():
        if "first_stage" in configs:
            parts["first_stage"] = build_first_stage(configs["first_stage"])
        first_stage = parts.get("first_stage")
        assert first_stage is None or isinstance(first_stage, FirstStage)
        parts["denoiser"] = build_denoiser(configs["denoiser"])
        parts["conditioner"] = build_conditioner(configs["conditioner"], first_stage)
    return parts


def shapes_of(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Shape]]:
    """By part, our names and shapes."""
    return {part: {n: tuple(t.shape) for n, t in module.state_dict().items()} for part, module in parts.items()}


def checked_parts(found: FoundModel) -> dict[str, nn.Module]:
    """The hollow parts of a found model, after every name and shape was compared."""
    with understanding(found.path, found.title), BoundedBuilding(len(found.source.shapes), found.path):
        parts = hollow_parts(found.configs)
    check_tables(found, shapes_of(parts))
    return parts


def build_model(found: FoundModel, weights: str = "ema", dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """The model, on the CPU. Its peak of memory is its own size and that of one group of tensors.

    weights: "ema" (where the source has averaged ones) or "live". dtype: of the denoiser's network.
    """
    parts = checked_parts(found)
    parts["denoiser"].to(dtype)
    tables, check = found.tables_of(weights), FiniteCheck(found.path)
    for part, module in parts.items():
        fill(module, found.source, tables[part], check)
    check.tell()
    first_stage = parts.get("first_stage")
    if isinstance(first_stage, FirstStage):
        assert found.latents is not None
        for name, value in zip(LATENTS, found.latents, strict=True):
            setattr(first_stage, name, latent_numbers(name, value, first_stage.latent_channels))
        first_stage.requires_grad_(False)
    used = "ema" if found.averaged and weights == "ema" else "live"
    info = {**found.info, "path": str(found.path), "weights": used}
    model = LatentDiffusion(first_stage, parts["denoiser"], parts["conditioner"], info)  # type: ignore[arg-type]
    model.kept = kept_of(found)
    return model


class FiniteCheck:
    """Notes which tensors of a source hold NaN or infinity while they pass by.

    A sum is not finite where one of its terms is not: one reading of numbers that were just copied, about a tenth of
    the time that reading them from the page cache takes.
    """

    def __init__(self, path: object) -> None:
        self.path, self.names = path, list[str]()

    def see(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            wide = tensor.float() if tensor.itemsize == 1 else tensor
            if not bool(wide.sum().isfinite()) and not bool(wide.isfinite().all()):  # sums of large numbers overflow
                self.names.append(name)

    def tell(self) -> None:
        """One warning, if there is something to say."""
        if self.names:
            warn(
                f"{self.path} holds NaN or infinity in {len(self.names)} tensor{'s' * (len(self.names) != 1)} "
                f"({some(self.names)}), and what it makes will show it: take another copy or an earlier checkpoint"
            )


def fill(module: nn.Module, source: TensorSource, table: Table, check: FiniteCheck) -> None:
    """Put the source's tensors in the places of a hollow module's, in the module's dtypes."""
    state = module.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    taken: set[int] = set()
    for name, tensor in read_table(source, table, shapes):
        old = state[name]
        check.see(table[name].names[0], tensor)
        tensor = owned(tensor, old.dtype, taken)
        place, _, last = name.rpartition(".")
        owner = module.get_submodule(place)
        if isinstance(old, nn.Parameter):
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        else:
            owner._buffers[last] = tensor


def owned(tensor: Tensor, dtype: torch.dtype, taken: set[int]) -> Tensor:
    """A tensor that shares no memory with another; copied only if needed. `taken`: addresses of those given out."""
    storage = tensor.untyped_storage()
    is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
    if tensor.dtype != dtype or not is_whole or storage.data_ptr() in taken:
        tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor


def latent_numbers(name: str, value: Number, channels: int) -> Tensor:
    """() or (channels,) float32: a shift or scale of latents, if it can be one."""
    try:
        numbers = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise DarkroomError(f"the {name} of the latents is {value!r}: give one number, or one per channel") from None
    if numbers.shape not in ((), (channels,)):
        raise DarkroomError(
            f"{len(numbers)} numbers for the {name} of {channels} latent channels: give one number, or one per channel"
        )
    if not bool(torch.isfinite(numbers).all()) or (name == "scale" and not bool((numbers > 0).all())):
        raise DarkroomError(f"the {name} of the latents is {value}: it must be finite, and a scale positive")
    return numbers
