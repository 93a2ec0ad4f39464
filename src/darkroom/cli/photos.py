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


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name."""
    from darkroom.data.records import IMAGE_SUFFIXES

    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def refuse_there(path: Path) -> NoReturn:
    raise DarkroomError(f"{path} is there already; name another with -o, or add --overwrite")


def note_done(done: int, jobs: int) -> None:
    click.echo(f"note: {done} of {jobs} are there already (--overwrite makes them anew)", err=True)


def note_frames(path: Path, photo: Photograph) -> None:
    if photo.frames > 1:
        click.echo(f"note: {path} has {photo.frames} frames, of which the first is taken", err=True)


def note_profile(path: Path, photo: Photograph, outputs: Sequence[Path]) -> None:
    """outputs: where what was made of the photo at `path` was written."""
    if photo.profile is not None and any(output.suffix.lower() != ".png" for output in outputs):
        click.echo(f"note: only .png keeps the colour profile of {path}", err=True)


def check_origins(outputs: Sequence[tuple[Path, Path]]) -> None:
    """(output, photo) of all that will be written: no file is written twice."""
    origins: dict[Path, Path] = {}
    for output, photo in outputs:
        if (other := origins.setdefault(output.absolute(), photo)) != photo:
            raise DarkroomError(f"{other} and {photo} would both become {output}; put them into two folders")


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
