"""The end of `darkroom eval MODEL DATA`: from what was seen to scores, record, pictures and page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from darkroom.config import to_dict
from darkroom.data.io import image_grid, write_image
from darkroom.data.latent_cache import module_hash
from darkroom.data.locations import data_names, spread
from darkroom.data.sources import ImageDataset
from darkroom.data.transforms import RULE_VERSION
from darkroom.evaluation.environment import environment
from darkroom.evaluation.feature_files import EMBEDDING, PROBABILITIES, FeatureFiles
from darkroom.evaluation.likelihood import bits_name, bound_variance
from darkroom.evaluation.measure import (
    Measured,
    NearestTraining,
    Seen,
    class_accuracy,
    distance_scores,
    mean_scores,
    memorised,
    nearest_training,
)
from darkroom.evaluation.picture_sources import LABEL, NFE, GeneratedPictures, StoredPictures
from darkroom.evaluation.protocol import Curve, ImageSet, Record, Sampling, Score, write_record
from darkroom.report_scores import scores_page
from darkroom.safe_files import write_file

if TYPE_CHECKING:
    from darkroom.scoring import Evaluation

RECORD, PARTS = "scores.json", "parts"
SHOWN = 36  # samples of the grid
SHOWN_NEIGHBOURS = 4  # rows of samples that were chosen by number, and as many that are nearest of all
# What each metric cannot be made without, said where somebody asked for it.
NEEDS = {
    "is": "needs an extractor that names classes; choose --extractor inception-tf",
    "accuracy": "needs samples and data with the same classes",
    "pairs": "needs a model that repairs pictures: super-resolution or inpainting",
    "clip": "needs a model and data with captions",
    "agreement": "is judged by rules that hold for `shapes` alone, on what a model of them is told",
    "bits": "is a bound of a model's likelihood; stored images have none",
}


def finish(job: Evaluation, bits: FeatureFiles | None, points: Sequence[tuple[str, float, Seen]]) -> Record:
    """Everything after the last image was seen; the parts are deleted when all is written.

    points: of curves, (setting, its value, the images made so).
    """
    found = distance_scores(job.samples, job.reference, job.request.wanted)
    found.scores += mean_scores(job.samples.files, _noted(job.samples.files), job.networks)
    found.scores += _accuracy(job)
    nearest = _neighbours(job, found)
    if bits is not None:
        found.scores += _bits_scores(job, bits)
    record = _record(job, found, _curves(job, points))
    _pictures(job, nearest)
    write_record(record, job.folder / RECORD)
    write_file(job.folder / "report.html", scores_page(record, job.folder, job.name).encode())
    shutil.rmtree(job.folder / PARTS)
    return record


# --- scores -----------------------------------------------------------------------------------------------------------


def _noted(files: FeatureFiles) -> list[str]:
    """The names of the numbers per image that are scores by their mean."""
    return [name for name in files.names if name not in (EMBEDDING, PROBABILITIES, NFE, LABEL)]


def _accuracy(job: Evaluation) -> list[Score]:
    """Class accuracy, where images were asked for by class and the real ones have theirs."""
    if not job.request.wants("accuracy") or len(job.dataset.class_names) < 2:
        return []
    if LABEL not in job.samples.files.names or LABEL not in job.reference.files.names:
        return []
    if isinstance(job.source, StoredPictures) and job.source.dataset.class_names != job.dataset.class_names:
        return []
    trained = job.trained
    if job.training is None or job.training.dataset.class_names != job.dataset.class_names:
        trained = None
    return class_accuracy(job.samples, job.reference, trained, job.dataset.class_names)


def _neighbours(job: Evaluation, found: Measured) -> NearestTraining | None:
    if not job.request.wants("neighbours"):
        return None
    held_out = job.reference if job.trained is not None else None
    nearest = nearest_training(job.samples, job.trained or job.reference, held_out)
    score = memorised(job.samples, nearest)
    if nearest.near == 0:
        found.warnings.append(
            "reference images are among the training images, so that these say nothing about memorised ones: name "
            "held-out images as DATA"
        )
    elif score is not None:
        found.scores.append(score)
    else:
        found.warnings.append(
            "no training images are known, so that the nearest images shown are those of the reference; name the "
            "training images with --train"
        )
    return nearest


def _bits_scores(job: Evaluation, files: FeatureFiles) -> list[Score]:
    assert job.model is not None
    options: dict[str, Any] = {
        "levels": job.request.bound_levels,
        "variance": bound_variance(job.model),
        "images": files.count,
    }
    if job.model.first_stage is not None:
        options |= {"latents": "mode", "first_stage": module_hash(job.model.first_stage.autoencoder)[:16]}
    return [replace(score, options=options) for score in mean_scores(files, [bits_name(job.model)])]


def _curves(job: Evaluation, points: Sequence[tuple[str, float, Seen]]) -> list[Curve]:
    """Distances and means of numbers per image over each setting."""
    curves: dict[str, Curve] = {}
    for setting, value, seen in points:
        scores = distance_scores(seen, job.reference, ["fd", "kd"]).scores
        scores += mean_scores(seen.files, _noted(seen.files))
        curve = curves.setdefault(setting, Curve(setting, seen.count, []))
        curve.points.append((value, {score.metric: score.value for score in scores}))
    for curve in curves.values():
        curve.points.sort(key=lambda point: point[0])
    return list(curves.values())


# --- the record -------------------------------------------------------------------------------------------------------


def _record(job: Evaluation, found: Measured, curves: list[Curve]) -> Record:
    precision = torch.float32 if job.model is None else next(job.model.denoiser.parameters()).dtype
    training = None
    if job.trained is not None and job.training is not None:
        training = _image_set(job.training.dataset, job.trained)
    unreadable = len(job.dataset.problems)
    lines = [f"{unreadable} images of the reference could not be read, and others took their places"]
    return Record(
        scores=found.scores,
        reference=_image_set(job.dataset, job.reference),
        training=training,
        sampling=_sampling(job),
        environment=environment(job.device, job.request.batch_size, precision),
        warnings=found.warnings + (lines if unreadable else []),
        curves=curves,
        request=to_dict(job.request),
    )


def _image_set(dataset: ImageDataset, seen: Seen) -> ImageSet:
    return ImageSet(
        source=data_names(dataset.config.source),
        split=dataset.split,
        digest=seen.files.digest(),
        examples=len(dataset),
        count=seen.count,
        size=list(dataset.size),
        crop=f"largest centred rectangle, Lanczos (rule {RULE_VERSION} of darkroom.data.transforms)",
    )


def _sampling(job: Evaluation) -> Sampling:
    files, source = job.samples.files, job.source
    size = list(job.request.size or ())
    if not isinstance(source, GeneratedPictures):
        return Sampling(job.name, files.digest(), job.count, size, generated=False)
    chosen = source.model.validate(source.request([0]))
    return Sampling(
        model=job.name,
        digest=job.model_digest,
        count=job.count,
        size=size,
        weights=str(source.model.info.get("weights", job.request.weights)),
        seed=source.settings.seed,
        solver=chosen.solver,
        steps=chosen.steps,
        guidance_scale=chosen.guidance_scale if source.fields else None,
        eta=chosen.eta,
        nfe=int(files.some(NFE, 1)[0]),
        conditions=list(source.fields),
        conditions_digest=files.digest("conditions"),
        made=job.dataset.made,
        class_balance=_balance(files, job.dataset.class_names),
    )


def _balance(files: FeatureFiles, names: Sequence[str]) -> dict[str, int]:
    """How many images of each class were asked for."""
    if LABEL not in files.names:
        return {}
    labels = files.value(LABEL)
    counts = torch.bincount(labels[labels.isfinite()].long(), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(job: Evaluation, nearest: NearestTraining | None) -> None:
    shown = [np.asarray(_read(file)) for file in sorted((job.folder / PARTS / "shown").glob("*.png"))]
    if shown:
        write_image(image_grid(shown), job.folder / "samples.png")
    if nearest is not None:
        write_image(_neighbours_picture(job, nearest), job.folder / "neighbours.png")


def _read(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _neighbours_picture(job: Evaluation, nearest: NearestTraining) -> Image.Image:
    """Rows: a sample, a gap, its nearest training images. Above samples by number, below the nearest of all."""
    distance, index = nearest.found
    by_distance = distance[:, 0].argsort(stable=True).tolist()
    rows = spread(len(index), SHOWN_NEIGHBOURS)
    rows += [row for row in by_distance if row not in rows][:SHOWN_NEIGHBOURS]
    samples = job.source.read([nearest.numbers[row] for row in rows]).images.numpy()
    real = job.training or StoredPictures(job.dataset)
    tiles: list[np.ndarray] = []
    for row, sample in zip(rows, samples, strict=True):
        gap = np.full_like(sample[:, : max(1, sample.shape[1] // 4)], 255)
        found = real.read(index[row].tolist()).images.numpy()
        tiles.append(np.concatenate([sample, gap, *found], axis=1))
    return image_grid(tiles, columns=1)
