"""The `README.md` of a model folder: what the model is, what it was made from, what it scored, what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from darkroom.report_tables import as_list, flatten, show

TRAINING = {
    "recipe": "recipe",
    "base": "initialised from",
    "steps": "steps",
    "minutes": "minutes",
    "hardware": "hardware",
    "threads": "threads",
    "seed": "seed",
    "version": "Darkroom",
}
LIMITS = (
    "It draws what its training pictures show and little else; look at its samples before you rely on it.",
    "Pictures that were rare in the data, or few in all, may be reproduced nearly unchanged.",
)
FIRST_STAGE_LIMITS = (
    "What it loses is lost for every model on top of it: look at reconstructions of your own images.",
    "Images unlike its training images, and sizes far from theirs, come back worse.",
)


def model_card(info: Mapping[str, Any]) -> str:
    """Markdown for a model folder. Every key is optional:

    kind ("FirstStage" for one alone) and load (what to give `darkroom.load`), name, description, tasks (list),
    image_size (width, height), channels, downsampling, latent_channels, conditioning (list), classes (list),
    parameters ({part: count}), data ({name, count, source, licence, digest, ...} or a text), recipe, base (what it was
    initialised from), steps ({stage: n}), minutes, hardware, threads, seed, version, scores ({name: value},
    {name: {value, protocol}} or [{name, value, protocol}]), prompts (examples), limits (list), warnings (list),
    licence.
    """
    lines = [f"# {info.get('name') or 'Latent diffusion model'}", ""]
    what = "first stage" if info.get("kind") == "FirstStage" else "latent diffusion model"
    lines += [str(info.get("description") or f"A {what} made with Darkroom."), ""]
    if facts := _facts(info):
        lines += ["| | |", "|---|---|", *(f"| {_cell(label)} | {_cell(value)} |" for label, value in facts), ""]
    lines += ["## How to use it", "", *_usage(info), "", "## Data", "", *_data(info.get("data")), ""]
    training = [row for key, label in TRAINING.items() if info.get(key) for row in flatten(info[key], label)]
    if training:
        lines += ["## Training", "", *(f"- {label}: {show(value)}" for label, value in training), ""]
    lines += ["## Scores", ""]
    if scores := _scores(info.get("scores")):
        lines += ["| score | value | protocol |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {show(value)} | {_cell(protocol)} |" for name, value, protocol in scores]
    else:
        lines.append("None measured.")
    general = FIRST_STAGE_LIMITS if info.get("kind") == "FirstStage" else LIMITS
    limits = (str(v) for v in (*as_list(info.get("limits")), *as_list(info.get("warnings")), *general))
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in dict.fromkeys(limits)), "", "## Licence", ""]
    lines.append(str(info.get("licence") or "Not stated. The licence of the training data may bind the model."))
    return "\n".join(lines) + "\n"


def _facts(info: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if tasks := as_list(info.get("tasks")):
        rows.append(("tasks", ", ".join(map(str, tasks))))
    if size := as_list(info.get("image_size")):
        rows.append(("picture size in training", f"{size[0]} x {size[-1]}"))
    labels = {"channels": "image channels", "downsampling": "downsampling f", "latent_channels": "latent channels"}
    rows += [(label, info[key]) for key, label in labels.items() if info.get(key)]
    if (pixels := _pixels(info)).get("dtype", "uint8") != "uint8":
        rows.append(("pixels", f"{pixels['dtype']}, {pixels.get('low'):g} to {pixels.get('high'):g}"))
    if "conditioning" in info:
        rows.append(("conditioning", ", ".join(map(str, as_list(info["conditioning"]))) or "none"))
    if classes := as_list(info.get("classes")):
        more = f" and {len(classes) - 40} more" if len(classes) > 40 else ""
        rows.append(("classes", ", ".join(map(str, classes[:40])) + more))
    if parameters := info.get("parameters"):
        rows += flatten(parameters, "parameters")
    return rows


def _pixels(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dict form of the pixel format; empty where nothing is said, which means 8 bits."""
    found = info.get("pixel_format")
    return found if isinstance(found, Mapping) else {}


def _usage(info: Mapping[str, Any]) -> list[str]:
    if info.get("kind") == "FirstStage":
        return _usage_of_a_first_stage(str(info.get("load") or "FOLDER"))
    name, conditions = str(info.get("load") or "FOLDER"), as_list(info.get("conditioning"))
    if "low_resolution" in conditions:
        return _usage_on_photos(f"upscale -m {name} photo.png", f'upscale(image, "{name}", seed=0)')
    if "repaint_mask" in conditions:
        return _usage_on_photos(f"edit -m {name} photo.png --mask mask.png", f'edit(image, mask, "{name}")')
    prompts, classes = as_list(info.get("prompts")), as_list(info.get("classes"))
    if prompts or "text" in conditions:
        prompt = str(prompts[0]) if prompts else "words like those of its captions"
        shell, call = f' "{prompt}"', f'"{prompt}", '
    elif classes:
        shell, call = f' --class "{classes[0]}"', f'class_label="{classes[0]}", '
    else:
        shell, call = "", ""
    dtype = _pixels(info).get("dtype", "uint8")
    picture = "picture.tif" if dtype == "float32" or int(info.get("channels") or 3) > 4 else "picture.png"
    return [
        "```bash",
        f"darkroom generate -m {name}{shell} --seed 0 -o {picture}",
        "```",
        "",
        "```python",
        "import darkroom",
        "",
        f'model = darkroom.load("{name}")',
        f"result = model.generate({call}seed=[0, 1, 2, 3])  # result.images: (4, H, W, C) {dtype}",
        "```",
    ]


def _usage_on_photos(command: str, call: str) -> list[str]:
    python = ["import darkroom", "", f"result = darkroom.{call}  # arrays (H, W, C) of 8 or 16 bits"]
    return ["```bash", f"darkroom {command}", "```", "", "```python", *python, "```"]


def _usage_of_a_first_stage(name: str) -> list[str]:
    return [
        "```bash",
        f"darkroom reconstruct {name} picture.png -o back.png",
        f"darkroom train FOLDER --first-stage {name}",
        "```",
        "",
        "```python",
        "import darkroom",
        "",
        f'first_stage = darkroom.load("{name}")',
        "latent = first_stage.encode(image).mode()  # (B, C, H, W) in [-1, 1] -> mean 0, standard deviation 1",
        "image = first_stage.decode(latent)",
        "```",
    ]


def _data(data: Any) -> list[str]:
    if not isinstance(data, Mapping):
        return [str(data) if data else "Not recorded."]
    stated = {k: v for k, v in data.items() if k not in ("problems", "warnings") and v not in (None, "", [], {})}
    lines = [f"- {label.replace('_', ' ')}: {show(value)}" for label, value in flatten(stated)]
    if not data.get("licence"):
        lines.append("- licence: not stated; ask the owner of the pictures before you pass this model on")
    return lines


def _scores(scores: Any) -> list[tuple[str, Any, str]]:
    """Any accepted form of scores as (name, value, protocol)."""
    if isinstance(scores, Mapping):
        scores = [{"name": k, **(v if isinstance(v, Mapping) else {"value": v})} for k, v in scores.items()]
    return [(str(s.get("name")), s.get("value"), str(s.get("protocol") or "not stated")) for s in as_list(scores)]


def _cell(value: Any) -> str:
    """Text that stays inside one Markdown table cell."""
    return show(value).replace("|", "\\|").replace("\n", " ")
