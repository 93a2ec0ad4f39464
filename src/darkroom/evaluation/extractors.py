"""Which networks look at the pictures, and what the scores made with them are called.

LPIPS, FID and KID are names of exact weights. Scores made with other weights carry another name: those made with the
bundled perceptual network are `perceptual-darkroom`, `FD-darkroom` and `KD-darkroom`.

`EXTRACTORS` is the one table of what looks at whole pictures: `open_extractor(name, device)` gives a row of it, ready.
Shapes: B batch, C channels, H W image size, D width of an embedding, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.features import inception
from darkroom.features.clip_image import CLIP_IMAGE_SIZES, clip_file, load_clip_image
from darkroom.features.dinov2 import DINOV2_SIZES, dinov2_file, load_dinov2
from darkroom.features.lpips import LINEAR_FILE, VGG_FILE, load_lpips, lpips_available
from darkroom.features.perceptual import load_perceptual
from darkroom.features.resizing import resize_bicubic, resize_tf1, shorter_side_and_centre
from darkroom.features.weight_files import weights_folder
from darkroom.safe_files import sha256_of

AUTO = "auto"
CPU = torch.device("cpu")
DINOV2_SIDE = 224  # of Stein et al. 2023
# Mean and standard deviation of red, green and blue, in [0, 1], that the networks were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Features(NamedTuple):
    """What an extractor sees in B images, on the CPU: embedding (B, D) float32; probabilities (B, K) float32, or None
    where the network names no classes."""

    embedding: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A network that looks at pictures: `extractor(images)`, uint8 (B, H, W, 3) on the CPU -> `Features`.

    name:        its row in `EXTRACTORS`
    fd_name:     what a Frechet distance of its embeddings is called: "FID" only where the published weights are used
    kd_name:     the same for a kernel distance
    width:       D
    resize:      the rule in words, for the record
    weights:     SHA-256 of what it looks with
    has_classes: whether there are probabilities, which the Inception score is made of
    look:        images as above -> `Features`, on whatever device
    """

    name: str
    fd_name: str
    kd_name: str
    width: int
    resize: str
    weights: str
    has_classes: bool
    look: Callable[[Tensor], Features]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected images uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        embedding, probabilities = self.look(images)
        return Features(embedding.float().cpu(), None if probabilities is None else probabilities.float().cpu())


@dataclass(frozen=True)
class PerceptualDistance:
    """`distance(image, other)`: (B, C, H, W) twice, in [-1, 1] -> (B,). `weights`: SHA-256 of what it looked with."""

    name: str
    distance: Callable[[Tensor, Tensor], Tensor]
    weights: str


@dataclass(frozen=True)
class Embedding:
    """`embed(image)`: (B, C, H, W) in [-1, 1] -> (B, D). `name` goes behind FD- and rFD-."""

    name: str
    embed: Callable[[Tensor], Tensor]
    weights: str


def default_extractors(device: torch.device, channels: int = 3) -> tuple[PerceptualDistance, Embedding]:
    """LPIPS where its published files are (for 1 and 3 channels), else our own distance; always our own embedding."""
    own = load_perceptual().to(device)
    embedding = Embedding("darkroom", own.embed, own.sha256)
    if channels in (1, 3) and lpips_available():
        lpips: nn.Module = load_lpips().to(device)
        return PerceptualDistance("LPIPS", lpips, _digest_of_files()), embedding
    return PerceptualDistance("perceptual-darkroom", own, own.sha256), embedding


def _digest_of_files() -> str:
    digest = hashlib.sha256()
    for name in (VGG_FILE, LINEAR_FILE):
        digest.update((weights_folder() / name).read_bytes())
    return digest.hexdigest()


def open_extractor(name: str = AUTO, device: torch.device | str = "cpu") -> Extractor:
    """A row of `EXTRACTORS`. One whose weights are not there is a DarkroomError that says where to put which file.

    "auto" is FID's own network where its file is, else the bundled one.
    """
    if name == AUTO:
        name = "inception-tf" if inception.inception_available() else "darkroom"
    if name not in EXTRACTORS:
        raise DarkroomError(
            f'extractor "{name}" is not known{nearest(name, EXTRACTORS)}; known are {", ".join((AUTO, *EXTRACTORS))}'
        )
    return EXTRACTORS[name](torch.device(device))


def _darkroom(device: torch.device) -> Extractor:
    """The bundled perceptual network, always there. It is small and was trained on synthetic distortions: its scores
    rank models on one set of pictures, and mean nothing beside published ones."""
    network = load_perceptual().to(device)

    def look(images: Tensor) -> Features:
        return Features(network.embed(_pixels(images, device) / 127.5 - 1.0), None)

    return Extractor(
        name="darkroom",
        fd_name="FD-darkroom",
        kd_name="KD-darkroom",
        width=network.embedding_width,
        resize="none: pictures are looked at in their own size",
        weights=network.sha256,
        has_classes=False,
        look=look,
    )


def _inception(device: torch.device, clean: bool) -> Extractor:
    """FID's network, by the protocol of the TensorFlow program or that of clean-fid (Parmar et al. 2022). Weights in
    the same layout that are not the published ones give scores of another name."""
    path = inception.inception_file()
    weights = sha256_of(path)
    network = inception.load_inception(path).to(device)
    size = (inception.SIDE, inception.SIDE)

    def look(images: Tensor) -> Features:
        pixels = _pixels(images, device)
        pixels = resize_bicubic(pixels, size, rounded=False) if clean else resize_tf1(pixels, size)
        # 128 is zero, so that white is 0.992: so does the graph, whose first operations these are.
        found = network(_channels_last((pixels - 128.0) / 128.0))
        return Features(found.embedding, found.logits.softmax(1))

    ending = "-clean" if clean else ""
    other = "" if weights.startswith(inception.PUBLISHED) else f"-inception-{weights[:8]}"
    rule = "bicubic as Pillow on floats, smoothed (clean-fid)" if clean else "bilinear as TensorFlow 1"
    return Extractor(
        name="inception-clean" if clean else "inception-tf",
        fd_name=f"FD{other}{ending}" if other else f"FID{ending}",
        kd_name=f"KD{other}{ending}" if other else f"KID{ending}",
        width=inception.WIDTH,
        resize=f"to 299x299, {rule}; (x - 128) / 128",
        weights=weights,
        has_classes=True,
        look=look,
    )


def _dinov2(device: torch.device, size: str) -> Extractor:
    path = dinov2_file(size)
    network = load_dinov2(size, path).to(device)

    def look(images: Tensor) -> Features:
        # Bytes are resized on the CPU, in float64, which not every device has: they are the same everywhere.
        pixels = resize_bicubic(_pixels(images, CPU), (DINOV2_SIDE, DINOV2_SIDE), rounded=True)
        return Features(network(_standardised(pixels.to(device), IMAGENET)), None)

    return Extractor(
        name=f"dinov2-{size}",
        fd_name=f"FD-dinov2-{size}",
        kd_name=f"KD-dinov2-{size}",
        width=network.config.width,
        resize=f"to {DINOV2_SIDE}x{DINOV2_SIDE}, bicubic as Pillow on bytes; statistics of ImageNet",
        weights=sha256_of(path),
        has_classes=False,
        look=look,
    )


def _clip(device: torch.device, size: str) -> Extractor:
    path = clip_file(size)
    network = load_clip_image(size, path).to(device)
    side = network.config.side

    def look(images: Tensor) -> Features:
        pixels = shorter_side_and_centre(_pixels(images, CPU), side)  # on the CPU as above
        return Features(network(_standardised(pixels.to(device), CLIP)), None)

    return Extractor(
        name=f"clip-{size}",
        fd_name=f"FD-clip-{size}",
        kd_name=f"KD-clip-{size}",
        width=network.config.projected,
        resize=f"shorter side to {side}, bicubic as Pillow on bytes, centre; statistics of CLIP",
        weights=sha256_of(path),
        has_classes=False,
        look=look,
    )


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 255]."""
    return images.to(device).movedim(-1, 1).contiguous().float()


def _standardised(pixels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in statistics)
    return (pixels / 255.0 - mean) / std


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


EXTRACTORS: dict[str, Callable[[torch.device], Extractor]] = {
    "inception-tf": partial(_inception, clean=False),
    "inception-clean": partial(_inception, clean=True),
    **{f"dinov2-{size}": partial(_dinov2, size=size) for size in DINOV2_SIZES},
    **{f"clip-{size}": partial(_clip, size=size) for size in CLIP_IMAGE_SIZES},
    "darkroom": _darkroom,
}
