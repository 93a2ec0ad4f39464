"""A page that asks people which of two pictures is better without telling where they come from: the paper's user study
(Rombach et al. 2022, App. E.3.4-5) as one HTML file that needs no server.

Pairs come in random order, sides are turned at random, choices stay in the visitor's browser and can be downloaded; the
preference has a binomial interval. Shapes: B pairs, H W image size.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkroom.config import understanding
from darkroom.data.batches import pixels_of
from darkroom.data.io import png_bytes
from darkroom.data.locations import spread
from darkroom.data.pictures import PictureDataset
from darkroom.data.sources import ImageDataset
from darkroom.errors import DarkroomError
from darkroom.eval_places import (
    Size,
    is_images,
    model_name,
    open_reference,
    open_whole,
    stored_size,
    with_derived_fields,
)
from darkroom.evaluation.intervals import binomial_interval
from darkroom.evaluation.picture_sources import GeneratedPictures, GenerationSettings, StoredPictures, eight_bits
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load, select_device
from darkroom.pixel_format import PixelFormat
from darkroom.report import ASSETS
from darkroom.safe_files import read_json, write_file

QUESTION = "Which picture is better?"
QUESTION_WITH_CAPTION = "Which picture is better, and shows what is asked for?"
ANSWERS = "darkroom blind answers"
Progress = Callable[[str, float, int], None]


@dataclass(frozen=True)
class BlindRequest:
    """one, other: models or images; data: the held-out examples whose conditions models are given. The rest is how
    models make images, as in `darkroom eval`: both have the same seeds and conditions, pair by pair."""

    one: str
    other: str
    data: list[str] = field(default_factory=list)
    pairs: int = 40
    size: Size | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    eta: float | None = None
    weights: str = "ema"
    batch_size: int = 16
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two pictures, uint8 (H, W, 3), the caption that both were made of, and the picture that both were made of."""

    one: np.ndarray
    other: np.ndarray
    caption: str = ""
    given: np.ndarray | None = None


def write_blind_page(request: BlindRequest, output: Path | None = None, progress: Progress | None = None) -> Path:
    """Make the pairs and write the page, by default `runs/blind-ONE-OTHER.html`."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    names = [model_name(place) for place in (request.one, request.other)]
    names = names if names[0] != names[1] else [request.one, request.other]
    if request.one == request.other:
        raise DarkroomError(f"{request.one} against itself: name two models, or two sets of images")
    page = Path("runs") / f"blind-{names[0]}-{names[1]}.html" if output is None else output
    if page.suffix.lower() not in (".html", ".htm"):
        raise DarkroomError(f"{page}: the page is one file; give --output a name that ends in .html")
    write_file(page, blind_page(make_pairs(request, progress), names).encode())
    return page


def make_pairs(request: BlindRequest, progress: Progress | None = None) -> list[Pair]:
    """The pictures of both sides, number by number."""
    places = [request.one, request.other]
    models = [None if is_images(place) else _model(place, request) for place in places]
    size = request.size or _common_size(places, models)
    dataset = _conditions(request, [model for model in models if model is not None], size)
    stored = [
        open_whole([place], size, 3, PixelFormat()) if model is None else None
        for place, model in zip(places, models, strict=True)
    ]
    chosen = _numbers([images for images in stored if images is not None], request.pairs)
    count = len(chosen[0]) if chosen else request.pairs
    settings = GenerationSettings(
        request.seed, request.steps, request.guidance_scale, request.solver, request.eta, size
    )
    sides: list[GeneratedPictures | StoredPictures] = []
    for images, model in zip(stored, models, strict=True):
        if images is not None:
            sides.append(StoredPictures(images, chosen.pop(0)))
        elif model is not None:
            sides.append(GeneratedPictures(model, dataset, count, settings))
    made = [_pictures(side, count, request.batch_size, progress, number) for number, side in enumerate(sides)]
    generated = next((side for side in sides if isinstance(side, GeneratedPictures)), None)
    return [Pair(one, other, *_words(generated, n)) for n, (one, other) in enumerate(zip(*made, strict=True))]


def _model(place: str, request: BlindRequest) -> LatentDiffusion:
    model = load(place, request.weights, select_device(request.device))
    if not isinstance(model, LatentDiffusion):
        raise DarkroomError(f"{place} is a first stage only, which makes no pictures")
    return model


def _common_size(places: Sequence[str], models: Sequence[LatentDiffusion | None]) -> Size:
    """(width, height) of the pictures of both sides, which must not tell them apart."""
    found = [
        stored_size(place) if model is None else tuple(model.defaults["size"])
        for place, model in zip(places, models, strict=True)
    ]
    if found[0] != found[1]:
        shown = [f"{place} has pictures of {w}x{h}" for place, (w, h) in zip(places, found, strict=True)]
        raise DarkroomError(f"{' and '.join(shown)}, which would tell them apart; bring both to one with --size")
    return found[0][0], found[0][1]


def _conditions(request: BlindRequest, models: Sequence[LatentDiffusion], size: Size) -> ImageDataset | None:
    """The examples whose conditions the models are given."""
    if not request.data or not models:
        return None
    dataset = open_reference(request.data, size, models[0].image_channels, models[0].pixels)
    for model in models:
        dataset = with_derived_fields(dataset, model)
    return dataset


def _numbers(sets: Sequence[ImageDataset], pairs: int) -> list[list[int]]:
    """Which images of each stored side: those of one name belong together; without common names those of one number."""
    if not sets:
        return []
    if len(sets) == 2 and all(isinstance(images, PictureDataset) for images in sets):
        keys = [{images.key(i): i for i in range(len(images))} for images in sets]  # type: ignore[attr-defined]
        common = [key for key in keys[0] if key in keys[1]]
        if common:
            return [[names[common[i]] for i in spread(len(common), pairs)] for names in keys]
    count = min(pairs, *(len(images) for images in sets))
    return [spread(len(images), count) for images in sets]


def _pictures(
    side: GeneratedPictures | StoredPictures, count: int, batch_size: int, progress: Progress | None, number: int
) -> list[np.ndarray]:
    made: list[np.ndarray] = []
    for start in range(0, count, batch_size):
        made += list(side.read(range(start, min(start + batch_size, count))).images.numpy())
        if progress is not None:
            progress(f"making side {number + 1}", len(made), count)
    return made


def _words(side: GeneratedPictures | None, number: int) -> tuple[str, np.ndarray | None]:
    """The caption, or class, and the picture that was given, of what a model was asked for."""
    if side is None or not side.fields:
        return "", None
    example = side.example(number)
    caption = str(example["text"]) if "text" in side.fields else ""
    if not caption and "class_label" in side.fields:
        caption = side.class_names[example["class_label"]].replace("_", " ")
    given, pixels = None, pixels_of(side.dataset)
    if "low_resolution" in side.fields:
        given = eight_bits(example["low_resolution"].permute(1, 2, 0)[None], pixels)[0].numpy()
    if "repaint_mask" in side.fields:
        whole = eight_bits(example["image"].permute(1, 2, 0)[None], pixels)[0].numpy()
        given = np.where(example["repaint_mask"][0, :, :, None].numpy() >= 0.5, np.uint8(127), whole)
    return caption, given


# --- the page ---------------------------------------------------------------------------------------------------------


def blind_page(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    """One HTML file. The names are in it, for the result; nothing on the screen tells them before."""
    content = [
        {
            "one": _uri(pair.one),
            "other": _uri(pair.other),
            "caption": pair.caption,
            "given": None if pair.given is None else _uri(pair.given),
        }
        for pair in pairs
    ]
    page = hashlib.sha256(json.dumps([content, list(names)]).encode()).hexdigest()[:16]
    question = QUESTION_WITH_CAPTION if any(pair.caption or pair.given is not None for pair in pairs) else QUESTION
    study = {"page": page, "names": list(names), "question": question, "pairs": content}
    text = (ASSETS / "blind.html").read_text(encoding="utf-8")
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    data = json.dumps(study, ensure_ascii=False).replace("<", "\\u003c")  # a caption must not end the script
    return text.replace("@@STYLE@@", style).replace("@@STUDY@@", data)


def _uri(image: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(np.ascontiguousarray(image))).decode()}"


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """How often `names[0]` was chosen, and the 95 % interval of that share."""

    names: list[str]
    chosen: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        return binomial_interval(self.chosen, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.chosen / self.count:.1%}" if self.count else "nothing"
        return (
            f"{self.names[0]} was preferred to {self.names[1]} in {self.chosen} of {self.count} pairs: {share}, 95 % "
            f"interval {low:.1%} to {high:.1%}"
        )


def read_answers(file: Path) -> tuple[str, Preference]:
    """(page, preference) of a downloaded file."""
    if not file.is_file():
        raise DarkroomError(f"{file}: no such file; give what was downloaded from the page")
    raw: Mapping[str, Any] = read_json(file, "answers")
    if raw.get("kind") != ANSWERS or raw.get("version") != 1:
        raise DarkroomError(
            f"{file}: holds no answers of a blind page of this version; give what was downloaded from one"
        )
    with understanding(file, "answers of a blind page"):
        names = [str(name) for name in raw["names"]]
        counts = Counter(answer["chosen"] for answer in raw["answers"])
        if len(names) != 2 or set(counts) - {"one", "other"}:
            raise ValueError("choices that are neither the one nor the other")
        return str(raw["page"]), Preference(names, counts["one"], sum(counts.values()))


def result_lines(files: Sequence[Path]) -> list[str]:
    """What each visitor preferred, and all of them together. The interval takes all choices as independent."""
    found = [read_answers(file) for file in files]
    if len({page for page, _ in found}) > 1:
        raise DarkroomError(
            f"{files[0]} and {files[-1]}: are answers to different pages; put those of one page together"
        )
    lines = [f"{file.name}: {preference}" for file, (_, preference) in zip(files, found, strict=True)]
    if len(found) == 1:
        return lines
    together = Preference(found[0][1].names, sum(p.chosen for _, p in found), sum(p.count for _, p in found))
    return [*lines, f"together: {together}"]
