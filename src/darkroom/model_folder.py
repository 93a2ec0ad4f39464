"""What lies on the disk: model folders, bundled models and single files, looked at without importing torch.

A model folder holds `darkroom.json` (the index) and one folder per part, each `config.json` + `model.safetensors`
(+ `model.live.safetensors`: the weights before averaging). A first stage may be a reference to a bundled model instead.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.generation_defaults import check_defaults
from darkroom.hub import HUB, fetch
from darkroom.safe_files import (
    SafetensorsHeader,
    is_weight_file,
    read_json,
    read_numbers,
    read_safetensors_header,
    sha256_of,
)

CONVERTED_FROM = "converted_from"  # in a model's info: `convert` made it, and may make it again
FORMAT_VERSION = 1
INDEX = "darkroom.json"
CONFIG = "config.json"
PIPELINE = "model_index.json"  # of diffusers
COMPONENTS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "bert")  # folders beside it
WEIGHTS = {"ema": "model.safetensors", "live": "model.live.safetensors"}
PARTS = {
    "latent_diffusion": ("first_stage", "denoiser", "conditioner", "preview"),
    "first_stage": ("first_stage", "preview"),
}
# Without a first stage a denoiser works on pixels or alone. `preview` shows latents quickly; it may simply be deleted.
OPTIONAL_PARTS = {"latent_diffusion": ("first_stage", "preview"), "first_stage": ("preview",)}

BUNDLED = Path(__file__).parent / "bundled"


def bundled() -> list[str]:
    """Names that `load` takes without any file: the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


def is_model_folder(path: Path) -> bool:
    return (path / INDEX).is_file()


def is_diffusers_folder(path: Path) -> bool:
    """A pipeline's folder, or that of one of its models."""
    if (path / PIPELINE).is_file():
        return True
    return (path / CONFIG).is_file() and "_class_name" in read_json(path / CONFIG, "config")


def find_source(source: str | Path) -> Path:
    """The folder or file that `source` means: a path first, then a bundled name. A run folder means its model. Only
    "hf:owner/name" (and "hf:owner/name/file") is looked for in the model hub.

    What is no Darkroom model folder (`is_model_folder`) is a single file or a diffusers folder.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if str(source).startswith(HUB):
            path = fetch(str(source))
            return path / "model" if is_model_folder(path / "model") else path
        if str(source) in bundled():
            return BUNDLED / str(source)
        close = difflib.get_close_matches(str(source), bundled(), n=1)
        names = f'did you mean "{close[0]}"?' if close else f"bundled models: {', '.join(bundled()) or 'none'}"
        raise DarkroomError(f"no model {str(source)!r}: no such file or folder, and no bundled model ({names})")
    if path.is_file() or is_model_folder(path):
        return path
    if is_model_folder(path / "model"):
        return path / "model"
    if not any(path.iterdir()):
        raise DarkroomError(f"{path} is an empty folder; give a model folder (one that holds {INDEX})")
    if is_diffusers_folder(path):
        return path
    raise DarkroomError(f"{path} is not a model folder: it holds no {INDEX} and no {PIPELINE}; {_found_instead(path)}")


def _found_instead(folder: Path) -> str:
    """What to give in the place of a folder that is no model."""
    inside = sorted(folder.iterdir())
    folders = [entry for entry in inside if entry.is_dir()]
    components = [entry.name for entry in folders if (entry / CONFIG).is_file() and entry.name.startswith(COMPONENTS)]
    if components:
        return (
            f"its folders ({', '.join(components[:4])}) are those of a diffusers pipeline, so fetch {PIPELINE} too, or "
            "give one of them alone"
        )
    models = [e for e in folders if is_model_folder(e) or is_model_folder(e / "model") or (e / PIPELINE).is_file()]
    weights = [entry for entry in inside if entry.is_file() and is_weight_file(entry)]
    if named := [*models, *weights]:
        return f"it holds {', '.join(entry.name for entry in named[:4])}: give {named[0]}"
    return "give a folder with one of these, or a weight file (.safetensors, .ckpt)"


@dataclass(frozen=True)
class ModelIndex:
    """`darkroom.json`, checked. `parts`: part -> folder of its files (for a reference: inside the bundled model)."""

    folder: Path
    kind: str
    info: dict[str, Any]
    parts: dict[str, Path]
    references: dict[str, dict[str, str]]
    files: dict[str, str]
    declared: tuple[str, ...] = ()  # the parts that the index itself names

    @property
    def sha256(self) -> str:
        """Identity of the model: a digest of the digests of all files that decide its images, so not of a preview."""
        beside = ("preview/", "official/")
        files = {name: digest for name, digest in self.files.items() if not name.startswith(beside)}
        text = json.dumps({"files": files, "references": self.references}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_index(folder: Path) -> ModelIndex:
    with understanding(folder / INDEX, "the index of a model"):
        return _read_index(folder)


def _read_index(folder: Path) -> ModelIndex:
    path = folder / INDEX
    raw = read_json(path, "model index")
    version, kind = raw.get("format_version"), raw.get("kind")
    if not isinstance(version, int) or version < 1:
        raise DarkroomError(f"{path} has no format_version; it is not the index of a model")
    if version > FORMAT_VERSION:
        raise DarkroomError(
            f"{path} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade darkroom-ldm"
        )
    if kind not in PARTS:
        raise DarkroomError(f"{path} describes a {kind!r}; known are: {', '.join(PARTS)}")
    declared, files, info = (raw.get(key, {}) for key in ("parts", "files", "info"))
    if not all(isinstance(value, dict) for value in (declared, files, info)):
        raise DarkroomError(f"{path} is damaged: parts, files and info are tables")
    check_defaults(info.get("defaults"), path)

    parts: dict[str, Path] = {}
    references: dict[str, dict[str, str]] = {}
    for part, place in declared.items():
        if part not in PARTS[kind]:
            raise DarkroomError(f"{path} names the unknown part {part!r}")
        if isinstance(place, dict):
            references[part] = _reference(path, part, place)
            parts[part] = find_reference(references[part], path)
        elif place == part:  # a folder of the same name: an index cannot lead outside its folder
            if part != "preview" or (folder / part).is_dir():
                parts[part] = folder / part
        else:
            raise DarkroomError(f"{path} puts the part {part!r} at {place!r}; it must be {part!r} or a reference")
    if missing := [part for part in PARTS[kind] if part not in parts and part not in OPTIONAL_PARTS[kind]]:
        raise DarkroomError(f"{path} lacks the part {missing[0]!r}; the model is incomplete")
    if "preview" not in parts and "first_stage" in references:  # that of the bundled model
        place = parts["first_stage"].with_name("preview")
        parts |= {"preview": place} if place.is_dir() else {}
    return ModelIndex(folder, kind, info, parts, references, files, tuple(declared))


def index_text(kind: str, info: Mapping[str, Any], places: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of an index. `places`: part -> its folder or {"reference": ...}; `files`: SHA-256 by name."""
    index = {"format_version": FORMAT_VERSION, "kind": kind, "info": info, "parts": places, "files": files}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _reference(path: Path, part: str, place: dict[str, Any]) -> dict[str, str]:
    reference = place.get("reference")
    if not (isinstance(reference, dict) and all(isinstance(reference.get(key), str) for key in ("name", "sha256"))):
        raise DarkroomError(f"{path} is damaged: the reference of {part!r} needs a name and a sha256")
    return {"name": reference["name"], "sha256": reference["sha256"]}


def find_reference(reference: dict[str, str], where: Path) -> Path:
    """The folder of the bundled first stage that a model refers to; its weights must be the very same."""
    name = reference["name"]
    if name not in bundled():
        raise DarkroomError(f"{where} needs the bundled first stage {name!r}, which this version does not ship")
    folder = BUNDLED / name / "first_stage"
    if sha256_of(folder / WEIGHTS["ema"]) != reference["sha256"]:
        raise DarkroomError(
            f"{where} needs another version of the bundled first stage {name!r} than the one shipped here"
        )
    return folder


# ----------------------------------------------------------------------------------------------------------- describing


def guess_family(names: Iterable[str]) -> str:
    """What a single weight file probably is, by the names of its tensors."""
    names = list(names)

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if any(".lora_" in name or "lora_unet" in name for name in names):
        return "a LoRA (small changes to the weights of another model)"
    if has("model.diffusion_model."):
        with_first_stage = " with its first stage" if has("first_stage_model.") else ""
        if has("model.diffusion_model.joint_blocks."):
            return f"a Stable Diffusion 3 checkpoint{with_first_stage}"
        if has("conditioner.embedders."):
            return f"a Stable Diffusion XL checkpoint{with_first_stage}"
        if has("cond_stage_model.transformer.text_model.", "cond_stage_model.model."):
            return f"a Stable Diffusion checkpoint{with_first_stage}"
        return f"a latent diffusion checkpoint of the paper's code{with_first_stage}"
    if has("encoder.conv_in.", "decoder.conv_in."):
        return "an autoencoder (first stage) of the paper's code" if has("encoder.down.") else "a diffusers autoencoder"
    if has("down_blocks.", "transformer_blocks."):
        return "a diffusers denoiser"
    if has("text_model.", "transformer.text_model."):
        return "a text encoder"
    if has("module/", "optimizer/", "ema/"):
        return "a Darkroom training checkpoint (go on with `darkroom train --resume`)"
    for start, part in (("network.", "denoiser"), ("autoencoder.", "first stage"), ("encoders.", "conditioner")):
        if has(start):
            return f"the {part} of a Darkroom model folder"
    if has("input_blocks."):
        return "a bare U-Net in the layout of the paper's code"
    if has("joint_blocks."):
        return "a bare MMDiT in the layout of Stable Diffusion 3"
    if has("blocks.") and has("x_embedder."):
        return "a bare DiT in the official layout"
    if has("string_to_param", "emb_params") or (len(names) == 1 and names[0].startswith("<")):
        return "a learned word (textual inversion)"
    return "a file of tensors of no known model"


# A word of what `guess_family` says: what such a file is good for.
_USES = (
    ("LoRA", "it changes another model: give that one with -m and this file with --lora (adapters=[...] of load)"),
    ("learned word", "it teaches another model a word: give that one with -m and this file with --embedding"),
    ("text encoder", "give it to the model that lacks it, with --set text_towers=FILE of `darkroom convert`"),
    ("diffusers denoiser", "give the folder that holds it and its config.json, or the whole pipeline's folder"),
    ("Darkroom model folder", "give the whole folder, which holds the other parts"),
    ("training checkpoint", "for pictures give the run folder"),
    ("bare", "give the whole checkpoint, or a diffusers folder of the same model"),
)


def how_to_use(guess: str) -> str:
    """What to do with a file that is no whole model, by what `guess_family` says of it."""
    usual = "give a whole checkpoint, a first stage, a diffusers folder or a Darkroom model folder"
    return next((use for word, use in _USES if word in guess), usual)


def describe_folder(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Everything `darkroom info` shows of a model folder, from headers alone. `verify`: compare the files' digests."""
    index = read_index(folder)
    parts: dict[str, Any] = {}
    for part, place in index.parts.items():
        header = read_safetensors_header(place / WEIGHTS["ema"])
        parts[part] = {
            "parameters": header.numel,
            "dtypes": dtypes(header),
            "bytes": sum(path.stat().st_size for path in place.iterdir() if path.is_file()),
            "live_weights": (place / WEIGHTS["live"]).is_file(),
            "config": read_json(place / CONFIG, "config"),
        }
        if part == "first_stage":
            parts[part]["latents"] = {
                name: read_numbers(place / WEIGHTS["ema"], name)
                for name in ("shift", "scale")
                if name in header.tensors
            }
        if part in index.references:
            parts[part]["reference"] = index.references[part]
    damaged = []
    if verify:
        for name, digest in index.files.items():
            path = folder / name
            if ".." in Path(name).parts or not path.is_file() or sha256_of(path) != digest:
                damaged.append(name)
    return {
        "path": str(folder),
        "kind": index.kind,
        "format_version": FORMAT_VERSION,
        "sha256": index.sha256,
        "info": index.info,
        "parts": parts,
        "changed_files": damaged,
    }


def dtypes(header: SafetensorsHeader) -> list[str]:
    return sorted({entry.dtype for entry in header.tensors.values()})
