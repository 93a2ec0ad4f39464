"""Text towers <-> the models of the transformers library that stand in diffusers folders: names and configs, both ways.

    ours          theirs
    clip          CLIPTextModel, CLIPTextModelWithProjection: the same names
    open_clip     the same classes: queries, keys and values apart, the projection transposed
    t5            T5EncoderModel: the same names
    text          LDMBertModel of the diffusers library, the tower of the paper

Their pipelines of Stable Diffusion 1 and 2 read a tower's last state, so layers that ours leaves out at the end are not
part of their model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from darkroom.config import to_dict
from darkroom.errors import DarkroomError
from darkroom.interop.tensor_source import Place, Table, same
from darkroom.networks.clip import CLIPTextConfig, OpenCLIPTextConfig
from darkroom.networks.t5 import T5EncoderConfig
from darkroom.networks.text_towers import tower_config

BERT_CLASS = "LDMBertModel"
# ours: theirs, at the top of a tower and inside a layer.
OPEN_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
OPEN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BERT_TOP = {
    "token_emb.weight": "model.embed_tokens.weight",
    "pos_emb.emb.weight": "model.embed_positions.weight",
    "norm.weight": "model.layer_norm.weight",
    "norm.bias": "model.layer_norm.bias",
}
BERT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
QKV = ("q_proj", "k_proj", "v_proj")
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # the same tensor; files hold one of them or both

# ------------------------------------------------------------------------------------------------------ CLIP, OpenCLIP


def clip_config(config: CLIPTextConfig | OpenCLIPTextConfig, layers: int, projected: bool) -> dict[str, Any]:
    """config.json of transformers for a tower, of which the first `layers` are written."""
    if isinstance(config, OpenCLIPTextConfig):
        last = config.vocab_size - 1
        numbers: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": int(config.width * config.mlp_ratio),
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.context_length,
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim or config.width,
            "bos_token_id": last - 1,
            "eos_token_id": last,
            "pad_token_id": 0,
        }
    else:
        numbers = {key: value for key, value in to_dict(config).items() if key != "with_projection"}
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {"architectures": [name], "model_type": "clip_text_model", **numbers, "num_hidden_layers": layers}


def clip_table(config: CLIPTextConfig | OpenCLIPTextConfig, layers: int, projected: bool) -> Table:
    """Our names -> theirs, of the tensors that their model has."""
    rows = _open_rows(layers) if isinstance(config, OpenCLIPTextConfig) else _clip_rows(layers)
    table = dict(rows)
    if projected and isinstance(config, OpenCLIPTextConfig):
        table["text_projection"] = Place(("text_projection.weight",), "transposed")
    elif projected and config.with_projection:  # type: ignore[union-attr]
        table["text_projection.weight"] = same("text_projection.weight")
    return table


def _clip_rows(layers: int) -> Iterator[tuple[str, Place]]:
    for name in OPEN_TOP.values():
        yield name, same(name)
    for i in range(layers):
        for module in (*OPEN_LAYER.values(), *(f"self_attn.{part}" for part in QKV)):
            for kind in ("weight", "bias"):
                name = f"text_model.encoder.layers.{i}.{module}.{kind}"
                yield name, same(name)


def _open_rows(layers: int) -> Iterator[tuple[str, Place]]:
    for ours, theirs in OPEN_TOP.items():
        yield ours, same(theirs)
    for i in range(layers):
        ours, theirs = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for own, module in OPEN_LAYER.items():
                yield f"{ours}.{own}.{kind}", same(f"{theirs}.{module}.{kind}")
            parts = tuple(f"{theirs}.self_attn.{part}.{kind}" for part in QKV)
            yield f"{ours}.attn.in_proj_{kind}", Place(parts)


def read_clip(config: Mapping[str, Any], where: str, pad: int | None) -> CLIPTextConfig:
    """Our config of the same names for a config.json. pad: the tokenizer's, where there is one."""
    get = {**to_dict(CLIPTextConfig()), "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048}
    get |= {"num_attention_heads": 8, "projection_dim": 512}  # the library's own defaults, of ViT-B-32
    get |= {key: value for key, value in config.items() if key in get}
    last = get["vocab_size"] - 1
    if config.get("eos_token_id", 2) == 2 or last == CLIPTextConfig().eos_token_id:
        get |= {"bos_token_id": last - 1, "eos_token_id": last}  # old files state wrong ones
    said = config.get("pad_token_id", 1)
    get["pad_token_id"] = pad if pad is not None else last if said == 1 else said
    get["with_projection"] = "WithProjection" in "".join(config.get("architectures") or ())
    result = CLIPTextConfig(**get)
    if any(value is None for value in to_dict(result).values()):
        raise DarkroomError(f"{where} leaves out what a text tower needs; give a complete config.json")
    return result


def as_open_clip(config: CLIPTextConfig, where: str) -> OpenCLIPTextConfig:
    """The same tower under OpenCLIP's names."""
    if config.hidden_act not in ("gelu", "quick_gelu"):
        raise DarkroomError(f'{where}: "hidden_act" {config.hidden_act!r} has no equivalent here')
    return OpenCLIPTextConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        context_length=config.max_position_embeddings,
        embed_dim=config.projection_dim,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        quick_gelu=config.hidden_act == "quick_gelu",
    )


def changed_options(config: Any, family: str, model: str) -> dict[str, Any]:
    """The options of a tower's network that differ from a named size."""
    usual = to_dict(tower_config(family, model, {}))
    return {key: value for key, value in to_dict(config).items() if usual[key] != value}


# ---------------------------------------------------------------------------------------------------------------- T5


def t5_config(config: T5EncoderConfig) -> dict[str, Any]:
    numbers = to_dict(config)
    gated = config.feed_forward_proj == "gated-gelu"
    act = {"dense_act_fn": "gelu_new" if gated else config.feed_forward_proj, "is_gated_act": gated}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0, "is_encoder_decoder": True}
    more = {"num_decoder_layers": config.num_layers, "tie_word_embeddings": False, "use_cache": False}
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", **numbers, **act, **ends, **more}


def read_t5(config: Mapping[str, Any]) -> T5EncoderConfig:
    defaults = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
                "feed_forward_proj": "relu"}  # fmt: skip
    get = {**to_dict(T5EncoderConfig()), **defaults}
    return T5EncoderConfig(**(get | {key: value for key, value in config.items() if key in get}))


def t5_table(config: T5EncoderConfig) -> Table:
    """Our names are theirs."""
    wi = ("wi_0", "wi_1") if config.feed_forward_proj.startswith("gated-") else ("wi",)
    names = [T5_TABLES[0], "encoder.final_layer_norm.weight"]
    for i in range(config.num_layers):
        block = f"encoder.block.{i}.layer"
        names += [f"{block}.0.SelfAttention.{part}.weight" for part in "qkvo"]
        names += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] * (i == 0)
        names += [f"{block}.1.DenseReluDense.{part}.weight" for part in (*wi, "wo")]
        names += [f"{block}.{j}.layer_norm.weight" for j in (0, 1)]
    return {name: same(name) for name in names}


# ------------------------------------------------------------------------------------------------ the paper's tower


def bert_config(encoder: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """config.json of LDMBertModel for our text encoder's complete config."""
    width = encoder["width"]
    return {
        "architectures": [BERT_CLASS],
        "model_type": "ldmbert",
        "vocab_size": vocabulary,
        "max_position_embeddings": encoder["length"],
        "d_model": width,
        "encoder_layers": encoder["depth"],
        "encoder_ffn_dim": 4 * width,
        "encoder_attention_heads": encoder["heads"],
        "head_dim": encoder["head_width"],
        "activation_function": "gelu",
        "dropout": encoder.get("dropout", 0.0),
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 0,
    }


def read_bert(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Entries of our text encoder's config."""
    width = config.get("d_model", 1280)
    for key, wanted in (("encoder_ffn_dim", 4 * width), ("activation_function", "gelu"), ("scale_embedding", False)):
        if config.get(key, wanted) != wanted:
            raise DarkroomError(f'{where}: "{key}" is {config[key]!r}; only {wanted!r} has an equivalent here')
    return {
        "kind": "text",
        "width": width,
        "depth": config.get("encoder_layers", 32),
        "heads": config.get("encoder_attention_heads", 8),
        "head_width": config.get("head_dim", 64),
        "length": config.get("max_position_embeddings", 77),
        "vocabulary": "bert",
        "vocabulary_size": config.get("vocab_size", 30522),
        "use_mask": False,
        "logits_head": True,
    }


def bert_table(depth: int, logits: bool) -> Table:
    start = "transformer."
    table = {start + ours: same(theirs) for ours, theirs in BERT_TOP.items()}
    for i in range(depth):
        attention, feed_forward = (f"{start}attn_layers.layers.{2 * i + j}" for j in (0, 1))
        theirs = f"model.layers.{i}"
        modules = {f"{attention}.0": "self_attn_layer_norm", f"{feed_forward}.0": "final_layer_norm",
                   f"{feed_forward}.1.net.0.0": "fc1", f"{feed_forward}.1.net.2": "fc2"}  # fmt: skip
        modules |= {f"{attention}.1.{ours}": f"self_attn.{name}" for ours, name in BERT_ATTENTION.items()}
        for ours, name in modules.items():
            kinds = ("weight",) if name.endswith(QKV) else ("weight", "bias")
            table |= {f"{ours}.{kind}": same(f"{theirs}.{name}.{kind}") for kind in kinds}
    if logits:
        table |= {f"{start}to_logits.{kind}": same(f"to_logits.{kind}") for kind in ("weight", "bias")}
    return table
