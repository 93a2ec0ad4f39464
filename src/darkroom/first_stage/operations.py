"""Encoder and decoder as a plain list of operations, for whoever runs them in another order than `forward`.

Each list computes the network in evaluation mode when its operations are applied one after the other (`run`). A
residual branch is `Remember ... Add`: what the first one sees is added, through a 1x1 convolution where the width
changes, to what the second one sees. Branches do not nest.
Shapes: B batch, C channels, H W map size, E latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Attention, Autoencoder, Bottleneck, Level, ResBlock
from darkroom.first_stage.grain import Grain, OutputGrain, with_squares
from darkroom.first_stage.quantizer import Codebook


@dataclass(frozen=True)
class Convolution:
    """A convolution of this module's weights; `padding` (left, right, top, bottom) with zeros."""

    conv: nn.Conv2d
    padding: tuple[int, int, int, int]

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.padding), self.conv.weight, self.conv.bias, self.conv.stride)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output."""
        left, right, top, bottom = self.padding
        (kh, kw), (sh, sw) = self.conv.kernel_size, self.conv.stride
        return (height + top + bottom - kh) // sh + 1, (width + left + right - kw) // sw + 1


@dataclass(frozen=True)
class Norm:
    """Group normalisation over the whole map, then SiLU or not."""

    norm: nn.GroupNorm
    silu: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.silu(x) if self.silu else x


@dataclass(frozen=True)
class Upsample:
    """Nearest neighbour, x2 along both sides."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


@dataclass(frozen=True)
class Remember:
    """Keep this map for the next `Add`, which passes it through the 1x1 convolution `shortcut`, if there is one."""

    shortcut: nn.Conv2d | None = None


@dataclass(frozen=True)
class Add:
    """Add the remembered map."""


@dataclass(frozen=True)
class Attend:
    """Single-head attention of every position to all: proj(softmax(q k^T / sqrt(C)) v); q, k, v, proj are 1x1."""

    q: nn.Conv2d
    k: nn.Conv2d
    v: nn.Conv2d
    proj: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = (conv(x).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.proj(h.transpose(1, 2).reshape(b, c, height, width))


@dataclass(frozen=True)
class AddGrain:
    """Add a decoder's fixed noise, whose rows depend on where in the map they are."""

    grain: Grain

    def __call__(self, x: Tensor) -> Tensor:
        return self.grain(x)


@dataclass(frozen=True)
class WithSquares:
    """The squares of all channels behind them."""

    def __call__(self, x: Tensor) -> Tensor:
        return with_squares(x)


@dataclass(frozen=True)
class AddOutputGrain:
    """Of C + 1 channels the last is the variance of the grain that is added to the others."""

    grain: OutputGrain

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows(x, 0)

    def rows(self, x: Tensor, start: int) -> Tensor:
        """(B, C + 1, n, W): the rows from `start` on -> (B, C, n, W)."""
        return x[:, :-1] + self.grain.of_variance(x[:, -1:], start)


@dataclass(frozen=True)
class Quantise:
    """The nearest code at each position."""

    codebook: Codebook

    def __call__(self, z: Tensor) -> Tensor:
        return self.codebook.lookup(self.codebook.nearest(z)).to(z.dtype)


Operation: TypeAlias = (
    Convolution | Norm | Upsample | Remember | Add | Attend | AddGrain | WithSquares | AddOutputGrain | Quantise
)


def encoder_operations(autoencoder: Autoencoder) -> list[Operation]:
    """(B, C, H, W) -> moments (B, 2E, h, w), for VQ the latent (B, E, h, w): what `autoencoder.moments` computes."""
    _check_mode(autoencoder)
    encoder = autoencoder.encoder
    operations: list[Operation] = [_same(encoder.conv_in)]
    for level in encoder.down:
        assert isinstance(level, Level)
        operations += _level(level)
        if level.downsample is not None:
            operations.append(Convolution(level.downsample.conv, (0, 1, 0, 1)))
    operations += _bottleneck(encoder.mid)
    operations += [Norm(encoder.norm_out, silu=True), _same(encoder.conv_out)]
    if autoencoder.quant_conv is not None:
        operations.append(_same(autoencoder.quant_conv))
    return operations


def decoder_operations(autoencoder: Autoencoder, quantize: bool = True) -> list[Operation]:
    """(B, E, h, w) -> (B, C, H, W): what `autoencoder.decode(latent, quantize)` computes."""
    _check_mode(autoencoder)
    decoder, operations = autoencoder.decoder, list[Operation]()
    if autoencoder.codebook is not None and quantize:
        operations.append(Quantise(autoencoder.codebook))
    if autoencoder.post_quant_conv is not None:
        operations.append(_same(autoencoder.post_quant_conv))
    operations += [_same(decoder.conv_in), *_bottleneck(decoder.mid)]
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        operations += _level(level)
        if level.upsample is not None:
            operations += [Upsample(), _same(level.upsample.conv)]
    operations.append(Norm(decoder.norm_out, silu=True))
    if decoder.grain is None:
        return [*operations, _same(decoder.conv_out)]
    both = _same(_beside(decoder.conv_out, decoder.grain.variance))
    return [*operations, WithSquares(), both, AddOutputGrain(decoder.grain)]


def run(operations: Iterable[Operation], x: Tensor) -> Tensor:
    """The operations one after the other on whole maps, (B, C, H, W) -> the last one's shape."""
    remembered = x
    for operation in operations:
        match operation:
            case Remember(shortcut):
                remembered = x if shortcut is None else shortcut(x)
            case Add():
                x = x + remembered
            case _:
                x = operation(x)
    return x


def shapes(operations: Sequence[Operation], channels: int, height: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(C, H, W) behind each operation, for an input of this shape."""
    for operation in operations:
        if isinstance(operation, Convolution):
            channels, (height, width) = operation.conv.out_channels, operation.size(height, width)
        elif isinstance(operation, AddOutputGrain):
            channels -= 1
        elif isinstance(operation, WithSquares):
            channels *= 2
        elif isinstance(operation, Upsample):
            height, width = 2 * height, 2 * width
        yield channels, height, width


def _same(conv: nn.Conv2d) -> Convolution:
    """As torch pads it: alike on both sides."""
    assert isinstance(conv.padding, tuple)
    height, width = conv.padding
    return Convolution(conv, (width, width, height, height))


def _beside(one: nn.Conv2d, other: nn.Conv2d) -> nn.Conv2d:
    """One convolution that gives the channels of both, of 3x3 places. The one reads only the first channels of what
    the other reads."""
    assert one.bias is not None and other.bias is not None
    both = nn.Conv2d(other.in_channels, one.out_channels + other.out_channels, 3, padding=1, device="meta")
    rest = one.weight.new_zeros(one.out_channels, other.in_channels - one.in_channels, 3, 3)
    weight = torch.cat([torch.cat([one.weight, rest], 1), other.weight])
    both.weight = nn.Parameter(weight, requires_grad=False)
    both.bias = nn.Parameter(torch.cat([one.bias, other.bias]), requires_grad=False)
    return both


def _level(level: Level) -> Iterator[Operation]:
    if level.grain is not None:
        yield AddGrain(level.grain)
    for i, block in enumerate(level.block):
        assert isinstance(block, ResBlock)
        yield from _res_block(block)
        if len(level.attn):
            yield from _attention(level.attn[i])


def _bottleneck(mid: Bottleneck) -> Iterator[Operation]:
    yield from _res_block(mid.block_1)
    if mid.attn_1 is not None:
        yield from _attention(mid.attn_1)
    yield from _res_block(mid.block_2)


def _res_block(block: ResBlock) -> Iterator[Operation]:
    yield Remember(block.nin_shortcut)
    yield from (Norm(block.norm1, silu=True), _same(block.conv1), Norm(block.norm2, silu=True), _same(block.conv2))
    yield Add()


def _attention(attention: nn.Module) -> Iterator[Operation]:
    assert isinstance(attention, Attention)
    yield from (Remember(), Norm(attention.norm, silu=False))
    yield from (Attend(attention.q, attention.k, attention.v, attention.proj_out), Add())


def _check_mode(autoencoder: Autoencoder) -> None:
    if autoencoder.training and autoencoder.config.dropout:
        raise DarkroomError("the autoencoder is in training mode and has dropout: call eval() before tiling")
