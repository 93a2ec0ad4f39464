"""What `data.pixels: auto` means for given files, and the value range of floating-point images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from darkroom.data.derived import DerivedDataset
from darkroom.data.image_files import read_samples
from darkroom.data.locations import is_mixture, spread
from darkroom.data.mixture import MixtureDataset
from darkroom.data.pictures import PictureDataset, in_threads, training_records
from darkroom.data.records import Record, reason_of
from darkroom.data.sources import DataConfig, ImageDataset
from darkroom.data.transforms import convert
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat, PixelType

COMPARED = 16  # files of a source whose depth and channels are compared with what is made of them
LOOKED_AT = 64  # files that decide what "auto" means
MEASURED = 4096  # files whose least and greatest value are the range of floating-point images
_WIDER: tuple[PixelType, ...] = ("float32", "uint16")
_DEPTH: tuple[PixelType, ...] = ("uint8", "uint16", "float32")
_ANY_RANGE = PixelFormat("float32", 0.0, 1.0)


def resolve_pixels(config: DataConfig) -> DataConfig:
    """The configuration with `pixels` and `value_range` stated, decided by the training images."""
    if config.is_resolved:
        return config
    if config.is_shapes:
        if config.pixels != "auto":
            raise DarkroomError(f"shapes have 8 bits: pixels={config.pixels} is not possible; use pixels=uint8")
        return replace(config, pixels="uint8")
    if config.is_synthetic:
        from darkroom.data.synthetic import SETS

        pixels = SETS[str(config.source)].pixels
        if config.pixels not in ("auto", pixels.dtype):
            raise DarkroomError(f"{config.source} has {pixels.dtype} pixels; use pixels={pixels.dtype}")
        return replace(config, pixels=pixels.dtype, value_range=config.value_range or (pixels.low, pixels.high))
    if is_mixture(config.source):
        raise DarkroomError("several kinds of sources: state data.pixels, and for float32 data.value_range too")
    records = training_records(config)
    if config.pixels == "auto":
        config = replace(config, pixels=widest(_evenly(records, LOOKED_AT)))
    if config.pixels == "float32" and config.value_range is None:
        config = replace(config, value_range=_measure(config, _evenly(records, MEASURED)))
    return config


def widest(records: list[Record]) -> PixelType:
    """The smallest type that holds what these files hold; files that cannot be read do not count."""
    found: set[PixelType] = set()
    for record in records:
        try:
            found.add(_type_of(read_samples(record.image.read()).values))
        except DarkroomError:  # a library is missing
            raise
        except Exception:  # whatever a damaged file makes a decoder raise; the full reading lists it
            continue
    return next((t for t in _WIDER if t in found), "uint8")


def converted(data: ImageDataset, given: bool = False) -> str | None:
    """A line where files have more bits than is made of them, or one channel where three are made; None where not.

    given: a given first stage decides what is made, so there is nothing to set.
    """
    if isinstance(data, DerivedDataset):
        return converted(data.dataset, given)
    if isinstance(data, MixtureDataset):
        return next((line for part in data.parts if (line := converted(part, given)) is not None), None)
    if not isinstance(data, PictureDataset):
        return None
    records = _evenly(data.records, COMPARED)
    channels = _channels_of(records)
    made, found = data.pixels.dtype, widest(records)
    deeper = _DEPTH.index(found) > _DEPTH.index(made)
    wider = channels == 1 and data.config.channels == 3
    if not deeper and (given or not wider):
        return None
    count = "" if channels is None else f"{channels} channel{'s' if channels > 1 else ''} of "
    line = f"the pictures have {count}{_bits(found)}; this {'first stage' if given else 'recipe'} makes "
    line += f"{data.config.channels} of {_bits(made)}"
    cures = [f"--set data.channels={channels}"] if wider else []
    cures += [f"--set data.pixels={found}"] if deeper else []
    return line if given else f"{line}: {' '.join(cures)}"


def _channels_of(records: list[Record]) -> int | None:
    """How many channels all these files have, opacity not counted; None where they differ or none can be read."""
    found: set[int] = set()
    for record in records:
        try:
            samples = read_samples(record.image.read())
        except Exception:  # whatever a damaged file makes a decoder raise; the full reading lists it
            continue
        found.add(samples.values.shape[2] - samples.alpha)
    return found.pop() if len(found) == 1 else None


def _bits(pixels: str) -> str:
    return {"uint8": "8 bits", "uint16": "16 bits"}.get(pixels, "32 bits (floating point)")


def _type_of(values: np.ndarray) -> PixelType:
    if values.dtype == np.uint8:
        return "uint8"
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 65535:  # Pillow has int32 for 16 bits
        return "uint16"
    return "float32"


def _measure(config: DataConfig, records: list[Record]) -> tuple[float, float]:
    """The least and the greatest value of these images, as the network would get them."""

    def ends(record: Record) -> tuple[float, float] | str:
        try:
            samples = read_samples(record.image.read(), config.channels)
            values = convert(samples, config.channels, _ANY_RANGE, config.background)
        except DarkroomError:
            raise
        except Exception as error:
            return reason_of(error)
        return float(values.min()), float(values.max())

    found = list(in_threads(ends, records))
    good = [pair for pair in found if not isinstance(pair, str)]
    if not good:
        first = f"{records[0].name} ({found[0]})" if records else "there are none"
        raise DarkroomError(f"{config.source}: no image gives a value range; the first: {first}; check the files")
    low, high = min(pair[0] for pair in good), max(pair[1] for pair in good)
    if low == high:
        raise DarkroomError(f"{config.source}: every value is {low:g}; state data.value_range, or check the files")
    return low, high


def _evenly(records: list[Record], most: int) -> list[Record]:
    return [records[i] for i in spread(len(records), most)]
