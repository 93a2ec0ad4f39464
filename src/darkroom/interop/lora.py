"""LoRA files: small changes to the weights of a model (Hu et al. 2021, eq. 3).

    W + weight * alpha / r * up @ down

down (r, in), up (out, r); for a convolution down is one of r filters and up 1x1. Files of kohya's scripts name them
`lora_down`, `lora_up` with a scalar `alpha` beside; peft and diffusers `lora_A`, `lora_B`, with the alphas in a config
or none (then alpha = r); older diffusers `lora.down`, `lora_linear_layer.down` and processors of attention. The LoCon
form with a core (`lora_mid`) is read too. Whatever else such files may hold (DoRA, LoHa, LoKr, full differences,
biases) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.interop.lora_names import Spot, Spots, find_spot
from darkroom.interop.tensor_file import TensorFile, open_tensor_file, some
from darkroom.safe_files import read_json
from darkroom.safe_json import parse_json

METADATA = "lora_adapter_metadata"  # diffusers' note of peft's config, beside the tensors
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

_ENDINGS = (
    (
        "down",
        r"\.lora_down\.weight|\.lora_A(?:\.default)?\.weight|\.lora(?:_linear_layer)?\.down\.weight|_lora\.down\.weight",
    ),
    ("up", r"\.lora_up\.weight|\.lora_B(?:\.default)?\.weight|\.lora(?:_linear_layer)?\.up\.weight|_lora\.up\.weight"),
    ("mid", r"\.lora_mid\.weight"),
    ("alpha", r"\.alpha"),
)
_ENDING = re.compile("|".join(f"(?P<{kind}>{pattern})$" for kind, pattern in _ENDINGS))
# kohya's prefix, or what all others put behind a layer's name. A learned word may be called "<flora>".
_MARK = re.compile(r"^lora_\w+\.|[._]lora\.(?:down|up)\.|\.(?:lora|hada|lokr)_|\.dora_scale$")
_OTHERS = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("diff_b", "differences of biases"),
    ("diff", "full differences"),
    ("lora_B.bias", "biases"),
    ("lora_up.bias", "biases"),
    ("lora_embedding_", "changes of token tables"),
)

_PLAIN = re.compile(r"\w[\w.-]*")  # a name of a layer, or the end of one


@dataclass
class Change:
    """What a file says of one layer. Shapes: down (r, in, ...), up (out, r, ...), mid (r, r, k, k)."""

    layer: str
    names: dict[str, str] = field(default_factory=dict)  # kind: name in the file
    scale: float | None = None  # alpha / r; None: alpha is stored


@dataclass(frozen=True)
class LoraFile:
    file: TensorFile
    changes: list[Change]


def is_lora(path: Path) -> bool:
    """Whether a file or a folder (of peft, of diffusers) holds a LoRA, by its names."""
    if path.is_dir():
        return _weights_in(path) is not None
    return any(_MARK.search(name) for name in open_tensor_file(path).shapes)


def _weights_in(folder: Path) -> Path | None:
    names = PEFT_WEIGHTS if (folder / PEFT_CONFIG).is_file() else DIFFUSERS_WEIGHTS
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_lora(path: Path) -> LoraFile:
    """The layers that a file changes; the numbers stay in it. Names that mean nothing here are an error."""
    weights = _weights_in(path) if path.is_dir() else path
    if weights is None:
        raise DarkroomError(f"{path} is a folder without a LoRA; give its file, or a folder of peft or diffusers")
    with understanding(path, "a LoRA"):
        file = open_tensor_file(weights)
        changes = _changes(file)
        config = _stated_config(path, file)
        for change in changes.values():
            if "alpha" not in change.names:
                change.scale = _stated_scale(path, change.layer, file.shapes[change.names["down"]][0], config)
    return LoraFile(file, list(changes.values()))


def _changes(file: TensorFile) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    unknown = []
    for name in file.shapes:
        ending = _ENDING.search(name)
        if ending is None:
            unknown.append(name)
            continue
        assert ending.lastgroup is not None
        layer = _layer(name[: ending.start()], ending[0])
        change = changes.setdefault(layer, Change(layer))
        if ending.lastgroup in change.names:
            raise DarkroomError(f"{file.path} says twice what {layer} changes by")
        change.names[ending.lastgroup] = name
    if unknown:
        kind = next((what for part, what in _OTHERS if any(part in name for name in unknown)), None)
        what = f"{kind}, which this version cannot apply" if kind else "names that no LoRA has"
        raise DarkroomError(f"{file.path} holds {what}: {some(unknown)}")
    if not changes:
        raise DarkroomError(f"{file.path} holds no tensors")
    for change in changes.values():
        if lacking := {"down", "up"} - change.names.keys():
            raise DarkroomError(f"{file.path} is incomplete: it lacks the {min(lacking)} matrix of {change.layer}")
    return changes


def _layer(start: str, ending: str) -> str:
    """Older diffusers keep the matrices in an attention's processor: attn1.processor.to_out_lora -> attn1.to_out.0"""
    if ending.startswith("_lora."):
        start = start.replace(".processor.", ".")
        return f"{start}.0" if start.endswith("to_out") else start
    return start


def _stated_config(path: Path, file: TensorFile) -> dict[str, Any]:
    """By part ("" for all): peft's config, where one comes with the weights."""
    if path.is_dir() and (path / PEFT_CONFIG).is_file():
        return {"": read_json(path / PEFT_CONFIG, "config of a LoRA")}
    if METADATA not in file.notes:
        return {}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in dict(parse_json(file.notes[METADATA].encode())).items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return parts


def _stated_scale(path: Path, layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r (or alpha / sqrt(r), Kalajdzievski 2023) of peft's config; 1 where nothing is said."""
    part, _, rest = layer.partition(".")
    stated = config.get(part) or config.get("")
    if not stated or rank < 1:
        return 1.0
    if stated.get("use_dora"):
        raise DarkroomError(f"{path} is a DoRA, which this version cannot apply; give a plain LoRA")
    alpha = stated.get("lora_alpha", rank)
    for pattern, value in (stated.get("alpha_pattern") or {}).items():
        wanted = pattern.removeprefix("^").removesuffix("$")
        if not _PLAIN.fullmatch(wanted):
            raise DarkroomError(
                f'{path}: its config gives an alpha to the pattern "{pattern}"; this version reads names of layers '
                "there, write them out"
            )
        if rest == wanted or layer == wanted or layer.endswith(f".{wanted}"):
            alpha = value
    return float(alpha) / (rank**0.5 if stated.get("use_rslora") else rank)


# ------------------------------------------------------------------------------------------------------------- applying


def match(lora: LoraFile, parts: Mapping[str, Spots]) -> list[tuple[Change, str, Spot]]:
    """Every change with the part and place that it is about; names without a place are an error that names them."""
    found, unmatched = [], []
    for change in lora.changes:
        place = find_spot(change.layer, parts)
        if place is None:
            unmatched.append(change.layer)
        else:
            found.append((change, *place))
    if unmatched:
        raise DarkroomError(
            f"{lora.file.path} was made for another model: {len(unmatched)} of its {len(lora.changes)} layers are not "
            f"in this one ({some(unmatched)})"
        )
    return found


def delta(lora: LoraFile, change: Change, shape: tuple[int, ...], swapped: bool) -> Tensor:
    """alpha / r * up @ down for rows of this shape, float32. Shapes are compared before numbers are read."""
    shapes = {kind: lora.file.shapes[name] for kind, name in change.names.items()}
    _check_shapes(lora.file.path, change, shapes, shape)
    tensors = lora.file.read(change.names.values())
    down, up = (tensors[change.names[kind]].float() for kind in ("down", "up"))
    rank = shapes["down"][0]
    scale = change.scale
    if scale is None:
        scale = float(tensors[change.names["alpha"]].float().reshape(())) / rank
    if "mid" in change.names:  # LoCon's core: the filter between the two matrices
        mid = tensors[change.names["mid"]].float()
        product = torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1))
    else:
        product = up.flatten(1) @ down.flatten(1)
    product = product.reshape(shape) * scale
    if not bool(torch.isfinite(product).all()):
        raise DarkroomError(f"{lora.file.path} holds numbers for {change.layer} that are not finite")
    return torch.cat(product.chunk(2)[::-1]) if swapped else product


def _check_shapes(path: Path, change: Change, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    inner = mid[2:] if mid is not None else down[2:]
    made = (*up[:1], *down[1:2], *inner)
    fits = (
        len(down) >= 2
        and len(up) >= 2
        and down[0] == up[1] >= 1
        and all(size == 1 for size in up[2:])
        and (mid is None or (len(mid) == 4 and mid[:2] == (up[1], down[0]) and all(size == 1 for size in down[2:])))
        and made[:2] == wanted[:2]
        and [size for size in made[2:] if size != 1] == [size for size in wanted[2:] if size != 1]
    )
    if not fits:
        raise DarkroomError(
            f"{path} was made for another model: {change.layer} has the shape {list(wanted)} here, and the file "
            f"changes it by {list(up)} times {list(down)}"
        )
    if "alpha" in shapes and torch.Size(shapes["alpha"]).numel() != 1:
        raise DarkroomError(
            f"{path} has an alpha of shape {list(shapes['alpha'])} for {change.layer}; one number is needed"
        )
