"""Models on the disk: `load` and `save`.

Weights and JSON only, whole or not at all: a model is written under a temporary name and takes its place in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from darkroom.adapters import Given, apply_adapters, saved_info
from darkroom.assemble import FiniteCheck, SkipInitialisation, build_model, latent_numbers, owned
from darkroom.blueprint import check_fit, hollow
from darkroom.build import build_conditioner, build_denoiser, build_first_stage, build_preview
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.preview import PreviewDecoder
from darkroom.first_stage.statistics import encoder_fingerprint
from darkroom.interop.diffusers_first_stage import Number
from darkroom.interop.facts import latent_facts, with_facts
from darkroom.interop.first_stage_files import FoundFirstStage, find_first_stage
from darkroom.interop.first_stage_rest import rest_of
from darkroom.interop.found_model import find_model
from darkroom.interop.kept_tensors import read_kept, save_kept
from darkroom.interop.tensor_file import TensorFile, opened
from darkroom.interop.tensor_source import GROUP_BYTES
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_folder import (
    BUNDLED,
    CONFIG,
    INDEX,
    PIPELINE,
    WEIGHTS,
    ModelIndex,
    bundled,
    find_source,
    guess_family,
    how_to_use,
    index_text,
    is_model_folder,
    read_index,
)
from darkroom.safe_files import (
    iter_safetensors,
    new_folder,
    read_json,
    read_safetensors_header,
    sha256_of,
    write_json,
    write_safetensors,
)

__all__ = ["bundled", "load", "load_first_stage", "save", "select_device", "select_dtype"]

Module = TypeVar("Module", bound=nn.Module)

_BUILD: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "first_stage": build_first_stage,
    "denoiser": build_denoiser,
    "conditioner": build_conditioner,
    "preview": build_preview,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys of `info` that say where a model came from this time; they are made anew by each load.
_TRANSIENT = ("sha256", "path", "weights")


def select_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" takes an accelerator if there is one. A device that this machine lacks is an error that says so."""
    if str(device) == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DarkroomError(f'device "{device}" is not available here; use "cpu" or "auto"') from None
    if chosen.type == "meta":
        raise DarkroomError('device "meta" holds no numbers; use "cpu" or "auto"')
    return chosen


def select_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype:
    """ "auto" is float32."""
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if str(dtype) == "auto":
        return torch.float32
    if str(dtype) not in _DTYPES:
        raise DarkroomError(f'dtype "{dtype}" is not known; use auto, {", ".join(_DTYPES)}')
    return _DTYPES[str(dtype)]


# ------------------------------------------------------------------------------------------------------------ loading


def load(
    source: str | Path,
    weights: str = "ema",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    facts: Mapping[str, Any] | None = None,
    adapters: Sequence[Given] = (),
) -> LatentDiffusion | FirstStage:
    """A model in eval mode from a model folder, a run folder or a bundled name (a path wins over a name), or from a
    file of the official code (.ckpt, .safetensors) or a diffusers folder: a whole model, or a first stage.

    `weights`: "ema" (averaged, what training recommends) or "live" (as the last step left them).
    `dtype`: precision of the denoiser's network; everything else stays in float32.
    `facts`: what an official file cannot say and its family's default has wrong: {"prediction": "epsilon"}; see
    `interop.facts.FACTS`.
    `adapters`: LoRA files and learned words to apply, each a path or (path, weight); see `darkroom.adapters`.
    What holds only a first stage gives a FirstStage.
    """
    model = _load(source, weights, device, dtype, facts)
    if adapters:
        if not isinstance(model, LatentDiffusion):
            raise DarkroomError(f"{source} is a first stage only; adapters change denoisers and text towers")
        apply_adapters(model, adapters)
    return model


def _load(
    source: str | Path,
    weights: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    facts: Mapping[str, Any] | None,
) -> LatentDiffusion | FirstStage:
    if weights not in WEIGHTS:
        raise DarkroomError(f'weights="{weights}" is not known; use "ema" or "live"')
    on, precision = select_device(device), select_dtype(dtype)
    path = find_source(source)
    if not is_model_folder(path):
        file = opened(path)
        whole = find_model(path, file)
        if whole is not None:
            return _ready(build_model(with_facts(whole, facts or {}), weights, precision), on)
        found = find_first_stage(path, file)
        if found is None or found.inside:
            refuse_official(path, found, file)
        alone = build_found(found, weights)
        set_latents(alone, *_latents_of(facts, path, "a first stage"))
        return _ready(alone, on)
    index = read_index(path)
    shift, scale = _latents_of(facts, path, "a Darkroom folder")
    if weights == "live" and not any((place / WEIGHTS["live"]).is_file() for place in index.parts.values()):
        raise DarkroomError(f'{path} holds no live weights; use weights="ema"')
    parts: dict[str, Any] = {}
    for part in sorted(index.parts, key=list(_BUILD).index):  # encoders of conditions may need the first stage
        parts[part] = _load_part(part, index.parts[part], weights, parts.get("first_stage"))
    first_stage = parts.get("first_stage")
    if first_stage is not None:
        _remember_reference(first_stage, index)
        first_stage.requires_grad_(False)
        set_latents(first_stage, shift, scale)
        if "preview" in parts:
            _attach_preview(first_stage, parts["preview"], index)
    if index.kind == "first_stage":
        assert isinstance(first_stage, FirstStage)
        first_stage.kept = read_kept(path)
        return _ready(first_stage, on)
    info = index.info | {"sha256": index.sha256, "path": str(path), "weights": weights}
    model = LatentDiffusion(first_stage, parts["denoiser"], parts["conditioner"], info)
    model.denoiser.network.to(precision)
    model.kept = read_kept(path)
    return _ready(model, on)


def _latents_of(facts: Mapping[str, Any] | None, path: Path, what: str) -> tuple[Number | None, Number | None]:
    given = latent_facts(facts or {}, path, what)
    return given.get("shift"), given.get("scale")


def load_first_stage(
    source: str | Path,
    device: str | torch.device = "auto",
    weights: str = "ema",
    *,
    shift: Number | None = None,
    scale: Number | None = None,
) -> FirstStage:
    """The first stage of a model or first-stage folder, of a bundled model, of an official file or diffusers folder.

    Whole checkpoints of Stable Diffusion and of the paper's code, and diffusers pipelines, give theirs.
    shift, scale: instead of what the source says, one number or one per latent channel.
    """
    path = find_source(source)
    if is_model_folder(path):
        given = load(source, weights, device)
        first_stage = given.first_stage if isinstance(given, LatentDiffusion) else given
        if first_stage is None:
            raise DarkroomError(f"{source}: holds no first stage")
    else:
        on, file = select_device(device), opened(path)
        if (found := find_first_stage(path, file)) is None:
            refuse_official(path, found, file)
        first_stage = _ready(build_found(found, weights), on)
    if shift is not None or scale is not None:
        set_latents(first_stage, shift, scale)
    return first_stage


def _ready(module: Module, on: torch.device) -> Module:
    """In eval mode on its device; on a CPU in the memory layout in which convolutions are fast there."""
    module.to(on).eval()
    return module.to(memory_format=torch.channels_last) if on.type == "cpu" else module  # type: ignore[call-overload]


def build_found(found: FoundFirstStage, weights: str = "ema") -> FirstStage:
    """Builds and fills what `find_first_stage` found; frozen, in float32."""
    with SkipInitialisation():
        first_stage = build_first_stage(found.config)
    taken: set[int] = set()
    tensors, check = found.read(weights), FiniteCheck(found.path)
    for name, tensor in tensors.items():
        check.see(found.names_of(weights)[name], tensor)
    check.tell()
    state = {f"autoencoder.{n}": owned(tensor, torch.float32, taken) for n, tensor in tensors.items()}
    state |= {"shift": torch.tensor(found.shift), "scale": torch.tensor(found.scale)}
    first_stage.load_state_dict(state, strict=True, assign=True)
    first_stage.kept = rest_of(found)
    return first_stage.requires_grad_(False)


def set_latents(first_stage: FirstStage, shift: Number | None, scale: Number | None) -> None:
    """Other numbers than those of the file, one or one per latent channel; None keeps the file's."""
    for name, value in (("shift", shift), ("scale", scale)):
        if value is not None:
            numbers = latent_numbers(name, value, first_stage.latent_channels)
            setattr(first_stage, name, numbers.to(first_stage.shift.device))
            first_stage.__dict__.pop("reference", None)  # with other numbers it is no longer the bundled one


def refuse_official(path: Path, found: FoundFirstStage | None, file: TensorFile | None) -> NoReturn:
    """What is recognised, and read safely, and not loaded by this version."""
    if found is not None:
        held = f"{found.inside} ({len(found.file.shapes)} tensors in {found.file.path.name})"
        raise DarkroomError(
            f"{path} is {held}: this version cannot load its denoiser, only its first stage ({found.what}), with "
            "darkroom.load_first_stage, `darkroom convert` or first_stage: {path: ...} in a recipe"
        )
    if path.is_dir():
        raise DarkroomError(
            f"{path} is a diffusers folder without a first stage that this version can load; give a Darkroom model "
            "folder, or a folder of AutoencoderKL or VQModel"
        )
    if file is None:
        raise DarkroomError(
            f"{path} is not a model; give a model folder (one that holds {INDEX} or {PIPELINE}) or a weight file "
            "(.safetensors, .ckpt)"
        )
    guess = guess_family(file.shapes)
    raise DarkroomError(
        f"{path} is {guess} ({len(file.shapes)} tensors), which this version cannot load by itself; {how_to_use(guess)}"
    )


def _load_part(part: str, folder: Path, weights: str, first_stage: FirstStage | None = None) -> Any:
    """Build a part from its config and fill it; every tensor must be there and fit."""
    config = read_json(folder / CONFIG, "config")
    file = folder / WEIGHTS[weights]
    if not file.is_file():  # a part that is not averaged (a frozen first stage) has one file only
        file = folder / WEIGHTS["ema"]
    stored = {name: entry.shape for name, entry in read_safetensors_header(file).tensors.items()}

    def build() -> nn.Module:
        return build_conditioner(config, first_stage) if part == "conditioner" else _BUILD[part](config)

    # Without numbers first: memory is taken for what fits the weights only.
    check_fit(hollow(build, len(stored), folder / CONFIG, f"the config of a {part}"), stored, file, folder / CONFIG)
    with SkipInitialisation():
        module = build()
    check = FiniteCheck(file)
    for group in _groups(iter_safetensors(file)):
        for name, tensor in group.items():
            check.see(name, tensor)
        module.load_state_dict(group, strict=False)  # all of them together are complete, as was found out before
    check.tell()
    return module


def _groups(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """A file's tensors, so many at a time that little memory is taken for them beside the module's own."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors:
        group[name] = tensor
        if sum(t.nbytes for t in group.values()) >= GROUP_BYTES:
            yield group
            group = {}
    yield group


def _remember_reference(first_stage: nn.Module, index: ModelIndex) -> None:
    """Note on a bundled first stage what it is, so that models trained on it can refer to it instead of copying it."""
    reference = index.references.get("first_stage")
    if reference is None and index.folder.parent == BUNDLED:
        digest = sha256_of(index.parts["first_stage"] / WEIGHTS["ema"])
        reference = {"name": index.folder.name, "sha256": digest}
    if reference is not None:
        object.__setattr__(first_stage, "reference", reference)


def _attach_preview(first_stage: FirstStage, preview: PreviewDecoder, index: ModelIndex) -> None:
    own, its = encoder_fingerprint(first_stage.autoencoder), preview.config_dict.get("first_stage")
    if own != its:
        raise DarkroomError(
            f"{index.parts['preview']} belongs to another first stage (encoder {str(its)[:12]}, this one has "
            f"{own[:12]}): delete that folder, then make one with `darkroom train preview --first-stage {index.folder}`"
        )
    first_stage.preview = preview
    preview.shared = "preview" not in index.declared  # it came with the bundled first stage that is referred to


# ------------------------------------------------------------------------------------------------------------ saving


def save(
    model: LatentDiffusion | FirstStage,
    folder: str | Path,
    *,
    card: str | None = None,
    live: Mapping[str, Mapping[str, Tensor]] | None = None,
    info: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    refer: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model folder; an older model of the same name is replaced in one step, other folders are refused.

    card:  text of README.md.
    live:  per part, the weights before averaging ("model.live.safetensors" beside the averaged ones).
    info:  joined to the model's own `info` (name, defaults, provenance...).
    dtype: precision in which parameters are stored ("float16" halves the file); buffers keep theirs.
    refer: name a bundled first stage instead of copying it.
    verify: is given the folder when all is written, before it takes its place; what it raises leaves the old one.
    """
    precision = None if str(dtype) == "auto" else select_dtype(dtype)
    destination = Path(folder).expanduser()
    parts = _parts(model)
    known = {} if isinstance(model, FirstStage) else saved_info(model)
    kept = {key: value for key, value in (known | dict(info or {})).items() if key not in _TRANSIENT}
    place = destination.resolve()
    kept.setdefault("name", place.parent.name if place.name == "model" else place.name)

    places: dict[str, Any] = {}
    files: dict[str, str] = {}
    with new_folder(destination, replaces=is_model_folder) as temporary:
        for part, module in parts.items():
            reference = getattr(module, "reference", None) if refer else None
            if reference is not None:
                places[part] = {"reference": reference}
                continue
            if part == "preview":
                if getattr(module, "shared", False) and isinstance(places["first_stage"], dict):
                    continue  # it comes with what is referred to
                _label_preview(module, parts["first_stage"], precision)
            places[part] = part
            (temporary / part).mkdir()
            raw = None if live is None else live.get(part)
            stored = torch.float16 if part == "preview" else precision
            for name, digest in _save_part(module, temporary / part, raw, stored).items():
                files[f"{part}/{name}"] = digest
        files |= save_kept(temporary, model.kept)
        kind = "first_stage" if isinstance(model, FirstStage) else "latent_diffusion"
        if card is not None:
            _write_text(temporary / "README.md", card)
        _write_text(temporary / INDEX, index_text(kind, kept, places, files))
        keep_other_files(destination, temporary, replaced={INDEX, "README.md", "official", *_BUILD})
        if verify is not None:
            verify(temporary)
    if model.kept is not None:  # what it was read from may have been replaced just now
        model.kept = read_kept(destination)
    return destination


def _parts(model: LatentDiffusion | FirstStage) -> dict[str, Any]:
    first_stage = model if isinstance(model, FirstStage) else model.first_stage
    parts: dict[str, Any] = {"first_stage": first_stage}
    if isinstance(model, LatentDiffusion):
        parts |= {"denoiser": model.denoiser, "conditioner": model.conditioner}
    parts["preview"] = None if first_stage is None else first_stage.preview
    return {name: module for name, module in parts.items() if module is not None}


def _label_preview(preview: Any, first_stage: FirstStage, precision: torch.dtype | None) -> None:
    """Write into its config whose latents it shows: those of the first stage as it will be loaded again."""
    preview.config_dict = preview.config_dict | {
        "first_stage": encoder_fingerprint(first_stage.autoencoder, stored_as=precision)
    }


def install_preview(preview: PreviewDecoder, folder: str | Path) -> Path:
    """Put a preview decoder into a model folder. Every other file stays byte for byte as it is, its index aside."""
    place = find_source(folder)
    first_stage = load_first_stage(place, "cpu")
    first_stage.preview = preview  # complains about one of other sizes
    _label_preview(preview, first_stage, None)
    index = read_json(place / INDEX, "model index")
    with new_folder(place / "preview", replaces=lambda old: (old / CONFIG).is_file()) as temporary:
        digests = _save_part(preview, temporary, None, torch.float16)
    index["parts"]["preview"] = "preview"
    index["files"] |= {f"preview/{name}": digest for name, digest in digests.items()}
    write_json(place / INDEX, index)
    return place / "preview"


def _save_part(
    module: nn.Module, folder: Path, live: Mapping[str, Tensor] | None, precision: torch.dtype | None
) -> dict[str, str]:
    """Config and weights of one part; gives the SHA-256 of each file."""
    config = getattr(module, "config_dict", None)
    if not isinstance(config, dict):
        raise DarkroomError(f"this {type(module).__name__} has no config_dict: build it with darkroom.build to save it")
    _write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    digests = {CONFIG: sha256_of(folder / CONFIG)}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for state, file in ((module.state_dict(), WEIGHTS["ema"]), (live, WEIGHTS["live"])):
        if state is None:
            continue
        tensors = {name: _stored(name, t, precision) if name in parameters else t for name, t in state.items()}
        digests[file] = write_safetensors(folder / file, tensors)
    return digests


def _stored(name: str, tensor: Tensor, precision: torch.dtype | None) -> Tensor:
    if precision is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(precision)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(result).all()):
        raise DarkroomError(f"{name} holds values beyond the range of {precision}; save in bfloat16 or float32")
    return result


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)


def keep_other_files(old: Path, new: Path, replaced: set[str]) -> None:
    """Replacing a model must not delete notes or pictures that someone put beside it."""
    if not old.is_dir():
        return
    for entry in old.iterdir():
        if entry.name in replaced or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(new / entry.name))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
