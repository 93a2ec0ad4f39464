"""Batches by step number. Nothing here has a state that a checkpoint would have to save.

Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from darkroom.data.masks import draw_mask
from darkroom.data.transforms import crop_example, crop_step
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

Batch = dict[str, Any]


class Examples(Protocol):
    """What batches are made of: an `ImageDataset`, a `LatentCache`, or any sequence of examples.

    A `config` with `flip` or a random crop asks for augmentation; then `example(index, flip)` must be there too. Where
    `redraws` is true, `redrawn(index, rng, flip)` gives an example whose random fields are drawn anew.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def pixels_of(dataset: Any) -> PixelFormat:
    """The pixel format of a data set; 8 bits for sequences that say nothing."""
    pixels = getattr(dataset, "pixels", None)
    return pixels if isinstance(pixels, PixelFormat) else PixelFormat()


def collate(examples: Sequence[dict[str, Any]], pixels: PixelFormat | None = None) -> Batch:
    """Examples -> batch: `image` and `low_resolution` float32 (B, C, H, W) in [-1, 1]; `moments` float32; `class_label`
    int64 (B,); `segmentation` int64 (B, H, W); `repaint_mask` and `depth` float32 (B, 1, H, W); `embedding` float32
    (B, D); `text` and `boxes` lists of B.

    pixels: what the numbers of `image` mean (`dataset.pixels`); by default 8 bits.
    """
    pixels = pixels or PixelFormat()
    batch: Batch = {}
    for field in examples[0]:
        values = [example[field] for example in examples]
        if field in ("image", "low_resolution"):
            images = torch.stack(values)
            if images.dtype != getattr(torch, pixels.dtype):
                raise ValueError(f"images are {images.dtype}, the pixel format says {pixels.dtype}")
            batch[field] = pixels.to_network(images)
        elif field in ("segmentation", "moments", "repaint_mask", "depth", "embedding"):
            batch[field] = torch.stack(values)
        elif field == "class_label":
            batch[field] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[field] = values
    return batch


class Batches:
    """Shuffled epochs as a pure function of (seed, step): resuming needs nothing but the step.

    batch_size: examples of one micro-batch on one rank. The stream of one epoch is cut into joint batches of
        batch_size * world_size, of which each rank takes its slice: two ranks with 4 see what one with 8 sees.
        The remainder of an epoch is dropped; a set smaller than a joint batch is repeated to fill it.
    micro_batches: how many make a training step (gradient accumulation).
    augment: apply the configuration's `flip` and `random_crop`, and redraw random masks and random damage (drawn from
        the seed and the batch number).
    crop: (width, height) of random crops instead of the configuration's.
    prefetch: prepare the next batch in a background thread; what is returned does not depend on it.
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        augment: bool = True,
        crop: tuple[int, int] | None = None,
        prefetch: bool = False,
    ) -> None:
        if batch_size < 1 or micro_batches < 1:
            raise DarkroomError(f"batch_size={batch_size}, micro_batches={micro_batches}: both must be 1 or more")
        if not len(dataset):
            raise DarkroomError("the training set is empty; check the data source and its `exclude`")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self._pixels = pixels_of(dataset)
        config = getattr(dataset, "config", None) if augment else None
        self._flip = bool(config is not None and config.flip)
        self._crop = crop or (config.crop_width_height if config is not None else None)
        size = config.width_height if config is not None else None
        if self._crop is not None and size is not None and (self._crop[0] > size[0] or self._crop[1] > size[1]):
            raise DarkroomError(
                f"crop {self._crop[0]}x{self._crop[1]} does not fit in images of {size[0]}x{size[1]}; make it smaller"
            )
        self._mask = getattr(dataset, "mask_rule", None) if augment else None
        self._redraws = augment and bool(getattr(dataset, "redraws", False))
        self._drawn = self._crop or size
        self.joint = batch_size * world_size
        self.per_epoch = max(1, len(dataset) // self.joint)
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._next: tuple[int, Future[Batch]] | None = None

    def epoch(self, train_step: int) -> float:
        """Epochs done when this step begins."""
        return train_step * self.micro_batches / self.per_epoch

    def indices(self, train_step: int, micro: int = 0) -> list[int]:
        """The examples of this rank's micro-batch."""
        return self._indices(self._number(train_step, micro))

    def batch_at(self, train_step: int, micro: int = 0) -> Batch:
        """The batch of this rank for micro-batch `micro` of `train_step`."""
        number = self._number(train_step, micro)
        if self._pool is None:
            return self._make(number)
        ready = self._next is not None and self._next[0] == number
        batch = self._next[1].result() if self._next is not None and ready else self._make(number)
        self._next = (number + 1, self._pool.submit(self._make, number + 1))
        return batch

    def close(self) -> None:
        """Stop the background thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._next = None

    def _number(self, train_step: int, micro: int) -> int:
        if not 0 <= micro < self.micro_batches or train_step < 0:
            raise ValueError(f"step {train_step}, micro-batch {micro} of {self.micro_batches}")
        return train_step * self.micro_batches + micro

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0, epoch])
        wanted = self.per_epoch * self.joint
        rounds = -(-wanted // len(self.dataset))
        return np.concatenate([rng.permutation(len(self.dataset)) for _ in range(rounds)])[:wanted]

    def _indices(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        start = place * self.joint + self.rank * self.batch_size
        return [int(i) for i in self._order(epoch)[start : start + self.batch_size]]

    def _make(self, number: int) -> Batch:
        indices = self._indices(number)
        if not self._flip and self._crop is None:
            plain = [self._example(index, number, place) for place, index in enumerate(indices)]
            return collate(self._with_masks(plain, number), self._pixels)
        rng = np.random.default_rng([self.seed, 1, number])
        draws = rng.random((self.joint, 3))[self.rank * self.batch_size :]
        examples = []
        for place, (index, (mirror, right, down)) in enumerate(zip(indices, draws.tolist(), strict=False)):
            example = self._example(index, number, place, flip=self._flip and mirror < 0.5)
            if self._crop is not None:
                height, width = example["image"].shape[-2:]
                step = crop_step(example, *self._crop)
                x = int(right * ((width - self._crop[0]) // step + 1)) * step
                y = int(down * ((height - self._crop[1]) // step + 1)) * step
                example = crop_example(example, x, y, *self._crop)
            examples.append(example)
        return collate(self._with_masks(examples, number), self._pixels)

    def _example(self, index: int, number: int, place: int, flip: bool = False) -> dict[str, Any]:
        """One example for a place of a batch, not cropped yet."""
        dataset: Any = self.dataset
        if self._redraws:
            rng = np.random.default_rng([self.seed, 3, number, self.rank * self.batch_size + place])
            return dataset.redrawn(index, rng, flip)
        return dataset.example(index, flip=True) if flip else dataset[index]

    def _with_masks(self, examples: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        """A mask of its own for every example of every batch, in place of the one that goes with the example."""
        if self._mask is None or self._drawn is None or "repaint_mask" not in examples[0]:
            return examples
        place = self.rank * self.batch_size
        for i, example in enumerate(examples):
            rng = np.random.default_rng([self.seed, 2, number, place + i])
            example["repaint_mask"] = torch.from_numpy(draw_mask(rng, self._drawn, self._mask))
        return examples


def ordered_batches(dataset: Examples, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The first `limit` examples (default: all) once, in order, not augmented. The last batch may be smaller."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for start in range(0, count, batch_size):
        yield collate([dataset[i] for i in range(start, min(start + batch_size, count))], pixels_of(dataset))
