"""What an official first-stage file holds besides the autoencoder: the perceptual network, the discriminator...

They stay with the first stage on its way through our folder, so that the file comes back whole.
"""

from __future__ import annotations

from darkroom.errors import DarkroomError
from darkroom.interop.compvis_first_stage import LEFT_OUT
from darkroom.interop.first_stage_files import FoundFirstStage, same_bits
from darkroom.interop.found_model import KEPT_FILE
from darkroom.interop.kept_tensors import Kept, keep, read_kept
from darkroom.interop.tensor_source import FileSource


def rest_of(found: FoundFirstStage) -> Kept | None:
    """None where nothing is kept: in other layouts, and inside whole checkpoints, whose own conversion keeps it."""
    if found.layout == "compvis" and not found.inside:
        names = {name: name for name in found.file.shapes if name.startswith(tuple(LEFT_OUT))}
        return keep(FileSource([("", found.file)]), names)
    if found.layout == "darkroom" and not found.inside and (found.path / KEPT_FILE).is_file():
        return read_kept(found.path)
    return None


def count_rest(written: FoundFirstStage, source: FoundFirstStage) -> int:
    """How many of them the written file or folder gives back: all, bit for bit, or an error."""
    rest, again = rest_of(source), rest_of(written)
    if rest is None:
        return 0
    names = rest.source.shapes
    there = {} if again is None else again.source.shapes
    for name in names:
        if name not in there or not same_bits(rest.source.read([name])[name], again.source.read([name])[name]):  # type: ignore[union-attr]
            raise DarkroomError(f"{written.path} does not give back {name} of {source.path} bit for bit")
    return len(names)
