"""`darkroom generate`: arguments -> one `Request` -> images that carry their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darkroom.cli.adapters import adapter_options, digests_of, given_adapters, note_places, recorded_adapters
from darkroom.cli.conditions import condition_options, given_files, idle_guidance
from darkroom.cli.models import open_model, shareable
from darkroom.cli.outputs import DEFAULT_FOLDER, Target, preview_file, show_in, write_grid, write_result
from darkroom.cli.seeds import MAX_SEEDS, SeedsCommand, parse_seeds
from darkroom.errors import DarkroomError
from darkroom.generation_defaults import DEFAULT_MODELS

if TYPE_CHECKING:
    import numpy as np

    from darkroom.cli.progress import StepBar
    from darkroom.generation_request import Request
    from darkroom.latent_diffusion import LatentDiffusion

DEFAULT_MODEL = DEFAULT_MODELS["generate"]
MAX_SIDE = 16_384
PREVIEWS = 10  # about so many in the course of a batch


def parse_guidance(words: Sequence[str]) -> dict[str, float] | None:
    """("text=5", "boxes=2") -> {"text": 5.0, "boxes": 2.0}; None for no word."""
    scales = {}
    for word in words:
        name, _, scale = word.partition("=")
        try:
            scales[name] = float(scale)
        except ValueError:
            raise DarkroomError(f"--guidance {word}: give NAME=SCALE, for example --guidance text=5") from None
    return scales or None


@click.command(cls=SeedsCommand, short_help="Make images.")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="A class by name or number (repeatable).")
@click.option("-m", "--model", help=f"Model folder or bundled name. [default: {DEFAULT_MODEL}]")
@adapter_options
@click.option("--seed", "seeds", multiple=True, metavar="N...", help="Seeds: 7, or 1 2 5, or 0..15. [default: 0]")
@click.option("-n", "--count", type=click.IntRange(1, MAX_SEEDS), help="So many images per prompt, seeds counted up.")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Solver steps: more is slower and finer.")
@click.option("--cfg-scale", type=float, help="Guidance: how closely to follow the prompt; 1 is off.")
@click.option(
    "--guidance", "guidances", multiple=True, metavar="NAME=SCALE", help="Guidance of one condition alone (repeatable)."
)
@click.option(
    "--guidance-interval", type=float, nargs=2, metavar="LOW HIGH", help="Guide only between these sigma/alpha."
)
@click.option(
    "--guidance-rescale", type=click.FloatRange(0, 1), help="Against oversaturation at high guidance: 0 to 1."
)
@click.option("--guide", metavar="MODEL", help="A weaker model to be guided away from, in place of no condition.")
@click.option("--solver", help="ddim, ddpm, euler, euler_ancestral, heun, dpm++2m, unipc, ... (docs: solvers)")
@click.option(
    "--eta",
    type=click.FloatRange(0, 1),
    help="Share of fresh noise per step, for ddim and the ancestral and SDE solvers.",
)
@click.option("--width", type=click.IntRange(1, MAX_SIDE), help="Pixels. [default: the model's size]")
@click.option("--height", type=click.IntRange(1, MAX_SIDE), help="Pixels. [default: the model's size]")
@click.option("--negative-prompt", help="What the images should not be like.")
@condition_options
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time: more needs more memory.")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Repeat the batch recorded in this PNG.")
@click.option("--grid", is_flag=True, help="All images in one PNG instead of one file each.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=f"An image file or a folder. [default: {DEFAULT_FOLDER}/]"
)
@click.option("--preview", type=click.Path(path_type=Path), help="A .png that shows the unfinished images meanwhile.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def generate(**options: Any) -> None:
    """Make images from prompts, from classes, or from nothing if the model was trained so.

    Each prompt is drawn with each seed; the same seed gives the same picture. Every PNG carries its settings:
    --from repeats the batch it was made in, pixel for pixel (to a .png: that one image).

    \b
      darkroom generate "a red fox" "a snail" --seed 0..3 --grid -o grid.png
      darkroom generate -m runs/clothes --class T-Shirt --count 8
      darkroom generate -m runs/mixed "a red circle" --boxes layout.json
      darkroom generate --from generated/0000-seed0-a-red-fox.png -o again.png
    """
    for name, value in options.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
                raise DarkroomError(f"{name.replace('_', ' ')}: these bytes are not UTF-8 text")
    known = {name: value for name, value in options.items() if name in Given.__dataclass_fields__}
    given = Given(**known, files=given_files(options))
    if options["source"] is not None:
        _repeat(given, options["source"])
    else:
        _generate(given)


@dataclass(frozen=True)
class Given:
    """The command line as it was typed."""

    prompts: tuple[str, ...]
    classes: tuple[str, ...]
    model: str | None
    seeds: tuple[str, ...]
    count: int | None
    steps: int | None
    cfg_scale: float | None
    guidances: tuple[str, ...]
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float | None
    guide: str | None
    loras: tuple[str, ...]
    embeddings: tuple[str, ...]
    solver: str | None
    eta: float | None
    width: int | None
    height: int | None
    negative_prompt: str | None
    noise_level: int | None
    files: dict[str, Path]  # conditions, by field
    batch_size: int | None
    grid: bool
    output: Path | None
    preview: Path | None
    device: str
    threads: int | None


def _generate(given: Given) -> None:
    if given.cfg_scale is not None and not math.isfinite(given.cfg_scale):
        raise DarkroomError(f"--cfg-scale {given.cfg_scale}: give a finite number")
    if given.prompts and given.classes:
        raise DarkroomError("give prompts or classes, not both")
    seeds = parse_seeds(given.seeds) or [0]
    if given.count is not None:
        if len(seeds) > 1:
            raise DarkroomError("give several seeds or --count, not both: --count counts up from one seed")
        seeds = list(range(seeds[0], seeds[0] + given.count))
    target = Target.choose(given.output, given.grid)
    preview = preview_file(given.preview)

    from darkroom.cli.conditions import read_files
    from darkroom.generation_request import Request

    model = _load(given)
    target = target.fitted(model)
    subjects = given.prompts or given.classes
    size = _size(given, model)
    conditions = read_files(model, given.files, size)
    request = Request(
        prompts=[prompt for prompt in given.prompts for _ in seeds] or None,
        class_labels=[name for name in given.classes for _ in seeds] or None,
        seeds=seeds * max(1, len(subjects)),
        steps=given.steps,
        guidance_scale=given.cfg_scale,
        guidance=parse_guidance(given.guidances),
        guidance_interval=given.guidance_interval,
        guidance_rescale=given.guidance_rescale or 0.0,
        solver=given.solver,
        eta=given.eta,
        size=size,
        negative_prompt=given.negative_prompt,
        batch_size=given.batch_size,
        conditions=conditions or None,
        noise_level=given.noise_level,
    )
    _make(model, request, target, given, preview=preview)
    typed = {"text": given.prompts or given.negative_prompt, "class_label": given.classes}
    asked = [*conditions, *(field for field, value in typed.items() if value)]
    for reason in idle_guidance(model, request.guidance or {}, asked, size):
        click.echo(f"note: {reason}: its --guidance changes nothing", err=True)
    if model.conditioner.fields and not asked:
        ways = {"text": "a prompt", "class_label": "--class"}
        takes = " or ".join(ways.get(field, field) for field in model.conditioner.fields)
        click.echo(f"note: nothing was asked for ({takes}): the pictures are of anything the model knows", err=True)


def _size(given: Given, model: LatentDiffusion) -> tuple[int, int]:
    """(width, height): what was typed, else what a given picture says, else the model's."""
    from darkroom.cli.conditions import natural_size

    typed = given.width is not None or given.height is not None
    natural = None if typed else natural_size(model, given.files)
    width, height = natural or model.defaults["size"]
    return given.width or width, given.height or height


def _repeat(given: Given, source: Path) -> None:
    """Make the recorded batch again. What would change the pictures cannot be combined with it."""
    fixed = (
        *("prompts", "classes", "seeds", "count", "steps", "cfg_scale", "solver", "eta", "width", "height"),
        *("guidances", "guidance_interval", "guidance_rescale", "negative_prompt", "batch_size", "noise_level"),
    )
    for name in fixed:
        if getattr(given, name) not in (None, ()):
            known = {"prompts": "a prompt", "classes": "--class", "seeds": "--seed", "guidances": "--guidance"}
            flag = known.get(name, f"--{name}")
            raise DarkroomError(f"--from repeats an image with its own settings; leave out {flag.replace('_', '-')}")

    from darkroom.png_settings import read_settings

    record = read_settings(source)
    if "upscale" in record:
        raise DarkroomError(
            f"{source} was made by `darkroom upscale`; repeat that command on the picture it was made of"
        )
    if "edit" in record:
        raise DarkroomError(f"{source} was made by `darkroom edit`; repeat that command on the picture it was made of")
    index = record.get("index")
    target = Target.choose(given.output, given.grid or index is None)
    preview = preview_file(given.preview)

    import torch

    from darkroom import __version__
    from darkroom.cli.conditions import recorded_conditions
    from darkroom.config import from_dict
    from darkroom.generation_request import Request

    try:
        request = from_dict(Request, record["request"])
        threads = int(record.get("threads") or torch.get_num_threads())
        recorded, recorded_guide = (dict(record.get(part) or {}) for part in ("model", "guide"))
    except (DarkroomError, TypeError, ValueError) as error:
        raise DarkroomError(f"the settings inside {source} cannot be read: {error}") from None
    if given.threads is None:
        given = replace(given, threads=min(max(threads, 1), 1024))
    if given.model is None:
        given = replace(given, model=_recorded_model(source, recorded))
    if not (given.loras or given.embeddings):
        loras, embeddings = recorded_adapters(source, recorded)
        given = replace(given, loras=loras, embeddings=embeddings)
    if given.guide is None and recorded_guide:
        given = replace(given, guide=_recorded_model(source, recorded_guide, "--guide"))
    model = _load(given)
    target = target.fitted(model)
    size = request.size or model.defaults["size"]
    request = replace(request, conditions=recorded_conditions(model, request.conditions, given.files, size))
    for what, then, now in (
        ("model", recorded.get("sha256"), model.info.get("sha256")),
        ("Darkroom", record.get("version"), __version__),
        ("torch", record.get("torch"), torch.__version__),
        ("thread count", threads, given.threads),
        ("adapters", *(digests_of(entries) for entries in (recorded, model.info))),
    ):
        if then is not None and then != now:
            shown = (str(then)[:10], str(now)[:10]) if what == "model" else (then, now)
            click.echo(f"note: {what} was {shown[0]}, here it is {shown[1]}: pixels may differ", err=True)
    only = index if target.single and isinstance(index, int) and 0 <= index < len(request.seeds) else None
    _make(model, request, target, given, only, preview)


def _recorded_model(image: Path, recorded: dict[str, Any], flag: str = "-m") -> str:
    """The model that an image names, if it is where it was or is a bundled one."""
    from darkroom.model_folder import bundled

    source, name = (str(recorded.get(key) or "") for key in ("source", "name"))
    if source and (Path(source).exists() or source in bundled()):
        return source
    if name in bundled():
        return name
    raise DarkroomError(
        f"{image} was made by the model {source or name or '(unnamed)'}, which is not here; add {flag} MODEL"
    )


def _load(given: Given, name: str | None = None) -> LatentDiffusion:
    """The model that was named, or another of the same command."""
    adapters = given_adapters(given.loras, given.embeddings) if name is None else []
    name = name or given.model
    model = open_model(
        name,
        "generate",
        given.device,
        given.threads,
        "it cannot generate by itself: give a whole model, or see `darkroom reconstruct`",
        adapters,
    )
    if model.first_stage is None:
        raise DarkroomError(
            f"{name or DEFAULT_MODEL} has no first stage, so its latents cannot be turned into images: give a folder "
            "or file of the model that holds one too"
        )
    return model


def _make(
    model: LatentDiffusion,
    request: Request,
    target: Target,
    given: Given,
    only: int | None = None,
    preview: Path | None = None,
) -> None:
    """Generate batch by batch and write each image as soon as it is there; with `only`, write that image alone."""
    from darkroom.cli.progress import StepBar

    request = model.validate(request)
    assert request.batch_size and request.steps
    guide = None if given.guide is None else _load(given, given.guide)
    sources = {"model": shareable(given.model or DEFAULT_MODEL), "guide": shareable(given.guide) if given.guide else ""}
    count, start = len(request.seeds), target.numbering()
    grid: list[tuple[np.ndarray, dict[str, Any]]] = []
    pixels = model.pixels
    written: list[Path] = []
    batches = range(0, count, request.batch_size)
    with StepBar("generating", len(batches) * request.steps) as bar:
        for number, first in enumerate(batches):
            # Each file records only the batch that it was computed in: that is what decides its last bits.
            part = _slice(request, slice(first, first + request.batch_size))
            result = model.generate(
                part,
                guide=guide,
                progress=_counting(bar, number * request.steps),
                preview=None if preview is None else show_in(preview, pixels),
                preview_every=max(1, request.steps // PREVIEWS),
            )
            for i, (image, settings) in enumerate(zip(result.images, result.settings, strict=True), start=first):
                for name, source in sources.items():
                    if source:
                        settings[name]["source"] = source
                note_places(settings["model"], model, shareable)
                if target.grid:
                    grid.append((image, settings))
                elif only is None or only == i:
                    alone = only is not None or count == 1
                    written.append(
                        write_result(target.image(start + (0 if alone else i), alone, settings), image, settings)
                    )
    if target.grid:
        seeds = len(set(request.seeds))
        columns = seeds if count > seeds > 1 else None
        written.append(write_grid(target.grid_image(start), grid, columns, pixels))
    for path in written[:8]:
        click.echo(click.format_filename(path))
    if len(written) > 8:
        click.echo(f"... {len(written)} images in {written[0].parent}")


def _counting(bar: StepBar, before: int) -> Callable[[int, int], None]:
    """A batch's own progress, counted on from the batches before it."""
    return lambda done, total: bar.update(before + done)


def _slice(request: Request, part: slice) -> Request:
    """Some images of a validated request."""
    return replace(
        request,
        prompts=request.prompts[part] if request.prompts is not None else None,
        class_labels=request.class_labels[part] if request.class_labels is not None else None,
        seeds=request.seeds[part],
        conditions={name: values[part] for name, values in (request.conditions or {}).items()} or None,
    )
