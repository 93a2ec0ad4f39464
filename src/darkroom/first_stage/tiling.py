"""Encode and decode images of any size in bounded memory, equal to the whole network within float rounding.

The network is a list of operations (operations.py) and is run map by map, each map strip by strip (strips.py); only
what a later pass needs again is stored (maps.py). A group norm needs the statistics of the whole map before the first
strip behind it can be computed, so those are taken while its input is written.

What does not fit `memory_gb` is spilled to unnamed temporary files. Without files it is computed again for every pass:
of the maps inside a residual block and behind upsampling only the statistics are kept then.

Shapes: B batch, C channels, H W image size, E latent channels, h w latent size.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder, check_image
from darkroom.first_stage.blended import blend_tiles
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.maps import MemoryMap, Shape, Source, StoredMap, Workspace
from darkroom.first_stage.operations import (
    Add,
    AddGrain,
    AddOutputGrain,
    Attend,
    Convolution,
    Norm,
    Operation,
    Quantise,
    Remember,
    Upsample,
    WithSquares,
    decoder_operations,
    encoder_operations,
    shapes,
)
from darkroom.first_stage.posterior import Posterior
from darkroom.first_stage.quantizer import precise
from darkroom.first_stage.strips import (
    Attended,
    Convolved,
    Grained,
    Normalised,
    OutputGrained,
    Squared,
    Statistics,
    Sum,
    Upsampled,
    UpsampledConvolved,
)

# Beyond the model and the image. With torch itself and kl-f8 in float32 the process stays below 4 GB.
DEFAULT_MEMORY_GB = 2.2
# Strips of a map, largest: what convolves fastest is in the processor's cache.
STRIP_BYTES = 2**23
# Strip-sized tensors that exist at one time: input with halo, its norm, output, sum, the window of a recomputed map.
STRIPS_AT_ONCE = 8
# Of blended tiles, in pixels: the size that most first stages were trained at or beyond.
DEFAULT_TILE = 512
# Where the system does not say how much memory is free.
FALLBACK_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Tiling:
    """How to encode or decode a large image. `FirstStage.encode(image, tile=512)` is short for Tiling(512).

    size: exact: a strip holds no more positions than a tile of this side, the memory decides otherwise; blended: the
    side of the tiles. "auto": the whole image at once where memory suffices, else tiles.
    mode: "exact", or "blended": independent overlapping tiles, faster for huge images, with an error (blended.py).
    memory_gb: for maps and strips, beyond the model and the image. None: 2.2, or for size "auto" half of what is free.
    spill: what does not fit goes to files in the system's temporary folder (True) or in this folder; False: no files,
    it is computed again instead.
    overlap: of blended tiles, in pixels, at most half a tile; None: a quarter.
    """

    size: int | Literal["auto"] = "auto"
    mode: Literal["exact", "blended"] = "exact"
    memory_gb: float | None = None
    spill: bool | str | Path = True
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1):
            raise DarkroomError(f'tile is {self.size!r}: it must be a number of pixels, at least 1, or "auto"')
        if self.mode not in ("exact", "blended"):
            raise DarkroomError(f'tile mode is "{self.mode}": it must be "exact" or "blended"')
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise DarkroomError(f"memory_gb is {self.memory_gb}: it must be a positive number")


Tile = int | Literal["auto"] | Tiling | None
"""What `encode` and `decode` take: the side of tiles in pixels, "auto", all options, or None: the whole image."""


def encode(autoencoder: Autoencoder | IdentityAutoencoder, image: Tensor, tile: Tile = None) -> Posterior:
    """`autoencoder.encode(image)`, tiled: (B, C, H, W) -> (B, E, h, w). Without gradients unless `tile` is None."""
    if tile is None or isinstance(autoencoder, IdentityAutoencoder):
        return autoencoder.encode(image)
    f = autoencoder.downsampling
    check_image(image, autoencoder.image_channels, f)
    moments = _tiled(autoencoder.moments, encoder_operations(autoencoder), image, tile, (f, 1))
    return Posterior.from_moments(moments) if autoencoder.codebook is None else Posterior(precise(moments))


def decode(autoencoder: Autoencoder | IdentityAutoencoder, latent: Tensor, tile: Tile = None) -> Tensor:
    """`autoencoder.decode(latent)`, tiled: (B, E, h, w) -> (B, C, H, W). Without gradients unless `tile` is None."""
    if tile is None or isinstance(autoencoder, IdentityAutoencoder):
        return autoencoder.decode(latent)
    operations = decoder_operations(autoencoder)
    return _tiled(autoencoder.decode, operations, latent, tile, (1, autoencoder.downsampling))


@torch.no_grad()
def _tiled(
    network: Callable[[Tensor], Tensor],
    operations: Sequence[Operation],
    x: Tensor,
    tile: int | Literal["auto"] | Tiling,
    scale: tuple[int, int],
) -> Tensor:
    """network(x), whose operations these are; scale: input and output positions per latent position."""
    tiling = tile if isinstance(tile, Tiling) else Tiling(tile)
    size = tiling.size
    memory = 1e9 * (tiling.memory_gb or DEFAULT_MEMORY_GB)
    if size == "auto":
        if tiling.memory_gb is None:
            memory = available_memory(x.device) / 2
        if len(x) * untiled_bytes(operations, x.shape[1:], x.element_size()) <= memory:
            return network(x)
    if tiling.mode == "blended":
        side = DEFAULT_TILE if size == "auto" else size
        overlap = side // 4 if tiling.overlap is None else tiling.overlap
        f = max(scale)
        return blend_tiles(network, x, max(side // f, 1), overlap // f, scale)
    positions = None if size == "auto" else size**2
    return torch.stack([run_strips(operations, one, int(memory), tiling.spill, positions) for one in x])


def run_strips(
    operations: Sequence[Operation],
    x: Tensor,
    memory: int,
    spill: bool | str | Path = True,
    positions: int | None = None,
) -> Tensor:
    """The operations on one map (C, H, W) -> (C', H', W'), in at most `memory` bytes beyond input and output.

    positions: at most so many in a strip (but whole rows, and no less than one).
    """
    folder = None if spill is False else Path(tempfile.gettempdir() if spill is True else spill)
    if folder is not None and not folder.is_dir():
        raise DarkroomError(f'there is no folder "{folder}" to spill activations to: create it or give another')
    strip_bytes = min(STRIP_BYTES, max(memory // (4 * STRIPS_AT_ONCE), 1))
    with torch.no_grad(), Workspace(memory - STRIPS_AT_ONCE * strip_bytes, folder) as workspace:
        return _Run(workspace, strip_bytes, positions, x).run(operations)


class _Run:
    """One pass over the operations. `current` is the map behind the last of them; it may be still to be computed."""

    def __init__(self, workspace: Workspace, strip_bytes: int, positions: int | None, x: Tensor) -> None:
        self.workspace, self.strip_bytes, self.positions = workspace, strip_bytes, positions
        self.itemsize = x.element_size()
        self.current: Source = self._in_memory(x)
        self.remembered: list[Source] = []
        self.statistics: Statistics | None = None  # of the current map, if they are known
        self.held = 0  # bytes of keys and values

    def run(self, operations: Sequence[Operation]) -> Tensor:
        for i, operation in enumerate(operations):
            if isinstance(operation, Norm | Remember | Upsample):  # read their input more than once, or want it small
                following = next((o for o in operations[i:] if not isinstance(o, Remember)), None)
                self._settle(normalised=isinstance(following, Norm))
            self._apply(operation)
        return self._output()

    def _apply(self, operation: Operation) -> None:
        current = self.current
        match operation:
            case Convolution() if isinstance(current, Upsampled) and UpsampledConvolved.fits(operation):
                self.current = UpsampledConvolved(current.source, operation.conv)
            case Convolution():
                self.current = Convolved(current, operation)
            case Norm(norm, silu):
                assert self.statistics is not None
                self.current = Normalised(current, *self.statistics.affine(norm), silu)
            case Upsample():
                self.current = Upsampled(current)
            case Remember(shortcut):
                kept = current if shortcut is None else Convolved(current, Convolution(shortcut, (0, 0, 0, 0)))
                self.remembered.append(kept)
                return
            case Add():
                self.current = Sum(current, self.remembered.pop())
            case Attend():
                self.held = 2 * current.shape.bytes(self.itemsize)
                if self.workspace.used + self.held > self.workspace.memory:
                    raise DarkroomError(
                        f"attention over the whole image needs {self.held / 1e9:.2f} GB for its keys and values: "
                        "raise memory_gb, or use blended tiles"
                    )
                self.workspace.used += self.held
                self.current = Attended(current, operation)
            case AddGrain(grain):
                self.current = Grained(current, grain)
            case WithSquares():
                self.current = Squared(current)
            case AddOutputGrain():
                self.current = OutputGrained(current, operation)
            case Quantise():
                # A latent is small; as a whole it is compared exactly as the network does it, near ties included.
                z = current.rows(0, current.shape.height).permute(2, 0, 1)
                self._close(current)
                self.current = self._in_memory(operation(z[None])[0])
        self.statistics = None

    def _in_memory(self, x: Tensor) -> MemoryMap:
        """(C, H, W) as a stored map."""
        stored = MemoryMap(Shape(x.shape[1], x.shape[2], x.shape[0]), self.workspace)
        stored.append(x.permute(1, 2, 0).contiguous())
        return stored

    def _settle(self, normalised: bool) -> None:
        """Store the current map if it is not, and take its statistics on the way if a norm follows.

        Where there is no room and no file for it, it stays as it is and will be computed again for every pass.
        """
        source = self.current
        stored, dying = None, set[StoredMap]()
        statistics = Statistics(source.shape.channels) if normalised and self.statistics is None else None
        if not isinstance(source, StoredMap) and self.statistics is None:
            dying = self._read_by_nobody_else(source)
            stored = self.workspace.make(source.shape, self.itemsize, sum(m.held for m in dying))
            # A sum is read twice by the next block, that one's by the next: computing it again would never end.
            if stored is None and isinstance(source, Sum):
                raise DarkroomError(
                    f"a map of {source.shape.bytes(self.itemsize) / 1e9:.2f} GB does not fit the memory allowed: "
                    "raise memory_gb, or allow files (spill)"
                )
        if stored is None and statistics is None:
            return
        for start, stop in self._strips(source):
            rows = source.rows(start, stop)
            if statistics is not None:
                statistics.add(rows)
            if stored is not None:
                stored.append(rows)
                for old, row in source.reads(stop):
                    if old in dying:
                        old.release(row)
        if stored is not None:
            self._close(source)
            self.current = stored
        if statistics is not None:
            self.statistics = statistics

    def _output(self) -> Tensor:
        source = self.current
        height, width, channels = source.shape
        out: Tensor | None = None
        for start, stop in self._strips(source):
            rows = source.rows(start, stop)
            if out is None:
                out = rows.new_empty(channels, height, width)
            out[:, start:stop] = rows.permute(2, 0, 1)
        assert out is not None
        return out

    def _read_by_nobody_else(self, source: Source) -> set[StoredMap]:
        others = {stored for other in self.remembered for stored, _ in other.reads(0)}
        return {stored for stored, _ in source.reads(0)} - others

    def _close(self, source: Source) -> None:
        for stored in self._read_by_nobody_else(source):
            stored.close()
        self.workspace.used -= self.held
        self.held = 0

    def _strips(self, source: Source) -> Iterator[tuple[int, int]]:
        """(start, stop) of strips for which no map that is computed on the way becomes too large."""
        shape = source.shape
        rows = self.strip_bytes // (source.widest * self.itemsize)
        if self.positions is not None:
            rows = min(rows, self.positions // shape.width)
        rows = max(1, rows // 2 * 2)  # even, because upsampling doubles rows
        for start in range(0, shape.height, rows):
            yield start, min(start + rows, shape.height)


def untiled_bytes(operations: Sequence[Operation], shape: Sequence[int], itemsize: int) -> int:
    """Memory at most that the network takes for one image (C, H, W) beyond its weights: an estimate from above."""
    before, remembered, most = math.prod(shape), 0, 0
    channels, height, width = shape
    for operation, (c, h, w) in zip(operations, shapes(operations, channels, height, width), strict=True):
        after = c * h * w
        match operation:
            case Remember(shortcut):
                remembered = (
                    before if shortcut is None else max(before, before // shortcut.in_channels * shortcut.out_channels)
                )
            case Attend():
                most = max(most, remembered + 6 * before)
            case _:
                # The norm's output is still there when SiLU writes its own; a convolution reorders what it reads.
                most = max(most, remembered + before + 2 * after)
        if isinstance(operation, Add):
            remembered = 0
        before = after
    return most * itemsize


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on this device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return FALLBACK_MEMORY
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)
