"""Where examples come from: `DataConfig`, `open_dataset`, and the datasets behind them.

An example is a dict; its `image` is (C, H, W) in the type of `data.pixels`, its other fields are those of a batch:
`text` str; `class_label` int; `boxes` float32 (n, 5) of class, x0, y0, x1, y1; `segmentation` int64 (H, W);
`low_resolution` (C, H/factor, W/factor) in the type of the image; `repaint_mask` float32 (1, H, W), 1 = repaint;
`depth` float32 (1, H, W), larger = nearer; `embedding` float32 (D,); `sizes` as of
`transforms.sizes_of`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from darkroom.data import shapes
from darkroom.data.degradations import LowResolution
from darkroom.data.locations import is_mixture, is_shapes, part_of
from darkroom.data.masks import RandomMask
from darkroom.data.transforms import flip_example
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

SPLITS = ("train", "validation")
SYNTHETIC = ("phantoms16", "bands6")  # drawn by `synthetic`


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    source: "shapes" (or "shapes:single", "shapes:pair"), "phantoms16", "bands6", an image folder, a tar or tar.gz
        shard, a glob of shards, a folder of shards, or a list of these. "PATH@COUNT" takes at most COUNT examples of
        a source.
    size: what the network sees, pixels; an int for a square or (width, height).
    channels: 3, 1 for grey, or as many as the images have.
    pixels: type of the numbers that the model works on and gives back: "uint8", "uint16", "float32", or "auto" for what
        the files hold.
    value_range: [low, high], the values that are black and white; what lies outside is clipped. None: all that an
        integer type holds; for float32 the least and the greatest value of the training images.
    count: number of scenes of a procedural source in the train split (a tenth of it, 1000 at most, in validation).
    validation: a share in [0, 1) of the examples, chosen by a hash of their keys; or paths or globs that hold them.
        A source with its own train and validation parts (sub-folders or shard names) uses those instead of a share.
    exclude: examples whose JSON metadata has one of these values under the key are left out: {"group": ["component"]}.
    limit: use at most this many examples of a split (chosen by hash, not the first ones).
    seed: of the procedural sources.
    flip: each example is mirrored with probability 1/2 when it is drawn for training.
    random_crop: train on random rectangles of this size out of the `size` picture; an int or (width, height).
    background: colour under transparent pixels.
    captions: template that makes a text out of the class name, such as "a photo of a {label}"; replaces texts.
    box_attributes: add a box's attributes (OpenImages: group, occluded, depiction, inside; 4 bits) to its class, as
        class + (number of classes) * bits; then also set `attributes` of the condition `boxes`.
    low_resolution: also make smaller, blurred or damaged pictures, for super-resolution and deblurring: {factor: 4,
        blur: 0, pipeline: bicubic}.
    repaint_mask: also draw masks, for inpainting: {share: [0.1, 0.5], everything: 0}. Masks beside the pictures win.
    sizes: also give the size that each picture had and where it was cut, for the condition `sizes`. Metadata
        `original_width` and `original_height` win over the size of the file: sets are often stored smaller.
    """

    source: str | list[str] = "shapes"
    size: int | tuple[int, int] = 64
    channels: int = 3
    pixels: Literal["uint8", "uint16", "float32", "auto"] = "uint8"
    value_range: tuple[float, float] | None = None
    count: int | None = None
    validation: float | str | list[str] = 0.05
    exclude: dict[str, list[str]] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    flip: bool = False
    random_crop: int | tuple[int, int] | None = None
    background: str = "white"
    captions: str | None = None
    box_attributes: bool = False
    low_resolution: LowResolution | None = None
    repaint_mask: RandomMask | None = None
    sizes: bool = False

    @property
    def width_height(self) -> tuple[int, int]:
        return _pair(self.size, "size")

    @property
    def crop_width_height(self) -> tuple[int, int] | None:
        """Size of the random crop, None without one. What the network sees in training is this or `width_height`."""
        if self.random_crop is None:
            return None
        crop, full = _pair(self.random_crop, "random_crop"), self.width_height
        if crop[0] > full[0] or crop[1] > full[1]:
            raise DarkroomError(
                f"random_crop {crop[0]}x{crop[1]} does not fit in size {full[0]}x{full[1]}; make the size larger"
            )
        return crop

    @property
    def is_resolved(self) -> bool:
        """Whether `pixels` and `value_range` say everything; otherwise `resolve_pixels` looks at the files."""
        return self.pixels != "auto" and (self.pixels != "float32" or self.value_range is not None)

    @property
    def pixel_format(self) -> PixelFormat:
        """The meaning of the numbers in examples, of a resolved configuration."""
        if self.channels < 1:
            raise DarkroomError(f"channels={self.channels} is not possible; give 1 or more")
        if self.pixels == "auto":
            raise DarkroomError('data.pixels "auto" is decided by the files; use darkroom.data.pixels.resolve_pixels')
        return PixelFormat.of(self.pixels, self.value_range)

    @property
    def is_synthetic(self) -> bool:
        """Whether the source is a procedural set besides `shapes`."""
        return isinstance(self.source, str) and self.source in SYNTHETIC

    @property
    def is_shapes(self) -> bool:
        return isinstance(self.source, str) and is_shapes(self.source) and part_of(self.source)[1] is None


def _pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise DarkroomError(f"{name}={value!r} is not a size; give one positive integer or [width, height]")
    return (pair[0], pair[1])


class ImageDataset(ABC):
    """Examples by number. `fields` are those that every example has."""

    fields: tuple[str, ...]
    class_names: list[str]  # names of `class_label`
    box_names: list[str]  # names of the classes in `boxes`
    problems: list[tuple[str, str]]  # what was left out: (name, reason)
    digest: str  # changes when any example changes
    replaced: dict[int, int]  # examples that could not be read: by which one each was replaced

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config, self.split = config, split
        self.class_names, self.box_names, self.problems = [], [], []
        self.replaced = {}

    @property
    def map_names(self) -> list[str]:
        """Names of the ids in `segmentation`: those of the classes, unless the source says otherwise."""
        return self.class_names

    @property
    def mask_rule(self) -> RandomMask | None:
        """How masks are drawn; None where there are none, or where they come with the pictures."""
        return None

    @property
    def redraws(self) -> bool:
        """Whether `redrawn` is another example for every generator, because some of its fields are random."""
        return False

    @property
    def made(self) -> dict[str, Any]:
        """By field that is made of the image or drawn beside it: the rule, in plain values."""
        return {}

    @property
    def low_resolution_factor(self) -> int | None:
        """How many times larger than `low_resolution` the image is; None without that field."""
        return None if self.config.low_resolution is None else self.config.low_resolution.factor

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every image."""
        return self.config.width_height

    @property
    def pixels(self) -> PixelFormat:
        """What the numbers of `image` mean."""
        return self.config.pixel_format

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def example(self, index: int, flip: bool = False) -> dict[str, Any]:
        """An example, mirrored if asked."""
        return flip_example(self[index]) if flip else self[index]

    def redrawn(self, index: int, rng: np.random.Generator, flip: bool = False) -> dict[str, Any]:
        """`example`, its random fields drawn from `rng` instead of being its own."""
        return self.example(index, flip)

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        """The fields besides the image, or those of them that are wanted: what costs time is then left out."""
        return {k: v for k, v in self[index].items() if k != "image" and (wanted is None or k in wanted)}

    @abstractmethod
    def captions(self) -> list[str]:
        """The texts of all examples in order; empty when they have none."""

    def describe(self) -> dict[str, Any]:
        """Plain facts for the plan and the report."""
        return {
            "source": self.config.source,
            "split": self.split,
            "examples": len(self),
            "size": list(self.size),
            "channels": self.config.channels,
            "pixels": str(self.pixels),
            "fields": list(self.fields),
            "classes": len(self.class_names),
            "problems": len(self.problems),
            "digest": self.digest,
        }


class ShapesDataset(ImageDataset):
    """The procedural set. Nothing is stored: an example is drawn when it is asked for."""

    COUNT = 20_000

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        source = config.source if isinstance(config.source, str) else "shapes"
        self.kind = source.partition(":")[2] or "mixed"
        if self.kind not in ("mixed", "single", "pair"):
            raise DarkroomError(f"source {source!r} does not exist; use shapes, shapes:single or shapes:pair")
        if config.channels != 3:
            raise DarkroomError(f"shapes have colours: channels={config.channels} is not possible; use channels=3")
        if config.pixels != "uint8":
            raise DarkroomError(f"shapes have 8 bits: pixels={config.pixels} is not possible; use pixels=uint8")
        if config.flip:
            raise DarkroomError("shapes captions name sides, so mirrored images would contradict them; use flip=false")
        if config.exclude or config.captions:
            raise DarkroomError("shapes have their own captions and no metadata; leave out `exclude` and `captions`")
        count = self.COUNT if config.count is None else config.count
        if split == "validation":
            count = min(max(count // 10, 1), 1000)
        self.count = count if config.limit is None else min(count, config.limit)
        if self.count < 1:
            raise DarkroomError("shapes without examples; set count (and limit) to 1 or more")
        self.fields = ("image", "text", "class_label", "boxes", "segmentation", "depth")
        self.class_names = list(shapes.SHAPES)
        self.box_names = list(shapes.SHAPES)
        identity = ["shapes", shapes.VERSION, config.seed, split, self.size, self.kind, self.count]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._captions: list[str] | None = None

    @property
    def map_names(self) -> list[str]:
        return ["background", *shapes.SHAPES]

    def scene(self, index: int) -> shapes.Scene:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return shapes.draw_scene(index, self.config.seed, self.split, self.size, self.kind)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        pixels, labels = shapes.render(scene)
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            "text": scene.caption,
            "class_label": scene.class_label,
            "boxes": torch.from_numpy(scene.boxes),
            "segmentation": torch.from_numpy(labels).long(),
            "depth": torch.from_numpy(shapes.depth_map(scene))[None],
        }

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        if wanted is None or {"segmentation", "depth"} & set(wanted):
            return super().without_image(index, wanted)  # maps are drawn with the picture
        scene = self.scene(index)
        known = {"text": scene.caption, "class_label": scene.class_label, "boxes": torch.from_numpy(scene.boxes)}
        return {name: value for name, value in known.items() if name in wanted}

    def captions(self) -> list[str]:
        if self._captions is None:
            self._captions = [self.scene(i).caption for i in range(self.count)]
        return self._captions


def open_dataset(config: DataConfig, split: str = "train", in_memory: bool = True) -> ImageDataset:
    """The examples of one split. in_memory: decode a small set of files once, when it is opened; otherwise nothing is
    held, and an unreadable picture is met, and replaced by the next one, when its turn comes."""
    if split not in SPLITS:
        raise DarkroomError(f"split {split!r} does not exist; use train or validation")
    _ = config.width_height, config.crop_width_height  # complain about impossible sizes before any file is read
    if not config.is_resolved:
        from darkroom.data.pixels import resolve_pixels

        config = resolve_pixels(config)
    _ = config.pixel_format
    if config.low_resolution is not None or config.repaint_mask is not None:
        from darkroom.data.derived import DerivedDataset

        plain = replace(config, low_resolution=None, repaint_mask=None)
        return DerivedDataset(open_dataset(plain, split, in_memory), config)
    if config.is_shapes:
        return ShapesDataset(config, split)
    if config.is_synthetic:
        from darkroom.data.synthetic import SyntheticDataset

        return SyntheticDataset(config, split)
    # They build on this module.
    from darkroom.data.mixture import MixtureDataset
    from darkroom.data.pictures import PictureDataset

    named = config.validation if isinstance(config.validation, (str, list)) else ""
    if is_mixture(config.source) or isinstance(named, list) or is_mixture(named):
        return MixtureDataset(config, split, partial(open_dataset, in_memory=in_memory))
    return PictureDataset(config, split) if in_memory else PictureDataset(config, split, in_memory_bytes=0)
