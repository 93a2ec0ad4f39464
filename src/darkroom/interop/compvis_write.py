"""Whole models to one file of the official layout. What that layout cannot express is refused by name.

A file that came from there gives back what it held. For other models the tables of the schedule and the like are made,
as the official code registers them; the complete configuration is noted beside the tensors, where only we read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom import __version__
from darkroom.errors import DarkroomError
from darkroom.interop.compvis_first_stage import AVERAGED, refuse_what_compvis_lacks
from darkroom.interop.compvis_model import AVERAGED_NETWORK, CONDITION, FIRST_STAGE, network_prefix, usual_name
from darkroom.interop.compvis_schedule import buffers
from darkroom.interop.content import Content
from darkroom.interop.families import family_named
from darkroom.interop.first_stage_files import EXPORTED_BY, SCALE
from darkroom.interop.found_model import MODEL_NOTE, NOTED, OWN, FoundModel
from darkroom.interop.tensor_source import Shape, Table, same

if TYPE_CHECKING:
    from torch import Tensor

EMA_DECAY = 0.9999  # of the official code


def compvis_content(found: FoundModel, shapes: Mapping[str, Mapping[str, Shape]], weights: str) -> Content:
    """weights: "all" (as the training left them, and the averaged ones beside them), or one of "ema" and "live"."""
    refuse_inexpressible(found)
    content = Content()
    targets = standard_tables(found, shapes)
    network = network_prefix(found.configs)
    tables = dict(found.tables_of("ema" if weights == "all" else weights))
    averages = keeps_averages(found, weights)
    if weights == "all" and averages:  # that layout has a second place for the denoiser's weights alone
        tables["denoiser"] = found.tables["denoiser"]
    for part, table in targets.items():
        content.add(table, found.source, tables[part], shapes[part])
    if averages:
        averaged = {
            ours: same(AVERAGED_NETWORK + name.removeprefix(network).replace(".", ""))
            for ours, place in targets["denoiser"].items()
            for name in place.names
        }
        means = found.averaged.get("denoiser", tables["denoiser"]) if weights == "all" else tables["denoiser"]
        content.add(averaged, found.source, means, shapes["denoiser"])
    if found.official:
        for name in found.official:
            if name in found.aliases:
                content.made[name] = content.made[found.aliases[name]]
            else:
                content.copied[name] = (found.source, found.kept_place(name))
    elif network:
        content.ready |= _made(found, averages)
        if found.family == "inpainting_big":  # the condition's encoder is the first stage
            for name in [n for n in content.made if n.startswith(FIRST_STAGE)]:
                content.made[CONDITION + name.removeprefix(FIRST_STAGE)] = content.made[name]
    return content


def standard_tables(found: FoundModel, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, Table]:
    """By part: our names -> the official ones. A file of unusual names gets its own back."""
    if found.layout == "compvis":
        return dict(found.tables)
    return {
        part: {
            ours: same(found.renamed.get(ours, name))
            for ours in names
            if (name := usual_name(part, ours, found.configs)) is not None
        }
        for part, names in shapes.items()
    }


def keeps_averages(found: FoundModel, weights: str) -> bool:
    """Whether the file has averaged copies: as its source has, or as the official configuration expects."""
    if not network_prefix(found.configs):
        return False  # beside a bare network there is no place for copies
    if found.layout == "compvis" or found.official:
        return "denoiser" in found.averaged or f"{AVERAGED}decay" in found.kept
    has_both = weights == "all" and "denoiser" in found.averaged
    return has_both or (found.family != OWN and family_named(found.family).averaged)


def _made(found: FoundModel, averages: bool) -> dict[str, Tensor]:
    """Buffers that the official code registers."""
    import torch

    result: dict[str, Tensor] = {}
    schedule = found.configs["denoiser"]["schedule"]
    if schedule.get("kind", "ldm") != "flow":
        result |= buffers(schedule)
    if averages:
        result[f"{AVERAGED}decay"] = torch.tensor(EMA_DECAY)
        result[f"{AVERAGED}num_updates"] = torch.tensor(0, dtype=torch.int32)
    for encoder in found.configs["conditioner"]["encoders"].values():
        if encoder.get("kind") == "clip":
            length = encoder.get("network", {}).get("max_position_embeddings", 77)
            result[f"{CONDITION}transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return result


def notes_of(found: FoundModel) -> dict[str, str]:
    """Beside the tensors: who wrote the file, and the configuration that the layout has no place for."""
    model = {
        "family": found.family,
        "configs": found.configs,
        "latents": found.latents,
        "info": {key: value for key, value in found.info.items() if key in NOTED},
    }
    notes = {EXPORTED_BY: f"darkroom {__version__}", MODEL_NOTE: json.dumps(model)}
    if found.latents is not None and not isinstance(found.latents[1], list):
        notes[SCALE] = repr(found.latents[1])
    return notes


# ---------------------------------------------------------------------------------------------------------- refusals


def refuse_inexpressible(found: FoundModel) -> None:
    """Raises what writing would, before any tensor is read."""
    if found.layout == "compvis":
        return
    for is_lacking, what in _lacking(found):
        if is_lacking:
            raise DarkroomError(f"the official code has no {what}; this model cannot be written in its layout")
    if "first_stage" in found.configs:
        refuse_what_compvis_lacks(found.configs["first_stage"])


def _lacking(found: FoundModel) -> list[tuple[bool, str]]:
    denoiser, encoders = found.configs["denoiser"], found.configs["conditioner"]["encoders"]
    network, schedule = denoiser["network"], denoiser.get("schedule", {})
    kind = network.get("kind", "unet")
    widths = [network.get("model_channels", 32) * mult for mult in network.get("channel_mult", ())]
    prediction = denoiser.get("prediction_type", "epsilon")
    flow = schedule.get("kind", "ldm") == "flow"
    shift = 0.0 if found.latents is None else found.latents[0]
    published = found.family != OWN
    rows: list[tuple[bool, str]] = [
        (bool(network.get("position_embedding")), "position embedding in its U-Net"),
        (bool(network.get("target_time")), "second time (target_time)"),
        (kind == "unet" and prediction not in ("epsilon", "x0", "v"), f'prediction of the type "{prediction}"'),
        (kind == "unet" and schedule.get("kind", "ldm") in ("flow", "edm"), f"schedule {schedule.get('kind')!r}"),
        (kind == "mmdit" and not flow, "MMDiT without rectified flow"),
        (kind == "dit" and [e.get("slot") for e in encoders.values()] != ["label"], "DiT on anything but class labels"),
        (any(width % 32 for width in widths), f"norms of widths like {widths} (it has 32 groups everywhere)"),
        (isinstance(shift, list) or (not published and shift != 0.0), "shift of the latents (--shift 0 leaves it out)"),
        (found.latents is not None and isinstance(found.latents[1], list), "scale per channel"),
        ("first_stage" not in found.configs and kind == "unet", "whole model without a first stage"),
    ]
    return rows + [(True, problem) for problem in _conditions_lacking(encoders, network)]


def _conditions_lacking(encoders: Mapping[str, Mapping[str, Any]], network: Mapping[str, Any]) -> list[str]:
    kinds = sorted(str(encoder.get("kind")) for encoder in encoders.values())
    if kinds not in KNOWN_CONDITIONS:
        return (
            [f"model with the conditions {', '.join(kinds)} together"] if len(kinds) > 1 else [f"condition {kinds[0]}"]
        )
    problems = []
    for encoder in encoders.values():
        kind = encoder["kind"]
        if kind == "clip" and encoder.get("model") == "ViT-H-14":
            problems.append("text tower of SD 2 without its last layer (as diffusers keeps it)")
        if kind == "class" and encoder.get("slot", "context") == "vector":
            problems.append("class as a vector")
        if kind in ("text", "boxes"):
            heads, width = encoder.get("heads", 4), encoder.get("head_width", 64)
            if (heads, width) != (8, 64):
                problems.append(f"text tower with {heads} heads of {width} (it has 8 of 64)")
            if encoder.get("use_mask", True):
                problems.append("mask for padding (use_mask)")
            if encoder.get("vector"):
                problems.append("vector of a text")
        if kind == "text" and encoder.get("vocabulary", "learned") == "learned":
            problems.append("vocabulary other than BERT's")
        if kind == "boxes" and encoder.get("tokens") is None:
            problems.append("places of boxes with ids of their own (tokens)")
        if kind == "low_resolution" and encoder.get("via", "pixels") != "pixels":
            problems.append("low-resolution picture through the first stage")
        if kind == "masked_image" and encoder.get("mask_via", "nearest") != "nearest":
            problems.append("every pixel of the mask (mask_via)")
    return problems


KNOWN_CONDITIONS: tuple[list[str], ...] = (
    [], ["class"], ["text"], ["boxes"], ["segmentation"], ["masked_image"], ["low_resolution"], ["clip"], ["open_clip"],
    ["clip", "masked_image"], ["masked_image", "open_clip"], ["depth", "open_clip"], ["low_resolution", "open_clip"],
    ["sdxl_text", "sizes"], ["sd3_text"],
)  # fmt: skip


def write_compvis_model(
    destination: Path, found: FoundModel, shapes: Mapping[str, Mapping[str, Shape]], weights: str
) -> Content:
    """One file: safetensors, or a checkpoint that the official code can load. Not atomic by itself: see `new_file`."""
    from darkroom.interop.first_stage_files import write_pickled
    from darkroom.safe_files import SAFETENSORS, stream_safetensors

    content, notes = compvis_content(found, shapes, weights), notes_of(found)
    if destination.suffix.lower() == SAFETENSORS:
        stream_safetensors(destination, content.entries(), content.produce, {"format": "pt", **notes})
    else:
        write_pickled(destination, dict(content.produce(content.entries())), notes)
    return content
