"""Operations as sources of rows: what a strip of their output needs of their input, and how it is computed.

Every row equals that of the whole map within float rounding: convolutions see the rows around a strip (zeros only
outside the image), norms have the statistics of the whole map, attention the keys and values of all positions.
Shapes: H W map size, C channels, n rows; rows are (n, W, C). P = n*W positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.first_stage.grain import Grain
from darkroom.first_stage.maps import Shape, Source, StoredMap
from darkroom.first_stage.operations import AddOutputGrain, Attend, Convolution
from darkroom.first_stage.quantizer import precise
from darkroom.kernels import linear

# Positions that are compared at once in attention: 4 MiB of float32 scores stay in the processor's cache.
QUERIES, KEYS = 256, 4096


class Statistics:
    """Mean and variance of the channels of a map, merged strip by strip in float64 (Chan et al. 1983)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)  # sum of (x - mean)^2

    def add(self, rows: Tensor) -> None:
        x = precise(rows).flatten(0, 1)  # (P, C)
        n = len(x)
        near = x.sum(0) / n
        x = x - near
        rest = x.sum(0).cpu().double() / n  # what rounding left of the mean
        squares = x.square_().sum(0).cpu().double() - n * rest.square()
        delta = near.cpu().double() + rest - self.mean
        self.squares += squares + delta.square() * (self.count * n / (self.count + n))
        self.mean += delta * (n / (self.count + n))
        self.count += n

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """scale, offset (C,) in float64: norm(x) = scale * x + offset."""
        assert norm.num_channels % norm.num_groups == 0
        in_groups = (norm.num_groups, norm.num_channels // norm.num_groups)
        means = self.mean.view(in_groups)
        mean = means.mean(1, keepdim=True)
        variance = (self.squares.view(in_groups) / self.count + (means - mean).square()).mean(1, keepdim=True)
        rstd = torch.rsqrt(variance + norm.eps).expand(in_groups).flatten()
        weight, bias = (None if t is None else t.detach().cpu().double() for t in (norm.weight, norm.bias))
        scale = rstd if weight is None else rstd * weight
        offset = -mean.expand(in_groups).flatten() * scale
        return scale, offset if bias is None else offset + bias


class Computed(Source):
    """Keeps the strip that it computed last: the next one begins a few rows before its end, and a residual branch asks
    for the same rows twice."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._start, self._kept = 0, None

    _kept: Tensor | None

    @abstractmethod
    def compute(self, start: int, stop: int) -> Tensor:
        """(n, W, C), a new tensor."""

    def rows(self, start: int, stop: int) -> Tensor:
        kept, first = self._kept, self._start
        if kept is None or not first <= start < first + len(kept):
            rows = self.compute(start, stop)
        elif stop <= first + len(kept):
            return kept[start - first : stop - first]
        else:
            rows = torch.cat([kept[start - first :], self.compute(first + len(kept), stop)])
        self._start, self._kept = start, rows
        return rows


class Convolved(Computed):
    def __init__(self, source: Source, convolution: Convolution) -> None:
        height, width = convolution.size(source.shape.height, source.shape.width)
        super().__init__(Shape(height, width, convolution.conv.out_channels))
        self.source, self._convolution = source, convolution
        _, _, self._top, _ = convolution.padding
        self._stride, self._reach = convolution.conv.stride[0], convolution.conv.kernel_size[0]

    def compute(self, start: int, stop: int) -> Tensor:
        conv, (left, right, _, _) = self._convolution.conv, self._convolution.padding
        first, last = start * self._stride - self._top, (stop - 1) * self._stride - self._top + self._reach
        height = self.source.shape.height
        x = _image(self.source.rows(max(first, 0), min(last, height)))
        border = (0, 0) if left == right else (left, right)
        if any(border) or first < 0 or last > height:
            x = F.pad(x, (*border, max(-first, 0), max(last - height, 0)))
        return _rows(F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, left if left == right else 0)))

    @property
    def widest(self) -> int:
        return max(super().widest, self._stride * self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start * self._stride - self._top)


class UpsampledConvolved(Computed):
    """A 3x3 convolution behind nearest-neighbour upsampling, at 4/9 of the arithmetic: output (2i+p, 2j+q) sees only
    2x2 positions of the small map, so each of the four parities (p, q) is a 2x2 convolution with summed weights."""

    def __init__(self, source: Source, conv: nn.Conv2d) -> None:
        height, width, _ = source.shape
        super().__init__(Shape(2 * height, 2 * width, conv.out_channels))
        self.source, self._conv = source, conv
        weight = conv.weight.detach()
        self._weights = [[_pair(_pair(weight, 2, p), 3, q) for q in (0, 1)] for p in (0, 1)]

    @staticmethod
    def fits(convolution: Convolution) -> bool:
        conv = convolution.conv
        return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and convolution.padding == (1, 1, 1, 1)

    def compute(self, start: int, stop: int) -> Tensor:
        height, width, _ = self.source.shape
        low, high = start // 2 - 1, (stop - 1) // 2 + 2
        x = _image(self.source.rows(max(low, 0), min(high, height)))
        x = F.pad(x, (1, 1, max(-low, 0), max(high - height, 0)))
        out = x.new_empty(stop - start, width, 2, self.shape.channels)
        for p in (0, 1):
            first, last = (start - p + 1) // 2, (stop - p + 1) // 2  # small rows whose parity p is asked for
            if first == last:
                continue
            part = x[:, :, first - 1 + p - low : last + p - low]
            for q in (0, 1):
                y = _rows(F.conv2d(part, self._weights[p][q], self._conv.bias))  # one column more than is used
                out[2 * first + p - start :: 2, :, q] = y[:, q : q + width]
        return out.flatten(1, 2)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start // 2 - 1)


class Upsampled(Source):
    """Nearest neighbour, x2."""

    def __init__(self, source: Source) -> None:
        height, width, channels = source.shape
        self.source, self.shape = source, Shape(2 * height, 2 * width, channels)

    def rows(self, start: int, stop: int) -> Tensor:
        low = start // 2
        x = self.source.rows(low, (stop - 1) // 2 + 1)
        return x.repeat_interleave(2, 0)[start - 2 * low : stop - 2 * low].repeat_interleave(2, 1)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start // 2)


class Normalised(Source):
    """scale * x + offset for each channel, then SiLU or not."""

    def __init__(self, source: Source, scale: Tensor, offset: Tensor, silu: bool) -> None:
        self.source, self.shape = source, source.shape
        self._scale, self._offset, self._silu = scale, offset, silu

    def rows(self, start: int, stop: int) -> Tensor:
        out, row = None, 0
        for piece in self.source.pieces(start, stop):
            exact = torch.promote_types(piece.dtype, torch.float32)
            if self._scale.dtype != exact or self._scale.device != piece.device:
                self._scale, self._offset = (t.to(piece.device, exact) for t in (self._scale, self._offset))
            if out is None:
                out = torch.empty((stop - start, *piece.shape[1:]), dtype=exact, device=piece.device)
            torch.addcmul(self._offset, piece.to(exact), self._scale, out=out[row : row + len(piece)])
            row += len(piece)
        assert out is not None
        if self._silu:
            F.silu(out, inplace=True)
        return out.to(piece.dtype)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start)


class Sum(Computed):
    def __init__(self, first: Source, second: Source) -> None:
        super().__init__(first.shape)
        self.first, self.second = first, second

    def compute(self, start: int, stop: int) -> Tensor:
        return self.first.rows(start, stop) + self.second.rows(start, stop)

    @property
    def widest(self) -> int:
        return max(super().widest, self.first.widest, self.second.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        yield from self.first.reads(start)
        yield from self.second.reads(start)


class Grained(Computed):
    def __init__(self, source: Source, grain: Grain) -> None:
        super().__init__(source.shape)
        self.source, self._grain = source, grain

    def compute(self, start: int, stop: int) -> Tensor:
        rows = self.source.rows(start, stop)
        return rows + _rows(self._grain.rows(start, stop, self.shape.width)).to(rows.dtype)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start)


class Squared(Computed):
    """A map and, behind its channels, their squares."""

    def __init__(self, source: Source) -> None:
        super().__init__(Shape(source.shape.height, source.shape.width, 2 * source.shape.channels))
        self.source = source

    def compute(self, start: int, stop: int) -> Tensor:
        rows = self.source.rows(start, stop)
        return torch.cat([rows, rows.square()], -1)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start)


class OutputGrained(Computed):
    def __init__(self, source: Source, operation: AddOutputGrain) -> None:
        shape = source.shape
        super().__init__(Shape(shape.height, shape.width, shape.channels - 1))
        self.source, self._operation = source, operation

    def compute(self, start: int, stop: int) -> Tensor:
        return _rows(self._operation.rows(_image(self.source.rows(start, stop)), start))

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start)


class Attended(Computed):
    """Keys and values of the whole map are held; queries are taken block by block."""

    def __init__(self, source: Source, attend: Attend) -> None:
        super().__init__(source.shape)
        height, width, _ = source.shape
        self.source, self._attend = source, attend
        self._keys: list[Tensor] = []  # (P, C)
        self._values: list[Tensor] = []  # (C, P)
        step = max(1, KEYS // width)
        for start in range(0, height, step):
            x = source.rows(start, min(start + step, height)).flatten(0, 1)
            self._keys.append(_project(x, attend.k))
            value = linear(_matrix(attend.v), x)
            self._values.append(value if attend.v.bias is None else value + attend.v.bias[:, None])

    def compute(self, start: int, stop: int) -> Tensor:
        x = self.source.rows(start, stop)
        queries = _project(x.flatten(0, 1), self._attend.q) * self.shape.channels**-0.5
        h = torch.cat([_softmax_average(q, self._keys, self._values) for q in queries.split(QUERIES)])
        return _project(h, self._attend.proj).view(x.shape)

    @property
    def widest(self) -> int:
        return max(super().widest, self.source.widest)

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        return self.source.reads(start)


def _softmax_average(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """q (P, C) -> (P, C): sum_j softmax_j(q k_j) v_j, block after block with the maximum so far (Milakov & Gimelshein
    2018). The sums are at least float32."""
    most = total = result = None
    for k, v in zip(keys, values, strict=True):
        scores = precise(linear(q, k))
        block_most = scores.amax(1, keepdim=True)
        new_most = block_most if most is None else torch.maximum(most, block_most)
        weights = scores.sub_(new_most).exp_()
        block_total, block_result = weights.sum(1, keepdim=True), precise(linear(weights.to(v.dtype), v))
        if most is None or total is None or result is None:
            total, result = block_total, block_result
        else:
            fade = (most - new_most).exp_()
            total = total.mul_(fade).add_(block_total)
            result = result.mul_(fade).add_(block_result)
        most = new_most
    assert result is not None and total is not None
    return result.div_(total).to(q.dtype)


def _project(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(P, C) -> (P, C'): a 1x1 convolution."""
    return linear(x, _matrix(conv), conv.bias)


def _matrix(conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach()[:, :, 0, 0]


def _pair(weight: Tensor, dim: int, parity: int) -> Tensor:
    """3 weights along `dim` -> the 2 that positions of this parity have behind nearest-neighbour upsampling."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c] if parity == 0 else [a + b, c], dim)


def _image(rows: Tensor) -> Tensor:
    """(n, W, C) -> (1, C, n, W) in channels_last, a view."""
    return rows.permute(2, 0, 1).unsqueeze(0)


def _rows(image: Tensor) -> Tensor:
    """(1, C, n, W) -> (n, W, C), a view of channels_last."""
    return image[0].permute(1, 2, 0).contiguous()
