"""LoRA files and learned words on the command line, and in the settings of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.adapters import Adapter
    from darkroom.latent_diffusion import LatentDiffusion

Command = TypeVar("Command", bound=Callable[..., Any])


def adapter_options(command: Command) -> Command:
    """--lora and --embedding."""
    for flag, name, form, text in (
        ("--embedding", "embeddings", "FILE[:WORD]", "A learned word (repeatable)."),
        ("--lora", "loras", "FILE[:WEIGHT]", "A LoRA file (repeatable)."),
    ):
        command = click.option(flag, name, multiple=True, metavar=form, help=text)(command)
    return command


def given_adapters(loras: Sequence[str], embeddings: Sequence[str]) -> list[Adapter]:
    """("detail.safetensors:0.8",), ("cat.pt:<cat>",) -> what `load` takes."""
    from darkroom.adapters import Adapter

    result = []
    for text in loras:
        path, weight = split_last(text)
        try:
            number = 1.0 if weight is None else float(weight)
        except ValueError:
            raise DarkroomError(f"--lora {text}: give FILE or FILE:WEIGHT, for example fox.safetensors:0.8") from None
        result.append(Adapter(Path(path).expanduser(), number))
    for text in embeddings:
        path, word = split_last(text)
        result.append(Adapter(Path(path).expanduser(), word=word))
    return result


def split_last(text: str) -> tuple[str, str | None]:
    """The path, and what stands behind its last colon; a file of the whole name wins."""
    path, colon, last = text.rpartition(":")
    is_path = not colon or "/" in last or "\\" in last or Path(text).expanduser().exists()
    return (text, None) if is_path else (path, last or None)


def note_places(model: dict[str, Any], loaded: LatentDiffusion, shareable: Callable[[str], str]) -> None:
    """Write into the settings of a picture where its adapters lie, as far as a picture may say it."""
    from darkroom.adapters import carried

    places = {a.path.name: shareable(str(a.path)) for a in carried(loaded).given}
    for entry in model.get("adapters", []):
        if places.get(entry["name"]):
            entry["source"] = places[entry["name"]]


def recorded_adapters(picture: Path, model: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """--lora and --embedding as a picture notes them; an error where a file is not at its place."""
    loras, embeddings = [], []
    for entry in _entries(model):
        source = str(entry.get("source") or entry.get("name"))
        is_word = entry.get("kind") == "embedding"
        if not Path(source).exists():
            flag = "--embedding" if is_word else "--lora"
            raise DarkroomError(f"{picture} was made with {entry.get('name')}, which is not here; add {flag} FILE")
        if is_word:
            embeddings.append(f"{source}:{entry.get('word')}")
        else:
            loras.append(f"{source}:{entry.get('weight', 1.0)!r}")
    return tuple(loras), tuple(embeddings)


def digests_of(model: Mapping[str, Any]) -> str:
    """What the adapters of a model are, for comparing and for people."""
    said = [f"{e.get('name')} {str(e.get('sha256'))[:10]} at {e.get('weight')}" for e in _entries(model)]
    return ", ".join(said) or "none"


def _entries(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = model.get("adapters") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DarkroomError("the adapters in the settings of a picture are damaged")
    return entries
