"""Settings inside a PNG: a `parameters` text that other tools show, and a `darkroom` JSON chunk that repeats the image.

`parameters` follows the form that the A1111 web UI made common: prompt, "Negative prompt: ...", then one line of
"Key: value" pairs, values with commas quoted as JSON. It is for reading; only the `darkroom` chunk is exact.
Images that are no PNG carry the same two texts in a description or beside them: see `data.image_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom.errors import DarkroomError

RECORD_FORMAT = 1
PARAMETERS, RECORD = "parameters", "darkroom"
_NEGATIVE = "Negative prompt:"
# Key: a word and then words, dashes or slashes; value: a JSON string, or anything without a comma.
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def png_text(settings: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, str]:
    """The text chunks of one generated image: its `Result.settings` entry as two texts by keyword. size: (width,
    height) of the picture where it is not what the model was asked for."""
    record = json.dumps({"format": RECORD_FORMAT, **settings}, separators=(",", ":"))
    return {PARAMETERS: format_parameters(settings, size), RECORD: record}


def format_parameters(settings: Mapping[str, Any], size: tuple[int, int] | None = None) -> str:
    """One image's settings as the `parameters` text; size as in `png_text`."""
    request, index = settings["request"], settings.get("index")

    def own(name: str) -> Any:
        values = request.get(name)
        return values[index if index is not None else 0] if values else None

    lines = [_words(own("prompts") or "")]
    if request.get("negative_prompt"):
        lines.append(f"{_NEGATIVE} {_words(request['negative_prompt'])}")
    width, height = size or request.get("size") or (None, None)
    model = settings.get("model") or {}
    pairs = {
        "Steps": request.get("steps"),
        "Sampler": request.get("solver"),
        "CFG scale": request.get("guidance_scale"),
        "Seed": own("seeds"),
        "Size": f"{width}x{height}" if width else None,
        "Model hash": model["sha256"][:10] if model.get("sha256") else None,
        "Model": model.get("name"),
        "Adapters": ", ".join(f"{a['name']} {a['weight']:g}" for a in model.get("adapters", [])) or None,
        "Eta": request.get("eta") or None,
        "Class": own("class_labels"),
        "Images": len(request.get("seeds") or []) if index is None else None,
        "Version": f"Darkroom {settings.get('version', '?')}",
    }
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _words(text: Any) -> str:
    """A text that was given as token ids is shown as they are."""
    return text if isinstance(text, str) else json.dumps(text)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) or text != text.strip() else text


def parse_parameters(text: str) -> dict[str, str]:
    """The `parameters` text as a table: "Prompt", "Negative prompt" and the pairs of its last line, all as strings."""
    lines = text.strip("\n").split("\n")
    # As in the tools that write it: a last line of fewer than three pairs is still part of the prompt.
    pairs = _PAIR.findall(lines[-1])
    pairs = pairs if len(pairs) >= 3 else []
    if pairs:
        lines.pop()
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    table = {"Prompt": "\n".join(lines[:start])}
    if negative:
        table["Negative prompt"] = negative
    for key, value in pairs:
        table[key.strip()] = _unquoted(value)
    return table


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def read_png_text(path: str | Path) -> dict[str, str]:
    """All text chunks of a PNG by keyword, without decoding its pixels; the notes of a TIFF, NPY or EXR."""
    from PIL import Image

    from darkroom.data.image_files import DEEP_SUFFIXES, read_text

    path = Path(path)
    try:
        if path.suffix.lower() in DEEP_SUFFIXES and path.is_file():
            return read_text(path)
        with Image.open(path) as image:
            if image.format != "PNG":
                raise DarkroomError(f"{path} is a {image.format} image; only PNG, TIFF, NPY and EXR carry settings")
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    except FileNotFoundError:
        raise DarkroomError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise DarkroomError(f"{path} is a folder, an image was expected") from None
    except PermissionError:
        raise DarkroomError(f"cannot read {path}: permission denied") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is not an image" if "cannot identify" in str(error) else str(error)
        raise DarkroomError(f"cannot read {path}: {reason}") from None


def read_settings(path: str | Path) -> dict[str, Any]:
    """The `darkroom` record of an image: version, model, request of the whole batch, and index in it."""
    text = read_png_text(path)
    if RECORD not in text:
        found = "only `parameters` text of another tool" if PARAMETERS in text else "no settings"
        raise DarkroomError(f"{path} holds {found}; only images made by Darkroom can be repeated")
    return parse_record(text[RECORD], path)


def parse_record(text: str, path: str | Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("request"), dict):
        raise DarkroomError(f"the settings inside {path} are damaged")
    if record.pop("format", None) != RECORD_FORMAT:
        raise DarkroomError(f"the settings inside {path} were written by a newer version; upgrade darkroom-ldm")
    return record
