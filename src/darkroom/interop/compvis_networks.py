"""Networks of official files: their configuration out of the names and shapes of their tensors, without torch.

Ours have the official names, so nothing is renamed. What no shape tells (the number of heads, the rule by which head
widths follow) are facts of the family, `network` in `families.py`. Whatever is inferred here is compared strictly
afterwards: the network is built from the config, and must have exactly the names and shapes of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from darkroom.errors import DarkroomError

Shapes = Mapping[str, tuple[int, ...]]

# Heads of the published sizes of DiT by width; the network's own file lists the rest of each size.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
MMDIT_HEAD_WIDTH = 64


def network_kind(shapes: Shapes) -> str | None:
    """ "unet", "mmdit" or "dit" by one name that each has; names without prefix."""
    marks = {"unet": "input_blocks.0.0.weight", "mmdit": "joint_blocks.0.x_block.attn.qkv.weight",
             "dit": "blocks.0.attn.qkv.weight"}  # fmt: skip
    return next((kind for kind, name in marks.items() if name in shapes), None)


def infer_network(shapes: Shapes, facts: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The dict form of the network's config. `facts`: the family's; they win where shapes leave a choice. `where` and
    `prefix` (of the names in the file) are for messages."""
    kind = network_kind(shapes)
    read = _Reader(shapes, where, prefix)
    if kind == "mmdit":
        return {"kind": kind, **_mmdit(read), **facts}
    if kind == "dit":
        return {"kind": kind, **_dit(read), **facts}
    return {"kind": "unet", **_unet(read), **facts}


class _Reader:
    """Shapes, and what is missing as an error with its name."""

    def __init__(self, shapes: Shapes, where: str, prefix: str) -> None:
        self.shapes, self.where, self.prefix = shapes, where, prefix

    def __call__(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise DarkroomError(
                f"{self.where} lacks '{self.prefix}{name}': the file is incomplete or another kind of model"
            )
        if len(shape) <= axis or not shape[axis]:
            raise DarkroomError(
                f"{self.where}: '{self.prefix}{name}' has shape {shape}, which this kind of network has not"
            )
        return shape[axis]

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.shapes)

    def count(self, start: str) -> int:
        """How many numbered entries follow `start`."""
        found = {m[1] for name in self.shapes if (m := re.match(re.escape(start) + r"(\d{1,4})\.", name))}
        return max((int(number) + 1 for number in found), default=0)


# ---------------------------------------------------------------------------------------------------------------- U-Net


def _unet(read: _Reader) -> dict[str, Any]:
    width = read("input_blocks.0.0.weight", 0)
    residual = bool(_up_stages(read, "in_layers."))
    blocks = _blocks_from_output(read) if residual else _blocks_from_input(read)
    levels = len(blocks)
    starts = [1 + sum(blocks[:level]) + level for level in range(levels)]  # of each level among the input blocks
    widths = [read(f"input_blocks.{start}.0.out_layers.3.weight", 0) for start in starts]
    if any(channels % width for channels in widths):
        raise DarkroomError(f"{read.where}: widths {widths} are no multiples of {width}; this has no equivalent here")
    attended = [level for level in range(levels) if read.has(f"input_blocks.{starts[level]}.1.")]
    transformer = read.has("middle_block.1.transformer_blocks.")
    depths = [read.count(f"input_blocks.{s}.1.transformer_blocks.") or 1 for s in starts]
    if transformer:
        depths[-1] = read.count("middle_block.1.transformer_blocks.")
    rows = read("input_blocks.1.0.emb_layers.1.weight", 0)
    return {
        "in_channels": read("input_blocks.0.0.weight", 1),
        "out_channels": read("out.2.weight", 0),
        "model_channels": width,
        "channel_mult": [channels // width for channels in widths],
        "num_res_blocks": _one(blocks),
        "attention_resolutions": [2**level for level in attended],
        "use_spatial_transformer": transformer,
        "transformer_depth": _one([depths[level] for level in attended] + depths[-1:]) if _even(depths, attended)
        else depths,
        "context_dim": _context_dim(read) if transformer else None,
        "use_linear_in_transformer": len(read.shapes.get("middle_block.1.proj_in.weight", ())) == 2,
        "use_scale_shift_norm": rows == 2 * read("input_blocks.1.0.out_layers.3.weight", 0),
        "resblock_updown": residual,
        "conv_resample": residual or levels == 1 or bool(_up_stages(read, "conv.")),
        **_labels(read),
    }  # fmt: skip


def _one(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _even(depths: Sequence[int], attended: Sequence[int]) -> bool:
    return len({depths[level] for level in attended} | {depths[-1]}) == 1


def _up_stages(read: _Reader, layer: str) -> list[int]:
    """Output blocks that end in a doubling whose layer is named so."""
    pattern = re.compile(rf"output_blocks\.(\d{{1,4}})\.[12]\.{re.escape(layer)}")
    return sorted({int(found[1]) for name in read.shapes if (found := pattern.match(name))})


def _blocks_from_output(read: _Reader) -> list[int]:
    """Residual blocks per level. Where halvings are residual blocks too, only the output half shows them."""
    ends = [*_up_stages(read, "in_layers."), read.count("output_blocks.") - 1]
    lengths = [end - start for start, end in zip([-1, *ends], ends, strict=False)]
    return [length - 1 for length in reversed(lengths)]


def _blocks_from_input(read: _Reader) -> list[int]:
    """A halving is a single convolution, or, without weights, a number that is left out."""
    blocks = [0]
    for index in range(1, read.count("input_blocks.")):
        if f"input_blocks.{index}.0.in_layers.2.weight" in read.shapes:
            blocks[-1] += 1
        else:
            blocks.append(0)
    return blocks


def _context_dim(read: _Reader) -> int | None:
    """The width that all second attentions read; None where each reads its own input."""
    found = re.compile(r"(.+\.transformer_blocks\.\d+\.attn2\.)to_k\.weight")
    starts = [m[1] for name in read.shapes if (m := found.fullmatch(name))]
    read_widths = {read(f"{start}to_k.weight", 1) for start in starts}
    own = {read(f"{start}to_q.weight", 1) for start in starts}
    return next(iter(read_widths)) if len(read_widths) == 1 and (own != read_widths or len(own) == 1) else None


def _labels(read: _Reader) -> dict[str, Any]:
    if "label_emb.0.0.weight" in read.shapes:
        return {"num_classes": "sequential", "adm_in_channels": read("label_emb.0.0.weight", 1)}
    if "label_emb.bias" in read.shapes:
        return {"num_classes": "continuous"}
    return {"num_classes": read("label_emb.weight", 0)} if "label_emb.weight" in read.shapes else {}


# --------------------------------------------------------------------------------------------------------- transformers


def _mmdit(read: _Reader) -> dict[str, Any]:
    hidden, channels, patch = (read("x_embedder.proj.weight", axis) for axis in (0, 1, 2))
    depth = read.count("joint_blocks.")
    side = math.isqrt(read("pos_embed", 1))
    attention = "joint_blocks.0.x_block.attn."
    norm = f"{attention}ln_q.weight" in read.shapes
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": read("final_layer.linear.weight", 0) // patch**2,
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": hidden // (read(f"{attention}ln_q.weight", 0) if norm else MMDIT_HEAD_WIDTH),
        "mlp_ratio": read("joint_blocks.0.x_block.mlp.fc1.weight", 0) / hidden,
        "qkv_bias": f"{attention}qkv.bias" in read.shapes,
        "qk_norm": ("ln" if f"{attention}ln_q.bias" in read.shapes else "rms") if norm else None,
        "x_block_self_attn_layers": [i for i in range(depth) if read.has(f"joint_blocks.{i}.x_block.attn2.")],
        "context_dim": read("context_embedder.weight", 1),
        "adm_in_channels": read("y_embedder.mlp.0.weight", 1),
        "pos_embed_max_size": side,
    }


def _dit(read: _Reader) -> dict[str, Any]:
    hidden, channels, patch = (read("x_embedder.proj.weight", axis) for axis in (0, 1, 2))
    return {
        "input_size": patch * math.isqrt(read("pos_embed", 1)),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": read("final_layer.linear.weight", 0) // patch**2,
        "hidden_size": hidden,
        "depth": read.count("blocks."),
        "num_heads": DIT_HEADS.get(hidden, hidden // 64),
        "mlp_ratio": read("blocks.0.mlp.fc1.weight", 0) / hidden,
        "num_classes": read("y_embedder.embedding_table.weight", 0),
    }
