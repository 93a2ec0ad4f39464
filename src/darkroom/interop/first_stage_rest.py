"""What an official first-stage file holds besides the autoencoder: the perceptual network, the discriminator...

They stay with the first stage on its way through our folder, so that the file comes back whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import DarkroomError
from darkroom.interop.compvis_first_stage import LEFT_OUT
from darkroom.interop.first_stage_files import FoundFirstStage, same_bits
from darkroom.interop.found_model import KEPT_FILE
from darkroom.interop.tensor_file import TensorFile, open_tensor_file
from darkroom.safe_files import write_safetensors


@dataclass(frozen=True)
class Rest:
    """Tensors of a file, by their official names."""

    file: TensorFile
    names: tuple[str, ...]


def rest_of(found: FoundFirstStage) -> Rest | None:
    """None where nothing is kept: in other layouts, and inside whole checkpoints, whose own conversion keeps it."""
    if found.layout == "compvis" and not found.inside:
        names = [name for name in found.file.shapes if name.startswith(tuple(LEFT_OUT))]
        return Rest(found.file, tuple(names)) if names else None
    if found.layout == "darkroom" and not found.inside and (found.path / KEPT_FILE).is_file():
        file = open_tensor_file(found.path / KEPT_FILE)
        return Rest(file, tuple(file.shapes))
    return None


def write_rest(folder: Path, rest: Rest) -> None:
    """Into a model folder that is being written."""
    (folder / KEPT_FILE).parent.mkdir()
    write_safetensors(folder / KEPT_FILE, rest.file.read(rest.names))


def count_rest(written: FoundFirstStage, source: FoundFirstStage) -> int:
    """How many of them the written file or folder gives back: all, bit for bit, or an error."""
    rest, again = rest_of(source), rest_of(written)
    if rest is None:
        return 0
    theirs = rest.file.read(rest.names)
    ours = {} if again is None else again.file.read(again.names)
    differing = [name for name in theirs if name not in ours or not same_bits(theirs[name], ours[name])]
    if differing:
        raise DarkroomError(f"{written.path} does not give back {differing[0]} of {source.path} bit for bit")
    return len(theirs)
