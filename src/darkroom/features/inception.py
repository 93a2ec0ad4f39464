"""The Inception network of FID (Heusel et al. 2017), under the names of its published PyTorch weights.

It is the TensorFlow graph `inception-2015-12-05` (Szegedy et al. 2016, trained by Google), which is not torchvision's
Inception v3: 1008 logits, average poolings that leave padding out of their mean, and a max pooling in the place of the
last average pooling. The file `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid is the same as torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`.

Shapes: B batch, C channels, H W size of a feature map. Pictures are (B, 3, 299, 299) in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.features.weight_files import fill, find_weights, need_weights, read_weights

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
SOURCE = "the releases of pytorch-fid or torch-fidelity"
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins
SIDE, WIDTH, CLASSES = 299, 2048, 1008
BN_EPSILON = 0.001


class InceptionFeatures(NamedTuple):
    """embedding (B, 2048): what FID and KID compare; logits (B, 1008) without their bias, which the Inception score
    leaves out (Salimans et al. 2016, released code)."""

    embedding: Tensor
    logits: Tensor


class Convolution(nn.Module):
    """Convolution without bias, norm by running statistics, ReLU. After `fold` the norm is in the convolution."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (sides[0] // 2, sides[1] // 2) if padding else (0, 0)
        self.conv = nn.Conv2d(channels, width, sides, stride, around, bias=False)
        norm = nn.BatchNorm2d(width, eps=BN_EPSILON)
        norm.num_batches_tracked = None  # a count of training steps, which the published file does not have
        self.bn: nn.Module = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """conv <- conv with the norm's factor and offset; float64 in between, so that folding costs one rounding."""
        if isinstance(self.bn, nn.BatchNorm2d):
            dtype = self.conv.weight.dtype
            folded = nn.utils.fuse_conv_bn_eval(self.conv.double(), self.bn.double()).to(dtype)
            self.conv, self.bn = folded.requires_grad_(False), nn.Identity()


def average(x: Tensor) -> Tensor:
    """3x3 mean around each place, of the places that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def chain(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class InceptionA(nn.Module):
    """35x35: 1x1 | 5x5 | two 3x3 | mean."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = chain(x, self.branch5x5_1, self.branch5x5_2)
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class InceptionB(nn.Module):
    """35x35 -> 17x17: 3x3 | two 3x3 | maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2, padding=False)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, padding=False)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17x17: 1x1 | 7x7 as 1x7 and 7x1 | the same twice | mean."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, narrow, 1)
        self.branch7x7_2 = Convolution(narrow, narrow, (1, 7))
        self.branch7x7_3 = Convolution(narrow, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(channels, narrow, 1)
        self.branch7x7dbl_2 = Convolution(narrow, narrow, (7, 1))
        self.branch7x7dbl_3 = Convolution(narrow, narrow, (1, 7))
        self.branch7x7dbl_4 = Convolution(narrow, narrow, (7, 1))
        self.branch7x7dbl_5 = Convolution(narrow, 192, (1, 7))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class InceptionD(nn.Module):
    """17x17 -> 8x8: 3x3 | 7x7 and 3x3 | maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, padding=False)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, padding=False)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8x8: 1x1 | 1x3 and 3x1 side by side | the same behind a 3x3 | a pooling.

    maximum: of the second of the two blocks, whose pooling in the graph is a maximum, against the paper's figure.
    """

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else average(x)
        sides = (self.branch3x3_2a(three), self.branch3x3_2b(three))
        double_sides = (self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double))
        return torch.cat([self.branch1x1(x), *sides, *double_sides, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> `InceptionFeatures`. Frozen, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=False)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, maximum=False)
        self.Mixed_7c = InceptionE(2048, maximum=True)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> InceptionFeatures:
        x = chain(image, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3), 3, stride=2)
        x = chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a)
        x = chain(x, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        x = chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        embedding = x.mean((2, 3))
        return InceptionFeatures(embedding, F.linear(embedding, self.fc.weight))

    def fold(self) -> Inception:
        """Norms into convolutions, and pixels beside pixels in memory: the same function, faster."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def inception_available() -> bool:
    return find_weights(FILES) is not None


def inception_file() -> Path:
    """The published weights, or a DarkroomError that says where to put them."""
    return need_weights(FILES, "the Inception network of FID", SOURCE)


def load_inception(path: Path | None = None) -> Inception:
    """With the weights of the published file (default: `inception_file()`), ready for use."""
    path = path or inception_file()
    state = {name: value for name, value in read_weights(path).items() if not name.endswith(".num_batches_tracked")}
    with torch.device("meta"):
        network = Inception()
    network.to_empty(device="cpu")
    fill(network, state, path)
    return network.fold()
