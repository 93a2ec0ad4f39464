"""Images to be scored, by number: stored ones, and those that a model makes of the conditions of held-out examples.

Image k of a model has seed `seed + k` and the conditions of one reference example, so that it is the same whoever makes
it and whenever. Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkroom.conditioning.classes import ClassEncoder
from darkroom.conditioning.encoder import digest_of
from darkroom.conditioning.requests import encoders_of, named_encoders
from darkroom.data.batches import pixels_of
from darkroom.data.io import preview
from darkroom.data.sources import ImageDataset
from darkroom.errors import DarkroomError
from darkroom.evaluation.feature_files import Pictures, Values
from darkroom.generation_request import Request
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.pixel_format import PixelFormat

# Of the values of an image: the number of the class that it has, or was asked to have; network calls it took.
LABEL, NFE = "label", "nfe"
Example = Mapping[str, Any]
Check = Callable[[Tensor, Sequence[Example]], Values]  # uint8 (B, H, W, 3) and the examples they were made after


def eight_bits(images: np.ndarray | Tensor, pixels: PixelFormat) -> Tensor:
    """(B, H, W, C) numbers of a pixel format -> uint8 (B, H, W, 3), as people would be shown them; grey three times."""
    shown = [preview(np.asarray(image), pixels) for image in images]
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(shown)))
    return stacked.expand(-1, -1, -1, 3).contiguous() if stacked.shape[-1] == 1 else stacked


class StoredPictures:
    """Images of a data set, those of `numbers` in this order."""

    def __init__(self, dataset: ImageDataset, numbers: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.numbers = list(range(len(dataset))) if numbers is None else list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, numbers: Sequence[int]) -> Pictures:
        examples = [self.dataset[self.numbers[n]] for n in numbers]
        images = torch.stack([example["image"] for example in examples]).permute(0, 2, 3, 1)
        values = {LABEL: labels_of(examples)} if "class_label" in examples[0] else {}
        return Pictures(eight_bits(images, self.dataset.pixels), values)


def labels_of(examples: Sequence[Example]) -> Tensor:
    """(B,) class numbers as floats; not a number where an example has none."""
    found = [example.get("class_label") for example in examples]
    return torch.tensor([float("nan") if label is None else float(label) for label in found])


@dataclass(frozen=True)
class GenerationSettings:
    """How images are made; None takes the model's default."""

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    eta: float | None = None
    size: tuple[int, int] | None = None

    def request(self, **conditions: Any) -> Request:
        return Request(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            solver=self.solver,
            eta=self.eta,
            size=self.size,
            **conditions,
        )


class GeneratedPictures:
    """`count` images of a model with the conditions of examples, evenly spread over the data set.

    dataset: None for a model without conditions.
    checks: what is measured of each image against the example whose conditions it was made of.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        dataset: ImageDataset | None,
        count: int,
        settings: GenerationSettings,
        checks: Sequence[Check] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.dataset, self.count, self.settings = model, dataset, count, settings
        self.checks, self.on_step = list(checks), on_step
        if dataset is None and model.conditioner.fields:
            raise DarkroomError(
                f"the model is told {' and '.join(model.conditioner.fields)}: name data that has it, behind the rest"
            )
        self.fields = [] if dataset is None else given_fields(model, dataset)
        self.class_names = [] if dataset is None else _check_classes(model, dataset, self.fields)
        if dataset is not None and count > len(dataset) and set(self.fields) - {"class_label"}:
            raise DarkroomError(
                f"{count} images are more than the {len(dataset)} examples whose {' and '.join(self.fields)} they are "
                f"made of; take --count {len(dataset)} or fewer, or more data"
            )
        model.validate(self.request([0]))  # what is wrong is found before anything is made

    def __len__(self) -> int:
        return self.count

    def example(self, number: int) -> Example:
        """The example whose conditions image `number` has."""
        if self.dataset is None:
            return {}
        return self.dataset[number * len(self.dataset) // self.count]

    def request(self, numbers: Sequence[int], examples: Sequence[Example] | None = None) -> Request:
        """What is asked for images of these numbers."""
        examples = [self.example(n) for n in numbers] if examples is None else examples
        given: dict[str, Any] = {field: [self._value(field, e) for e in examples] for field in self.fields}
        request = self.settings.request(
            prompts=given.pop("text", None), class_labels=given.pop("class_label", None), conditions=given or None
        )
        return replace(request, seeds=[self.settings.seed + n for n in numbers], batch_size=len(numbers))

    def _value(self, field: str, example: Example) -> Any:
        if field == "class_label":
            return self.class_names[example[field]]
        if field in ("image", "low_resolution"):
            return pixels_of(self.dataset).to_network(example[field])
        return example[field]

    def read(self, numbers: Sequence[int]) -> Pictures:
        examples = [self.example(n) for n in numbers]
        request = self.request(numbers, examples)
        result = self.model.generate(request, progress=self.on_step)
        images = eight_bits(result.images, self.model.pixels)
        values: Values = {NFE: torch.full((len(numbers),), float(result.nfe))}
        if "class_label" in self.fields:
            values[LABEL] = labels_of(examples)
        for check in self.checks:
            values |= check(images, examples)
        return Pictures(images, values, conditions_digest(request) if self.fields else "")


def given_fields(model: LatentDiffusion, dataset: ImageDataset) -> list[str]:
    """The conditions that images are made with: all that the model takes and the data has. Those that follow from the
    size of the image, and those that a model can do without, are left out where the data lacks them."""
    fields: list[str] = []
    for encoder in encoders_of(model.conditioner):
        missing = [field for field in encoder.fields if field not in dataset.fields]
        follows = encoder.from_size(dataset.size) is not None
        if missing and not (encoder.optional or follows):
            has = " and ".join(f for f in dataset.fields if f != "image") or "images alone"
            raise DarkroomError(
                f"the model is told {' and '.join(encoder.fields)}, and the data has {has}: evaluate it on data with "
                f"{missing[0]}, such as the held-out part of its training data"
            )
        fields += [field for field in encoder.fields if not missing and field not in fields]
    return fields


def _check_classes(model: LatentDiffusion, dataset: ImageDataset, fields: Sequence[str]) -> list[str]:
    """The data's class names; classes by number (boxes, maps) must be the model's own, classes by name be known."""
    for name, encoder in named_encoders(model.conditioner):
        config: Any = getattr(encoder, "config", None)
        classes = list(getattr(config, "classes", None) or [])
        if not classes or encoder.field not in fields:
            continue
        theirs = list(replace(config, classes=[]).completed(name, dataset).classes)
        unknown = [c for c in theirs if c not in classes]
        if unknown or (theirs != classes and not isinstance(encoder, ClassEncoder)):
            raise DarkroomError(
                f"the classes of the data ({', '.join(theirs[:3])}, ...) are not those that the model was trained with "
                f"({', '.join(classes[:3])}, ...); evaluate it on data with its own classes"
            )
    return list(dataset.class_names)


def conditions_digest(request: Request) -> str:
    """SHA-256 of what some images were asked to show."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [list(value.shape), digest_of(value)]
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else str(value)

    known = {"text": request.prompts, "class_label": request.class_labels, **(request.conditions or {})}
    told = {name: plain(values) for name, values in sorted(known.items()) if values is not None}
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()
