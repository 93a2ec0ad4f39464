"""LPIPS: perceptual distance of VGG16 features (Zhang et al. 2018, arXiv 1801.03924), version 0.1.

The state-dict keys are those of the first-stage checkpoints (`net.slice1.0.weight`, `lin0.model.1.weight`,
`scaling_layer.shift`). Shapes: B batch, H W image size; images have 3 channels in [-1, 1] (1 channel is repeated).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features.weight_files import read_weights, weights_folder

VGG_FILE = "vgg16-397923af.pth"  # torchvision's ImageNet weights
LINEAR_FILE = "vgg.pth"  # the linear heads: lpips/weights/v0.1/vgg.pth of the authors' repository

# Layers of torchvision's vgg16().features in each slice: (index, input channels, output channels) of the convolutions.
# A slice ends with the ReLU behind its last convolution and, from the second on, starts with a max-pooling.
SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)


class LPIPS(nn.Module):
    """(B, 3, H, W) twice, in [-1, 1] -> (B,). Evaluation only: no dropout, no gradients for its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _VGG16()
        for i, convolutions in enumerate(SLICES):
            setattr(self, f"lin{i}", _Linear(convolutions[-1][2]))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        if image.shape[1] not in (1, 3):
            raise DarkroomError(
                f"LPIPS takes images of 1 or 3 channels, got {image.shape[1]}: use perceptual=laplacian"
            )
        if min(image.shape[-2:]) < 16:
            raise DarkroomError(f"LPIPS needs sides of at least 16 pixels, got {tuple(image.shape[-2:])}")
        one, two = (self.net(self.scaling_layer(x.expand(-1, 3, -1, -1))) for x in (image, other))
        total = torch.zeros(image.shape[0], device=image.device)
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            difference = (_unit(a) - _unit(b)).square()
            weight = getattr(self, f"lin{i}").model[1].weight
            total = total + (difference * weight.to(difference)).sum(1).flatten(1).mean(1)
        return total


class _Scaling(nn.Module):
    """[-1, 1] -> standardised like the images VGG16 was trained on (ImageNet statistics in that range)."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.shift.to(image)) / self.scale.to(image)


class _VGG16(nn.Module):
    """The features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        for number, convolutions in enumerate(SLICES, 1):
            convs = {str(i): nn.Conv2d(c, out, 3, padding=1) for i, c, out in convolutions}
            setattr(self, f"slice{number}", nn.ModuleDict(convs))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number in range(1, len(SLICES) + 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            for conv in getattr(self, f"slice{number}").values():
                x = F.relu(conv(x))
            features.append(x)
        return features


class _Linear(nn.Module):
    """One non-negative weight per channel. The identity stands where dropout was and keeps the key `model.1`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


def _unit(features: Tensor) -> Tensor:
    """Unit length along the channels, in float32. vector_norm has gradient 0 where a position's features are all 0."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def lpips_available(folder: Path | None = None) -> bool:
    """True when both published files are in `folder` (default: `weights_folder()`)."""
    folder = folder or weights_folder()
    return (folder / VGG_FILE).is_file() and (folder / LINEAR_FILE).is_file()


def load_lpips(folder: Path | None = None) -> LPIPS:
    """LPIPS with the published weights from `folder` (default: `weights_folder()`)."""
    folder = folder or weights_folder()
    missing = [name for name in (VGG_FILE, LINEAR_FILE) if not (folder / name).is_file()]
    if missing:
        raise DarkroomError(
            f"LPIPS weights not found: put {' and '.join(missing)} ({VGG_FILE} is torchvision's vgg16, {LINEAR_FILE} "
            f"the linear heads lpips/weights/v0.1/vgg.pth) into {folder} or set DARKROOM_WEIGHTS, "
            "or use perceptual=laplacian"
        )
    return lpips_from_published(read_weights(folder / VGG_FILE), read_weights(folder / LINEAR_FILE))


def lpips_from_published(vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> LPIPS:
    """From torchvision's vgg16 state dict (`features.N.weight`; its classifier is ignored) and the linear heads."""
    model = LPIPS()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("scaling_layer.")}
    for key, own in model.state_dict().items():
        if key in state:
            continue
        part = key.split(".")
        source, name = (vgg, f"features.{part[2]}.{part[3]}") if part[0] == "net" else (linear, key)
        if name not in source or source[name].shape != own.shape:
            found = tuple(source[name].shape) if name in source else "nothing"
            raise DarkroomError(f"LPIPS weights: {name} must have shape {tuple(own.shape)}, found {found}: wrong file?")
        state[key] = source[name]
    model.load_state_dict(state, strict=True)
    return model
