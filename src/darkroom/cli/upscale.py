"""`darkroom upscale`: photos in, enlarged or sharpened photos out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darkroom.cli.models import open_model, shareable
from darkroom.cli.photos import (
    check_folder,
    check_origins,
    do_each,
    files_of,
    fitted_output,
    folder_beside,
    is_done,
    note_done,
    note_frames,
    note_profile,
    pictures_in,
    refuse_there,
    without_masks,
)
from darkroom.errors import DarkroomError
from darkroom.generation_defaults import DEFAULT_MODELS

if TYPE_CHECKING:
    from darkroom.data.photographs import Photograph
    from darkroom.upscaling import Upscaler, UpscaleSettings

DEFAULT_MODEL = DEFAULT_MODELS["upscale"]
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
@click.option("--steps", type=click.IntRange(1, 10_000), help="Solver steps: more is slower and draws more.")
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
      darkroom upscale photo.jpg --consistency --seed 3
      darkroom upscale -m runs/deblur holiday/ -o sharp/
    """
    jobs, many = choose_jobs(photos, output)
    read = [job.photo for job in jobs]
    todo = [job for job in jobs if overwrite or not many or not is_done(job.output, read)]
    if len(todo) < len(jobs):
        note_done(len(jobs) - len(todo), len(jobs))
    if not todo:
        return

    from darkroom.cli.outputs import check_writable
    from darkroom.data.photographs import read_photograph

    for job in todo:
        check_writable(job.output.parent)
    first = None
    if not many:  # what is wrong with it is said before a model is loaded
        if todo[0].named and todo[0].output.exists() and not overwrite:
            refuse_there(todo[0].output)
        first = read_photograph(todo[0].photo)
        _target(todo[0], first, read, overwrite)

    from darkroom.upscaling import Upscaler, UpscaleSettings

    needed = "give a whole model that was trained with low_resolution"
    upscaler = Upscaler(open_model(model, "upscale", options["device"], options["threads"], needed))
    settings = UpscaleSettings(
        guidance_scale=options["cfg_scale"],
        **{name: options[name] for name in UpscaleSettings.__dataclass_fields__ if name in options},
    )
    source = shareable(model or DEFAULT_MODEL)

    def make(job: Job) -> list[Path]:
        photo = first or read_photograph(job.photo)
        return [_make(upscaler, job, photo, _target(job, photo, read, overwrite), settings, source)]

    do_each(todo, make, many, "upscaled")


@dataclass(frozen=True)
class Job:
    """named: the output is what someone typed, its type included."""

    photo: Path
    output: Path
    named: bool = False


def choose_jobs(photos: Sequence[Path], output: Path | None) -> tuple[list[Job], bool]:
    """What becomes what, and whether there may be many: a folder was named, or more than one photo."""
    many = len(photos) > 1 or photos[0].is_dir()
    into = output is not None and (many or output.is_dir() or not output.suffix)
    if into and output is not None:
        check_folder(output)
    if output is not None and not into:
        jobs = [Job(photos[0], output, named=True)]
    else:
        jobs = []
        for place in photos:
            folder = output or (folder_beside(place, ADDED) if place.is_dir() else place.parent)
            found = [place]
            if place.is_dir():
                found = without_masks(pictures_in(place))
                if not found:
                    raise DarkroomError(f"{place}: no pictures in this folder; name another, or a picture")
            added = "" if output is not None or place.is_dir() else ADDED
            jobs += [Job(photo, folder / f"{photo.stem}{added}.png") for photo in found]
    check_origins([(job.output, job.photo) for job in jobs], [job.photo for job in jobs], "the photo")
    return jobs, many


def _target(job: Job, photo: Photograph, read: Sequence[Path], overwrite: bool) -> Path:
    """Where the result goes, in a type of file that can hold it. read: the photos of all jobs."""
    path = fitted_output(job.output, job.named, photo)
    check_origins([(file, job.photo) for file in files_of(path)], read, "the photo")
    if there := [file for file in files_of(path) if file.exists() and not overwrite]:
        refuse_there(there[0])
    return path


def _make(upscaler: Upscaler, job: Job, photo: Photograph, path: Path, settings: UpscaleSettings, source: str) -> Path:
    """One photo; gives where it was written."""
    from darkroom.cli.progress import PhaseBars
    from darkroom.data.photographs import save_photograph
    from darkroom.model_pictures import resized_alpha
    from darkroom.png_settings import png_text

    note_frames(job.photo, photo)
    try:
        with PhaseBars(unit="windows") as bars:
            result = upscaler(photo.values, settings, bars.update)
    except DarkroomError as error:
        raise DarkroomError(f"{job.photo}: {error}") from None
    record = result.settings
    if source:
        record["model"]["source"] = source
    alpha = None if photo.alpha is None else resized_alpha(photo.alpha, result.image.shape[:2])
    height, width = result.image.shape[:2]
    save_photograph(path, replace(photo, values=result.image, alpha=alpha), png_text(record, (width, height)))
    note_profile(job.photo, photo, [path])
    if result.difference is not None and result.difference >= 0.5:
        click.echo(
            f"note: {job.photo} has contrasts that no picture made smaller has: made smaller, the result differs from "
            f"it by up to {result.difference:.1f}",
            err=True,
        )
    return path
