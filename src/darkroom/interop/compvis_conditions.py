"""Conditions of official files: which tensors are whose, and the encoder's configuration out of their shapes.

The official names stand behind a prefix, ours behind another; nothing else differs, so `Whose` rows are the whole map.
torch is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.errors import DarkroomError

Shapes = Mapping[str, tuple[int, ...]]

# What shows a kind of condition: the start of one of its names, the more special first.
MARKS = (
    ("sdxl", "conditioner.embedders.1.model.token_embedding."),
    ("sd3", "text_encoders."),
    ("open_clip", "cond_stage_model.model.token_embedding."),
    ("clip", "cond_stage_model.transformer.text_model.embeddings.token_embedding."),
    ("clip", "cond_stage_model.transformer.embeddings.token_embedding."),
    ("transformer", "cond_stage_model.transformer.token_emb."),
    ("class", "cond_stage_model.embedding."),
    ("map", "cond_stage_model.channel_mapper."),
    ("first_stage", "cond_stage_model.encoder."),
)
BOX_TOKENS, BOX_PLACES = 8192, 3  # of the paper's layouts: the vocabulary, and the tokens of a box
CLIP_HEAD_WIDTH = 64
# Settings of the text towers' networks that a file may change, with the size that they are compared with.
CLIP_SIZES = {"clip": ("ViT-L-14", 768), "clip_g": ("ViT-bigG-14", 1280)}


@dataclass(frozen=True)
class Whose:
    """Names that begin with `theirs` are ours of the conditioner, which begin with `ours`."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Conditions:
    """What the conditioner of a file is: encoder configs by name, and where their tensors stand."""

    encoders: dict[str, dict[str, Any]]
    whose: tuple[Whose, ...]


def conditions_kind(shapes: Shapes) -> str | None:
    """See `Look.conditions` in `families.py`."""
    kind = next((kind for kind, start in MARKS if any(name.startswith(start) for name in shapes)), None)
    if kind != "transformer":
        return kind
    rows = shapes.get("cond_stage_model.transformer.token_emb.weight", (0,))[0]
    return "boxes" if rows == BOX_TOKENS else "text"


def find_conditions(shapes: Shapes, kind: str | None, family: str) -> Conditions:
    """The conditioner of a family's file."""
    own = _OF_KIND[kind](shapes) if kind in _OF_KIND else Conditions({}, ())
    return Conditions(_BESIDE_FIRST.get(family, {}) | own.encoders | _BESIDE.get(family, {}), own.whose)


def standard_places(encoders: Mapping[str, Mapping[str, Any]]) -> tuple[Whose, ...]:
    """Where the official code has the tensors of these encoders, by their configs."""
    rows: list[Whose] = []
    for name, config in encoders.items():
        for theirs, ours in PLACES.get(str(config.get("kind")), ()):
            rows.append(Whose(theirs, f"encoders.{name}.{ours}"))
    return tuple(rows)


_TOWER = "towers.tower.network."
# By kind of our encoder: the start of the official names, and of ours inside the encoder.
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "class": (("cond_stage_model.", ""),),
    "text": (("cond_stage_model.", "tower."),),
    "boxes": (("cond_stage_model.", "tower."),),
    "segmentation": (("cond_stage_model.", "rescaler."),),
    "clip": (("cond_stage_model.transformer.", _TOWER),),
    "open_clip": (("cond_stage_model.model.", _TOWER),),
    "sdxl_text": (
        ("conditioner.embedders.0.transformer.", "towers.clip_l.network."),
        ("conditioner.embedders.1.model.", "towers.clip_g.network."),
    ),
    "sd3_text": tuple(
        (f"text_encoders.{theirs}.transformer.", f"towers.{ours}.network.")
        for theirs, ours in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5xxl", "t5"))
    ),
}

# Encoders without tensors, which the family has before or behind the others.
_BESIDE_FIRST: dict[str, dict[str, dict[str, Any]]] = {
    "dit": {"class": {"kind": "class", "slot": "label", "drop_rate": 0.1}},
}
_MASK = {"mask": {"kind": "masked_image"}}
_BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "sd-v1-inpainting": _MASK,
    "sd-v2-inpainting": _MASK,
    "sd-v2-depth": {"depth": {"kind": "depth"}},
    "sd-v2-x4-upscaler": {"low_resolution": {"kind": "low_resolution", "factor": 4, "noise_levels": 350}},
    "sdxl-base": {"sizes": {"kind": "sizes", "size": [1024, 1024]}},
    "bsr_sr": {"low_resolution": {"kind": "low_resolution", "factor": 4}},
    "inpainting_big": {
        "mask": {"kind": "masked_image", "mask_first": False, "normalised": False, "fill": -1.0,
                 "mask_range": [-1.0, 1.0]},
    },
}  # fmt: skip


def _rows(shapes: Shapes, name: str, axis: int = 0) -> int:
    shape = shapes.get(name)
    if shape is None or len(shape) <= axis:
        raise DarkroomError(f"the condition's tensor {name!r} is missing or has the shape {shape}")
    return shape[axis]


def _count(shapes: Shapes, start: str) -> int:
    """How many numbered layers follow `start`."""
    numbers = {name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)}
    return sum(number.isdigit() for number in numbers)


def _names(count: int) -> list[str]:
    """Files hold no names of classes; numbers stand for them."""
    return [str(number) for number in range(count)]


# -------------------------------------------------------------------------------------------------------------- kinds


def _standard(name: str, config: dict[str, Any]) -> Conditions:
    return Conditions({name: config}, standard_places({name: config}))


def _class(shapes: Shapes) -> Conditions:
    """1000 classes, or, where the model was trained for guidance, one more that stands for none."""
    rows, width = (_rows(shapes, "cond_stage_model.embedding.weight", axis) for axis in (0, 1))
    null = rows != 1000
    config = {"kind": "class", "classes": _names(rows - null), "width": width, "null_class": null,
              "drop_rate": 0.1 if null else 0.0}  # fmt: skip
    return _standard("class", config)


def _transformer(shapes: Shapes) -> dict[str, Any]:
    start = "cond_stage_model.transformer."
    heads = 8  # always, whatever the width; see the official BERTEmbedder
    inner = _rows(shapes, f"{start}attn_layers.layers.0.1.to_q.weight")
    return {
        "width": _rows(shapes, f"{start}token_emb.weight", 1),
        "depth": _count(shapes, f"{start}attn_layers.layers.") // 2,
        "heads": heads,
        "head_width": inner // heads,
        "use_mask": False,
    }


def _text(shapes: Shapes) -> Conditions:
    start = "cond_stage_model.transformer."
    config = {
        "kind": "text",
        **_transformer(shapes),
        "length": _rows(shapes, f"{start}pos_emb.emb.weight"),
        "vocabulary": "bert",
        "vocabulary_size": _rows(shapes, f"{start}token_emb.weight"),
        "logits_head": f"{start}to_logits.weight" in shapes,
    }
    return _standard("text", config)


def _boxes(shapes: Shapes) -> Conditions:
    places = _rows(shapes, "cond_stage_model.transformer.pos_emb.emb.weight")
    crop = places % BOX_PLACES == 2
    config = {
        "kind": "boxes",
        **_transformer(shapes),
        "classes": _names(OPEN_IMAGES_CLASSES),
        "max_objects": places // BOX_PLACES,
        "tokens": BOX_TOKENS,
        "crop": crop,
        "drop_rate": 0.0,
    }
    return _standard("boxes", config)


# Classes of the official configuration; the file's vocabulary is larger, and no shape tells them.
OPEN_IMAGES_CLASSES = 601


def _map(shapes: Shapes) -> Conditions:
    name = "cond_stage_model.channel_mapper."
    channels, labels = (_rows(shapes, f"{name}weight", axis) for axis in (0, 1))
    config = {"kind": "segmentation", "classes": _names(labels), "channels": channels, "bias": f"{name}bias" in shapes,
              "drop_rate": 0.0}  # fmt: skip
    return _standard("map", config)


# -------------------------------------------------------------------------------------------------------- text towers


def _clip(shapes: Shapes) -> Conditions:
    """Newer releases of transformers leave one level of names out."""
    start = "cond_stage_model.transformer."
    level = "text_model." if any(name.startswith(f"{start}text_model.") for name in shapes) else ""
    config = {"kind": "clip", "network": clip_network(shapes, start, level)}
    if level:
        return _standard("text", config)
    return Conditions({"text": config}, (Whose(start, f"encoders.text.{_TOWER}text_model."),))


def _open_clip(shapes: Shapes) -> Conditions:
    start = "cond_stage_model.model."
    config = {"kind": "open_clip", "network": open_clip_network(shapes, start, "ViT-H-14")}
    return _standard("text", config)


def _sdxl(shapes: Shapes) -> Conditions:
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    config = {
        "kind": "sdxl_text",
        "clip_l": {"network": clip_network(shapes, first)},
        "clip_g": {"network": open_clip_network(shapes, second, "ViT-bigG-14")},
    }
    return _standard("text", config)


def _sd3(shapes: Shapes) -> Conditions:
    """The towers that the file holds. Without T5 zeros take its place, which the model was trained for."""
    present = [
        tower for tower in ("clip_l", "clip_g", "t5xxl") if any(n.startswith(f"text_encoders.{tower}.") for n in shapes)
    ]
    if "clip_l" not in present or "clip_g" not in present:
        raise DarkroomError(
            f"the file holds the text tower {', '.join(present)} alone; clip_l and clip_g are needed, or none of them"
        )
    starts = {tower: f"text_encoders.{tower}.transformer." for tower in present}
    config: dict[str, Any] = {
        "kind": "sd3_text",
        "clip_l": {"network": clip_network(shapes, starts["clip_l"])},
        "clip_g": {"network": clip_network(shapes, starts["clip_g"], model="ViT-bigG-14")},
        "t5": {"network": t5_network(shapes, starts["t5xxl"])} if "t5xxl" in starts else None,
    }
    return _standard("text", config)


def _changed(options: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Only what differs from the named size."""
    return {key: value for key, value in options.items() if usual.get(key) != value}


_CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12, "max_position_embeddings": 77}  # fmt: skip
_CLIP_G = {"vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
           "num_attention_heads": 20, "max_position_embeddings": 77}  # fmt: skip
_OPEN_H = {"vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24, "mlp_ratio": 4.0, "context_length": 77,
           "embed_dim": 1024}  # fmt: skip
_OPEN_G = _OPEN_H | {"width": 1280, "heads": 20, "layers": 32, "embed_dim": 1280}
_T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def clip_network(shapes: Shapes, start: str, level: str = "text_model.", model: str = "ViT-L-14") -> dict[str, Any]:
    """Options of `CLIPTextConfig` that differ from the named size."""
    read = start + level
    tokens = f"{read}embeddings.token_embedding.weight"
    width, vocabulary = _rows(shapes, tokens, 1), _rows(shapes, tokens)
    options: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _rows(shapes, f"{read}encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": _count(shapes, f"{read}encoder.layers."),
        "num_attention_heads": max(1, width // CLIP_HEAD_WIDTH),
        "max_position_embeddings": _rows(shapes, f"{read}embeddings.position_embedding.weight"),
    }
    if (projection := f"{start}text_projection.weight") in shapes:
        options["with_projection"] = True
        if (wide := _rows(shapes, projection)) != (768 if model == "ViT-L-14" else 1280):
            options["projection_dim"] = wide
    if vocabulary != _CLIP_L["vocab_size"]:  # the two last tokens begin and end a text
        options |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return _changed(options, _CLIP_L if model == "ViT-L-14" else _CLIP_G)


def open_clip_network(shapes: Shapes, start: str, model: str) -> dict[str, Any]:
    """Options of `OpenCLIPTextConfig` that differ from the named size."""
    width = _rows(shapes, f"{start}token_embedding.weight", 1)
    options = {
        "vocab_size": _rows(shapes, f"{start}token_embedding.weight"),
        "width": width,
        "heads": max(1, width // CLIP_HEAD_WIDTH),
        "layers": _count(shapes, f"{start}transformer.resblocks."),
        "mlp_ratio": _rows(shapes, f"{start}transformer.resblocks.0.mlp.c_fc.weight") / width,
        "context_length": _rows(shapes, f"{start}positional_embedding"),
        "embed_dim": _rows(shapes, f"{start}text_projection", 1),
    }
    return _changed(options, _OPEN_G if model == "ViT-bigG-14" else _OPEN_H)


def t5_network(shapes: Shapes, start: str) -> dict[str, Any]:
    """Options of `T5EncoderConfig` that differ from XXL."""
    block = f"{start}encoder.block.0.layer."
    heads = _rows(shapes, f"{block}0.SelfAttention.relative_attention_bias.weight", 1)
    options = {
        "vocab_size": _rows(shapes, f"{start}shared.weight"),
        "d_model": _rows(shapes, f"{start}shared.weight", 1),
        "d_kv": _rows(shapes, f"{block}0.SelfAttention.q.weight") // heads,
        "d_ff": _rows(shapes, f"{block}1.DenseReluDense.wo.weight", 1),
        "num_layers": _count(shapes, f"{start}encoder.block."),
        "num_heads": heads,
    }
    return _changed(options, _T5_XXL)


_OF_KIND = {
    "class": _class,
    "text": _text,
    "boxes": _boxes,
    "map": _map,
    "clip": _clip,
    "open_clip": _open_clip,
    "sdxl": _sdxl,
    "sd3": _sd3,
}
