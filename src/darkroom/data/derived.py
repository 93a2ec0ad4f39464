"""Fields that are made of the image or drawn beside it: `low_resolution` and `repaint_mask`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from darkroom.config import to_dict
from darkroom.data.degradations import degrade
from darkroom.data.masks import RandomMask, draw_mask
from darkroom.data.sources import DataConfig, ImageDataset
from darkroom.data.transforms import flip_example

# The streams of random numbers from which the masks and the damaged pictures of a split are drawn.
_MASKS, _DAMAGE = 5, 6


class DerivedDataset(ImageDataset):
    """Another data set with more fields. Its images, and with them its digest and latent caches, are the same.

    A mask belongs to its example, and so does damage that is random; both are redrawn for every batch where batches
    are augmented: see `Batches`. A field that the files have already stays theirs.
    """

    def __init__(self, dataset: ImageDataset, config: DataConfig) -> None:
        super().__init__(config, dataset.split)
        if config.low_resolution is not None:
            config.low_resolution.check(config.channels)
        self.dataset = dataset
        asked = {"low_resolution": config.low_resolution, "repaint_mask": config.repaint_mask}
        self._made = [name for name, rule in asked.items() if rule is not None and name not in dataset.fields]
        self.fields = (*dataset.fields, *self._made)
        self.class_names, self.box_names = dataset.class_names, dataset.box_names
        self.problems, self.replaced, self.digest = dataset.problems, dataset.replaced, dataset.digest

    @property
    def map_names(self) -> list[str]:
        return self.dataset.map_names

    @property
    def made(self) -> dict[str, Any]:
        return {name: to_dict(getattr(self.config, name)) for name in self._made}

    @property
    def mask_rule(self) -> RandomMask | None:
        return self.config.repaint_mask if "repaint_mask" in self._made else None

    @property
    def redraws(self) -> bool:
        rule = self.config.low_resolution
        return "low_resolution" in self._made and rule is not None and rule.is_random

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._with_made(self.dataset[index], index, self._made)

    def redrawn(self, index: int, rng: np.random.Generator, flip: bool = False) -> dict[str, Any]:
        example = self._with_made(self.dataset[index], index, self._made, rng)
        return flip_example(example) if flip else example

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        made = [name for name in self._made if wanted is None or name in wanted]
        if "low_resolution" in made:  # it is made of the image
            return super().without_image(index, wanted)
        return self._with_made(self.dataset.without_image(index, wanted), index, made)

    def _with_made(
        self, example: dict[str, Any], index: int, names: Collection[str], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """rng: what damage is drawn from; None: from a generator of the example's own."""
        config, made = self.config, dict(example)
        if "low_resolution" in names and config.low_resolution is not None:
            rng = rng or np.random.default_rng([config.seed, _DAMAGE, int(self.split == "validation"), index])
            made["low_resolution"] = degrade(example["image"], config.low_resolution, rng, self.pixels)
        if "repaint_mask" in names and config.repaint_mask is not None:
            rng = np.random.default_rng([config.seed, _MASKS, int(self.split == "validation"), index])
            made["repaint_mask"] = torch.from_numpy(draw_mask(rng, self.size, config.repaint_mask))
        return made

    def captions(self) -> list[str]:
        return self.dataset.captions()

    def describe(self) -> dict[str, Any]:
        return self.dataset.describe() | {"fields": list(self.fields)} | self.made
