"""Whole models to diffusers folders: components with their configs and weights, scheduler, tokenizers, the index.

What the components have no place for (tables of an official file, layers that their pipelines do not read) goes into a
file beside them, with a note of our configuration, so that the folder gives back the identical model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom import __version__
from darkroom.errors import DarkroomError
from darkroom.interop.content import Content
from darkroom.interop.diffusers_components import TRANSFORMER, Component, check_towers, components
from darkroom.interop.diffusers_folder import (
    CONFIG,
    LIVE,
    LIVE_VARIANT,
    NOTE_FILE,
    NOTES,
    PIPELINE,
    REST_FILE,
    note_text,
)
from darkroom.interop.diffusers_pipelines import Pipeline, choose_pipeline
from darkroom.interop.diffusers_scheduler import to_scheduler
from darkroom.interop.diffusers_tokenizers import write_tokenizers
from darkroom.interop.first_stage_files import EXPORTED_BY
from darkroom.interop.found_model import LATENTS, FoundModel
from darkroom.interop.tensor_source import Shape, Table, same
from darkroom.safe_files import read_json, stream_safetensors

# The pipeline that we bring along, and its component, as they stand in a folder.
CODE = Path(__file__).parent / "diffusers_code"
OWN_CODE = {"pipeline.py": "pipeline.py.txt", "class_embedder/class_embedder.py": "class_embedder.py.txt"}
LOW_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
}


def refuse_inexpressible(found: FoundModel) -> Pipeline:
    """The pipeline that runs the model; raises what writing would, before any tensor is read."""
    pipeline = choose_pipeline(found.configs, found.latents)
    check_towers(found.configs["conditioner"]["encoders"])
    _scheduler(found)
    return pipeline


def write_diffusers_model(
    folder: Path, found: FoundModel, shapes: Mapping[str, Mapping[str, Shape]], weights: str
) -> None:
    """Into a folder that is there. weights: "all" (averaged ones, and beside them those of the last step as the variant
    "non_ema"), or one of "ema" and "live"."""
    pipeline = refuse_inexpressible(found)
    parts = components(found.configs, shapes, found.latents, pipeline, _sample_size(found))
    tables = found.tables_of("ema" if weights == "all" else weights)
    live = found.tables if weights == "all" else {}
    places: dict[str, str] = {}
    for component in parts:
        place = folder / component.folder
        place.mkdir()
        # The precision in which transformers loads what is not told another one; diffusers' own models do without.
        more = {"torch_dtype": "float32"} if component.stem == TRANSFORMER else {}
        _write_json(place / CONFIG, {**component.config, **more, f"_{EXPORTED_BY}": f"darkroom {__version__}"})
        content = _content(component, found, tables, shapes)
        for name in found.kept:
            if name.startswith(f"{component.folder}/") and name.partition("/")[2] not in content.made:
                content.copied[name.partition("/")[2]] = (found.source, found.kept_place(name))
                places[name] = name
        _write(place / f"{component.stem}.safetensors", content)
        if component.part in found.averaged and component.part in live:
            _write(place / f"{component.stem}.{LIVE_VARIANT}.safetensors", _content(component, found, live, shapes))
    (folder / NOTES).mkdir()
    rest = _rest(parts, found, tables, live, shapes)
    for name in found.kept:
        if name not in places and name not in found.aliases:
            places[name] = f"kept/{name}"
            rest.copied[places[name]] = (found.source, found.kept_place(name))
    if rest.made or rest.copied:
        _write(folder / REST_FILE, rest)
    own = {part: {n: s for n, s in table.items() if n not in LATENTS} for part, table in shapes.items()}
    (folder / NOTE_FILE).write_text(note_text(found, pipeline.autoencoder, own, places), encoding="utf-8")
    name, scheduler = _scheduler(found)
    index: dict[str, Any] = {"scheduler": ["diffusers", name]}
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index |= {component.folder: [component.library, component.cls] for component in parts}
    index |= write_tokenizers(folder, found.configs["conditioner"]["encoders"])
    index |= _of_pipeline(folder, pipeline, found)
    if pipeline.is_own:
        for target, text in OWN_CODE.items():
            if (folder / target).parent.is_dir():
                (folder / target).write_text((CODE / text).read_text(encoding="utf-8"), encoding="utf-8")
    cls: Any = ["pipeline", pipeline.name] if pipeline.is_own else pipeline.name
    head = {"_class_name": cls, "_diffusers_version": "0.36.0", f"_{EXPORTED_BY}": f"darkroom {__version__}"}
    _write_json(folder / PIPELINE, head | dict(sorted(index.items())))


def _content(
    component: Component, found: FoundModel, tables: Mapping[str, Table], shapes: Mapping[str, Mapping[str, Shape]]
) -> Content:
    content = Content(ready={name: one.make() for name, one in component.ready.items()})
    content.add(component.table, found.source, tables[component.part], shapes[component.part])
    return content


def _rest(
    parts: list[Component],
    found: FoundModel,
    tables: Mapping[str, Table],
    live: Mapping[str, Table],
    shapes: Mapping[str, Mapping[str, Shape]],
) -> Content:
    """Tensors of ours that no component has a place for."""
    content = Content()
    placed = {(component.part, ours) for component in parts for ours in component.table}
    for start, given in (("", tables), (LIVE, {p: t for p, t in live.items() if p in found.averaged})):
        for part, table in given.items():
            left = [ours for ours in table if (part, ours) not in placed]
            targets = {ours: same(f"{start}{NOTES}/{part}/{ours}") for ours in left}
            content.add(targets, found.source, table, shapes[part])
    return content


def _write(path: Path, content: Content) -> None:
    stream_safetensors(path, content.entries(), content.produce, {"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------------- details


def _scheduler(found: FoundModel) -> tuple[str, dict[str, Any]]:
    denoiser = found.configs["denoiser"]
    network = denoiser["network"]
    kind = network.get("kind", "unet")
    solver = str(found.info.get("defaults", {}).get("solver", "ddim"))
    if kind == "dit" and solver == "ddpm":
        solver = "ddim"  # their DiT pipeline throws the learned variance away
    patch = 1 if kind == "unet" else int(network.get("patch_size", 2))
    return to_scheduler(denoiser, solver, patch, offset=0 if kind == "dit" else 1)


def _sample_size(found: FoundModel) -> int | None:
    """The usual side of the latents, which pipelines take where no size is asked for."""
    size = found.info.get("defaults", {}).get("size")
    levels = len(found.configs["first_stage"].get("channel_mult", (1,)))
    return None if not size else int(size[0]) // 2 ** (levels - 1)


def _of_pipeline(folder: Path, pipeline: Pipeline, found: FoundModel) -> dict[str, Any]:
    """Entries of the index that one pipeline alone has."""
    name = pipeline.name
    encoders = {encoder["kind"]: encoder for encoder in found.configs["conditioner"]["encoders"].values()}
    none = [None, None]
    if name in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        return {
            "safety_checker": none,
            "feature_extractor": none,
            "image_encoder": none,
            "requires_safety_checker": False,
        }
    if name == "StableDiffusionDepth2ImgPipeline":
        return {"depth_estimator": none, "feature_extractor": none}
    if name == "StableDiffusionUpscalePipeline":
        (folder / "low_res_scheduler").mkdir()
        _write_json(folder / "low_res_scheduler" / "scheduler_config.json", LOW_SCHEDULER)
        levels = encoders["low_resolution"].get("noise_levels", 0)
        more = {"safety_checker": none, "feature_extractor": none, "watermarker": none}
        return {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": levels, **more}
    if name == "StableDiffusionXLPipeline":
        return {"force_zeros_for_empty_prompt": True, "image_encoder": none, "feature_extractor": none}
    if name == "StableDiffusion3Pipeline":
        text = encoders.get("sd3_text")
        gone: tuple[str, ...] = ("", "_2", "_3") if text is None else ("_3",) if text.get("t5", {}) is None else ()
        more = {f"{name}{number}": none for number in gone for name in ("text_encoder", "tokenizer")}
        return {"image_encoder": none, "feature_extractor": none, **more}
    if pipeline.is_own:
        text = encoders.get("text", {})
        network = "transformer" if found.configs["denoiser"]["network"].get("kind") == "dit" else "unet"
        absent = {"unet", "transformer"} - {network}
        result: dict[str, Any] = dict.fromkeys(absent, none)
        result |= {"use_mask": bool(text.get("use_mask", True)), "use_vector": bool(text.get("vector", False))}
        result |= {n: none for n in ("bert", "tokenizer") if not text}
        if "class" not in encoders or encoders["class"].get("slot") == "label":
            result["class_embedder"] = none
        if "class" in encoders:
            result["null_class"] = (
                len(encoders["class"]["classes"]) if encoders["class"].get("null_class", True) else None
            )
        return result
    return {}


def is_former_folder(path: Path) -> bool:
    """Whether a folder was written by us, and may be written again."""
    try:
        return path.is_dir() and f"_{EXPORTED_BY}" in read_json(path / PIPELINE) and (path / NOTE_FILE).is_file()
    except DarkroomError:
        return False
