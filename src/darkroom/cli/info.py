"""`darkroom info`: what a model, a weight file or an image holds. Nothing in a file is executed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from darkroom.config import understanding
from darkroom.errors import DarkroomError, printable


@click.command(short_help="Look inside a file.")
@click.argument("source", metavar="MODEL|FILE|PNG")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def info(source: str, as_json: bool) -> None:
    """Tell what a model folder, a bundled model, a diffusers folder, a weight file or an image holds.

    Weight files are read without running anything in them. Of a model folder the digest of every file is compared
    with the one recorded when it was saved.

    \b
      darkroom info runs/clothes
      darkroom info model.safetensors
      darkroom info picture.png
    """
    from darkroom.interop.tensor_file import is_weight_file
    from darkroom.model_folder import find_source

    path = Path(source).expanduser()
    if path.is_file() and not is_weight_file(path):
        facts = _image(path)
    else:
        place = find_source(source)
        facts = _weight_file(place) if place.is_file() else _folder(place)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        with understanding(path, "what can be described"):
            lines = _lines(facts)
        for line in lines:
            click.echo(printable(line))


def _image(path: Path) -> dict[str, Any]:
    from PIL import Image

    from darkroom.data.image_files import DEEP_SUFFIXES, read_samples
    from darkroom.png_settings import PARAMETERS, RECORD, parse_parameters, parse_record, read_png_text
    from darkroom.safe_files import START_BYTES, instead_of_weights, open_for_reading

    facts: dict[str, Any] = {"path": str(path)}
    deep = path.suffix.lower() in DEEP_SUFFIXES
    try:
        if deep:
            samples = read_samples(path.read_bytes())
            height, width, channels = samples.values.shape
            facts |= {"kind": f"{samples.format} image", "size": f"{width}x{height}"}
            facts["mode"] = f"{channels} channel{'s' * (channels > 1)} of {samples.values.dtype}"
            has_text = True
        else:
            with Image.open(path) as image:
                facts |= {"kind": f"{image.format} image", "size": f"{image.width}x{image.height}", "mode": image.mode}
                has_text = image.format == "PNG"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        with open_for_reading(path) as (file, _):
            start = file.read(START_BYTES)
        weights = start[8:10] == b'{"' or start[:2] == b"PK"
        cure = f": {instead_of_weights(start)}" if weights else "; give a model folder, a weight file or a PNG"
        raise DarkroomError(f"{path} is neither an image nor a model{cure}") from None
    text = read_png_text(path) if has_text else {}
    if PARAMETERS in text:
        facts["parameters"] = parse_parameters(text[PARAMETERS])
    if RECORD in text:
        facts["record"] = parse_record(text[RECORD], path)
    if not text:
        facts["settings"] = "none"
    return facts


def _weight_file(path: Path) -> dict[str, Any]:
    from darkroom.interop.compvis_model import describe as describe_model
    from darkroom.interop.first_stage_files import glance
    from darkroom.interop.tensor_file import open_tensor_file
    from darkroom.model_folder import guess_family

    file = open_tensor_file(path)
    is_pickled = file.stored is not None
    facts: dict[str, Any] = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "kind": "torch checkpoint, read without running anything in it" if is_pickled else "safetensors file",
        "parameters": sum(math.prod(shape) for shape in file.shapes.values()),
        "dtypes": sorted(set(file.dtypes.values())),
        "metadata": {key: value[:200] for key, value in file.notes.items()},
        "holds": guess_family(file.shapes),
    }
    try:
        with understanding(path, "a model"):
            facts |= describe_model(file) or {}
    except DarkroomError as error:
        facts["model"] = f"cannot be loaded: {error}"
    try:
        with understanding(path, "a first stage"):
            found = glance(file)
        if found is not None:
            from darkroom.interop.compvis_first_stage import describe

            facts["first stage"] = describe(found.config)
            facts["first_stage_config"] = found.config
    except DarkroomError as error:
        facts["first stage"] = f"cannot be loaded: {error}"
    return facts | {"tensors": {name: list(shape) for name, shape in file.shapes.items()}}


def _diffusers_folder(path: Path) -> dict[str, Any]:
    from darkroom.interop.first_stage_files import find_first_stage
    from darkroom.interop.found_model import find_model

    facts: dict[str, Any] = {"path": str(path), "kind": "diffusers folder"}
    try:
        if (model := find_model(path)) is not None:
            facts["model"] = model.title
            counts = {part.replace("_", " "): len(table) for part, table in model.tables.items() if table}
            facts["parts of it"] = ", ".join(f"{part} {count} tensors" for part, count in counts.items())
            facts |= model.facts
    except DarkroomError as error:
        facts["model"] = f"cannot be loaded: {error}"
    found = find_first_stage(path)
    if found is None:
        return facts | {"first stage": "none that can be loaded"}
    return facts | {
        "first stage": found.what,
        "latents": f"shift {found.shift}, scale {found.scale}",
        "first_stage_config": found.config,
    }


def _folder(path: Path) -> dict[str, Any]:
    from darkroom.model_folder import describe_folder, is_model_folder

    return describe_folder(path) if is_model_folder(path) else _diffusers_folder(path)


# ------------------------------------------------------------------------------------------------------------ printing


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts for people: long tables are cut, configs and class lists shortened."""
    if "parts" in facts:
        return _model_lines(facts)
    lines = [facts["path"], f"  {facts['kind']}"]
    for key in ("holds", "model", "prediction", "parts of it", "first stage", "latents", "size", "mode", "settings"):
        if key in facts:
            lines.append(f"  {key}: {facts[key]}")
    if "tensors" in facts:
        lines.append(f"  {len(facts['tensors'])} tensors, {_amount(facts['parameters'])} numbers, {_kinds(facts)}")
        lines.append(f"  size: {facts['bytes'] / 1e6:.1f} MB")
        lines += [f"  {key}: {_short(value)}" for key, value in facts.get("metadata", {}).items()]
        lines += [f"    {name}  {shape}" for name, shape in list(facts["tensors"].items())[:8]]
        if len(facts["tensors"]) > 8:
            lines.append(f"    ... {len(facts['tensors']) - 8} more (--json shows all)")
    lines += [f"  {key}: {value}" for key, value in facts.get("parameters", {}).items()] if "size" in facts else []
    if "record" in facts:
        lines += _record_lines(facts["record"], facts["path"])
    return lines


def _record_lines(record: dict[str, Any], path: str) -> list[str]:
    """What an image was made from beside its prompt, and how to make it again."""
    for command in ("upscale", "edit"):
        if command in record:
            facts = {key: value for key, value in record[command].items() if value not in (None, False)}
            lines = [f"  {key.replace('_', ' ')}: {_short(value)}" for key, value in facts.items()]
            return [*lines, f"  made by darkroom {command}: repeat that command on the picture it was made of"]
    from darkroom.cli.conditions import flag_of
    from darkroom.model_folder import bundled

    request, index = record["request"], record.get("index")
    count = len(request.get("seeds") or [])
    lines, command = [], f"darkroom generate --from {path}"
    source, name = (str(record.get("model", {}).get(key) or "") for key in ("source", "name"))
    if not (source and Path(source).exists()) and not {source, name} & {*bundled()}:
        command += " -m MODEL"
    for field, values in (request.get("conditions") or {}).items():
        value = values[index if isinstance(index, int) and index < len(values) else 0]
        if isinstance(value, dict) and "sha256" in value:
            flag = flag_of(field)
            command += f" {flag}FILE" if flag.endswith("=") else f" {flag} FILE"
            value = f"SHA-256 {value['sha256'][:10]}"
        others = " (of the first image)" if index is None and any(v != values[0] for v in values) else ""
        lines.append(f"  {field}: {_short(value)}{others}")
    for key in ("guidance", "guidance_interval", "noise_level"):
        if request.get(key) is not None:
            lines.append(f"  {key.replace('_', ' ')}: {_short(request[key])}")
    which = f"image {index + 1} of {count}" if isinstance(index, int) else f"a grid of {count}"
    return [*lines, f"  repeat it ({which} in its batch) with: {command}"]


def _model_lines(facts: dict[str, Any]) -> list[str]:
    known = facts["info"]
    lines = [facts["path"], f"  {facts['kind'].replace('_', ' ')} {known.get('name', '')}".rstrip()]
    total = 0
    for part, entry in facts["parts"].items():
        total += entry["parameters"]
        more = f", bundled {entry['reference']['name']}" if "reference" in entry else ""
        more += ", with live weights" if entry["live_weights"] else ""
        kind = _part_kind(part, entry["config"])
        if part == "first_stage" and "pixels" in entry["config"]:
            from darkroom.config import from_dict
            from darkroom.pixel_format import PixelFormat

            more += f", images of {from_dict(PixelFormat, entry['config']['pixels'])}"
        lines.append(f"  {part.replace('_', ' ')}: {kind}{_amount(entry['parameters'])} numbers, {_kinds(entry)}{more}")
        if "latents" in entry:
            lines += _latent_lines(entry["latents"])
    lines.append(f"  in all: {_amount(total)} numbers, {sum(e['bytes'] for e in facts['parts'].values()) / 1e6:.1f} MB")
    for name, encoder in facts["parts"].get("conditioner", {}).get("config", {}).get("encoders", {}).items():
        classes = encoder.get("classes")
        lines.append(f"  takes {name}" + (f": {len(classes)} classes, {_short(', '.join(classes))}" if classes else ""))
    lines += [f"  {key}: {_short(value)}" for key, value in known.items() if key != "name"]
    lines.append(f"  sha256: {facts['sha256']}")
    changed = facts["changed_files"]
    lines.append(f"  CHANGED since it was saved: {', '.join(changed)}" if changed else "  files: as they were saved")
    return lines


def _latent_lines(latents: dict[str, list[float]]) -> list[str]:
    """latent = (z - shift) * scale, for all channels alike or for each."""
    if set(latents) != {"shift", "scale"}:
        return []
    shift, scale = (latents[name] for name in ("shift", "scale"))
    count = max(len(shift), len(scale))
    if count == 1:
        return [f"    latents: (z - shift) * scale, shift {shift[0]:.5g}, scale {scale[0]:.5g} for all channels"]
    both = zip(*(v * count if len(v) == 1 else v for v in (shift, scale)), strict=True)
    head = "    latents: (z - shift) * scale per channel"
    return [head, *(f"      channel {i}: shift {m:.5g}, scale {s:.5g}" for i, (m, s) in enumerate(both))]


def _part_kind(part: str, config: dict[str, Any]) -> str:
    if part == "first_stage":
        if config.get("kind") == "identity":
            return f"identity, {config.get('channels', 3)} channels, "
        if not {"channel_mult", "embed_dim"} <= config.keys():  # what a config leaves out has its default
            from darkroom.first_stage.autoencoder import AutoencoderConfig

            config = vars(AutoencoderConfig()) | config
        codes = config.get("codebook_size")
        kind = "KL" if codes is None else f"VQ with {codes} codes"
        return f"{kind}, f {2 ** (len(config['channel_mult']) - 1)}, {config['embed_dim']} latent channels, "
    if part == "preview":
        return f"a decoder for live previews, f {config.get('downsampling')}, "
    if part == "denoiser":
        network = config.get("network", {}).get("kind", "unet")
        return f"{network}, {config.get('prediction_type')}, schedule {config.get('schedule', {}).get('kind')}, "
    return ""


def _kinds(entry: dict[str, Any]) -> str:
    return "/".join(entry["dtypes"]) or "no dtype"


def _amount(count: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _short(value: Any, width: int = 90) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
