"""From what was seen in images to scores: the one table of metrics that `darkroom eval` knows.

Frechet distance, class accuracy and means of numbers per image are made of all images; what looks at pairs of them is
made of a fixed number, evenly spread, so that memory stays the same from there on.
Shapes: N images, D width of an embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from darkroom.config import nearest
from darkroom.data.locations import spread
from darkroom.errors import DarkroomError
from darkroom.evaluation.agreement import class_hits
from darkroom.evaluation.discriminant import LinearDiscriminant
from darkroom.evaluation.distances import (
    SPLITS,
    SUBSET_SIZE,
    SUBSETS,
    Neighbours,
    NeighbourSearch,
    density_hits,
    frechet,
    inception_score,
    inside,
    kernel_distance,
    neighbour_radii,
    unbiased_mmd,
)
from darkroom.evaluation.extractors import Extractor
from darkroom.evaluation.feature_files import EMBEDDING, PROBABILITIES, FeatureFiles
from darkroom.evaluation.influence import frechet_influence, inception_score_influence, kernel_influence
from darkroom.evaluation.intervals import deviations
from darkroom.evaluation.metrics import Moments
from darkroom.evaluation.picture_sources import LABEL
from darkroom.evaluation.protocol import Extraction, Score

# By name on the command line: what it is.
METRICS = {
    "fd": "Frechet distance of features: FID where they are those of its network",
    "kd": "kernel distance of features (KID): unbiased, also for few images",
    "is": "Inception score, with an extractor that names classes",
    "pr": "improved precision and recall",
    "dc": "density and coverage",
    "neighbours": "how near samples lie to the training images, against held-out images",
    "accuracy": "class accuracy: how often the class asked for is recognised",
    "agreement": "caption, class, box and map agreement on `shapes`, by exact rules",
    "pairs": "PSNR, SSIM and perceptual distance from the picture that was degraded or masked",
    "clip": "CLIP score of images and their captions",
    "bits": "bits per dimension, from the variational bound",
}
MOST = 2_000  # images whose pairs are looked at, where no other number is asked for
MOST_PROBABILITIES = 50_000  # images of an Inception score, the published number
QUERIES = 1_000  # samples whose nearest training images are searched
NEIGHBOURS = 5  # of each
PRECISION_K, DENSITY_K = 3, 5  # of the publications
SAMPLES_PER_FEATURE = 10  # fewer, and the bias of a Frechet distance is of the order of differences between models
NEAR = 0.05  # the share of held-out images that are nearer to a training image than the distance that counts as near


def check_metrics(names: Sequence[str]) -> list[str]:
    """Names of metrics, or a DarkroomError for one that is none."""
    for name in names:
        if name not in METRICS:
            raise DarkroomError(f'metric "{name}" is not known{nearest(name, METRICS)}; there are {", ".join(METRICS)}')
    return list(dict.fromkeys(names))


@dataclass
class Seen:
    """One set of images as an extractor sees it; what several metrics need is made once."""

    files: FeatureFiles
    extractor: Extractor
    most: int = MOST  # images whose pairs are looked at

    @cached_property
    def moments(self) -> Moments:
        return self.files.moments(self.extractor.width)

    @cached_property
    def some(self) -> Tensor:
        """(at most `most`, D)."""
        return self.files.some(EMBEDDING, self.most)

    @property
    def count(self) -> int:
        return self.files.count


@dataclass
class Measured:
    """Scores so far, and what to beware of."""

    scores: list[Score] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def suffix(extractor: Extractor) -> str:
    """What names of scores end with: nothing for the network of FID, "-darkroom" for our own."""
    return extractor.fd_name.removeprefix("FID").removeprefix("FD")


def extraction(extractor: Extractor) -> Extraction:
    return Extraction(extractor.name, extractor.weights, extractor.resize)


def distance_scores(samples: Seen, reference: Seen, metrics: Sequence[str]) -> Measured:
    """The scores that compare two sets of features; `metrics` are names of `METRICS`, others are passed over."""
    found = Measured()
    small = min(samples.count, reference.count) < SAMPLES_PER_FEATURE * samples.extractor.width
    if "fd" in metrics:
        found.scores.append(frechet_score(samples, reference))
        if small:
            found.warnings.append(_bias_warning(samples, reference))
    if "kd" in metrics or ("fd" in metrics and small):
        found.scores.append(kernel_score(samples, reference))
    if "is" in metrics and samples.extractor.has_classes:
        found.scores.append(inception(samples))
    if "pr" in metrics:
        found.scores += precision_and_recall(samples, reference)
    if "dc" in metrics:
        found.scores += density_and_coverage(samples, reference)
    return found


def _bias_warning(samples: Seen, reference: Seen) -> str:
    name, kernel = samples.extractor.fd_name, samples.extractor.kd_name
    width = samples.extractor.width
    return (
        f"{name} from {samples.count} images against {reference.count} is biased upwards (its features have {width} "
        f"dimensions, {SAMPLES_PER_FEATURE * width:,} images of each are few enough to see that): compare it only with "
        f"scores of as many images against the same reference; {kernel} beside it has no such bias"
    )


def frechet_score(samples: Seen, reference: Seen) -> Score:
    one, other = samples.moments, reference.moments
    influence = frechet_influence(samples.some, one.mean, one.covariance, other.mean, other.covariance)
    return Score(
        metric=samples.extractor.fd_name,
        value=frechet(one, other),
        options={"covariance": "N - 1, float64, eigenvalues"},
        extraction=extraction(samples.extractor),
        deviations=deviations(influence, samples.count),
    )


def kernel_score(samples: Seen, reference: Seen) -> Score:
    x, y = samples.some, reference.some
    # Small sets: all pairs, which subsets of them would only make noisier.
    whole = min(len(x), len(y)) <= SUBSET_SIZE
    pairs = "all" if whole else f"mean of {SUBSETS} subsets of {SUBSET_SIZE}"
    options = {"kernel": "(x.y/D + 1)^3", "pairs": pairs, "images": len(x), "reference_images": len(y)}
    value = 0.0
    if min(len(x), len(y)) > 1:
        value = unbiased_mmd(y, x) if whole else kernel_distance(y, x).mean
    return Score(
        metric=samples.extractor.kd_name,
        value=value,
        options=options,
        extraction=extraction(samples.extractor),
        deviations=deviations(kernel_influence(x, y)),
    )


def inception(samples: Seen) -> Score:
    p = samples.files.some(PROBABILITIES, MOST_PROBABILITIES)
    splits = min(SPLITS, len(p))
    return Score(
        metric=f"IS{suffix(samples.extractor)}",
        value=inception_score(p, splits=splits).mean,
        options={"splits": splits, "images": len(p)},
        extraction=extraction(samples.extractor),
        deviations=deviations(inception_score_influence(p)),
    )


def _shares(metric: str, hits: Tensor, options: Mapping[str, Any], seen: Seen, resampled: str) -> Score:
    """The mean of a number of each image, of those that were looked at: the interval is that of so many."""
    return Score(
        metric=f"{metric}{suffix(seen.extractor)}",
        value=float(hits.double().mean()),
        options=dict(options),
        extraction=extraction(seen.extractor),
        deviations=deviations(_thin(hits), len(hits)),
        resampled=resampled,
    )


def precision_and_recall(samples: Seen, reference: Seen) -> list[Score]:
    """Kynkaanniemi et al. 2019; no scores where a set is too small to have neighbours."""
    x, y, k = samples.some, reference.some, PRECISION_K
    if min(len(x), len(y)) <= k:
        return []
    options = {"neighbours": k, "images": len(x), "reference_images": len(y)}
    precision = inside(x, y, neighbour_radii(y, k))
    recall = inside(y, x, neighbour_radii(x, k))
    return [
        _shares("precision", precision, options, samples, "images"),
        _shares("recall", recall, options, samples, "reference"),
    ]


def density_and_coverage(samples: Seen, reference: Seen) -> list[Score]:
    """Naeem et al. 2020."""
    x, y, k = samples.some, reference.some, DENSITY_K
    if len(y) <= k:
        return []
    options = {"neighbours": k, "images": len(x), "reference_images": len(y)}
    balls, covered = density_hits(y, x, k)
    return [
        _shares("density", balls, options, samples, "images"),
        _shares("coverage", covered, options, samples, "reference"),
    ]


def mean_scores(files: FeatureFiles, names: Sequence[str], network: dict[str, Extraction] | None = None) -> list[Score]:
    """The mean over images of each number that was noted of them. network: by name, what it was made with."""
    result = []
    for name in names:
        values = files.value(name).double()
        known = values[values.isfinite()]
        if len(known):
            left = len(values) - len(known)
            result.append(
                Score(
                    name,
                    float(known.mean()),
                    extraction=(network or {}).get(name),
                    deviations=deviations(_thin(known), len(known)),
                    note=f"{left} of {len(values)} images have no finite value and are left out" if left else "",
                )
            )
    return result


def _thin(values: Tensor) -> Tensor:
    """At most MOST of them, evenly spread: enough for an interval."""
    return values if len(values) <= MOST else values[torch.arange(MOST) * len(values) // MOST]


def class_accuracy(samples: Seen, reference: Seen, training: Seen | None, class_names: Sequence[str]) -> list[Score]:
    """How often a classifier fitted on real images recognises the class that was asked for; beside it, how often that
    of the held-out real images. Without training images it is fitted on the reference itself. No scores where no image
    has a class."""
    fitted = training or reference
    classifier = LinearDiscriminant(samples.extractor.width, len(class_names))
    for part in fitted.files.parts([EMBEDDING, LABEL]):
        classifier.update(part[EMBEDDING], part[LABEL])
    if not float(classifier.counts.sum()):
        return []
    classifier.fit()
    on = "training" if training else "reference"
    options = {"classifier": "linear discriminant", "fitted_on": on, "fitted_images": fitted.count}
    own, real = _class_hits(classifier, samples), _class_hits(classifier, reference)
    found = []
    if len(own):
        found.append(_shares("class accuracy", own, options, samples, "images"))
    if len(real):
        score = _shares("class accuracy of real images", real, options, reference, "reference")
        note = "" if training else "of the very images that the classifier was fitted on"
        found.append(replace(score, note=note))
    return found


def _class_hits(classifier: LinearDiscriminant, seen: Seen) -> Tensor:
    """1 where the class is recognised, else 0; images without a class are left out."""
    hits = []
    for part in seen.files.parts([EMBEDDING, LABEL]):
        known = part[LABEL].isfinite()
        hits.append(class_hits(classifier.scores(part[EMBEDDING][known]), part[LABEL][known].long()))
    return torch.cat(hits)


@dataclass(frozen=True)
class NearestTraining:
    """numbers: (Q,) of samples; found: their nearest training images, nearest first; near: the distance that a share
    NEAR of held-out images lies below, None without them."""

    numbers: list[int]
    found: Neighbours
    near: float | None


def nearest_training(samples: Seen, training: Seen, held_out: Seen | None) -> NearestTraining:
    """The training images that samples are nearest to, in one pass over them."""
    queries = samples.files.some(EMBEDDING, QUERIES)
    search = NeighbourSearch(queries, min(NEIGHBOURS, training.count))
    others = None if held_out is None else NeighbourSearch(held_out.files.some(EMBEDDING, QUERIES))
    for part in training.files.parts([EMBEDDING]):
        for each in (search, others):
            if each is not None:
                each.update(part[EMBEDDING])
    near = None if others is None else float(torch.quantile(others.result().distance[:, 0], NEAR))
    return NearestTraining(spread(samples.count, QUERIES), search.result(), near)


def memorised(samples: Seen, nearest: NearestTraining) -> Score | None:
    """The share of samples that lie nearer to a training image than all but NEAR of the held-out images do: about NEAR
    for a model that makes images as new as those, towards 1 for one that repeats its training images."""
    if nearest.near is None:
        return None
    hits = nearest.found.distance[:, 0] < nearest.near
    options = {"held_out_share": NEAR, "images": len(hits)}
    return _shares("near training images", hits, options, samples, "images")
