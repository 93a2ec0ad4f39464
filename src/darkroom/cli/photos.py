"""What commands that take photos and write photos have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    from darkroom.data.photographs import Photograph

JobT = TypeVar("JobT")
# Of the name of a mask in a folder: a_mask.png, or a.mask.png as in training.
MASK_ENDINGS = ("_mask", ".mask")
PROFILED = (".png", ".tif", ".tiff")  # hold the ICC profile of their colours
DEFAULT_SUFFIXES = (".png", ".tif", ".npy")  # of `default_suffix`


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name."""
    from darkroom.data.records import IMAGE_SUFFIXES

    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def without_masks(found: Sequence[Path]) -> list[Path]:
    """The pictures but for those that are named as masks of others among them, which is told."""
    stems = {path.stem for path in found}
    left = [p for p in found if not (p.stem.endswith(MASK_ENDINGS) and p.stem[: -len(MASK_ENDINGS[0])] in stems)]
    if len(left) < len(found):
        click.echo(f"note: {len(found) - len(left)} masks of other pictures are left out", err=True)
    return left


def refuse_there(path: Path) -> NoReturn:
    raise DarkroomError(f"{path} is there already; name another with -o, or add --overwrite")


def note_done(done: int, jobs: int) -> None:
    click.echo(f"note: {done} of {jobs} are there already (--overwrite makes them anew)", err=True)


def note_frames(path: Path, photo: Photograph) -> None:
    if photo.frames > 1:
        click.echo(f"note: {path} has {photo.frames} frames, of which the first is taken", err=True)


def note_profile(path: Path, photo: Photograph, outputs: Sequence[Path]) -> None:
    """outputs: where what was made of the photo at `path` was written."""
    if photo.profile is not None and any(output.suffix.lower() not in PROFILED for output in outputs):
        click.echo(f"note: only .png and .tif keep the colour profile of {path}", err=True)


def folder_beside(place: Path, added: str) -> Path:
    """Where the results of a folder go without --output: beside it, under its name and `added`."""
    named = place.resolve() if place.name in ("", "..") else place
    if not named.name:
        raise DarkroomError(f"{place}: no folder can lie beside it; name one with -o")
    return named.with_name(named.name + added)


def check_origins(outputs: Sequence[tuple[Path, Path]], inputs: Sequence[Path], what: str) -> None:
    """(output, photo) of all that will be written, and what will be read: no file is written twice, and none of those
    that are read. what: they are, in the message."""
    read = {path.resolve() for path in inputs}
    origins: dict[Path, Path] = {}
    for output, photo in outputs:
        if output.resolve() in read:
            raise DarkroomError(f"{output}: that is {what} itself; choose another output")
        if (other := origins.setdefault(output.resolve(), photo)) != photo:
            raise DarkroomError(f"{other} and {photo} would both become {output}; put them into two folders")


def is_done(output: Path, inputs: Sequence[Path]) -> bool:
    """Whether a file of a folder's results is there, whatever type it needed; what is read is no result."""
    read = {path.resolve() for path in inputs}
    found = (output.with_suffix(suffix) for suffix in DEFAULT_SUFFIXES)
    return any(path.exists() and path.resolve() not in read for path in found)


def files_of(output: Path) -> list[Path]:
    """What is written for a result: beside an .npy, which holds no text, a .json with its settings."""
    return [output, output.with_suffix(".json")] if output.suffix.lower() == ".npy" else [output]


def check_folder(output: Path) -> None:
    """Refuses what cannot be, or is not meant to be, a folder of several results."""
    from darkroom.data.image_files import OUTPUT_SUFFIXES

    if not output.is_dir() and (output.exists() or output.suffix.lower() in OUTPUT_SUFFIXES):
        raise DarkroomError(f"{output} is a file; for several pictures name a folder")


def fitted_output(output: Path, named: bool, photo: Photograph) -> Path:
    """Where a result of this photo goes: into the file that was named, if its type can hold it, else into one of a type
    that can."""
    from darkroom.data.image_files import check_suffix, default_suffix

    channels, dtype = photo.values.shape[2] + (photo.alpha is not None), str(photo.values.dtype)
    path = output if named else output.with_suffix(default_suffix(channels, dtype))
    check_suffix(path, channels, dtype)
    return path


def do_each(jobs: Sequence[JobT], make: Callable[[JobT], Sequence[Path]], many: bool, what: str) -> None:
    """Do them one after the other and print what was written. Of many, one that cannot be done is left out with a note,
    and the error comes at the end. what: could not be done, in that error."""
    failed: list[str] = []
    for job in jobs:
        try:
            written = make(job)
        except DarkroomError as error:
            if not many:
                raise
            failed.append(str(error))
            click.echo(f"note: left out: {error}", err=True)
            continue
        for path in written:
            click.echo(click.format_filename(path))
    if failed:
        raise DarkroomError(f"{len(failed)} of {len(jobs)} pictures could not be {what}; the first: {failed[0]}")
