"""How much a stranger's config may state: as many layers as there are tensors for them, no more rows than one has.

Tables of names are made layer by layer and class by class, so a config of one line could ask for hours of work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from darkroom.errors import DarkroomError

MAX_LEVELS = 32  # each halves the picture
# Entries of configs, theirs and ours. Of one group the largest counts; the groups multiply.
_LEVELS = ("block_out_channels", "channel_mult")
_GROUPS = (
    ("layers_per_block", "num_res_blocks", "decoder_num_res_blocks"),
    ("transformer_layers_per_block", "transformer_depth"),
)
_STACKS = ("num_layers", "num_hidden_layers", "encoder_layers", "depth", "layers")
_ROWS = ("num_embeds_ada_norm", "num_class_embeds")  # of tables of classes, each of which gets a name


def check_stated(config: Any, stored: Iterable[Mapping[str, tuple[int, ...]]], weights: object, where: object) -> None:
    """Refuse a config, or a table of configs, with more layers than tensors, or more classes than the largest tensor
    has rows. stored: the tensors' shapes, by file; `weights`, `where`: what holds them, and the config, in messages."""
    shapes = [shape for file in stored for shape in file.values()]
    rows = max((max(shape, default=0) for shape in shapes), default=0)
    todo = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, Mapping):
            todo += value.values()
            _check_layers(value, len(shapes), weights, where)
            for name in _ROWS:
                if (count := _largest(value, (name,))) > max(rows, 1):
                    raise DarkroomError(
                        f"{where} states {name} {count:,}, and no tensor of {weights} has more than {rows:,} rows; "
                        "give the weights and the config of one model"
                    )


def _check_layers(config: Mapping[str, Any], tensors: int, weights: object, where: object) -> None:
    levels = max((len(config[key]) for key in _LEVELS if isinstance(config.get(key), (list, tuple))), default=1)
    if levels > MAX_LEVELS:
        raise DarkroomError(f"{where} states {levels} levels of resolution; {MAX_LEVELS} are the most")
    blocks = levels * math.prod(_largest(config, group) for group in _GROUPS)
    if (layers := max(blocks, _largest(config, _STACKS))) > max(tensors, 1):
        raise DarkroomError(
            f"{weights} holds {tensors} tensors, too few for the {min(layers, 10**18):,} layers of {where}; give the "
            "weights and the config of one model"
        )


def _largest(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    return max([1, *(number for key in keys for number in _numbers(config.get(key)))])


def _numbers(value: Any) -> Iterator[int]:
    """A number, or those of a list with one for each level."""
    if isinstance(value, int):
        yield min(value, 10**18)
    elif isinstance(value, (list, tuple)):
        yield from (min(entry, 10**18) for entry in value if isinstance(entry, int))
