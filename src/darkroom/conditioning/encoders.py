"""All condition encoders by the `kind` of their config. A new modality is one more row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from darkroom.conditioning.classes import ClassEncoder
from darkroom.conditioning.encoder import ConditionEncoder, EncoderConfig
from darkroom.conditioning.layout import LayoutEncoder
from darkroom.conditioning.maps import DepthEncoder, LowResolutionEncoder, MaskedImageEncoder
from darkroom.conditioning.segmentation import SegmentationEncoder, SegmentationTokens
from darkroom.conditioning.sizes import SizesEncoder
from darkroom.conditioning.text import TextEncoder
from darkroom.conditioning.text_arrangements import SD3TextEncoder, SDXLTextEncoder
from darkroom.conditioning.text_towers import ClipEncoder, OpenClipEncoder, T5TextEncoder
from darkroom.conditioning.vectors import LabelEncoder, VectorEncoder

ENCODERS: dict[str, type[ConditionEncoder]] = {
    "class": ClassEncoder,
    "text": TextEncoder,
    "boxes": LayoutEncoder,
    "segmentation": SegmentationEncoder,
    "segmentation_tokens": SegmentationTokens,
    "low_resolution": LowResolutionEncoder,
    "masked_image": MaskedImageEncoder,
    "depth": DepthEncoder,
    "label": LabelEncoder,
    "vector": VectorEncoder,
    "clip": ClipEncoder,
    "open_clip": OpenClipEncoder,
    "t5": T5TextEncoder,
    "sdxl_text": SDXLTextEncoder,
    "sd3_text": SD3TextEncoder,
    "sizes": SizesEncoder,
}

if TYPE_CHECKING:
    AnyEncoderConfig = EncoderConfig
else:  # what recipes may hold, chosen by `kind`
    AnyEncoderConfig = Union[tuple(encoder.config_class for encoder in ENCODERS.values())]  # noqa: UP007
