"""First stages in other people's files: found, named, compared strictly, read and written.

What can be read: a file of the official code (bare, or a whole checkpoint that holds a first stage), diffusers' folder
of an autoencoder or of a whole pipeline, diffusers' weight file alone. `find_first_stage` looks at names and shapes.
Every tensor of the file is then accounted for: it is the autoencoder's, it belongs to another part of a checkpoint, it
is left out by name (`LEFT_OUT`), or the file is refused with the names of what does not fit.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom import __version__
from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.interop import compvis_first_stage as compvis
from darkroom.interop import diffusers_first_stage as diffusers
from darkroom.interop.diffusers_first_stage import Number
from darkroom.interop.stated_sizes import check_stated
from darkroom.interop.tensor_file import SAFETENSORS, TensorFile, open_tensor_file, opened, some
from darkroom.safe_files import read_json, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

PIPELINE, CONFIG = "model_index.json", "config.json"
SCALE = "scale_factor"  # 0-d, in checkpoints that measured it (scale_by_std)
EXPORTED_BY = "exported_by"  # our mark on files that we wrote
FLOATS = ("float64", "float32", "float16", "bfloat16")
EIGHT_BITS = {"dtype": "uint8", "low": 0.0, "high": 255.0}


@dataclass(frozen=True)
class FoundFirstStage:
    """A first stage in a file, not read yet."""

    path: Path  # what was asked for
    file: TensorFile
    layout: str  # "compvis" | "diffusers" | "darkroom"
    config: dict[str, Any]  # the dict form of `AutoencoderConfig`
    shift: Number
    scale: Number
    scale_from: str  # who says so, for people
    shapes: dict[str, tuple[int, ...]]  # of our tensors
    names: dict[str, str]  # ours: the file's
    averaged: dict[str, str]  # the same for the averaged weights, if there are any
    left_out: dict[str, int]  # what: how many tensors of it
    inside: str | None  # the whole checkpoint or pipeline that it is part of

    @property
    def what(self) -> str:
        """ "kl-f8: KL, f 8, 4 latent channels" """
        return compvis.describe(self.config)

    @property
    def dtypes(self) -> set[str]:
        return {self.file.dtypes[name] for name in self.names.values()}

    def names_of(self, weights: str) -> dict[str, str]:
        """ours: the file's. Averaged weights where the file has them, unless "live"."""
        return self.averaged if self.averaged and weights == "ema" else self.names

    def read(self, weights: str = "ema") -> dict[str, Tensor]:
        """Our names and shapes, the file's dtypes."""
        names = self.names_of(weights)
        tensors = self.file.read(names.values())
        return {ours: tensors.pop(theirs).reshape(self.shapes[ours]) for ours, theirs in names.items()}


def find_first_stage(path: Path, file: TensorFile | None = None) -> FoundFirstStage | None:
    """The first stage in a file or folder; None where there is none. A damaged one is an error that names the damage.

    `path`: a weight file, a folder with an autoencoder's config.json, or a diffusers pipeline's folder. `file`: the one
    of that path, where it was opened before.
    """
    with understanding(path, "a first stage"):
        if path.is_dir():
            return _in_folder(path)
        if (file := file or opened(path)) is None:
            return None
        if path.name in diffusers.WEIGHT_FILES and _class_name(path.parent) in diffusers.CLASSES:
            return _with_config(path, path.parent, path, None)
        glanced = glance(file)
        return None if glanced is None else _with_facts(file, glanced)


@dataclass(frozen=True)
class Glance:
    """What the names and shapes in a single file say of the first stage in it, before anything is compared."""

    layout: str
    prefix: str  # of its names
    config: dict[str, Any]
    ours: dict[str, str]  # ours: theirs without prefix, for the names that have a place here
    facts: compvis.Facts
    is_part: bool  # of a whole checkpoint


def glance(file: TensorFile) -> Glance | None:
    """Without torch; None if there is no first stage."""
    for prefix in compvis.PREFIXES:
        is_compvis = compvis.is_first_stage(file.shapes, prefix)
        if not is_compvis and not diffusers.is_first_stage(file.shapes, prefix):
            continue
        own = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
        ours = {name: name for name in own} if is_compvis else _our_names(own, diffusers.count_levels(own))
        config = compvis.infer_config({new: own[name] for new, name in ours.items()}, str(file.path))
        is_part = any(name.startswith(start) for start, _, _ in compvis.CHECKPOINTS for name in file.shapes)
        facts = compvis.latent_facts(config, file.shapes)
        return Glance("compvis" if is_compvis else "diffusers", prefix, config, ours, facts, is_part)
    return None


def _class_name(folder: Path) -> str | None:
    if not (folder / CONFIG).is_file():
        return None
    name = read_json(folder / CONFIG, "config").get("_class_name")
    return name if isinstance(name, str) else None


def _in_folder(path: Path) -> FoundFirstStage | None:
    if (path / PIPELINE).is_file():
        pipeline = read_json(path / PIPELINE, "pipeline index").get("_class_name", "pipeline")
        for name in diffusers.SUBFOLDERS:
            if _class_name(path / name) in diffusers.CLASSES:
                return _with_config(path, path / name, None, f"a diffusers {pipeline}")
        return None
    return _with_config(path, path, None, None) if _class_name(path) in diffusers.CLASSES else None


# ------------------------------------------------------------------------------------------------------------- two ways


def _with_facts(file: TensorFile, glanced: Glance) -> FoundFirstStage:
    """A single file. Shift and scale by family; the file's own scale where it has one."""
    config, facts, prefix = glanced.config, glanced.facts, glanced.prefix
    scale, source = facts.scale, facts.what
    if SCALE in file.shapes:
        scale, source = (
            _positive(file, _short(float(file.read([SCALE])[SCALE].float().mean()))),
            "the checkpoint's scale_factor",
        )
    elif SCALE in file.notes and EXPORTED_BY in file.notes:
        scale, source = _positive(file, file.notes[SCALE]), "the file's scale_factor"
    shapes = expected_shapes(config, file.path)
    names = {new: prefix + _their_name(glanced, new) for new in shapes}
    averaged = _averaged(file.shapes, names)
    used = {*names.values(), *averaged.values(), SCALE}
    left_out = _account(file, config, shapes, names, prefix, used)
    inside = f"a {facts.what} checkpoint" if glanced.is_part else None
    return FoundFirstStage(
        path=file.path,
        file=file,
        layout=glanced.layout,
        config=config,
        shift=facts.shift,
        scale=scale,
        scale_from=source,
        shapes=shapes,
        names=names,
        averaged=averaged,
        left_out=left_out,
        inside=inside,
    )


def _with_config(path: Path, folder: Path, weights: Path | None, inside: str | None) -> FoundFirstStage:
    """diffusers' folder of an autoencoder: the config says everything, the weights must agree."""
    where = str(folder / CONFIG)
    config, shift, scale = diffusers.from_diffusers_config(read_json(folder / CONFIG, "config"), where)
    if weights is None:
        weights = next((folder / name for name in diffusers.WEIGHT_FILES if (folder / name).is_file()), None)
        if weights is None:
            raise DarkroomError(f"{folder} holds no weights; {' or '.join(diffusers.WEIGHT_FILES[::2])} is needed")
    file = open_tensor_file(weights)
    levels = len(config["channel_mult"])
    check_stated(config, [file.shapes], weights, where)
    shapes = expected_shapes(config, folder / CONFIG)
    ours = _our_names(file.shapes, levels)
    names = {new: ours.get(new) or diffusers.to_theirs(new, levels) for new in shapes}
    left_out = _account(file, config, shapes, names, "", set(names.values()))
    return FoundFirstStage(
        path=path,
        file=file,
        layout="diffusers",
        config=config,
        shift=shift,
        scale=scale,
        scale_from=where,
        shapes=shapes,
        names=names,
        averaged={},
        left_out=left_out,
        inside=inside,
    )


def in_darkroom_folder(path: Path, part: Path, weights: str, inside: str | None) -> FoundFirstStage:
    """The first stage of a Darkroom model folder as one of this kind. `part`: its folder, with config.json and the file
    `weights`."""
    config = plain_config(read_json(part / CONFIG, "config"), str(path))
    file = open_tensor_file(part / weights)
    check_stated(config, [file.shapes], file.path, part / CONFIG)
    shapes = expected_shapes(config, part / CONFIG)
    names = {name: f"autoencoder.{name}" for name in shapes}
    latents = ("shift", "scale")
    _account(file, config, shapes, names, "", {*names.values(), *latents})
    if missing := [name for name in latents if name not in file.shapes]:
        raise DarkroomError(f"{file.path} lacks {missing[0]!r}; it is not the first stage of a model")
    values = file.read(latents)
    return FoundFirstStage(
        path=path,
        file=file,
        layout="darkroom",
        config=config,
        shift=as_number(values["shift"]),
        scale=as_number(values["scale"]),
        scale_from="the model",
        shapes=shapes,
        names=names,
        averaged={},
        left_out={},
        inside=inside,
    )


def plain_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The complete dict form of `AutoencoderConfig` that other libraries' autoencoders are described by, defaults
    filled in (older models name fewer settings); what those libraries have no words for is refused."""
    kept = {key: value for key, value in config.items() if key not in ("kind", "pixels")}
    pixels = config.get("pixels") or EIGHT_BITS
    if config.get("kind") == "identity":
        raise DarkroomError(f"{where}: a first stage that changes nothing (identity) has no weights to exchange")
    if any(pixels.get(key, value) != value for key, value in EIGHT_BITS.items()):
        raise DarkroomError(
            f"{where}: its images are {pixels.get('dtype')} from {pixels.get('low')} to {pixels.get('high')}, "
            "and other layouts know 8 bits only; it cannot be exchanged"
        )
    from darkroom.config import from_dict
    from darkroom.first_stage.autoencoder import AutoencoderConfig  # imports torch

    return dict(vars(from_dict(AutoencoderConfig, kept, "first stage")))


def as_number(values: Tensor) -> Number:
    """() or (E,) -> a number, or a list where channels differ; with as many digits as float32 needs."""
    numbers = [_short(value) for value in values.float().flatten().tolist()]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _short(value: float) -> float:
    """The shortest decimal number that is the same in float32: 0.18215 for 0.18215000629425049."""
    import numpy

    return float(str(numpy.float32(value)))


def _positive(file: TensorFile, value: float | str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise DarkroomError(f"{file.path}: its {SCALE} is {value!r}, a positive number is needed")
    return number


def _our_names(names: Iterable[str], levels: int) -> dict[str, str]:
    """ours: diffusers', for the names that have a place here."""
    return {new: name for name in names if (new := diffusers.to_ours(name, levels)) is not None}


def _their_name(glanced: Glance, name: str) -> str:
    if name in glanced.ours:
        return glanced.ours[name]
    return name if glanced.layout == "compvis" else diffusers.to_theirs(name, len(glanced.config["channel_mult"]))


def _averaged(shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> dict[str, str]:
    """Averaged weights of a bare first stage lie under the name without its dots. All of them count, or none."""
    found = {ours: compvis.AVERAGED + theirs.replace(".", "") for ours, theirs in names.items()}
    return found if all(shapes.get(found[ours]) == shapes.get(names[ours], ()) for ours in names) else {}


# ---------------------------------------------------------------------------------------------------- strict comparison


def expected_shapes(config: Mapping[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `Autoencoder(config)`, without making its numbers."""
    import torch

    from darkroom.config import from_dict
    from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig

    try:
        with torch.device("meta"):
            module = Autoencoder(from_dict(AutoencoderConfig, config, "first stage"))
    except RuntimeError:  # more elements than can be counted
        raise DarkroomError(f"{where} describes an autoencoder of impossible size") from None
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _account(
    file: TensorFile,
    config: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    prefix: str,
    used: Collection[str],
) -> dict[str, int]:
    """What is left out, counted; every tensor that is missing, unknown or of another shape ends in one error."""
    missing, wrong, unknown = [], [], []
    for ours, shape in expected.items():
        theirs = names[ours]
        if theirs not in file.shapes:
            missing.append(theirs)
        elif not _same_numbers(theirs, file.shapes[theirs], shape):
            wrong.append(f"{theirs} {file.shapes[theirs]} for {shape}")
        elif file.dtypes[theirs] not in FLOATS:
            wrong.append(f"{theirs} {file.dtypes[theirs]}")
    left_out: dict[str, int] = {}
    for name in file.shapes:
        if name in used:
            continue
        what = _left_out(name, prefix)
        if what is None:
            unknown.append(name)
        else:
            left_out[what] = left_out.get(what, 0) + 1
    if missing or unknown or wrong:
        problems = [
            f"{len(found)} tensor{'s' * (len(found) != 1)} {verb} ({some(found)})"
            for verb, found in (("missing", missing), ("unknown", unknown), ("of another shape or type", wrong))
            if found
        ]
        raise DarkroomError(f"{file.path} does not fit {compvis.describe(config)}: {', '.join(problems)}")
    return left_out


def _left_out(name: str, prefix: str) -> str | None:
    """Why a tensor is not the autoencoder's, None if nothing is known about it."""
    if not name.startswith(prefix):
        return "other parts of the checkpoint"
    own = name.removeprefix(prefix)
    if own.startswith(compvis.AVERAGED):
        return "averaged copies"
    return next((what for start, what in compvis.LEFT_OUT.items() if own.startswith(start)), None)


def _same_numbers(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored shape is the wanted one; an attention's 1x1 convolution may also be stored as a matrix."""
    is_attention = ".attn" in name or ".attentions." in name
    return stored == wanted or (is_attention and wanted[2:] == (1, 1) and stored == wanted[:2])


# -------------------------------------------------------------------------------------------------------------- writing


def compvis_notes(config: Mapping[str, Any], shift: Number, scale: Number) -> dict[str, str]:
    """What is noted beside the tensors in a file of the official layout; what that layout cannot express is refused.

    It has no place for the scale of the latents (it is in the config of the denoiser), so the scale is a note, which
    only we read.
    """
    compvis.refuse_what_compvis_lacks(config)
    facts = compvis.latent_facts(config, ())
    if shift != facts.shift:
        raise DarkroomError(
            f"the official layout has no place for {diffusers.latents_in_words(shift, scale)}, it means a shift of "
            f"{facts.shift:g}: write the diffusers layout, or give --shift {facts.shift:g} to leave yours out"
        )
    if isinstance(scale, list):
        raise DarkroomError(
            "the official layout has no place for a scale per channel: write the diffusers layout, or give one --scale"
        )
    return {EXPORTED_BY: f"darkroom {__version__}"} | ({SCALE: repr(scale)} if scale != facts.scale else {})


def refuse_inexpressible(format: str, config: Mapping[str, Any], shift: Number, scale: Number) -> None:
    """Raises what writing would, from the config alone: before any tensor is read. `format`: compvis or diffusers."""
    if format == "compvis":
        compvis_notes(config, shift, scale)
    else:
        diffusers.to_diffusers_config(config, shift, scale)


def write_compvis(
    destination: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shift: Number, scale: Number
) -> None:
    """One file with the official names: safetensors, or a checkpoint that the official code can load (.ckpt, .pt).

    Not atomic by itself: see `new_file`.
    """
    notes = compvis_notes(config, shift, scale)
    if destination.suffix.lower() == SAFETENSORS:
        write_safetensors(destination, tensors, {"format": "pt", **notes})
    else:
        write_pickled(destination, tensors, notes)


def write_pickled(destination: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """A checkpoint as the official code saves it: the tensors under "state_dict", notes beside it."""
    import torch

    content = {"state_dict": {name: t.contiguous() for name, t in tensors.items()}, **notes}
    try:
        with open(destination, "xb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer hides what the operating system said
        raise OSError(errno.EIO, str(error).splitlines()[0]) from None


def write_diffusers(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shift: Number, scale: Number
) -> None:
    """config.json and the weights, into a folder that is there. Not atomic by itself: see `new_folder`."""
    content = diffusers.to_diffusers_config(config, shift, scale) | {f"_{EXPORTED_BY}": f"darkroom {__version__}"}
    levels = len(config["channel_mult"])
    named = {}
    for name, tensor in tensors.items():
        theirs = diffusers.to_theirs(name, levels)
        named[theirs] = tensor.reshape(diffusers.stored_shape(theirs, tuple(tensor.shape)))
    with open(folder / CONFIG, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_safetensors(folder / diffusers.WEIGHT_FILES[0], named, {"format": "pt"})


def is_former_export(path: Path) -> bool:
    """Whether a file or folder was written by us in another layout, and may be written again."""
    try:
        if path.is_dir():
            ours = {CONFIG, diffusers.WEIGHT_FILES[0]}
            return {p.name for p in path.iterdir()} == ours and f"_{EXPORTED_BY}" in read_json(path / CONFIG)
        return EXPORTED_BY in open_tensor_file(path).notes
    except DarkroomError:
        return False


def count_equal(written: FoundFirstStage, source: FoundFirstStage, weights: str = "ema") -> int:
    """The number of tensors that a written file gives back, by the inverse map: all, bit for bit, or an error.

    Both files are read once more, so that nothing in memory is compared with itself. A tensor that is stored in a wider
    dtype than in the source must be the source's numbers exactly.
    """
    names, again = source.names_of(weights), written.names_of("ema")
    theirs = source.file.read(names.values())
    ours = written.file.read(again.values())
    if names.keys() != again.keys():
        raise DarkroomError(f"{written.path} does not give back the tensors of {source.path}")
    for name in names:
        tensor = theirs.pop(names[name])
        if not same_bits(ours.pop(again[name]).to(tensor.dtype), tensor):
            raise DarkroomError(f"{written.path} does not give back {names[name]} of {source.path} bit for bit")
    return len(names)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, number of elements and bytes; NaNs and signs of zero included. Shapes may differ (matrix or 1x1)."""
    import torch

    if one.dtype != other.dtype or one.numel() != other.numel():
        return False
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
