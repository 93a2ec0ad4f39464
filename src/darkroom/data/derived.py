"""Fields that are made of the image or drawn beside it: `low_resolution` and `repaint_mask`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from darkroom.data.degradations import degrade
from darkroom.data.masks import RandomMask, draw_mask
from darkroom.data.sources import DataConfig, ImageDataset

_MASKS = 5  # the stream of random numbers from which the masks of a split are drawn


class DerivedDataset(ImageDataset):
    """Another data set with more fields. Its images, and with them its digest and latent caches, are the same.

    A mask belongs to its example, and is redrawn for every batch where batches are augmented: see `Batches`. A field
    that the files have already stays theirs.
    """

    def __init__(self, dataset: ImageDataset, config: DataConfig) -> None:
        super().__init__(config, dataset.split)
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
    def mask_rule(self) -> RandomMask | None:
        return self.config.repaint_mask if "repaint_mask" in self._made else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._with_made(self.dataset[index], index, self._made)

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        made = [name for name in self._made if wanted is None or name in wanted]
        if "low_resolution" in made:  # it is made of the image
            return super().without_image(index, wanted)
        return self._with_made(self.dataset.without_image(index, wanted), index, made)

    def _with_made(self, example: dict[str, Any], index: int, names: Collection[str]) -> dict[str, Any]:
        config, made = self.config, dict(example)
        if "low_resolution" in names and config.low_resolution is not None:
            made["low_resolution"] = degrade(example["image"], config.low_resolution)
        if "repaint_mask" in names and config.repaint_mask is not None:
            rng = np.random.default_rng([config.seed, _MASKS, int(self.split == "validation"), index])
            made["repaint_mask"] = torch.from_numpy(draw_mask(rng, self.size, config.repaint_mask))
        return made

    def captions(self) -> list[str]:
        return self.dataset.captions()

    def describe(self) -> dict[str, Any]:
        return self.dataset.describe() | {"fields": list(self.fields)}
