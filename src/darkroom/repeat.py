"""`darkroom eval --repeat`: a record is enough to measure again what it says, and to see whether it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from darkroom.config import from_dict
from darkroom.errors import DarkroomError
from darkroom.eval_places import check_places, is_images
from darkroom.evaluation.protocol import Record, settings_of
from darkroom.model_folder import find_source
from darkroom.report_scores import score_text
from darkroom.scoring import EvalRequest


def repeat_request(record: Record, places: Sequence[str] = (), training: Sequence[str] = ()) -> EvalRequest:
    """What a record asks for. places: MODEL DATA..., where they lie elsewhere now."""
    if not record.request:
        raise DarkroomError(
            "this record does not say how it was asked for; measure again with darkroom eval MODEL DATA"
        )
    try:
        request = from_dict(EvalRequest, record.request, "request")
    except DarkroomError as error:
        raise DarkroomError(f"what the record says of how it was asked for cannot be: {error}") from error
    if not request.data and not places:
        raise DarkroomError(
            "this record was made while a model was trained: say where model and data lie, darkroom eval MODEL DATA "
            "--repeat RECORD"
        )
    if len(places) == 1:
        raise DarkroomError(f"{places[0]}: with --repeat give both, MODEL DATA, or neither")
    if places:
        request = replace(request, model=places[0], data=list(places[1:]))
    if training:
        request = replace(request, training=list(training))
    try:
        check_places([*request.data, *(request.training or [])])
    except DarkroomError as error:
        cure = "say where it lies now: darkroom eval MODEL DATA --repeat RECORD"
        raise DarkroomError(f"{str(error).partition(';')[0]}; {cure}") from error
    if not is_images(request.model):
        find_source(request.model)  # complains
    return request


def repeated_lines(before: Record, after: Record) -> tuple[bool, list[str]]:
    """Whether all numbers are the same, and what to say about it."""
    old, new = before.values, after.values
    changed = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    if not changed:
        return True, [f"identical: all {len(new)} scores are those of the record"]
    lines = []
    for name in changed:
        shown = [score_text(name, side[name]) if name in side else "none" for side in (old, new)]
        exact = f" ({old.get(name)!r}, {new.get(name)!r})" if shown[0] == shown[1] else ""
        lines.append(f"{name}: {shown[1]}, the record has {shown[0]}{exact}")
    facts = [
        ("model", before.sampling.digest, after.sampling.digest),
        ("reference images", before.reference.digest, after.reference.digest),
        ("conditions", before.sampling.conditions_digest, after.sampling.conditions_digest),
        *((name, old_value, settings_of(after)[name]) for name, old_value in settings_of(before).items()),
    ]
    reasons = [f"{name} ({str(a)[:24]}, now {str(b)[:24]})" for name, a, b in facts if a != b]
    lines.append("not identical" + (f"; what differs: {', '.join(reasons)}" if reasons else " under the same settings"))
    return False, lines
