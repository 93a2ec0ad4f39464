"""Our DiT and MMDiT <-> diffusers' `DiTTransformer2DModel` and `SD3Transformer2DModel`: weights and configs, both ways.

Both store the same numbers. diffusers keeps queries, keys and values apart, turns the two halves of two modulations
round, and repeats DiT's embeddings of time and class in every block; all of it is undone exactly, so that a round trip
is exact to the last bit. What one side has and the other has not is refused by name, never dropped.

One difference remains that no weights can mend: diffusers' DiT computes the frequencies of its time features as
10000^(-i/127), the official code and ours as 10000^(-i/128).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.interop.tensor_source import Place, Table
from darkroom.networks.dit import DiTConfig
from darkroom.networks.mmdit import MMDiTConfig

# (our tensor, their tensors): one of theirs is the same tensor, three are its thirds along the rows, and a name that
# begins with SWAPPED has both halves of the rows the other way round. REPEATED: all of them are the same tensor.
Row = tuple[str, tuple[str, ...]]
SWAPPED, REPEATED = "swapped ", "repeated "

DIT_CLASS = "DiTTransformer2DModel"
SD3_CLASS = "SD3Transformer2DModel"

# Entries of a diffusers config that we have no option for, with the value under which both are the same network.
DIT_NEUTRAL: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
# Read by nothing, or (norm_eps) 1e-6 in the official code and 1e-5 in diffusers' files for the same weights.
DIT_UNREAD = ("norm_num_groups", "upcast_attention", "norm_eps")
DIT_TRANSLATED: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
SD3_TRANSLATED: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
QK_NORMS = {None: None, "rms": "rms_norm", "ln": "layer_norm"}


# ------------------------------------------------------------------------------------------------------------- configs


def dit_to_diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The arguments of `DiTTransformer2DModel` for the same network; JSON-ready."""
    c = config
    _refuse(
        DIT_CLASS,
        (c.num_classes is None, "network without classes"),
        (c.adm_in_channels is not None, "vector input (adm_in_channels)"),
        (c.context_dim is not None, "context (context_dim)"),
        (c.qk_norm is not None, "qk_norm"),
        (c.mlp_ratio != 4, "mlp_ratio other than 4"),
        (c.position_fit != "stretch", "position_fit other than stretch"),
        (c.target_time, "target_time"),
    )
    assert c.num_classes is not None
    return {
        "_class_name": DIT_CLASS,
        **DIT_NEUTRAL,
        "norm_eps": 1e-6,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "num_layers": c.depth,
        "sample_size": c.input_size,
        "patch_size": c.patch_size,
        "num_embeds_ada_norm": c.num_classes - 1,  # they add the null class
    }


def dit_from_diffusers_config(config: Mapping[str, Any]) -> DiTConfig:
    """Our config for a diffusers one; entries that are left out have diffusers' defaults."""
    get = _read(config, DIT_CLASS, DIT_TRANSLATED, DIT_NEUTRAL, DIT_UNREAD)
    if get["num_embeds_ada_norm"] is None:
        raise DarkroomError('diffusers DiT: "num_embeds_ada_norm" is not set, which has no equivalent here')
    return DiTConfig(
        input_size=get["sample_size"],
        patch_size=get["patch_size"],
        in_channels=get["in_channels"],
        out_channels=get["in_channels"] if get["out_channels"] is None else get["out_channels"],
        hidden_size=get["num_attention_heads"] * get["attention_head_dim"],
        depth=get["num_layers"],
        num_heads=get["num_attention_heads"],
        num_classes=get["num_embeds_ada_norm"] + 1,
    )


def sd3_to_diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """The arguments of `SD3Transformer2DModel` for the same network; JSON-ready."""
    c = config
    base = c.pos_embed_max_size if c.pos_embed_base_size is None else c.pos_embed_base_size
    _refuse(
        SD3_CLASS,
        (c.context_dim is None, "network without a context"),
        (c.adm_in_channels is None, "network without a vector"),
        (c.num_classes is not None, "classes (num_classes)"),
        (not c.qkv_bias, "queries without a bias (qkv_bias)"),
        (c.mlp_ratio != 4, "mlp_ratio other than 4"),
        (c.position_fit != "crop", "position_fit other than crop"),
        (c.target_time, "target_time"),
    )
    return {
        "_class_name": SD3_CLASS,
        "sample_size": base * c.patch_size,
        "patch_size": c.patch_size,
        "in_channels": c.in_channels,
        "num_layers": c.depth,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "num_attention_heads": c.num_heads,
        "joint_attention_dim": c.context_dim,
        "caption_projection_dim": c.hidden_size,
        "pooled_projection_dim": c.adm_in_channels,
        "out_channels": c.out_channels,
        "pos_embed_max_size": c.pos_embed_max_size,
        "dual_attention_layers": list(c.x_block_self_attn_layers),
        "qk_norm": QK_NORMS[c.qk_norm],
    }


def sd3_from_diffusers_config(config: Mapping[str, Any]) -> MMDiTConfig:
    """Our config for a diffusers one; entries that are left out have diffusers' defaults."""
    get = _read(config, SD3_CLASS, SD3_TRANSLATED, {}, ())
    width = get["num_attention_heads"] * get["attention_head_dim"]
    if get["caption_projection_dim"] != width:
        raise DarkroomError(
            f'diffusers SD3: "caption_projection_dim" {get["caption_projection_dim"]} is not the width {width} of the '
            "tokens, which has no equivalent here"
        )
    norms = {theirs: ours for ours, theirs in QK_NORMS.items()}
    if get["qk_norm"] not in norms:
        raise DarkroomError(f'diffusers SD3: "qk_norm" {get["qk_norm"]!r} has no equivalent here')
    return MMDiTConfig(
        patch_size=get["patch_size"],
        in_channels=get["in_channels"],
        out_channels=get["in_channels"] if get["out_channels"] is None else get["out_channels"],
        depth=get["num_layers"],
        hidden_size=width,
        num_heads=get["num_attention_heads"],
        context_dim=get["joint_attention_dim"],
        adm_in_channels=get["pooled_projection_dim"],
        pos_embed_max_size=get["pos_embed_max_size"],
        pos_embed_base_size=get["sample_size"] // get["patch_size"],
        x_block_self_attn_layers=tuple(get["dual_attention_layers"]),
        qk_norm=norms[get["qk_norm"]],  # type: ignore[arg-type]
    )


def _refuse(name: str, *lacking: tuple[bool, str]) -> None:
    for is_lacking, what in lacking:
        if is_lacking:
            raise DarkroomError(f"{name} of diffusers has no {what}; this network cannot be exchanged with it")


def _read(
    config: Mapping[str, Any],
    name: str,
    translated: Mapping[str, Any],
    neutral: Mapping[str, Any],
    unread: tuple[str, ...],
) -> dict[str, Any]:
    """The translated entries with diffusers' defaults; unknown and untranslatable ones are refused."""
    if (found := config.get("_class_name", name)) != name:
        raise DarkroomError(f"this is the config of a diffusers {found}; a {name} can be read here")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {*translated, *neutral, *unread}
    for key, value in given.items():
        if key not in known:
            raise DarkroomError(f'diffusers {name}: unknown config entry "{key}"{nearest(key, known)}')
        if key in neutral and value != neutral[key]:
            raise DarkroomError(f'diffusers {name}: "{key}" is {value!r}; only {neutral[key]!r} has an equivalent here')
    return {key: given.get(key, default) for key, default in translated.items()}


# ------------------------------------------------------------------------------------------------------------- weights


def dit_table(config: DiTConfig) -> Table:
    """Our names -> where their tensors stand; without the table of positions, which they compute."""
    return {ours: _place(theirs) for ours, theirs in _dit_rows(config)}


def sd3_table(config: MMDiTConfig) -> Table:
    """Our names -> where their tensors stand."""
    return {ours: _place(theirs) for ours, theirs in _sd3_rows(config)}


def _place(theirs: tuple[str, ...]) -> Place:
    for mark, form in ((SWAPPED, "swapped"), (REPEATED, "repeated")):
        if theirs[0].startswith(mark):
            return Place(tuple(name.removeprefix(mark) for name in theirs), form)  # type: ignore[arg-type]
    return Place(theirs)


def _layer(ours: str, *theirs: str) -> Iterator[Row]:
    """Rows for weight and bias."""
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", tuple(f"{t}.{name}" for t in theirs)


def _qkv(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.to_q", f"{prefix}.to_k", f"{prefix}.to_v"


def _dit_rows(config: DiTConfig) -> Iterator[Row]:
    """(ours, theirs) per tensor; follows the constructor of `DiT`."""
    blocks = [f"transformer_blocks.{i}" for i in range(config.depth)]
    yield from _layer("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        embedders = (f"{REPEATED}{block}.norm1.emb.timestep_embedder.{theirs}" for block in blocks)
        yield from _layer(f"t_embedder.mlp.{ours}", *embedders)
    table = "embedding_table.weight"
    yield f"y_embedder.{table}", tuple(f"{REPEATED}{block}.norm1.emb.class_embedder.{table}" for block in blocks)
    for i, block in enumerate(blocks):
        yield from _layer(f"blocks.{i}.attn.qkv", *_qkv(f"{block}.attn1"))
        yield from _layer(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        yield from _layer(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        yield from _layer(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        yield from _layer(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
    yield from _layer("final_layer.adaLN_modulation.1", "proj_out_1")
    yield from _layer("final_layer.linear", "proj_out_2")


def _sd3_rows(config: MMDiTConfig) -> Iterator[Row]:
    """(ours, theirs) per tensor; follows the constructor of `MMDiT`."""
    yield "pos_embed", ("pos_embed.pos_embed",)
    yield from _layer("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        yield from _layer(f"{ours}.mlp.0", f"time_text_embed.{theirs}.linear_1")
        yield from _layer(f"{ours}.mlp.2", f"time_text_embed.{theirs}.linear_2")
    yield from _layer("context_embedder", "context_embedder")
    for i in range(config.depth):
        block, last = f"transformer_blocks.{i}", i == config.depth - 1
        text, image = f"joint_blocks.{i}.context_block", f"joint_blocks.{i}.x_block"
        yield from _layer(f"{image}.attn.qkv", *_qkv(f"{block}.attn"))
        yield from _layer(f"{image}.attn.proj", f"{block}.attn.to_out.0")
        yield from _layer(f"{text}.attn.qkv", *(f"{block}.attn.add_{part}_proj" for part in "qkv"))
        yield from _norms(config, f"{image}.attn", f"{block}.attn.norm_")
        yield from _norms(config, f"{text}.attn", f"{block}.attn.norm_added_")
        yield from _feed_forward(image, f"{block}.ff")
        yield from _layer(f"{image}.adaLN_modulation.1", f"{block}.norm1.linear")
        turned = SWAPPED if last else ""
        yield from _layer(f"{text}.adaLN_modulation.1", f"{turned}{block}.norm1_context.linear")
        if not last:
            yield from _layer(f"{text}.attn.proj", f"{block}.attn.to_add_out")
            yield from _feed_forward(text, f"{block}.ff_context")
        if i in config.x_block_self_attn_layers:
            yield from _layer(f"{image}.attn2.qkv", *_qkv(f"{block}.attn2"))
            yield from _layer(f"{image}.attn2.proj", f"{block}.attn2.to_out.0")
            yield from _norms(config, f"{image}.attn2", f"{block}.attn2.norm_")
    yield from _layer("final_layer.adaLN_modulation.1", f"{SWAPPED}norm_out.linear")
    yield from _layer("final_layer.linear", "proj_out")


def _feed_forward(ours: str, theirs: str) -> Iterator[Row]:
    yield from _layer(f"{ours}.mlp.fc1", f"{theirs}.net.0.proj")
    yield from _layer(f"{ours}.mlp.fc2", f"{theirs}.net.2")


def _norms(config: MMDiTConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Rows of the norms of queries and keys: a gain, in "ln" also a bias."""
    for part in "qk" if config.qk_norm is not None else "":
        for name in ("weight", "bias") if config.qk_norm == "ln" else ("weight",):
            yield f"{ours}.ln_{part}.{name}", (f"{theirs}{part}.{name}",)


def rows_of(config: DiTConfig | MMDiTConfig) -> list[Row]:
    """(ours, theirs) for every tensor of a transformer."""
    return list(_dit_rows(config) if isinstance(config, DiTConfig) else _sd3_rows(config))
