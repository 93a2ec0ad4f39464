"""Which pipeline of the diffusers library runs a model of ours; what none of them can express is refused by name.

Where only the loop around the components is missing there (a mask over the text, a class as context, a flow with a
U-Net), the folder brings its own pipeline, a short file of code that diffusers runs when it is told to trust it. All
components but a table of classes are their own classes in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.errors import DarkroomError

OWN_PIPELINE = "DarkroomPipeline"
BERT_LENGTH = 77  # built into LDMTextToImagePipeline
DIT_CLASSES = 1000  # built into DiTPipeline


@dataclass(frozen=True)
class Pipeline:
    """name: of its class; autoencoder: the folder's name; has_shift: whether it reads a shift of the latents"""

    name: str
    autoencoder: str = "vae"
    has_shift: bool = False

    @property
    def is_own(self) -> bool:
        return self.name == OWN_PIPELINE


STABLE = Pipeline("StableDiffusionPipeline")
# By the kinds of the conditions beside the one text tower.
BESIDE_TEXT = {
    (): STABLE,
    ("masked_image",): Pipeline("StableDiffusionInpaintPipeline"),
    ("depth",): Pipeline("StableDiffusionDepth2ImgPipeline"),
    ("low_resolution",): Pipeline("StableDiffusionUpscalePipeline"),
}
OWN = Pipeline(OWN_PIPELINE, has_shift=True)
LDM = Pipeline("LDMPipeline", "vqvae")
LDM_TEXT = Pipeline("LDMTextToImagePipeline", "vqvae")
LDM_UPSCALE = Pipeline("LDMSuperResolutionPipeline", "vqvae")
XL = Pipeline("StableDiffusionXLPipeline", has_shift=True)
SD3 = Pipeline("StableDiffusion3Pipeline", has_shift=True)
DIT = Pipeline("DiTPipeline")


def choose_pipeline(configs: Mapping[str, Mapping[str, Any]], latents: tuple[Any, Any] | None) -> Pipeline:
    """For the configs of a model; an error that names what diffusers has no pipeline for."""
    if "first_stage" not in configs:
        raise DarkroomError("diffusers' pipelines need an autoencoder, and this model has no first stage")
    network, encoders = configs["denoiser"]["network"], configs["conditioner"]["encoders"]
    pipeline = _by_conditions(network, encoders)
    if pipeline in (LDM, LDM_TEXT, DIT) and not _is_stock(pipeline, configs, latents):
        pipeline = OWN
    _refuse(pipeline, configs, latents)
    return pipeline


def _by_conditions(network: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]]) -> Pipeline:
    kinds = sorted(str(encoder["kind"]) for encoder in encoders.values())
    kind, has_context = network.get("kind", "unet"), bool(network.get("use_spatial_transformer"))
    words = f"{kind} with {' and '.join(kinds) or 'no condition'}"
    found: Pipeline | None = None
    if kind == "mmdit":
        found = SD3 if kinds in ([], ["sd3_text"]) else None  # its official file has no text towers
    elif kind == "dit":
        found = DIT if kinds == ["class"] and _one(encoders).get("slot") == "label" else None
    elif kinds == ["sdxl_text", "sizes"]:
        found = XL
    elif (towers := [k for k in kinds if k in ("clip", "open_clip")]) and len(towers) == 1:
        found = BESIDE_TEXT.get(tuple(k for k in kinds if k not in towers))
    elif kinds == ["text"] and has_context:
        found = LDM_TEXT
    elif kinds == ["class"]:
        slot = _one(encoders).get("slot", "context")
        words += f" in the slot {slot}"
        found = OWN if has_context == (slot == "context") else None
    elif kinds == [] and not has_context:
        found = LDM
    elif kinds == ["low_resolution"] and not has_context:
        found = LDM_UPSCALE
    if found is None:
        raise DarkroomError(f"diffusers has no pipeline for a {words}; this model cannot be written for it")
    return found


def _one(encoders: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(iter(encoders.values()))


def _is_stock(pipeline: Pipeline, configs: Mapping[str, Mapping[str, Any]], latents: tuple[Any, Any] | None) -> bool:
    """Whether a pipeline of diffusers' own does the same, with all that is built into it."""
    schedule = configs["denoiser"].get("schedule", {})
    if schedule.get("kind", "ldm") == "flow" or not _is_plain(latents):
        return False
    levels = len(configs["first_stage"].get("channel_mult", ()))
    if pipeline is DIT:
        return len(_one(configs["conditioner"]["encoders"])["classes"]) == DIT_CLASSES
    if pipeline is LDM:
        return True
    encoder = _one(configs["conditioner"]["encoders"])
    plain = not encoder.get("use_mask", True) and not encoder.get("vector", False)
    return plain and encoder.get("length", 32) == BERT_LENGTH and levels == 4


def _is_plain(latents: tuple[Any, Any] | None) -> bool:
    """No shift, one scale."""
    return latents is not None and latents[0] == 0.0 and not isinstance(latents[1], list)


def _refuse(pipeline: Pipeline, configs: Mapping[str, Mapping[str, Any]], latents: tuple[Any, Any] | None) -> None:
    network, encoders = configs["denoiser"]["network"], configs["conditioner"]["encoders"]
    denoiser = configs["denoiser"]
    flow = denoiser.get("schedule", {}).get("kind", "ldm") == "flow"
    per_channel = latents is not None and any(isinstance(value, list) for value in latents)
    low: Mapping[str, Any] = next((e for e in encoders.values() if e["kind"] == "low_resolution"), {})
    mask: Mapping[str, Any] = next((e for e in encoders.values() if e["kind"] == "masked_image"), {})
    depth = "depth" in pipeline.name.lower()
    wrong_sizes = pipeline is XL and any(
        list(e.get("parts", ())) not in ([], ["original_size", "crop", "target_size"]) for e in encoders.values()
    )
    for is_lacking, what in (
        (not pipeline.has_shift and not _is_plain(latents), "shift of the latents, or scale per channel"),
        (pipeline is SD3 and per_channel, "shift and scale per channel"),
        (pipeline is SD3 and not flow, "MMDiT without rectified flow"),
        (pipeline is not SD3 and not pipeline.is_own and flow, "rectified flow with this network"),
        (pipeline is LDM_UPSCALE and latents is not None and latents[1] != 1.0, "scale of the latents"),
        (bool(low) and low.get("via", "pixels") != "pixels", "low-resolution picture through the first stage"),
        (bool(low) and bool(low.get("noise_levels")) == (pipeline is LDM_UPSCALE), "such noise on the condition"),
        (bool(mask) and not _usual_mask(mask), "mask other than that of Stable Diffusion's inpainting"),
        (wrong_sizes, "sizes other than SDXL's"),
        (pipeline is not DIT and not pipeline.is_own and not depth and bool(denoiser.get("learned_variance")),
         "learned variance"),
        (pipeline.is_own and network.get("kind", "unet") == "unet" and bool(denoiser.get("learned_variance")),
         "learned variance"),
    ):  # fmt: skip
        if is_lacking:
            raise DarkroomError(f"{pipeline.name} of diffusers has no {what}; this model cannot be written for it")


def _usual_mask(mask: Mapping[str, Any]) -> bool:
    usual = {"mask_first": True, "normalised": True, "fill": 0.0, "mask_range": [0.0, 1.0], "mask_via": "nearest"}
    return all(
        (list(v) if isinstance(v := mask.get(key, value), tuple) else v) == value for key, value in usual.items()
    )
