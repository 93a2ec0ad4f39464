"""`darkroom upscale`: photos in, enlarged or sharpened photos out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.data.photographs import Photograph
    from darkroom.upscaling import Upscaler, UpscaleSettings

DEFAULT_MODEL = "clothing-sr"
ADDED = "-upscaled"  # to a name without --output


@click.command(short_help="Enlarge or sharpen photos of any size.")
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PHOTO|FOLDER...")
@click.option("-m", "--model", help=f"Model folder or bundled name. [default: {DEFAULT_MODEL}]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=f"A file or a folder. [default: PHOTO{ADDED}.png]"
)
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
@click.option("--consistency", is_flag=True, help="The result, made smaller again, is exactly the photo.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Other details.")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Solver steps: more is slower and finer.")
@click.option("--solver", help="ddim, euler, dpm++2m, ... (docs: solvers)")
@click.option("--eta", type=click.FloatRange(0, 1), help="Share of fresh noise per step, for solvers that draw noise.")
@click.option(
    "--cfg-scale", type=float, help="Guidance, for models that were trained with dropped conditions; 1 is off."
)
@click.option("--prompt", help="What the photo shows, for models that also take text.")
@click.option("--noise-level", type=click.IntRange(min=0), help="Noise on the photo, for models trained with it.")
@click.option("--window", type=click.IntRange(min=1), help="Side of the windows in pixels of the result.")
@click.option("--overlap", type=click.IntRange(min=0), help="What windows share at least, in pixels of the result.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows at a time: more needs more memory.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def upscale(photos: tuple[Path, ...], model: str | None, output: Path | None, overwrite: bool, **options: Any) -> None:
    """Enlarge PHOTO, of any size, by the factor that the model was trained for; a model for blurred pictures sharpens.

    8 and 16 bits, grey and colour, opacity and colour profile are kept; the result is upright. Of a FOLDER all pictures
    are taken, those that are done already left out.

    \b
      darkroom upscale photo.jpg -o large.png
      darkroom upscale photo.jpg --consistency --steps 20
      darkroom upscale -m runs/deblur holiday/ -o sharp/
    """
    jobs, many = choose_jobs(photos, output)
    todo = [job for job in jobs if overwrite or not job.output.exists()]
    if not many and not todo:
        raise DarkroomError(f"{jobs[0].output} is there already; name another with -o, or add --overwrite")
    if len(todo) < len(jobs):
        click.echo(
            f"note: {len(jobs) - len(todo)} of {len(jobs)} are there already (--overwrite makes them anew)", err=True
        )
    if not todo:
        return

    from darkroom.cli.generate import check_writable
    from darkroom.data.photographs import read_photograph

    for job in todo:
        check_writable(job.output.parent)
    first = None
    if not many:  # what is wrong with it is said before a model is loaded
        first = read_photograph(todo[0].photo)
        _target(todo[0], first, overwrite)
    upscaler = _load(model, options["device"], options["threads"])

    from darkroom.upscaling import UpscaleSettings

    settings = UpscaleSettings(
        guidance_scale=options["cfg_scale"],
        **{name: options[name] for name in UpscaleSettings.__dataclass_fields__ if name in options},
    )
    source = _shareable(model)
    failed: list[str] = []
    for job in todo:
        try:
            written = _make(upscaler, job, first or read_photograph(job.photo), settings, source, overwrite)
        except DarkroomError as error:
            if not many:
                raise
            failed.append(str(error))
            click.echo(f"note: left out: {error}", err=True)
            continue
        click.echo(click.format_filename(written))
    if failed:
        raise DarkroomError(f"{len(failed)} of {len(todo)} pictures could not be used; the first: {failed[0]}")


@dataclass(frozen=True)
class Job:
    """named: the output is what someone typed, its type included."""

    photo: Path
    output: Path
    named: bool = False


def choose_jobs(photos: Sequence[Path], output: Path | None) -> tuple[list[Job], bool]:
    """What becomes what, and whether there may be many: a folder was named, or more than one photo."""
    from darkroom.data.records import IMAGE_SUFFIXES

    many = len(photos) > 1 or photos[0].is_dir()
    into = output is not None and (many or output.is_dir() or not output.suffix)
    if into and output is not None and output.exists() and not output.is_dir():
        raise DarkroomError(f"{output} is a file; for several pictures name a folder")
    if output is not None and not into:
        jobs = [Job(photos[0], output, named=True)]
    else:
        jobs = []
        for place in photos:
            folder = output or (place.with_name(place.name + ADDED) if place.is_dir() else place.parent)
            found = [place]
            if place.is_dir():
                found = sorted(p for p in place.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
                if not found:
                    raise DarkroomError(f"{place}: no pictures in this folder; name another, or a picture")
            added = "" if output is not None or place.is_dir() else ADDED
            jobs += [Job(photo, folder / f"{photo.stem}{added}.png") for photo in found]
    outputs: dict[Path, Path] = {}
    for job in jobs:
        if job.output.absolute() == job.photo.absolute():
            raise DarkroomError(f"{job.output}: that is the photo itself; choose another output")
        if (other := outputs.setdefault(job.output.absolute(), job.photo)) != job.photo:
            raise DarkroomError(f"{other} and {job.photo} would both become {job.output}; put them into two folders")
    return jobs, many


def _load(name: str | None, device: str, threads: int | None) -> Upscaler:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from darkroom.latent_diffusion import LatentDiffusion
    from darkroom.model_io import bundled, load
    from darkroom.upscaling import Upscaler

    if name is None and DEFAULT_MODEL not in bundled() and not Path(DEFAULT_MODEL).exists():
        raise DarkroomError("no model was named and this version ships none for this; add -m MODEL")
    model = load(name or DEFAULT_MODEL, device=device)
    if not isinstance(model, LatentDiffusion):
        raise DarkroomError(f"{name} is a first stage only; give a whole model that was trained with low_resolution")
    return Upscaler(model)


def _target(job: Job, photo: Photograph, overwrite: bool) -> Path:
    """Where the result goes, in a type of file that can hold it."""
    from darkroom.data.image_files import check_suffix, default_suffix

    channels, dtype = photo.values.shape[2] + (photo.alpha is not None), str(photo.values.dtype)
    path = job.output if job.named else job.output.with_suffix(default_suffix(channels, dtype))
    check_suffix(path, channels, dtype)
    if path != job.output and path.exists() and not overwrite:
        raise DarkroomError(f"{path} is there already; name another with -o, or add --overwrite")
    return path


def _make(
    upscaler: Upscaler, job: Job, photo: Photograph, settings: UpscaleSettings, source: str, overwrite: bool
) -> Path:
    """One photo; gives where it was written."""
    from darkroom.cli.progress import PhaseBars
    from darkroom.data.photographs import photograph_bytes
    from darkroom.png_settings import png_text
    from darkroom.safe_files import write_file
    from darkroom.upscaling.upscaler import enlarged_alpha

    path = _target(job, photo, overwrite)
    if photo.frames > 1:
        click.echo(f"note: {job.photo} has {photo.frames} frames, of which the first is taken", err=True)
    try:
        with PhaseBars(unit="windows") as bars:
            result = upscaler(photo.values, settings, bars.update)
    except DarkroomError as error:
        raise DarkroomError(f"{job.photo}: {error}") from None
    record = result.settings
    if source:
        record["model"]["source"] = source
    alpha = None if photo.alpha is None else enlarged_alpha(photo.alpha, upscaler.factor)
    large = replace(photo, values=result.image, alpha=alpha)
    write_file(path, photograph_bytes(large, path.suffix.lower(), png_text(record)))
    if photo.profile is not None and path.suffix.lower() != ".png":
        click.echo(f"note: {path.suffix} is written without the colour profile of {job.photo}; .png keeps it", err=True)
    if result.difference is not None and result.difference >= 0.5:
        click.echo(
            f"note: {job.photo} has contrasts that no picture made smaller has: made smaller, the result differs from "
            f"it by up to {result.difference:.1f}",
            err=True,
        )
    return path


def _shareable(model: str | None) -> str:
    """What a picture may say about where its model lies: no absolute path."""
    return "" if model is not None and (Path(model).is_absolute() or model.startswith("~")) else model or DEFAULT_MODEL
