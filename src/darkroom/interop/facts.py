"""What no tensor of a source tells and its user may know better: `--set NAME=VALUE`, `facts={...}` of `load`.

A fact is taken where it can be meant, or refused in one line: before anything is built or read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from darkroom.config import nearest, with_overrides
from darkroom.errors import DarkroomError
from darkroom.interop.found_model import LATENTS, PARTS, FoundModel, is_numbers

PREDICTIONS = ("epsilon", "v", "x0", "velocity", "edm")
TOWERS = "text_towers"


@dataclass(frozen=True)
class Fact:
    """place: of the value in the configs; means: what it is, for people; is_one: whether a value can be it"""

    place: str
    means: str
    is_one: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


FACTS = {
    "prediction": Fact("denoiser.prediction_type", f"one of {', '.join(PREDICTIONS)}", lambda v: v in PREDICTIONS),
    "flow_shift": Fact("denoiser.schedule.shift", "a positive number", lambda v: is_number(v) and v > 0),
    "zero_terminal_snr": Fact("denoiser.schedule.zero_terminal_snr", "true or false", _is_flag),
    "num_heads": Fact("denoiser.network.num_heads", "a whole number of at least 1, or null", _is_count),
    "num_head_channels": Fact("denoiser.network.num_head_channels", "a whole number of at least 1, or null", _is_count),
    "learned_variance": Fact("denoiser.learned_variance", "true or false", _is_flag),
}


def is_number(value: Any) -> bool:
    return is_numbers(value) and not isinstance(value, (list, tuple))


def with_facts(found: FoundModel, facts: Mapping[str, Any]) -> FoundModel:
    """The same source, understood differently. `facts`: short names (`FACTS`, "scale", "shift"), or the dotted name of
    any entry of the configs; "text_towers": files of towers that the source leaves out."""
    for name, value in facts.items():
        _check(found, name, value)
    told = {name: f"{value} (as asked for)" for name, value in facts.items()}
    if TOWERS in facts:
        from darkroom.interop.added_towers import with_towers  # imports torch

        found = with_towers(found, facts[TOWERS])
    latents = found.latents
    if latents is not None:
        latents = facts.get("shift", latents[0]), facts.get("scale", latents[1])
    changes = {
        FACTS[name].place if name in FACTS else name.replace("conditioner.", "conditioner.encoders.", 1): value
        for name, value in facts.items()
        if name not in (*LATENTS, TOWERS)
    }
    configs: dict[str, Any] = with_overrides(found.configs, changes)
    if facts.get("num_heads") is not None and "num_head_channels" not in facts:  # of the two the other would win
        configs["denoiser"]["network"]["num_head_channels"] = None
    _refuse_misfits(found, configs, facts)
    return replace(found, configs=configs, latents=latents, facts=found.facts | told)


def latent_facts(facts: Mapping[str, Any], path: object, what: str) -> dict[str, Any]:
    """The facts of something that tells all others itself: shift and scale alone."""
    for name, value in facts.items():
        if name not in LATENTS:
            raise DarkroomError(f'{path} is {what}, for which "{name}" cannot be set; only {" and ".join(LATENTS)} can')
        _check_latents(name, value)
    return dict(facts)


def _check(found: FoundModel, name: str, value: Any) -> None:
    """Whether there is such a fact, and the value can be one."""
    if name in LATENTS:
        _check_latents(name, value)
        if found.latents is None:
            raise DarkroomError(f"{found.path} holds no first stage, whose {name} could be set")
    elif name in FACTS:
        if not FACTS[name].is_one(value):
            raise DarkroomError(f"{name}={_shown(value)} cannot be; it is {FACTS[name].means}")
    elif name.split(".")[0] in PARTS:
        _check_entry(found, name)
    elif name != TOWERS:
        raise DarkroomError(f'"{name}" is no fact of a model{nearest(name, [*LATENTS, *FACTS, TOWERS])}')


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _check_entry(found: FoundModel, name: str) -> None:
    """A dotted name of the configs: the part and, of the conditioner, the condition must be there. What stands in them
    is read strictly when the part is built."""
    part, *rest = name.split(".")
    if part not in found.configs:
        raise DarkroomError(f"{found.path} holds no {part.replace('_', ' ')}, of which {name} could be set")
    if part != "conditioner":
        if not rest:
            raise DarkroomError(f'"{name}" is a part of the model; set an entry of it: {name}.OPTION=VALUE')
        return
    encoders = found.configs[part]["encoders"]
    if not encoders:
        raise DarkroomError(f"{found.path} has no conditions, of which {name} could be set")
    if not rest or rest[0] not in encoders:
        said = f'"{".".join(rest)}"' if rest else "of no name"
        raise DarkroomError(f"{found.path} has no condition {said}{nearest(''.join(rest[:1]), encoders)}")
    if len(rest) < 2:
        raise DarkroomError(f'"{name}" is a condition; set an entry of it: {name}.OPTION=VALUE')


def _refuse_misfits(found: FoundModel, configs: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Facts that the rest of the model contradicts."""
    # A fact may have put a number in the place of a table, which building the part complains about.
    stated = {name: value for name, value in configs["denoiser"].items() if isinstance(value, Mapping)}
    network, kind = stated.get("network", {}), stated.get("schedule", {}).get("kind", "ldm")
    latent = configs.get("first_stage", {}).get("embed_dim") or network.get("in_channels")
    outputs, doubled = network.get("out_channels"), bool(facts.get("learned_variance"))
    steps = f"{found.path} has a schedule of the kind {kind}"
    for name, is_misfit, why in (
        (
            "prediction",
            facts.get("prediction") == "edm" and kind != "edm",
            f'which is another scaling of the input, and {steps}; give "epsilon", "v", "x0" or "velocity"',
        ),
        ("flow_shift", kind != "flow", f"which is about flows, and {steps}; leave it out"),
        (
            "zero_terminal_snr",
            facts.get("zero_terminal_snr") is True and kind in ("flow", "edm"),
            f"which is about tables of betas, and {steps}; leave it out",
        ),
        (
            "learned_variance",
            isinstance(outputs, int) and isinstance(latent, int) and outputs != latent * (1 + doubled),
            f"for which the network of {found.path} would have {latent} channels of output "
            f"{'twice' if doubled else 'once'}, and it has {outputs}; leave it out",
        ),
    ):
        if name in facts and is_misfit:
            raise DarkroomError(f"{name}={_shown(facts[name])} cannot be, {why}")


def _check_latents(name: str, value: Any) -> None:
    if not is_numbers(value):
        raise DarkroomError(
            f"{name}={_shown(value)} is no number; give one number, or a list of one per latent channel"
        )
