"""LoRA files and learned words on a loaded model: applied with a weight, several at once, and removed exactly.

The weights that the model came with are kept beside the changed ones, so that removing gives back the very same bits.
With several files every change is added to those original weights, in the order given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.conditioning.text_towers import VOCABULARY, TextTower, TextTowers
from darkroom.errors import DarkroomError
from darkroom.interop.learned_words import LearnedWord, read_learned_word
from darkroom.interop.lora import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, Change, LoraFile, delta, is_lora, match, read_lora
from darkroom.interop.lora_names import Spot, Spots, network_spots, tower_spots
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import guess_family, is_diffusers_folder, is_model_folder
from darkroom.safe_files import sha256_of

RECORD = "adapters"  # in a model's info, and in the settings of its pictures
MERGED = "merged_adapters"  # in the info of a model that was saved with them


@dataclass(frozen=True)
class Adapter:
    """path:   a LoRA (a file, or a folder of peft or diffusers) or the file of a learned word
    weight: factor of the change; for a word, of its vectors
    word:   for a learned word, instead of the one in its file
    """

    path: Path
    weight: float = 1.0
    word: str | None = None


Given = Adapter | str | Path | tuple[str | Path, float]


@dataclass
class Applied:
    """What a model carries of its adapters: how to undo them."""

    given: list[Adapter] = field(default_factory=list)
    weights: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # parameter, its original numbers
    tables: list[tuple[TextTower, nn.Parameter]] = field(default_factory=list)  # tower, its original table


def apply_adapters(model: LatentDiffusion, adapters: Sequence[Given]) -> None:
    """Apply files to a model, beside those that it already carries.

    An entry is a path, (path, weight) or an `Adapter`. Every tensor of a file must have its place in the model; what
    has none is an error that names it, and the model stays as it was.
    """
    given = [*carried(model).given, *map(as_adapter, adapters)]
    loras = [adapter for adapter in given if is_lora(adapter.path)]
    others = [adapter for adapter in given if adapter not in loras]
    for adapter in others:
        _refuse_other(adapter.path)
    words = [(adapter, read_learned_word(adapter.path, adapter.word)) for adapter in others]
    originals = {id(parameter): numbers for parameter, numbers in carried(model).weights}
    changed = _changed_weights(model, loras, originals)
    _check_words(model, [word for _, word in words])
    records = [_record(adapter, "lora") for adapter in loras] + [
        _record(adapter, "embedding") | {"word": word.word} for adapter, word in words
    ]
    # Everything is known to fit; from here on nothing fails half way.
    remove_adapters(model)
    applied = Applied(given)
    for parameter, numbers in changed:
        applied.weights.append((parameter, parameter.data))
        parameter.data = numbers
    for adapter, word in words:
        for tower, vectors in _places(model, word):
            _extend(tower, word.word, vectors * adapter.weight, applied)
    if given:
        model.adapters = applied
        model.info[RECORD] = records


def remove_adapters(model: LatentDiffusion) -> None:
    """The model as it was before any adapter, to the last bit."""
    applied = carried(model)
    for parameter, numbers in applied.weights:
        # The model may have moved in the meantime.
        parameter.data = numbers.to(device=parameter.device, dtype=parameter.dtype)
    for tower, table in applied.tables:
        module, name = tower.table
        grown = getattr(module, name)
        table.data = table.data.to(device=grown.device, dtype=grown.dtype)
        setattr(module, name, table)
        tower.size, tower.learned = len(table), {}
    model.adapters = None
    model.info.pop(RECORD, None)


def carried(model: LatentDiffusion) -> Applied:
    return model.adapters if isinstance(model.adapters, Applied) else Applied()


def saved_info(model: LatentDiffusion) -> dict[str, Any]:
    """What is said of a model that is written as it is now: changed weights are its own from then on. Learned words are
    no part of a model's vocabulary and are refused."""
    info = dict(model.info)
    adapters = info.pop(RECORD, [])
    if words := [entry["word"] for entry in adapters if entry["kind"] == "embedding"]:
        raise DarkroomError(
            f"the model carries the learned word {words[0]!r}, which cannot be written with it: call "
            "darkroom.remove_adapters(model) first, and give the file again when the model is loaded"
        )
    return info | ({MERGED: adapters} if adapters else {})


def as_adapter(given: Given) -> Adapter:
    """What someone gives, checked."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise DarkroomError(f"an adapter is a path, or (path, weight), not {given!r}")
        adapter = Adapter(Path(given[0]).expanduser(), given[1])
    else:
        adapter = given if isinstance(given, Adapter) else Adapter(Path(given).expanduser())
    if isinstance(adapter.weight, bool) or not isinstance(adapter.weight, (int, float)):
        raise DarkroomError(f"the weight of {adapter.path} is {adapter.weight!r}; give a number, 1 is as trained")
    if not math.isfinite(adapter.weight):
        raise DarkroomError(f"the weight of {adapter.path} is {adapter.weight}; give a finite number, 1 is as trained")
    if not adapter.path.exists():
        raise DarkroomError(f"{adapter.path} does not exist; check the path of the adapter")
    return adapter


def _refuse_other(path: Path) -> None:
    """What is known to be neither a LoRA nor a learned word is refused by what it is, from names alone."""
    if path.is_dir():
        whole = is_model_folder(path) or is_diffusers_folder(path)
        known = f"a folder without a LoRA ({', '.join((*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS))})"
        guess = "a whole model" if whole else known
    else:
        guess = guess_family(open_tensor_file(path).shapes)
        whole = "checkpoint" in guess
    if whole or not any(word in guess for word in ("learned word", "no known model")):
        instead = "give it as the model (-m)" if whole else "give the file of the LoRA or of the word"
        raise DarkroomError(f"{path} is {guess}, neither a LoRA nor a learned word; {instead}")


def _record(adapter: Adapter, kind: str) -> dict[str, Any]:
    """What a picture says of it: enough to know the very same file again."""
    path = adapter.path
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _WEIGHTS)
    digests = [sha256_of(file) for file in files]
    return {"kind": kind, "name": path.name, "sha256": "+".join(digests), "weight": adapter.weight}


_WEIGHTS = (".safetensors", ".bin", ".json")


# ------------------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Part:
    """One file's change of the rows of one weight."""

    lora: LoraFile
    change: Change
    spot: Spot
    weight: float

    def add_to(self, total: Tensor) -> None:
        index, count = self.spot.part
        rows = total.chunk(count)[index]
        rows += delta(self.lora, self.change, tuple(rows.shape), self.spot.swapped).to(rows.device) * self.weight


def _changed_weights(
    model: LatentDiffusion, loras: Iterable[Adapter], originals: Mapping[int, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, its new numbers) for all that LoRA files change, computed in float32."""
    networks = _networks(model)
    spots: dict[str, Spots] = {part: spots() for part, (_, spots) in networks.items()}
    plan: dict[tuple[str, str], list[Part]] = {}
    for adapter in loras:
        lora = read_lora(adapter.path)
        for change, part, spot in match(lora, spots):
            plan.setdefault((part, spot.name), []).append(Part(lora, change, spot, adapter.weight))
    result = []
    for (part, name), changes in plan.items():
        parameter = networks[part][0].get_parameter(name)
        original = originals.get(id(parameter), parameter.data).to(parameter.device, parameter.dtype)
        total = original.float().clone()
        for one in changes:
            one.add_to(total)
        result.append((parameter, torch.empty_like(original).copy_(total)))  # in the original's layout in memory
    return result


def _networks(model: LatentDiffusion) -> dict[str, tuple[nn.Module, Callable[[], Spots]]]:
    """What LoRA files speak of: the denoiser, and text towers in their customary order."""
    network = model.denoiser.network
    result: dict[str, tuple[nn.Module, Callable[[], Spots]]] = {"denoiser": (network, lambda: network_spots(network))}
    numbers = {"clip_l": "text 1", "clip_g": "text 2", "t5": "text 3", "tower": "text 1"}
    for name, tower in _towers(model).items():

        def spots(tower: TextTower = tower) -> Spots:
            return tower_spots(tower.network, tower.use.family)

        result[numbers.get(name, f"text {name}")] = (tower.network, spots)
    return result


def _towers(model: LatentDiffusion) -> dict[str, TextTower]:
    """By their names in SDXL and SD 3; "tower" where there is one."""
    return {
        name: tower
        for encoder in model.conditioner.encoders.values()
        if isinstance(encoder, TextTowers)
        for name, tower in encoder.towers.items()
        if isinstance(tower, TextTower)
    }


# -------------------------------------------------------------------------------------------------------------- words


def _places(model: LatentDiffusion, word: LearnedWord) -> list[tuple[TextTower, Tensor]]:
    """The towers that learn a word, with its vectors."""
    towers = _towers(model)
    readers = {name: tower for name, tower in towers.items() if VOCABULARY[tower.use.family] == "clip"}
    wanted = readers or towers
    if not wanted:
        raise DarkroomError(
            f"{word.path} is a learned word, and this model has no text tower with a table of such words"
        )
    vectors = dict(word.vectors)
    if "" in vectors:
        if len(wanted) > 1:
            raise DarkroomError(
                f"{word.path} has vectors for one text tower, and this model has {' and '.join(wanted)}: give a file "
                "with vectors for each"
            )
        vectors = {next(iter(wanted)): vectors[""]}
    elif len(towers) == 1 and len(vectors) == 1:
        vectors = {next(iter(towers)): next(iter(vectors.values()))}
    for problem, names in (
        ("has no", vectors.keys() - towers.keys()),
        ("needs some for", wanted.keys() - vectors.keys()),
    ):
        if names:
            said = "has vectors for" if problem == "has no" else "lacks vectors that"
            raise DarkroomError(f"{word.path} {said} {', '.join(sorted(names))}: this model {problem} {min(names)}")
    for name, rows in vectors.items():
        if rows.shape[1] != towers[name].width:
            raise DarkroomError(
                f"{word.path} has vectors of width {rows.shape[1]}, and {name} of this model is {towers[name].width} "
                "wide: it was learned with another model"
            )
    return [(towers[name], rows) for name, rows in vectors.items()]


def _check_words(model: LatentDiffusion, words: Sequence[LearnedWord]) -> None:
    for index, word in enumerate(words):
        _places(model, word)
        if any(word.word == other.word for other in words[:index]):
            raise DarkroomError(f"two files teach the word {word.word!r}; give one of them another word")


def _extend(tower: TextTower, word: str, vectors: Tensor, applied: Applied) -> None:
    """The table of a tower gets more rows; they are the word's ids from now on."""
    module, name = tower.table
    table = getattr(module, name)
    if all(tower is not other for other, _ in applied.tables):
        applied.tables.append((tower, table))
    grown = torch.cat([table.data, vectors.to(device=table.device, dtype=table.dtype)])
    setattr(module, name, nn.Parameter(grown, requires_grad=table.requires_grad))
    tower.learned = tower.learned | {word: list(range(tower.size, tower.size + len(vectors)))}
    tower.size += len(vectors)
