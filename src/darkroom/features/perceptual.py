"""Our own perceptual distance and image embedding: a small network, trained by the recipe `perceptual`.

The distance has the form of LPIPS (Zhang et al. 2018, arXiv 1801.03924): features of several stages, unit length along
the channels, squared differences, one non-negative weight per channel, mean over positions, sum over stages. Two things
differ from VGG16. Features are compared *after* pooling with an overlapping window, so that they are local energies
rather than exact positions: a shift by one pixel costs little, a missing texture much. And the unit length is
regularised, f / sqrt(|f|^2 + EPSILON^2): where nearly nothing responds, noise is not blown up to full length.

Shapes: B batch, C image channels, H W image size, N = B for C = 3, else B*C, D width of the embedding.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.config import from_dict
from darkroom.errors import DarkroomError
from darkroom.safe_files import read_json, read_safetensors

EPSILON = 0.1  # length below which a feature vector counts as weak
SMALLEST = 16  # pixels that four poolings need
BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "perceptual"


@dataclass(frozen=True)
class PerceptualConfig:
    """Widths of the stages, each at half the size of the one before; few channels where there are many pixels."""

    widths: tuple[int, ...] = (16, 48, 96, 128, 192)
    first_kernel: int = 5  # of the first convolution; all others are 3
    two_convolutions_from: int = 3  # stages from here on have two

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.first_kernel % 2 == 0:
            raise DarkroomError(
                f"perceptual network with widths {list(self.widths)} and first_kernel {self.first_kernel}: widths must "
                "be positive and the kernel odd"
            )


class PerceptualNetwork(nn.Module):
    """(B, C, H, W) twice, in [-1, 1] -> (B,) distances.

    Images of another number of channels than 3 are taken channel by channel as grey pictures; the distances and
    embeddings of the channels are averaged. Convolutions run in the precision of a surrounding autocast, the rest in
    float32.
    """

    def __init__(self, config: PerceptualConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PerceptualConfig()
        self.stages = nn.ModuleList()
        channels = 3
        for i, width in enumerate(config.widths):
            self.stages.append(
                _Stage(
                    channels, width, config.first_kernel if i == 0 else 3, 2 if i >= config.two_convolutions_from else 1
                )
            )
            channels = width
        # exp(log_weights) are the weights of the channels; all start at 1 / number of stages.
        start = -math.log(len(config.widths))
        self.log_weights = nn.ParameterList(nn.Parameter(torch.full((w,), start)) for w in config.widths)

    @property
    def embedding_width(self) -> int:
        return sum(self.config.widths)

    @property
    def sha256(self) -> str:
        """Identity of the weights, whatever file they came from: scores made with them carry it."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def features(self, image: Tensor) -> list[Tensor]:
        """[(N, widths[0], H/2, W/2), (N, widths[1], H/4, W/4), ...]; the last stage is not pooled. Sides below 16 are
        continued by their edge."""
        if image.shape[1] != 3:
            image = image.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)
        height, width = image.shape[-2:]
        if min(height, width) < SMALLEST:
            image = F.pad(image, (0, max(0, SMALLEST - width), 0, max(0, SMALLEST - height)), mode="replicate")
        x = image.to(self.log_weights[0].dtype).contiguous(memory_format=torch.channels_last)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i + 1 < len(self.stages):
                x = F.avg_pool2d(x, 4, 2, 1, count_include_pad=False)
            maps.append(x)
        return maps

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        if image.shape != other.shape:
            raise ValueError(f"images of different shapes: {tuple(image.shape)} and {tuple(other.shape)}")
        distance = self.compare(self.features(image), self.features(other))
        return distance if image.shape[1] == 3 else distance.view(image.shape[0], -1).mean(1)

    def compare(self, one: list[Tensor], two: list[Tensor]) -> Tensor:
        """The distances (N,) between feature maps of two lots of images."""
        total = torch.zeros(one[0].shape[0], device=one[0].device)
        with torch.autocast(one[0].device.type, enabled=False):
            for a, b, log_weight in zip(one, two, self.log_weights, strict=True):
                difference = (unit_length(a) - unit_length(b)).square().mean((2, 3))
                total = total + difference @ log_weight.float().exp()
        return total

    def embed(self, image: Tensor) -> Tensor:
        """(B, D) float32: the mean features of every stage, for Frechet distances and nearest neighbours."""
        with torch.autocast(image.device.type, enabled=False):
            pooled = torch.cat([m.float().mean((2, 3)) for m in self.features(image.float())], 1)
        return pooled if image.shape[1] == 3 else pooled.view(image.shape[0], image.shape[1], -1).mean(1)


class _Stage(nn.Module):
    """Convolutions with ReLU behind each."""

    def __init__(self, channels: int, width: int, kernel: int, count: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for i in range(count):
            size = kernel if i == 0 else 3
            convolution = nn.Conv2d(channels if i == 0 else width, width, size, padding=size // 2)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.convolutions.append(convolution)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return x


def unit_length(features: Tensor) -> Tensor:
    """(N, C, h, w) -> f / sqrt(|f|^2 + EPSILON^2) along the channels, in float32; smooth everywhere."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + EPSILON**2)


def load_perceptual(folder: Path | str | None = None) -> PerceptualNetwork:
    """The bundled network, or the one that `darkroom train` left in `folder`; frozen, in eval mode."""
    place = BUNDLED if folder is None else Path(folder)
    if not (place / "config.json").is_file():
        raise DarkroomError(f"{place}: no perceptual network here (config.json is missing); check the folder")
    config = from_dict(PerceptualConfig, read_json(place / "config.json")["network"], "network")
    network = PerceptualNetwork(config)
    state = {k: v.float() for k, v in read_safetensors(place / "model.safetensors").items()}
    own = network.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise DarkroomError(f"{place / 'model.safetensors'}: does not fit its config.json ({wrong[0]}); train it again")
    network.load_state_dict(state, strict=True)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()
