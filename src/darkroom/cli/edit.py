"""`darkroom edit`: photos in, photos with a part of them repainted out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darkroom.cli.models import open_model, shareable
from darkroom.cli.outputs import check_writable
from darkroom.cli.photos import (
    MASK_ENDINGS,
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
)
from darkroom.cli.seeds import SeedsCommand, parse_seeds
from darkroom.errors import DarkroomError
from darkroom.generation_defaults import DEFAULT_MODELS

if TYPE_CHECKING:
    import numpy as np

    from darkroom.data.photographs import Photograph
    from darkroom.editing import Edited, Editor, EditSettings

DEFAULT_MODEL = DEFAULT_MODELS["edit"]
ADDED = "-edited"  # to a name without --output
MAX_EXPAND = 16_384


def parse_expand(text: str | None) -> tuple[int, int, int, int]:
    """ "64" -> (64, 64, 64, 64); "0,32,0,32": left, top, right, bottom."""
    words = ["0"] if text is None else text.split(",")
    words = words * 4 if len(words) == 1 else words
    if len(words) != 4 or not all(w.strip().isdecimal() and int(w) <= MAX_EXPAND for w in words):
        raise DarkroomError(
            f"--expand {text}: give the pixels to add, one number for all sides, or left,top,right,bottom such as "
            "64,0,64,0"
        )
    left, top, right, bottom = map(int, words)
    return left, top, right, bottom


@click.command(cls=SeedsCommand, short_help="Repaint a part of a photo, add a border, vary it.")
@click.argument("photo", type=click.Path(path_type=Path), metavar="PHOTO|FOLDER")
@click.argument("prompt", required=False)
@click.option("--mask", type=click.Path(path_type=Path), metavar="FILE", help="White is repainted, black is kept.")
@click.option("--expand", metavar="PIXELS", help="Add a border: 64, or left,top,right,bottom.")
@click.option("--strength", type=float, help="How much is changed, above 0 to 1. [default: 1; 0.6 without a mask]")
@click.option("--class", "class_label", metavar="NAME", help="What to paint, for models of classes.")
@click.option("-m", "--model", help=f"Model folder or bundled name. [default: {DEFAULT_MODEL}]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=f"A file or a folder. [default: PHOTO{ADDED}.png]"
)
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
@click.option("--seed", "seeds", multiple=True, metavar="N...", help="Seeds: 7, or 1 2 5, or 0..15. [default: 0]")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Solver steps: more is slower and finer.")
@click.option("--solver", help="ddim, dpm++2m, repaint, ... (docs: solvers)")
@click.option("--eta", type=click.FloatRange(0, 1), help="Share of fresh noise per step, for solvers that draw noise.")
@click.option("--cfg-scale", "guidance_scale", type=float, help="How closely to follow the prompt; 1 is off.")
@click.option("--negative-prompt", help="What the new part should not be like.")
@click.option("--window", type=click.IntRange(min=1), help="Largest side of what the model sees at once, in pixels.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time: more needs more memory.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def edit(
    photo: Path, mask: Path | None, model: str | None, output: Path | None, overwrite: bool, **options: Any
) -> None:
    """Repaint what --mask marks in PHOTO, or what --expand adds to it. Without both a model of text or classes (-m)
    makes variations of it.

    Every pixel that is not repainted comes back as it was, in 8 or 16 bits. Photos may have any size, opacity and a
    colour profile. Of a FOLDER every picture with a mask beside it (a.jpg, a_mask.png) is repainted.

    \b
      darkroom edit photo.png --mask mask.png
      darkroom edit photo.png --expand 0,32,0,32 --seed 0..3 -o taller.png
      darkroom edit pictures/ -o without/
      darkroom edit -m emoji face.png "a sad face" --strength 0.7
    """
    from darkroom.editing import Editor, EditSettings

    given = {name: options[name] for name in EditSettings.__dataclass_fields__ if name in options}
    given |= {
        "seeds": tuple(dict.fromkeys(parse_seeds(options["seeds"]))) or (0,),
        "expand": parse_expand(options["expand"]),
    }
    settings = EditSettings(**given)
    jobs = choose_jobs(photo, mask, output, settings.seeds)
    many = photo.is_dir()
    read = _read_files(jobs)
    if many and not overwrite:
        todo = [replace(job, outputs={s: p for s, p in job.outputs.items() if not is_done(p, read)}) for job in jobs]
        jobs = [job for job in todo if job.outputs]
        if len(jobs) < len(todo):
            note_done(len(todo) - len(jobs), len(todo))
    if not jobs:
        return
    for job in jobs:
        check_writable(next(iter(job.outputs.values())).parent)
    # What is wrong is said before a model is loaded.
    first = None if many else _read(jobs[0], settings, read, overwrite)
    needed = "it cannot repaint: give a whole model"
    editor = Editor(open_model(model, "edit", options["device"], options["threads"], needed))
    source = shareable(model or DEFAULT_MODEL)

    def make(job: Job) -> list[Path]:
        return _make(editor, job, first or _read(job, settings, read, overwrite), settings, source)

    do_each(jobs, make, many, "edited")


@dataclass(frozen=True)
class Job:
    """outputs: by seed; named: they are what someone typed, their type included."""

    photo: Path
    mask: Path | None
    outputs: dict[int, Path]
    named: bool = False


@dataclass(frozen=True)
class Ready:
    """A job whose files have been read. mask: (H, W) bool or None; outputs: by seed, in types that can hold them."""

    photo: Photograph
    mask: np.ndarray | None
    outputs: dict[int, Path]


def choose_jobs(photo: Path, mask: Path | None, output: Path | None, seeds: Sequence[int]) -> list[Job]:
    """What becomes what."""
    if not photo.is_dir():
        into = output is not None and (output.is_dir() or not output.suffix)
        named = output is not None and not into
        if output is None or into:
            output = (output or photo.parent) / f"{photo.stem}{'' if into else ADDED}.png"
        jobs = [Job(photo, mask, _outputs(output, seeds), named)]
    else:
        if mask is not None:
            raise DarkroomError(
                f"{photo} is a folder, whose masks lie in it: a.jpg and a{MASK_ENDINGS[0]}.png; leave out --mask"
            )
        folder = output or folder_beside(photo, ADDED)
        check_folder(folder)
        jobs = [Job(p, m, _outputs(folder / f"{p.stem}.png", seeds)) for p, m in pairs(photo)]
    outputs = [(path, job.photo) for job in jobs for path in job.outputs.values()]
    check_origins(outputs, _read_files(jobs), "the photo or the mask")
    return jobs


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    """The pictures of a folder that have a mask beside them, with it; says which have none."""
    found = pictures_in(folder)
    masks: dict[str, Path] = {}
    for path in [p for p in found if p.stem.endswith(MASK_ENDINGS)]:
        name = path.stem[: -len(MASK_ENDINGS[0])]
        if (other := masks.setdefault(name, path)) != path:
            raise DarkroomError(f"{other} and {path} are masks of one picture; take one of them away")
    pictures = [p for p in found if not p.stem.endswith(MASK_ENDINGS)]
    together = [(p, masks[p.stem]) for p in pictures if p.stem in masks]
    if not together:
        raise DarkroomError(
            f"{folder}: no picture has a mask beside it; a.jpg needs a{MASK_ENDINGS[0]}.png, white where to repaint"
        )
    if alone := [p.name for p in pictures if p.stem not in masks]:
        click.echo(f"note: {len(alone)} of {len(pictures)} pictures have no mask, the first is {alone[0]}", err=True)
    return together


def _outputs(path: Path, seeds: Sequence[int]) -> dict[int, Path]:
    if len(seeds) == 1:
        return {seeds[0]: path}
    return {seed: path.with_name(f"{path.stem}-seed{seed}{path.suffix}") for seed in seeds}


def _read_files(jobs: Sequence[Job]) -> list[Path]:
    return [path for job in jobs for path in (job.photo, job.mask) if path is not None]


def _read(job: Job, settings: EditSettings, read: Sequence[Path], overwrite: bool) -> Ready:
    """The photo, what is to be repainted, and the files of the results; complains about what cannot be done. read: what
    all jobs read."""
    from darkroom.data.photographs import read_photograph
    from darkroom.editing.editor import as_hole, check_hole, expanded

    photo = read_photograph(job.photo)
    outputs = {seed: fitted_output(path, job.named, photo) for seed, path in job.outputs.items()}
    files = [file for path in outputs.values() for file in files_of(path)]
    check_origins([(file, job.photo) for file in files], read, "the photo or the mask")
    mask = None if job.mask is None else read_mask(job.mask)
    if mask is not None:
        try:
            hole = as_hole(mask, (photo.values.shape[0], photo.values.shape[1]))
            check_hole(expanded(photo.values, hole, settings.expand)[1])
        except DarkroomError as error:
            raise DarkroomError(f"{job.mask}: {error}") from None
    if there := [file for file in files if file.exists() and not overwrite]:
        refuse_there(there[0])
    note_frames(job.photo, photo)
    return Ready(photo, mask, outputs)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: what is opaque and nearer to white than to black."""
    import numpy as np

    from darkroom.data.photographs import read_photograph

    photo = read_photograph(path)
    top = np.iinfo(photo.values.dtype).max if photo.values.dtype.kind in "iu" else 1.0
    white: np.ndarray = photo.values.mean(2) >= top / 2
    return white if photo.alpha is None else white & (photo.alpha[..., 0] >= top / 2)


def _make(editor: Editor, job: Job, ready: Ready, settings: EditSettings, source: str) -> list[Path]:
    """All images of one photo; gives where they were written."""
    from darkroom.cli.progress import StepBar
    from darkroom.data.photographs import save_photograph
    from darkroom.png_settings import png_text

    photo, settings = ready.photo, replace(settings, seeds=tuple(ready.outputs))
    try:
        with StepBar("editing", 100, "%") as bar:  # how many steps there are follows from the mask
            report = bar.update
            result = editor(photo.values, ready.mask, settings, lambda done, total: report(max(1, 100 * done // total)))
    except DarkroomError as error:
        raise DarkroomError(f"{job.photo}: {error}") from None
    written = list(ready.outputs.values())
    for image, record, path in zip(result.images, result.settings, written, strict=True):
        if source:
            record["model"]["source"] = source
        edited = replace(photo, values=image, alpha=_alpha(photo, result, settings))
        save_photograph(path, edited, png_text(record, (image.shape[1], image.shape[0])))
    note_profile(job.photo, photo, written)
    if result.mask is None and result.images[0].shape != photo.values.shape:
        height, width = result.images[0].shape[:2]
        click.echo(f"note: the variations have {width}x{height} pixels, which the model makes at once", err=True)
    return written


def _alpha(photo: Photograph, result: Edited, settings: EditSettings) -> np.ndarray | None:
    """Opacity as it was, full in what was added; of variations of another size, resized along."""
    import numpy as np

    from darkroom.model_pictures import resized_alpha

    if photo.alpha is None:
        return None
    if result.mask is None:
        size = result.images[0].shape[:2]
        return photo.alpha if size == photo.alpha.shape[:2] else resized_alpha(photo.alpha, size)
    left, top, right, bottom = settings.expand
    full = np.iinfo(photo.alpha.dtype).max if photo.alpha.dtype.kind in "iu" else 1.0
    return np.pad(photo.alpha, ((top, bottom), (left, right), (0, 0)), constant_values=full)
