"""How well a first stage gives images back: scores with their protocol, streamed, so that memory does not grow with the
number of images.

Shapes: B batch, C channels, H W image size, E latent channels, h w latent size, D width of an embedding, K codes.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from darkroom import __version__
from darkroom.data.batches import collate
from darkroom.data.latent_cache import module_hash
from darkroom.data.locations import data_names, spread
from darkroom.data.sources import ImageDataset
from darkroom.data.transforms import RULE_VERSION
from darkroom.errors import DarkroomError
from darkroom.evaluation.extractors import Embedding, PerceptualDistance, default_extractors
from darkroom.evaluation.metrics import (
    WINDOW,
    Moments,
    codes_used,
    frechet_distance,
    gradient_energy,
    gradient_energy_ratio,
    psnr,
    ssim,
)
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.quantizer import code_counts, perplexity

PROTOCOL_VERSION = 1
SAMPLES_PER_FEATURE = 10  # fewer, and the bias of a Frechet distance is of the order of differences between models
ENERGY, USED, PERPLEXITY = "gradient energy ratio", "codes used", "perplexity"
ENCODE, DECODE = "encode s/MP", "decode s/MP"
Report = Callable[[int, int], None]  # (images done, of how many)


@dataclass(frozen=True)
class FirstStageScores:
    """What `evaluate_first_stage` found. `protocol` holds all that it takes to make the numbers again."""

    scores: dict[str, float]  # by metric
    sources: dict[str, dict[str, float]]  # the same for each source alone, where there are several
    latents: dict[str, list[float]]  # mean and std of each channel of the normalised latents
    protocol: dict[str, Any]
    warnings: list[str]
    images: Tensor  # (n, C, H, W), some of the images
    reconstructions: Tensor  # (n, C, H, W)

    @property
    def record(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        names = ("scores", "sources", "latents", "warnings", "protocol")
        return {name: getattr(self, name) for name in names}

    @property
    def perceptual(self) -> float:
        """The perceptual distance, whatever network it was made with."""
        return self.scores[self.protocol["perceptual"]["name"]]

    @property
    def frechet(self) -> float:
        """The reconstruction Frechet distance, whatever network it was made with."""
        return self.scores["rFD-" + self.protocol["frechet"]["name"]]


@dataclass
class _Sums:
    """The running sums of one source."""

    width: int
    codes: int | None
    count: int = 0
    totals: dict[str, float] = field(default_factory=dict)  # of metrics that are means over images
    energies: tuple[float, float] = (0.0, 0.0)  # reconstructions, originals

    def __post_init__(self) -> None:
        self.original, self.decoded = Moments(self.width), Moments(self.width)
        self.counts = None if self.codes is None else torch.zeros(self.codes, dtype=torch.int64)

    def merge(self, other: _Sums) -> None:
        self.count += other.count
        for name, value in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.energies = (self.energies[0] + other.energies[0], self.energies[1] + other.energies[1])
        self.original.merge(other.original)
        self.decoded.merge(other.decoded)
        if self.counts is not None and other.counts is not None:
            self.counts += other.counts

    def scores(self, embedding: str) -> dict[str, float]:
        found = {name: total / self.count for name, total in self.totals.items()}
        one, two = self.original, self.decoded
        found[f"rFD-{embedding}"] = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
        found[ENERGY] = gradient_energy_ratio(*(torch.tensor([e], dtype=torch.float64) for e in self.energies))
        if self.counts is not None:
            found |= {USED: codes_used(self.counts), PERPLEXITY: float(perplexity(self.counts))}
        return found


class _Clock:
    """Seconds per megapixel of what `time` runs: the median, which other work on the machine moves least."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rates: list[float] = []

    def time(self, work: Callable[[], Tensor], pixels: int) -> Tensor:
        self._wait()
        started = time.perf_counter()
        result = work()
        self._wait()
        self.rates.append((time.perf_counter() - started) / pixels * 1e6)
        return result

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @property
    def per_megapixel(self) -> float:
        return statistics.median(self.rates)


@torch.no_grad()
def evaluate_first_stage(
    first_stage: FirstStage,
    dataset: ImageDataset | Mapping[str, ImageDataset],
    *,
    batch_size: int = 16,
    count: int | None = None,
    extractors: tuple[PerceptualDistance, Embedding] | None = None,
    shown: int = 16,
    facts: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> FirstStageScores:
    """Scores of the reconstructions from the posterior's mode.

    dataset: one set of images, or several by name, which then also get scores of their own.
    count: take at most so many images of each set, evenly spread over it.
    extractors: the networks for the perceptual distance and the Frechet distance (`default_extractors`).
    shown: so many pictures are handed back with their reconstructions.
    facts: joined to the protocol (hardware, name of the model, ...).

    Reconstructions are clamped to [-1, 1] and not rounded to the steps of a file.
    """
    sets = dict(dataset) if isinstance(dataset, Mapping) else {"images": dataset}
    chosen = {name: spread(len(images), len(images) if count is None else count) for name, images in sets.items()}
    total = sum(map(len, chosen.values()))
    if total == 0:
        raise DarkroomError("there are no images to evaluate on; check the data")
    _check(first_stage, sets)
    device, channels = first_stage.device, first_stage.image_channels
    distance, embedding = extractors or default_extractors(device, channels)
    codebook = first_stage.autoencoder.codebook
    was_training = first_stage.training
    first_stage.eval()

    sums: dict[str, _Sums] = {}
    latents = Moments(first_stage.latent_channels)
    encoding, decoding = _Clock(device), _Clock(device)
    wanted = _shown(chosen, shown)
    pictures: list[tuple[Tensor, Tensor]] = []
    warm = False
    done = 0
    for name, numbers, image in _batches(sets, chosen, batch_size):
        original = image.to(device)
        pixels = image.shape[0] * image.shape[2] * image.shape[3]
        size = (image.shape[3], image.shape[2])
        if not warm:  # the first run of a shape also prepares its kernels
            first_stage.decode(first_stage.encode(original).mode(), size=size)
            warm = True
        latent = encoding.time(lambda x=original: first_stage.encode(x).mode(), pixels)  # type: ignore[misc]
        decoded = decoding.time(lambda z=latent, s=size: first_stage.decode(z, size=s), pixels)  # type: ignore[misc]
        decoded = decoded.float().clamp(-1.0, 1.0)
        if not bool(torch.isfinite(decoded).all()):
            raise DarkroomError("the first stage gives values that are not finite; its weights are damaged")
        latents.update(latent.float().movedim(1, -1).flatten(0, -2))
        one, two = embedding.embed(original), embedding.embed(decoded)
        here = sums.setdefault(name, _Sums(one.shape[1], None if codebook is None else codebook.size))
        here.count += len(image)
        found = {"PSNR": psnr(decoded, original)}
        if min(image.shape[-2:]) >= WINDOW:
            found["SSIM"] = ssim(decoded, original)
        found[distance.name] = distance.distance(original, decoded)
        for metric, values in found.items():
            here.totals[metric] = here.totals.get(metric, 0.0) + float(values.double().sum())
        energies = (gradient_energy(decoded), gradient_energy(original))
        here.energies = (here.energies[0] + float(energies[0].sum()), here.energies[1] + float(energies[1].sum()))
        here.original.update(one)
        here.decoded.update(two)
        if codebook is not None and here.counts is not None:
            here.counts += code_counts(codebook.nearest(first_stage.denormalise(latent)), codebook.size).cpu()
        for place, number in enumerate(numbers):
            if (name, number) in wanted:
                pictures.append((image[place], decoded[place].cpu()))
        done += len(image)
        if report is not None:
            report(done, total)
    first_stage.train(was_training)

    everything = _Sums(next(iter(sums.values())).width, None if codebook is None else codebook.size)
    for part in sums.values():
        everything.merge(part)
    scores = everything.scores(embedding.name)
    scores |= {ENCODE: encoding.per_megapixel, DECODE: decoding.per_megapixel}
    by_source = {name: {"images": s.count, **s.scores(embedding.name)} for name, s in sums.items()}
    protocol = _protocol(first_stage, sets, chosen, distance, embedding, batch_size) | dict(facts or {})
    return FirstStageScores(
        scores=scores,
        sources=by_source if len(sums) > 1 else {},
        latents={"mean": latents.mean.tolist(), "std": latents.std.tolist()},
        protocol=protocol,
        warnings=_warnings(everything, sums, embedding),
        images=torch.stack([a for a, _ in pictures]),
        reconstructions=torch.stack([b for _, b in pictures]),
    )


def _check(first_stage: FirstStage, sets: Mapping[str, ImageDataset]) -> None:
    for name, images in sets.items():
        if images.config.channels != first_stage.image_channels:
            raise DarkroomError(
                f"{name}: has images of {images.config.channels} channels, the first stage takes "
                f"{first_stage.image_channels}; open them with that many"
            )


def _shown(chosen: Mapping[str, list[int]], count: int) -> set[tuple[str, int]]:
    """Which images are handed back: as many of each set as of the others, evenly spread."""
    filled = {name: numbers for name, numbers in chosen.items() if numbers}
    shares = spread(len(filled) * count, count)  # so that they add up to `count`
    result: set[tuple[str, int]] = set()
    for place, (name, numbers) in enumerate(filled.items()):
        share = sum(place * count <= s < (place + 1) * count for s in shares)
        result |= {(name, numbers[i]) for i in spread(len(numbers), share)}
    return result


def _batches(
    sets: Mapping[str, ImageDataset], chosen: Mapping[str, list[int]], batch_size: int
) -> Iterator[tuple[str, list[int], Tensor]]:
    """(set, numbers, images (B, C, H, W) in [-1, 1]); a batch is of one set."""
    for name, numbers in chosen.items():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            yield name, part, collate([sets[name][i] for i in part], sets[name].pixels)["image"]


def _warnings(everything: _Sums, sums: Mapping[str, _Sums], embedding: Embedding) -> list[str]:
    width, count = everything.width, everything.count
    result = []
    name = f"rFD-{embedding.name}"
    if count <= width:
        result.append(
            f"{name} from {count} images has no full covariance of its {width} features: compare it only with scores "
            "of the very same images"
        )
    elif count < SAMPLES_PER_FEATURE * width:
        result.append(
            f"{name} from {count} images is biased (its embedding has {width} features, {SAMPLES_PER_FEATURE * width} "
            "images are few enough to see that): compare it only with scores of the very same images"
        )
    if len(sums) > 1:
        result.append("scores of single sources come from fewer images still")
    return result


def _protocol(
    first_stage: FirstStage,
    sets: Mapping[str, ImageDataset],
    chosen: Mapping[str, list[int]],
    distance: PerceptualDistance,
    embedding: Embedding,
    batch_size: int,
) -> dict[str, Any]:
    codebook = first_stage.autoencoder.codebook
    parameter = next(first_stage.parameters(), torch.zeros(()))
    data = {
        name: {
            "source": data_names(images.config.source),
            "split": images.split,
            "digest": images.digest,
            "examples": len(images),
            "count": len(chosen[name]),
            "size": list(images.size),
            "channels": images.config.channels,
            "pixels": str(images.pixels),
            "unreadable": len(images.problems),
        }
        for name, images in sets.items()
    }
    return {
        "protocol_version": PROTOCOL_VERSION,
        "task": "first-stage reconstruction",
        "count": sum(map(len, chosen.values())),
        "data": data,
        "crop": f"largest centred rectangle, Lanczos (rule {RULE_VERSION} of darkroom.data.transforms)",
        "posterior": "mode",
        "reconstructions": "clamped to [-1, 1], not rounded to the steps of a file",
        "PSNR": "mean over images, data range 2",
        "SSIM": "Wang et al. 2004: Gaussian 11x11, sigma 1.5, K1 0.01, K2 0.03, windows inside, mean of channels",
        "perceptual": {"name": distance.name, "weights": distance.weights, "mean": "over images"},
        "frechet": {"name": embedding.name, "weights": embedding.weights, "covariance": "N - 1, float64, eigenvalues"},
        "gradient_energy": "sum over images of mean squared differences of neighbours, reconstructions / originals",
        "first_stage": {
            "weights": module_hash(first_stage.autoencoder),
            "downsampling": first_stage.downsampling,
            "latent_channels": first_stage.latent_channels,
            "codes": None if codebook is None else codebook.size,
            "parameters": sum(p.numel() for p in first_stage.autoencoder.parameters()),
        },
        "timing": "median wall clock of batches, warmed up; PSNR and the rest are not in it",
        "batch_size": batch_size,
        "precision": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "threads": torch.get_num_threads(),
        "versions": {"darkroom": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
