"""The little that a training step must know about several processes (torchrun)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among the others."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device: str = "auto") -> World:
    """Join the process group that torchrun announces in the environment; alone, do nothing.

    device: "auto", "cpu" or "cuda". Each process takes the GPU of its own number ("cuda" means that one from here on).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if ":" in device:
            raise DarkroomError(f"--device {device}: with several processes each takes a GPU of its own; use cuda")
        if local >= count:
            raise DarkroomError(f"process {local + 1} of this machine has no GPU, there are {count}; start {count}")
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size())


def wrap(module: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel around one phase when there are several processes."""
    if world.size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def of_first_rank(value: T, world: World) -> T:
    """The first process's value everywhere: what is measured or chosen by chance must not differ between ranks."""
    if world.size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """True on every rank when it is true on one: all ranks must skip a step together."""
    if world.size == 1:
        return flag
    tensor = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return bool(tensor.item())


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """The mean of a scalar over all processes, for logs."""
    if world.size == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / world.size
