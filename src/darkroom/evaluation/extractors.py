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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.features.lpips import LINEAR_FILE, VGG_FILE, load_lpips, lpips_available, weights_folder
from darkroom.features.perceptual import load_perceptual

AUTO = "auto"


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
    """A row of `EXTRACTORS`. One whose weights are not there is a DarkroomError that says where to put which file."""
    if name == AUTO:
        name = "darkroom"
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
        return Features(network.embed(in_unit_range(images, device) * 2.0 - 1.0), None)

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


def in_unit_range(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1]."""
    return images.to(device).movedim(-1, 1).float() / 255.0


EXTRACTORS: dict[str, Callable[[torch.device], Extractor]] = {"darkroom": _darkroom}
