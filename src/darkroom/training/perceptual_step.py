"""The train step of the perceptual network: it learns from pictures alone, and from their classes where they have any.

Three tasks share the network.
1. Instance discrimination (NT-Xent of SimCLR; Chen et al. 2020, arXiv 2002.05709, eq. 1): two views of a picture
   (crop, scale, mirror, colour) are found among the views of all pictures of the batch. It gives features of content.
2. Ranking: of the same distortion at two strengths the stronger one must be further from the original, and a shift by
   one pixel must be nearer than a visible blur. The hinge is soft and on log-distances: only the order is taught. It
   gives the channel weights, and features that see every distortion.
3. Classification of the pictures that carry a `class_label` (the others have -1).

Shapes: B batch, C channels, H W size of a picture, D width of the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.data.distortions import DISTORTIONS, MARGIN, cut, gaussian_blur
from darkroom.errors import DarkroomError
from darkroom.features.perceptual import PerceptualConfig, PerceptualNetwork
from darkroom.training.loop import LoopConfig, Phase, all_parameters

Batch = dict[str, Any]


@dataclass(frozen=True)
class PerceptualTrainConfig:
    """Weights of the three tasks and how views are made."""

    crop: int = 48  # side of the views; the pictures must be larger by twice the margin of 8
    discrimination_weight: float = 1.0
    temperature: float = 0.2
    projection: int = 64
    ranking_weight: float = 2.0
    ranking_margin: float = 0.25  # in log-distance
    ranking_softness: float = 0.25
    least_gap: float = 0.15  # between two strengths that are compared, of the range [0, 1]
    classification_weight: float = 0.3


@dataclass(frozen=True)
class PerceptualRecipe(LoopConfig):
    """Training a perceptual network: its shape, its tasks and the loop."""

    network: PerceptualConfig = field(default_factory=PerceptualConfig)
    objective: PerceptualTrainConfig = field(default_factory=PerceptualTrainConfig)


class PerceptualStep:
    """One phase. `modules` is what a checkpoint saves, `ema_modules` what is averaged."""

    def __init__(self, network: PerceptualNetwork, config: PerceptualTrainConfig, classes: int = 0) -> None:
        self.network, self.config = network, config
        self.heads = Heads(network.embedding_width, config.projection, classes)
        for module in (network, self.heads):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules: dict[str, nn.Module] = {"network": network, "heads": self.heads}
        self.ema_modules: dict[str, nn.Module] = dict(self.modules)
        self.phase = PerceptualPhase(network, self.heads, config)
        self.phases = [Phase("perceptual", self.phase, all_parameters([self.phase]))]

    @torch.no_grad()
    def validation_loss(self, batches: list[Batch], seed: int = 0) -> dict[str, float]:
        """The tasks on held-out pictures with fixed draws; `validation_ranking` is the share of right orders."""
        totals: dict[str, float] = {}
        for i, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(seed + i)
            loss, metrics = self.phase(batch, generator, 0)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(batches)
        return {f"validation_{name}": value for name, value in totals.items()}


class Heads(nn.Module):
    """What is needed in training only: the projection of instance discrimination and the classifier."""

    def __init__(self, width: int, projection: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        self.classify = nn.Linear(width, classes) if classes else None


class PerceptualPhase(nn.Module):
    def __init__(self, network: PerceptualNetwork, heads: Heads, config: PerceptualTrainConfig) -> None:
        super().__init__()
        self.network, self.heads, self.config = network, heads, config

    def forward(self, batch: Batch, generator: torch.Generator, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """All draws are made on the CPU; `image` (B, C, H, W)."""
        config = self.config
        device = next(self.network.parameters()).device
        image = batch["image"].float().cpu()
        with torch.autocast("cpu", enabled=False):
            wide = original_crops(image, config.crop + 2 * MARGIN, generator)
            milder, stronger = distorted_pairs(wide, config.least_gap, generator)
            view = changed_view(image, config.crop, generator)
        views = [cut(wide), milder, stronger, view]
        maps = self.network.features(torch.cat(views).to(device))
        original, mild, strong, other = zip(*(m.float().chunk(4) for m in maps), strict=True)
        with torch.autocast(device.type, enabled=False):
            near = self.network.compare(list(original), list(mild))
            far = self.network.compare(list(original), list(strong))
            ranking, right = ranking_loss(near, far, config.ranking_margin, config.ranking_softness)
            pooled = [torch.cat([m.mean((2, 3)) for m in maps], 1) for maps in (original, other)]
            hidden = [self.heads.norm(p) for p in pooled]
            one, two = (self.heads.project(h) for h in hidden)
            same = discrimination_loss(one, two, config.temperature)
            loss = config.ranking_weight * ranking + config.discrimination_weight * same
            metrics = {"ranking": ranking, "ranked_right": right, "discrimination": same, "distance": far.mean()}
            label = batch.get("class_label")
            if self.heads.classify is not None and label is not None:
                label = label.to(device)
                known = (label >= 0).float()
                logits = self.heads.classify(torch.cat(hidden))
                entropy = F.cross_entropy(logits, label.clamp(min=0).repeat(2), reduction="none")
                entropy = (entropy * known.repeat(2)).sum() / (2 * known.sum()).clamp(min=1.0)
                loss = loss + config.classification_weight * entropy
                metrics["classification"] = entropy
        return loss, {k: v.detach() for k, v in metrics.items()}


def ranking_loss(near: Tensor, far: Tensor, margin: float, softness: float) -> tuple[Tensor, Tensor]:
    """(B,) distances of the milder and the stronger distortion -> softplus hinge on log(near / far) + margin, in units
    of `softness`; and the share in the right order."""
    difference = torch.log(near + 1e-4) - torch.log(far + 1e-4)
    return F.softplus((difference + margin) / softness).mul(softness).mean(), (near < far).float().mean()


def discrimination_loss(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """NT-Xent: (B, P) projections of two views; each of the 2B must find its partner among the other 2B - 1."""
    z = F.normalize(torch.cat([one, two]), dim=1)
    similarity = (z @ z.T) / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(one))
    return F.cross_entropy(similarity, partner)


def original_crops(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(B, C, side, side): unchanged pixels at a random place; for a part of them of the picture at half its size, so
    that fine and coarse content is met. A tenth is grey, as pictures of other channel counts are looked at."""
    batch, channels, height, width = image.shape
    if min(height, width) < side:
        raise DarkroomError(
            f"perceptual training takes crops of {side} pixels with their margin; the pictures are {width}x{height}: "
            'raise "data.size" or lower "perceptual.objective.crop"'
        )
    half = F.avg_pool2d(image, 2)
    reduced = torch.rand(batch, generator=generator) < (0.3 if min(half.shape[-2:]) >= side else -1.0)
    places = torch.rand((batch, 2), generator=generator).tolist()
    grey = torch.rand(batch, generator=generator) < 0.1
    crops = []
    for i, (down, right) in enumerate(places):
        source = half[i] if reduced[i] else image[i]
        y, x = int(down * (source.shape[1] - side + 1)), int(right * (source.shape[2] - side + 1))
        crop = source[:, y : y + side, x : x + side]
        crops.append(crop.mean(0, keepdim=True).expand(channels, -1, -1) if grey[i] else crop)
    return torch.stack(crops)


def distorted_pairs(wide: Tensor, least_gap: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Per image a milder and a stronger distortion of one kind, without the margin. One in eight images has a shift by
    one pixel as the milder and a blur of 0.9 to 3.2 pixels as the stronger one."""
    batch = len(wide)
    names = list(DISTORTIONS)
    kinds = torch.randint(len(names) + 1, (batch,), generator=generator)
    gap = least_gap + (1.0 - least_gap) * torch.rand(batch, generator=generator).square()
    low = torch.rand(batch, generator=generator) * (1.0 - gap)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    milder, stronger = torch.empty_like(wide), torch.empty_like(wide)
    for number in range(len(names) + 1):
        chosen = (kinds == number).nonzero().flatten()
        if not len(chosen):
            continue
        part = wide[chosen]

        def again(number: int = number) -> torch.Generator:  # the same draws for both strengths
            return torch.Generator().manual_seed(seed + number)

        if number == len(names):
            milder[chosen] = DISTORTIONS["shift"](part, torch.zeros(len(chosen)), again())
            stronger[chosen] = gaussian_blur(part, 0.9 + 2.3 * low[chosen])
        else:
            distort = DISTORTIONS[names[number]]
            milder[chosen] = distort(part, low[chosen], again())
            stronger[chosen] = distort(part, (low + gap)[chosen], again())
    return cut(milder), cut(stronger)


def changed_view(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(B, C, side, side): a part of 35 to 100 per cent of the picture's area, mirrored or not, in other colours."""
    batch, channels = image.shape[:2]
    draws = torch.rand((batch, 6 + channels), generator=generator)
    scale = torch.sqrt(0.35 + 0.65 * draws[:, 0])
    mirror = torch.where(draws[:, 1] < 0.5, 1.0, -1.0)
    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = scale * mirror, scale
    affine[:, 0, 2], affine[:, 1, 2] = ((2.0 * draws[:, 2:4] - 1.0) * (1.0 - scale)[:, None]).T
    factor = max(1, min(image.shape[-2:]) // side)
    source = F.avg_pool2d(image, factor)  # without it the bilinear look-up would alias
    grid = F.affine_grid(affine, [batch, channels, side, side], align_corners=False)
    view = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    contrast, brightness = 0.7 + 0.6 * draws[:, 4], 0.4 * draws[:, 5] - 0.2
    cast = 0.3 * draws[:, 6:] - 0.15
    mean = view.mean((1, 2, 3), keepdim=True)
    view = (view - mean) * contrast.view(-1, 1, 1, 1) + mean
    return (view + brightness.view(-1, 1, 1, 1) + cast[:, :, None, None]).clamp(-1.0, 1.0)
