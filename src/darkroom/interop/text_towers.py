"""Published text towers in other people's files: found by the names of their tensors, translated, read strictly.

Read are folders of the transformers library, whole pipelines of the diffusers library, single weight files, and
checkpoints of SD 1, SD 2, SDXL and SD 3, whose text towers have names like

    cond_stage_model.transformer.text_model...          SD 1     names of transformers
    cond_stage_model.model.transformer.resblocks...     SD 2     names of OpenCLIP
    conditioner.embedders.{0.transformer, 1.model}...   SDXL     CLIP-L and bigG
    text_encoders.{clip_l, clip_g, t5xxl}.transformer   SD 3

behind which the names are those of `networks/clip.py` and `networks/t5.py`. A tower is recognised by one name that each
family has (`MARKS`), and chosen by its width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.text_towers import TextTower, TextTowers
from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.interop.tensor_file import TensorFile, is_weight_file, open_tensor_file
from darkroom.safe_files import file_inside, read_json

# By family: the table of its tokens, a second name that stands beside it under the same prefix, and a level of names
# that this spelling leaves out.
MARKS = (
    ("clip", "text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight", ""),
    ("clip", "embeddings.token_embedding.weight", "final_layer_norm.weight", "text_model."),  # newer transformers
    ("open_clip", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight", ""),
    ("t5", "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", ""),
    ("t5", "encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", ""),
)
# Tensors that stand beside a text tower in its files and are no part of it: buffers, other halves of the whole.
BESIDE = re.compile(
    r"text_model\.embeddings\.position_ids|attn_mask|logit_bias|visual_projection\.weight|lm_head\.weight"
    r"|(text_model\.)?(visual|vision_model|decoder)\..*|text_model\.(logit_scale|visual_projection\.weight)"
)
PIPELINE_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "open_clip_model.safetensors")
FAMILY_NAMES = {"clip": "CLIP", "open_clip": "OpenCLIP", "t5": "T5"}


# ------------------------------------------------------------------------------------------------------------ names

# OpenCLIP's block and layer names, and those of transformers.
_BLOCKS = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_TOP = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
)
_QKV = ("q_proj", "k_proj", "v_proj")


def clip_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names -> those of transformers: q, k, v apart, the projection transposed, no temperature."""
    names, result = dict(_TOP), {}
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", name)
        if name in names:
            result[names[name]] = tensor
        elif name == "text_projection":
            result["text_projection.weight"] = tensor.t()
        elif block is not None:
            place, part, kind = f"text_model.encoder.layers.{block[1]}.", block[2].rstrip("._"), block[3]
            if part == "attn.in_proj":
                for q, third in zip(_QKV, tensor.chunk(3), strict=True):
                    result[f"{place}self_attn.{q}.{kind}"] = third
            else:
                result[f"{place}{dict(_BLOCKS)[part]}.{kind}"] = tensor
    return result


def open_clip_from_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_from_open_clip`."""
    names, blocks = {theirs: ours for ours, theirs in _TOP}, {theirs: ours for ours, theirs in _BLOCKS}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in names:
            result[names[name]] = tensor
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.t()
        elif block is not None:
            place, part, kind = f"transformer.resblocks.{block[1]}.", block[2], block[3]
            if part in blocks:
                result[f"{place}{blocks[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                thirds = [state[name.replace("q_proj", q)] for q in _QKV]
                result[f"{place}attn.in_proj_{kind}"] = torch.cat(thirds)
    return result


# ---------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class FoundTower:
    """A text tower in files, not read yet.

    names:  those of its family -> the file's
    files:  by the file's name of a tensor
    config: that of the transformers library, where there is one
    """

    place: Path
    family: str
    width: int
    layers: int
    names: dict[str, str]
    files: dict[str, TensorFile]
    config: dict[str, Any]

    @property
    def what(self) -> str:
        return f"{FAMILY_NAMES[self.family]}, {self.width} wide, {self.layers} layers"

    def read(self) -> dict[str, Tensor]:
        """The family's names; the file's dtypes."""
        return {ours: self.files[theirs].read([theirs])[theirs] for ours, theirs in self.names.items()}


def find_towers(path: str | Path) -> list[FoundTower]:
    """Every text tower in a weight file, a folder of the transformers library, or a pipeline's folder."""
    place = Path(path).expanduser()
    with understanding(place, "text towers"):
        return _towers_at(place)


def _towers_at(place: Path) -> list[FoundTower]:
    if place.is_dir():
        folders = [place, *(place / name for name in PIPELINE_FOLDERS if (place / name).is_dir())]
        return [tower for folder in folders for tower in _in_files(folder, _weight_files(folder))]
    if not place.is_file():
        raise DarkroomError(f"{place} is not there; give a folder or a weight file with text towers")
    if not is_weight_file(place):
        raise DarkroomError(f"{place} is not a weight file; give a folder or a weight file with text towers")
    return _in_files(place, [place])


def _weight_files(folder: Path) -> list[Path]:
    """The weights in a folder: one file, or the parts that an index names."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index, "index of weights").get("weight_map", {})
            return [file_inside(folder, part, index) for part in sorted(set(parts.values()))]
    return []


def _in_files(place: Path, paths: Iterable[Path]) -> list[FoundTower]:
    files: dict[str, TensorFile] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        file = open_tensor_file(path)
        files |= dict.fromkeys(file.shapes, file)
        shapes |= file.shapes
    settings = place / "config.json"
    config = read_json(settings, "config") if place.is_dir() and settings.is_file() else {}
    config = config.get("text_config") or config
    found: dict[str, FoundTower] = {}
    for family, mark, proof, level in MARKS:
        for name in shapes:
            prefix = name.removesuffix(mark)
            if prefix == name or (prefix and prefix[-1] != ".") or f"{prefix}{proof}" not in shapes:
                continue
            if level and prefix.endswith(level):
                continue  # found under its full name
            names = {_with_level(n.removeprefix(prefix), level): n for n in shapes if n.startswith(prefix)}
            names = {ours: n for ours, n in names.items() if not BESIDE.fullmatch(ours)}
            depth = 1 + max((int(m[1]) for n in names if (m := _LAYER.search(n))), default=-1)
            tower = FoundTower(place, family, shapes[name][1], depth, names, files, config)
            found.setdefault(prefix, tower)
    return list(found.values())


_LAYER = re.compile(r"(?:layers|resblocks|block)\.(\d+)\.")


def _with_level(name: str, level: str) -> str:
    """The projection stands outside of it."""
    return name if name.startswith("text_projection.") else level + name


# ---------------------------------------------------------------------------------------------------------- reading


def choose(tower: TextTower, name: str, found: list[FoundTower], path: str | Path) -> FoundTower:
    """The tower in a file that is the one wanted: of its vocabulary and width."""
    is_t5 = tower.use.family == "t5"
    fits = [f for f in found if (f.family == "t5") == is_t5 and f.width == tower.width]
    if not fits:
        holds = "; ".join(f.what for f in found) or "no text tower"
        wanted = f"{FAMILY_NAMES[tower.use.family]}, {tower.width} wide"
        raise DarkroomError(f"{path} holds {holds}, but {name} is {wanted}: give its weights, or another `model`")
    return next((f for f in fits if f.family == tower.use.family), fits[0])


@torch.no_grad()
def load_tower(tower: TextTower, found: FoundTower, name: str = "the tower") -> None:
    """Fill a tower. Every tensor of the file must have its place, and every parameter that takes part its tensor."""
    _check_facts(tower, found, name)
    state = found.read()
    if tower.use.family != found.family:
        state = clip_from_open_clip(state) if tower.use.family == "clip" else open_clip_from_clip(state)
    network: nn.Module = tower.network
    own = network.state_dict()
    if found.family == "t5" and "encoder.embed_tokens.weight" in state:
        state.setdefault("shared.weight", state["encoder.embed_tokens.weight"])
        del state["encoder.embed_tokens.weight"]
    for extra in ("text_projection.weight", "logit_scale"):  # not held by a tower that has no use for it
        if extra not in own:
            state.pop(extra, None)
    idle = {id(p) for p in network.unused(**tower.options)}  # type: ignore[operator]
    needed = {n for n, p in network.named_parameters() if id(p) not in idle}
    missing, unknown = sorted(needed - set(state)), sorted(set(state) - set(own))
    wrong = [n for n in own if n in state and state[n].shape != own[n].shape]
    if missing or unknown or wrong:
        problem = (
            f"has no {missing[0]}"
            if missing
            else f"holds {unknown[0]}, which has no place"
            if unknown
            else f"has {wrong[0]} of shape {list(state[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}"
        )
        raise DarkroomError(
            f"{found.place} ({found.what}) does not fit {name}: it {problem}; set `model` or `network` to its sizes"
        )
    for key, tensor in state.items():
        own[key].copy_(tensor)


def _check_facts(tower: TextTower, found: FoundTower, name: str) -> None:
    """What no tensor shows, where the file comes with a config: activation, heads, the end token."""
    config: Any = tower.network.config
    for key in ("hidden_act", "num_attention_heads", "num_heads", "feed_forward_proj", "layer_norm_eps"):
        stated, ours = found.config.get(key), getattr(config, key, None)
        if stated is not None and ours is not None and stated != ours:
            raise DarkroomError(
                f"{found.place}: its config says {key} {stated!r}, but {name} has {ours!r}; set network.{key}"
            )


def find_weights(conditioner: Conditioner) -> list[tuple[str, TextTower, FoundTower]]:
    """Where the published weights of a conditioner's text towers are: (name for people, tower, file). Nothing is read
    but names and shapes, so that what is missing is found before long work.

    A tower that training does not change must have weights; one that it changes may begin from nothing.
    """
    result = []
    for label, encoder in conditioner.encoders.items():
        if not isinstance(encoder, TextTowers):
            continue
        for name, tower in encoder.towers.items():
            assert isinstance(tower, TextTower)
            path = tower.config.weights or getattr(encoder.config, "weights", None)
            what = f'"conditioner.{label}"' if len(encoder.towers) == 1 else f'"conditioner.{label}.{name}"'
            if path is not None:
                result.append((what, tower, choose(tower, what, find_towers(path), path)))
            elif not encoder.config.trainable:
                raise DarkroomError(
                    f"{what} keeps its published weights, but no file is named: set `weights`, or trainable: true"
                )
    return result


def fill(conditioner: Conditioner) -> list[str]:
    """Read those weights; says what was read."""
    found = find_weights(conditioner)
    for what, tower, file in found:
        load_tower(tower, file, what)
    return [f"{what}: {file.what} from {file.place}" for what, _, file in found]
