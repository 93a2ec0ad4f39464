"""Whole models in one file of the official layout: found, and written.

    model.diffusion_model.*     the denoiser's network             first_stage_model.*      the first stage
    cond_stage_model.*, conditioner.embedders.*, text_encoders.*   the conditioner
    model_ema.*                 averaged weights of the network, by names without dots

and beside them tables of the schedule, buffers, losses. DiT's official file is the bare network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from darkroom.errors import DarkroomError
from darkroom.generation_defaults import check_defaults
from darkroom.interop import families
from darkroom.interop.compvis_conditions import Whose, conditions_kind, find_conditions, standard_places
from darkroom.interop.compvis_first_stage import AVERAGED
from darkroom.interop.compvis_networks import infer_network, network_kind
from darkroom.interop.compvis_schedule import BUFFERS, read_schedule
from darkroom.interop.families import Family, Look
from darkroom.interop.first_stage_files import EXPORTED_BY, SCALE, Glance, as_number, glance
from darkroom.interop.found_model import MODEL_NOTE, OWN, FoundModel, noted_latents
from darkroom.interop.tensor_file import TensorFile, some
from darkroom.interop.tensor_source import FileSource, Shape, Table, same
from darkroom.safe_json import parse_json

NETWORK, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
AVERAGED_NETWORK = f"{AVERAGED}diffusion_model"

# Left in some files by the official sampler.
SAMPLER = ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas", "ddim_timesteps")

# Tensors that are no part of our model, by the start of their names, and what they are.
KEPT: tuple[tuple[str, str], ...] = (
    *((name, "tables of the noise schedule") for name in (*BUFFERS, "lvlb_weights", "denoiser.")),
    (SCALE, "scale of the latents"),
    (f"{AVERAGED}decay", "state of the averaging"),
    (f"{AVERAGED}num_updates", "state of the averaging"),
    (f"{FIRST_STAGE}loss.", "perceptual network and discriminator"),
    (f"{FIRST_STAGE}colorize", "colours for showing maps"),
    ("logvar", "log-variance of the loss"),
    *((name, "tables of the sampler") for name in SAMPLER),
    ("low_scale_model.", "tables of the noise on the condition"),
    ("depth_model.", "network that estimates depth"),
)
KEPT_ENDS = (
    (".position_ids", "positions of the text tower"),
    (".attn_mask", "mask of the text tower"),
    (".logit_bias", "temperature of the text tower"),
)


def find_compvis(file: TensorFile) -> FoundModel | None:
    """The whole model in a weight file; None where there is no denoiser in it that is known here."""
    path = file.path
    prefix = _network_prefix(file)
    if prefix is None:
        return None
    first_stage = glance(file)
    if MODEL_NOTE in file.notes and EXPORTED_BY in file.notes:
        return _noted(file, prefix, first_stage)
    look = _look(file, prefix, first_stage)
    family = families.recognise(look, str(path))
    configs, whose = _configs(file, prefix, first_stage, family, look)
    tables, averaged, kept = _sorted_out(file, prefix, first_stage, whose, look)
    facts = {"prediction": f"{family.prediction} (of the family)"}
    if look.network == "mmdit" and look.conditions is None:
        facts["text towers"] = "none in the file; --set text_towers=PATH adds them"
    return FoundModel(
        path=path,
        layout="compvis",
        family=family.name,
        title=family.title,
        source=FileSource([("", file)]),
        configs=configs,
        tables=tables,
        averaged=averaged,
        latents=None if first_stage is None else (family.shift, _scale(file, family)),
        kept=kept,
        renamed=_unusual(tables, configs),
        info={"name": path.stem, "family": family.name, "defaults": family.defaults},
        facts=facts,
    )


def usual_name(part: str, ours: str, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The official name of a tensor of ours; None where the official file of such a model does not have it."""
    network = network_prefix(configs)
    rows = {
        "denoiser": [Whose(network, "network.")],
        "first_stage": [Whose(FIRST_STAGE, "autoencoder.")] if network else [],
        "conditioner": standard_places(configs["conditioner"]["encoders"]),
    }[part]
    row = next((row for row in rows if ours.startswith(row.ours)), None)
    return None if row is None else row.theirs + ours.removeprefix(row.ours)


def network_prefix(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The official file of a DiT is the bare network; its first stage is another file."""
    return "" if configs["denoiser"]["network"].get("kind") == "dit" else NETWORK


def _unusual(tables: Mapping[str, Table], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Our names -> the file's, where these are not the usual ones."""
    return {
        ours: place.names[0]
        for part, table in tables.items()
        for ours, place in table.items()
        if place.names[0] != usual_name(part, ours, configs)
    }


def _network_prefix(file: TensorFile) -> str | None:
    """Of the denoiser's names; a bare network is a model by itself only in DiT's layout."""
    prefix = next((p for p in (NETWORK, "") if network_kind(_own(file.shapes, p))), None)
    return None if prefix == "" and network_kind(file.shapes) != "dit" else prefix


def describe(file: TensorFile) -> dict[str, Any] | None:
    """The family and the parts of a whole model for people, from names and shapes alone; None if there is none."""
    prefix = _network_prefix(file)
    if prefix is None:
        return None
    first_stage = glance(file)
    look = _look(file, prefix, first_stage)
    if MODEL_NOTE in file.notes and EXPORTED_BY in file.notes:
        return {"model": f"{_noted(file, prefix, first_stage).title}, written by {file.notes[EXPORTED_BY]}"}
    family = families.recognise(look, str(file.path))
    whose = find_conditions(file.shapes, look.conditions, family.name).whose
    tables, averaged, kept = _sorted_out(file, prefix, first_stage, whose, look)
    counts = {part: len(table) for part, table in tables.items() if table}
    counts |= {"averaged copies": len(averaged["denoiser"])} if averaged else {}
    counts |= {"kept besides": len(kept)} if kept else {}
    return {
        "model": family.title,
        "prediction": f"{family.prediction}, as its family; --set prediction=... says otherwise",
        "parts of it": ", ".join(f"{what.replace('_', ' ')} {count} tensors" for what, count in counts.items()),
    }


def _noted(file: TensorFile, prefix: str, first_stage: Glance | None) -> FoundModel:
    """A file that we wrote: what it is stands beside the tensors."""
    try:
        note = parse_json(file.notes[MODEL_NOTE].encode())
        configs, family = dict(note["configs"]), str(note["family"])
        encoders, latents = dict(configs["conditioner"]["encoders"]), note["latents"]
        check_defaults(note["info"].get("defaults"), file.path)
        info = {"name": file.path.stem, **note["info"]} | ({} if family == OWN else {"family": family})
        if latents is not None:
            latents = noted_latents(latents)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DarkroomError(f"{file.path} is damaged: its note about the model cannot be read") from None
    look = _look(file, prefix, first_stage)
    if first_stage is None:
        configs.pop("first_stage", None)
    else:
        configs["first_stage"] = {**first_stage.config, **configs.get("first_stage", {})}
    whose = standard_places(encoders)
    if look.conditions == "clip":
        whose = find_conditions(file.shapes, "clip", family).whose  # names of either release
    tables, averaged, kept = _sorted_out(file, prefix, first_stage, whose, look)
    return FoundModel(
        path=file.path,
        layout="compvis",
        family=family,
        title=str(info["name"]),
        source=FileSource([("", file)]),
        configs=configs,
        tables=tables,
        averaged=averaged,
        latents=None if latents is None or first_stage is None else latents,
        kept=kept,
        renamed=_unusual(tables, configs),
        info=info,
        facts={"everything": "noted in the file, which darkroom wrote"},
    )


def _own(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _look(file: TensorFile, prefix: str, first_stage: Glance | None) -> Look:
    own = _own(file.shapes, prefix)
    kind = network_kind(own)
    assert kind is not None
    traits = {
        "updown": any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in own),
        "labels": "label_emb.weight" in own,
        "dual": any(".x_block.attn2." in name for name in own),
        "qk_norm": any(name.endswith(".attn.ln_q.weight") for name in own),
    }
    network = infer_network(own, {}, str(file.path), prefix)
    latent = network["out_channels"] if first_stage is None else first_stage.config["embed_dim"]
    return Look(
        network=kind,
        extra=network["in_channels"] - latent,
        conditions=conditions_kind(file.shapes),
        quantised=None if first_stage is None else first_stage.config["codebook_size"] is not None,
        f=None if first_stage is None else 2 ** (len(first_stage.config["channel_mult"]) - 1),
        traits=frozenset(name for name, has in traits.items() if has),
        name=file.path.name.lower(),
        context=network.get("context_dim") if kind == "unet" else None,
        vector=kind == "unet" and network.get("num_classes") is not None,
    )


def _configs(
    file: TensorFile, prefix: str, first_stage: Glance | None, family: Family, look: Look
) -> tuple[dict[str, dict[str, Any]], tuple[Whose, ...]]:
    network = infer_network(_own(file.shapes, prefix), family.network, str(file.path), prefix)
    schedule = dict(family.schedule)
    if "betas" in file.shapes:
        schedule = read_schedule(file.read(["betas"])["betas"], family.schedule, str(file.path))
    denoiser = {
        "network": network,
        "schedule": schedule,
        "prediction_type": family.prediction,
        "learned_variance": family.learned_variance,
    }
    conditions = find_conditions(file.shapes, look.conditions, family.name)
    encoders = conditions.encoders
    if "class" in encoders and encoders["class"].get("slot") == "label":
        count = network["num_classes"] - 1  # the last is no class
        encoders = encoders | {"class": encoders["class"] | {"classes": [str(i) for i in range(count)]}}
    configs: dict[str, dict[str, Any]] = {"denoiser": denoiser, "conditioner": {"encoders": encoders}}
    if first_stage is not None:
        configs["first_stage"] = first_stage.config
    return configs, conditions.whose


def _sorted_out(
    file: TensorFile, prefix: str, first_stage: Glance | None, whose: tuple[Whose, ...], look: Look
) -> tuple[dict[str, Table], dict[str, Table], dict[str, str]]:
    """Every tensor of the file: ours, averaged, or kept; any other is an error that names it."""
    rows = [("denoiser", prefix, "network."), *(("conditioner", w.theirs, w.ours) for w in whose)]
    if first_stage is not None:
        rows.append(("first_stage", first_stage.prefix, "autoencoder."))
    tables: dict[str, dict[str, Any]] = {part: {} for part in ("first_stage", "denoiser", "conditioner")}
    if first_stage is None:
        del tables["first_stage"]
    kept: dict[str, str] = {}
    rest: list[str] = []
    for name in file.shapes:
        what = _kept(name, look)
        row = next((row for row in rows if name.startswith(row[1])), None)
        if what is not None:
            kept[name] = what
        elif row is not None:
            part, theirs, ours = row
            tables[part][ours + name.removeprefix(theirs)] = same(name)
        else:
            rest.append(name)
    without_dots = {AVERAGED_NETWORK + name.removeprefix(prefix).replace(".", ""): ours
                    for ours, place in tables["denoiser"].items() for name in place.names}  # fmt: skip
    means = {without_dots[name]: same(name) for name in rest if name in without_dots}
    unknown = [name for name in rest if name not in without_dots]
    if means and (without := tables["denoiser"].keys() - means.keys()):
        names = [name for ours in without for name in tables["denoiser"][ours].names]
        raise DarkroomError(
            f"{file.path} has no averaged copies of {some(names)}: these do not belong there, or the copies are missing"
        )
    if orphans := [name for name in unknown if name.startswith(AVERAGED_NETWORK)]:
        raise DarkroomError(f"{file.path} holds averaged copies of tensors that it lacks ({some(orphans)})")
    if unknown:
        raise DarkroomError(f"{file.path} holds {len(unknown)} tensors of no known part ({some(unknown)})")
    return dict(tables), {"denoiser": means} if means else {}, kept


def _kept(name: str, look: Look) -> str | None:
    if look.conditions == "first_stage" and name.startswith(CONDITION):
        return "first stage, listed again as the condition's"
    if look.conditions == "boxes" and name.startswith(f"{CONDITION}transformer.to_logits."):
        return "unused output layer of the text tower"
    found = next((what for start, what in KEPT if name == start or (start[-1] == "." and name.startswith(start))), None)
    return found or next((what for end, what in KEPT_ENDS if name.endswith(end)), None)


def _scale(file: TensorFile, family: Family) -> Any:
    """Of the latents: measured and stored in some files, else the family's."""
    return as_number(file.read([SCALE])[SCALE].float()) if SCALE in file.shapes else family.scale
