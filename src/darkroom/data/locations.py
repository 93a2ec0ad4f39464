"""The words by which a recipe names its data (a path or glob, `shapes`, either with "@COUNT" behind it), what records
keep of them, and an even choice among what they hold."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

_COUNT = re.compile(r"(?P<path>.+)@(?P<count>[1-9][0-9]*)")


def part_of(location: str) -> tuple[str, int | None]:
    """ "PATH@COUNT" -> (path, count); count None where there is none. A file of that very name is itself."""
    found = _COUNT.fullmatch(location)
    if found is None or os.path.exists(os.path.expanduser(location)):
        return location, None
    return found["path"], int(found["count"])


def is_shapes(location: str) -> bool:
    """Whether this names the procedural set: "shapes", "shapes:single", "shapes:pair", with a count or without."""
    return part_of(location)[0].split(":")[0] == "shapes"


def is_there(location: str) -> bool:
    """Whether something can be read by this name: a file or folder, a glob that matches, or `shapes`."""
    path = os.path.expanduser(part_of(location)[0])
    return is_shapes(location) or os.path.exists(path) or bool(glob.glob(path, recursive=True))


def is_mixture(source: str | list[str]) -> bool:
    """Whether `source` needs more than one reader: a count behind a name, or `shapes` in a list."""
    if isinstance(source, str):
        return part_of(source)[1] is not None
    return any(part_of(location)[1] is not None or is_shapes(location) for location in source)


def data_names(source: str | list[str]) -> list[str]:
    """The names of the data without the folders they lie in: models and records travel, their maker's paths do not."""
    return [Path(s).name for s in ([source] if isinstance(source, str) else source)]


def spread(length: int, most: int) -> list[int]:
    """At most so many indices, evenly over the whole: folders often lie class by class."""
    count = min(length, most)
    return [i * length // count for i in range(count)]
