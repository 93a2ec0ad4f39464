"""`darkroom eval MODEL DATA`: a model or images in, a record of scores out, however large the sets are.

open both -> look at the reference, the training images and the samples, part by part (kept on the disk, divided among
processes, resumed) -> scores -> scores.json, samples.png, neighbours.png, report.html

Shapes: B batch, H W image size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkroom.clip_reader import ClipReader, open_clip_reader
from darkroom.config import to_dict
from darkroom.data.io import write_image
from darkroom.data.latent_cache import module_hash
from darkroom.data.locations import spread
from darkroom.data.sources import ImageDataset
from darkroom.errors import DarkroomError
from darkroom.eval_places import (
    Size,
    check_places,
    is_images,
    model_name,
    open_reference,
    open_training,
    open_whole,
    stored_size,
    trained_size,
    with_derived_fields,
)
from darkroom.evaluation.checks import PAIRED, caption_check, is_shapes_set, pair_check, shapes_check
from darkroom.evaluation.extractors import Extractor, default_extractors, open_extractor
from darkroom.evaluation.feature_files import FeatureFiles, PictureSource, observe
from darkroom.evaluation.likelihood import LEVELS, BoundSource
from darkroom.evaluation.measure import METRICS, MOST, Seen, check_metrics, extraction
from darkroom.evaluation.picture_sources import Check, GeneratedPictures, GenerationSettings, StoredPictures
from darkroom.evaluation.protocol import Extraction, Record
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, select_device
from darkroom.pixel_format import PixelFormat
from darkroom.safe_files import read_json, write_file
from darkroom.scoring_result import NEEDS, PARTS, RECORD, SHOWN, finish
from darkroom.training.distributed import World, any_rank

READ_PART = 64  # stored images that are looked at together
MOST_SAMPLES = 10_000  # of a model, where no number is asked for
MOST_COUNT = 10_000_000  # of anything: their very numbers would fill the memory
MOST_TRAINING = 10_000  # training images searched for neighbours, where they were not named
SETTINGS = "eval.json"  # of the scores in a folder, from before the first image was seen
Progress = Callable[[str, float, int], None]  # what is being done, how many images of it, of how many


@dataclass(frozen=True)
class EvalRequest:
    """What to score, and how. All of it is in the record; see `darkroom eval --help` for the words.

    metrics: names of `measure.METRICS`; None: all that can be made, but bits per dimension.
    bits_per_dim: bits per dimension beside them.
    pair_images: of so many images pairs are looked at (kernel distance, precision, density).
    training: images for the memorisation check; None: the training part of the data, where it has one.
    """

    model: str
    data: list[str]
    training: list[str] | None = None
    metrics: list[str] | None = None
    extractor: str = "auto"
    size: tuple[int, int] | None = None
    count: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    eta: float | None = None
    weights: str = "ema"
    batch_size: int = 16
    pair_images: int = MOST
    bits_per_dim: bool = False
    bound_levels: int = LEVELS
    sweep_steps: list[int] = field(default_factory=list)
    sweep_guidance: list[float] = field(default_factory=list)
    sweep_count: int | None = None
    save_images: bool = False
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"count": 1, "seed": 0, "steps": 1, "batch_size": 1, "pair_images": 2, "bound_levels": 2,
                 "sweep_count": 2, "threads": 1}  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise DarkroomError(f"{name} is {value}; give {smallest} or more")
        if max(self.count or 0, self.sweep_count or 0, self.pair_images) > MOST_COUNT:
            raise DarkroomError(f"that many images cannot be counted here; give numbers up to {MOST_COUNT:,}")
        if any(steps < 1 for steps in self.sweep_steps) or min(self.size or (1, 1)) < 1:
            raise DarkroomError(f"sweep_steps {self.sweep_steps}, size {self.size}: give numbers above 0")
        if self.metrics == []:
            raise DarkroomError(f"no metrics are named; there are {', '.join(METRICS)}")

    @property
    def settings(self) -> GenerationSettings:
        return GenerationSettings(self.seed, self.steps, self.guidance_scale, self.solver, self.eta, self.size)

    @property
    def wanted(self) -> list[str]:
        """The metrics to try."""
        named = [name for name in METRICS if name != "bits"] if self.metrics is None else check_metrics(self.metrics)
        return [*named, "bits"] if self.bits_per_dim and "bits" not in named else named

    def wants(self, metric: str) -> bool:
        return metric in self.wanted

    def insists(self, metric: str) -> bool:
        """Whether a metric that cannot be made is an error."""
        return metric in (self.metrics or []) or (metric == "bits" and self.bits_per_dim)


@dataclass(frozen=True)
class Evaluated:
    """Where the files are, and what is in scores.json."""

    folder: Path
    record: Record


def evaluate_model(
    request: EvalRequest,
    output: Path | None = None,
    *,
    world: World | None = None,
    progress: Progress | None = None,
    model: LatentDiffusion | None = None,
    dataset: ImageDataset | None = None,
) -> Evaluated | None:
    """Score a model, or stored images, against held-out ones. None in all processes but the first.

    output: by default `runs/eval-NAME`. What was interrupted there goes on; other settings are refused.
    model, dataset: these, in place of what the request names; the request then has a size and a count.

    Raises DarkroomError for anything a user can mend.
    """
    request.wanted  # noqa: B018  (unknown names are found before anything is opened)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    name = request.model if model is not None else model_name(request.model)
    folder = Path("runs") / f"eval-{name}" if output is None else Path(output)
    check_folder(folder)
    job = Evaluation(request, name, folder, world or World(), progress, model, dataset)
    return job.run()


def check_folder(folder: Path) -> None:
    """Refuse to write where something else is kept."""
    if folder.exists() and not folder.is_dir():
        raise DarkroomError(f"{folder}: is a file; choose a folder for --output")
    if (folder / "config.yaml").exists() or (folder / "darkroom.json").exists():
        raise DarkroomError(f"{folder}: holds a run or a model; choose another --output for the scores")
    if (folder / RECORD).exists() and not (folder / SETTINGS).exists():
        raise DarkroomError(f"{folder}: holds other scores; choose another --output")


class Evaluation:
    """One evaluation: what is opened, and the stages."""

    def __init__(
        self,
        request: EvalRequest,
        name: str,
        folder: Path,
        world: World,
        progress: Progress | None,
        model: LatentDiffusion | None,
        dataset: ImageDataset | None,
    ) -> None:
        self.name, self.folder, self.world, self.progress = name, folder, world, progress
        self.device = select_device(request.device)
        check_places([*request.data, *(request.training or [])])  # a misspelt name is told before a model is loaded
        stored = model is None and is_images(request.model)
        if model is None and not stored:
            loaded = load(request.model, request.weights, self.device)
            if not isinstance(loaded, LatentDiffusion):
                raise DarkroomError(
                    f"{request.model} is a first stage only: score it with --first-stage {request.model}"
                )
            model = loaded
        self.model = model
        pixels = PixelFormat() if model is None else model.pixels
        channels = 3 if model is None else model.image_channels
        size = request.size or (stored_size(request.model) if model is None else self._trained_size(request.model))
        # As it can be asked for again: with what was chosen here.
        self.request = replace(request, size=size, device=str(self.device), threads=torch.get_num_threads())
        self.dataset = dataset or open_reference(request.data, size, channels, pixels)
        if model is not None:
            self.dataset = with_derived_fields(self.dataset, model)
        self.extractor = open_extractor(request.extractor, self.device)
        self.training = self._training(size, channels, pixels)
        self.networks: dict[str, Extraction] = {}
        self.source = self._samples(size)
        self.count = len(self.source)
        self._check_possible()
        self.points = self._points()

    def _trained_size(self, place: str) -> Size:
        assert self.model is not None
        width, height = self.model.defaults["size"]
        known = "size" in self.model.info.get("defaults", {})
        return (width, height) if known else trained_size(place) or (width, height)

    def _training(self, size: Size, channels: int, pixels: PixelFormat) -> StoredPictures | None:
        if self.request.training is not None:
            return StoredPictures(open_whole(self.request.training, size, channels, pixels))
        needed = self.request.wants("neighbours") or self.request.wants("accuracy")
        found = open_training(self.request.data, size, channels, pixels) if needed and self.request.data else None
        if found is None:
            return None
        return StoredPictures(found, spread(len(found), MOST_TRAINING))

    def _samples(self, size: Size) -> GeneratedPictures | StoredPictures:
        request = self.request
        if self.model is None:
            images = open_whole([request.model], size, 3, PixelFormat())
            if request.count is not None and request.count > len(images):
                raise DarkroomError(
                    f"{request.model}: {request.count} images were asked for and there are {len(images)}; leave "
                    "--count out"
                )
            return StoredPictures(images, spread(len(images), request.count or len(images)))
        count = request.count or min(len(self.dataset), MOST_SAMPLES)
        return self.generated(count, replace(request.settings, size=size))

    def generated(self, count: int, settings: GenerationSettings) -> GeneratedPictures:
        """Images of the model, with the checks that their conditions allow."""
        assert self.model is not None
        source = GeneratedPictures(self.model, self.dataset, count, settings)
        source.checks += self._checks(source)
        return source

    def _checks(self, source: GeneratedPictures) -> list[Check]:
        checks: list[Check] = []
        if self.request.wants("agreement") and is_shapes_set(self.dataset) and source.fields:
            checks.append(shapes_check(source.fields, self.dataset.class_names))
        if self.request.wants("clip") and "text" in source.fields and (reader := self._clip_reader) is not None:
            self.networks[reader.name] = extraction(reader.images)
            checks.append(caption_check(reader.name, reader))
        if self.request.wants("pairs") and any(field in source.fields for field in PAIRED):
            distance, _ = default_extractors(self.device)
            self.networks[distance.name] = Extraction(distance.name, distance.weights, "none")
            checks.append(pair_check(self.dataset, distance))
        return checks

    @cached_property
    def _clip_reader(self) -> ClipReader | None:
        """CLIP, where its files are; where the score was asked for by name, what is missing is said."""
        try:
            return open_clip_reader(self.device)
        except DarkroomError:
            if self.request.insists("clip"):
                raise
            return None

    def _check_possible(self) -> None:
        """What was asked for by name and cannot be made is told before anything is."""
        for metric, so in self.possible().items():
            if self.request.insists(metric) and not so:
                raise DarkroomError(f'metric "{metric}" {NEEDS[metric]}; leave it out')

    def possible(self) -> dict[str, bool]:
        """Of metrics that not all pictures can have: can these?"""
        generated = isinstance(self.source, GeneratedPictures)
        fields = self.source.fields if isinstance(self.source, GeneratedPictures) else []
        classes = self.dataset.class_names if len(self.dataset.class_names) > 1 else None
        own = self.dataset if generated else self.source.dataset
        return {
            "is": self.extractor.has_classes,
            "accuracy": own is not None and own.class_names == classes and (not generated or "class_label" in fields),
            "pairs": any(field in fields for field in PAIRED),
            "clip": "text" in fields,
            "agreement": is_shapes_set(self.dataset) and bool(fields),
            "bits": generated,
        }

    def _points(self) -> list[tuple[str, float, GeneratedPictures]]:
        """Of the curves: (setting, its value, the images made so). Settings that cannot be are told now."""
        request = self.request
        if not request.sweep_steps and not request.sweep_guidance:
            return []
        if not isinstance(self.source, GeneratedPictures):
            raise DarkroomError("curves over steps or guidance need a model; stored images have neither")
        count = min(request.sweep_count or self.count, self.count)
        own = self.source.settings
        wanted: list[tuple[str, float, GenerationSettings]] = [
            *(("steps", float(n), replace(own, steps=n)) for n in dict.fromkeys(request.sweep_steps)),
            *(("guidance", g, replace(own, guidance_scale=g)) for g in dict.fromkeys(request.sweep_guidance)),
        ]
        return [(setting, value, self.generated(count, settings)) for setting, value, settings in wanted]

    # --- stages ---

    def run(self) -> Evaluated | None:
        self._check_settings()
        error: DarkroomError | None = None
        bits: FeatureFiles | None = None
        points: list[tuple[str, float, Seen]] = []
        try:
            self._look_at_sets()
            bits, points = self._bits(), self._sweeps()
        except DarkroomError as found:
            error = found
        # All wait here for one another, and hear of an error: else the others would wait for ever.
        if any_rank(error is not None, self.world, self.device):
            raise error or DarkroomError("another process could not go on; its message says why")
        return Evaluated(self.folder, finish(self, bits, points)) if self.world.is_main else None

    def _look_at_sets(self) -> None:
        self._look("looking at the reference", StoredPictures(self.dataset), self.reference.files, self.extractor)
        if self.training is not None and self.trained is not None:
            self._look("looking at training images", self.training, self.trained.files, self.extractor)
        doing = "generating" if self.model is not None else "looking at the images"
        self._look(doing, self.source, self.samples.files, self.extractor, keep=self._keep)

    @cached_property
    def reference(self) -> Seen:
        return Seen(self._files("reference", len(self.dataset), READ_PART), self.extractor, self.request.pair_images)

    @cached_property
    def trained(self) -> Seen | None:
        if self.training is None:
            return None
        return Seen(self._files("training", len(self.training), READ_PART), self.extractor, self.request.pair_images)

    @cached_property
    def samples(self) -> Seen:
        return Seen(
            self._files("samples", self.count, self.request.batch_size), self.extractor, self.request.pair_images
        )

    def _files(self, name: str, count: int, part: int) -> FeatureFiles:
        return FeatureFiles(self.folder / PARTS / name, count, part)

    def _look(
        self,
        doing: str,
        source: PictureSource,
        files: FeatureFiles,
        extractor: Extractor | None,
        keep: Callable[[Sequence[int], Tensor], None] | None = None,
    ) -> None:
        """One set, with its progress."""
        total = sum(len(files.numbers(start)) for start in files.starts[self.world.rank :: self.world.size])
        done = 0.0

        def report(images: float) -> None:
            nonlocal done
            done += images
            if self.progress is not None:
                self.progress(doing, min(done, total), total)

        if isinstance(source, GeneratedPictures):

            def on_step(step: int, steps: int) -> None:
                if self.progress is not None:
                    self.progress(doing, min(done + files.part * step / steps, total), total)

            source.on_step = on_step
        observe(source, files, extractor, rank=self.world.rank, size=self.world.size, report=report, keep=keep)

    def _bits(self) -> FeatureFiles | None:
        if not self.request.wants("bits"):
            return None
        assert isinstance(self.source, GeneratedPictures)
        files = self._files("bits", min(self.count, len(self.dataset)), self.request.batch_size)
        source = BoundSource(self.generated(files.count, self.source.settings), self.request.bound_levels)
        self._look("bounding the likelihood", source, files, None)
        return files

    def _sweeps(self) -> list[tuple[str, float, Seen]]:
        """(setting, its value, what was seen of the images made so)."""
        result = []
        for setting, value, source in self.points:
            files = self._files(f"{setting}-{value!r}", len(source), self.request.batch_size)
            self._look(f"generating, {setting} {value:g}", source, files, self.extractor)
            result.append((setting, value, Seen(files, self.extractor, self.request.pair_images)))
        return result

    def _keep(self, numbers: Sequence[int], images: Tensor) -> None:
        """The images of the grid, and all of them where that was asked for."""
        shown = set(spread(self.count, SHOWN))
        for number, image in zip(numbers, images.numpy(), strict=True):
            if number in shown:
                write_image(image, self.folder / PARTS / "shown" / f"{number:08d}.png")
            if self.request.save_images:
                write_image(image, self.folder / "images" / f"{number:08d}.png")

    # --- the settings of a folder ---

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides the numbers: parts made under others must not be joined with these."""
        plain = to_dict(self.request)
        for place in ("model", "data", "training"):
            del plain[place]
        sets = {"data": self.dataset.digest, "training": self.training and self.training.dataset.digest}
        images = self.source.dataset.digest if isinstance(self.source, StoredPictures) else self.model_digest
        facts = {"images": images, **sets, "extractor_weights": self.extractor.weights, "torch": torch.__version__}
        return json.loads(json.dumps(plain | facts))

    @cached_property
    def model_digest(self) -> str:
        assert self.model is not None
        return module_hash(self.model)

    def _check_settings(self) -> None:
        file = self.folder / SETTINGS
        if file.is_file():
            kept = read_json(file, "settings of an evaluation")
            differ = [name for name in self.settings if kept.get(name) != self.settings[name]]
            if differ:
                name = differ[0]
                raise DarkroomError(
                    f"{self.folder}: was begun with other settings ({name}: {str(kept.get(name))[:40]}, now "
                    f"{str(self.settings[name])[:40]}); choose another --output, or the same settings"
                )
        elif self.world.is_main:
            write_file(file, (json.dumps(self.settings, indent=1) + "\n").encode())
