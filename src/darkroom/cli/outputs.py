"""Where `darkroom generate` puts its images, and how they get there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np

    from darkroom.latent_diffusion import LatentDiffusion
    from darkroom.pixel_format import PixelFormat

DEFAULT_FOLDER = "generated"


@dataclass(frozen=True)
class Target:
    """Where images go: one file (`single`), or a folder where nothing is ever overwritten. A grid is for looking at and
    always a PNG; `suffix` is the type of the images' own files."""

    path: Path
    single: bool
    grid: bool
    suffix: str = ".png"

    @classmethod
    def choose(cls, output: Path | None, grid: bool) -> Target:
        path = Path(DEFAULT_FOLDER) if output is None else output
        if path.suffix and not path.is_dir():
            known = (".png",) if grid else (".png", ".tif", ".tiff", ".npy", ".exr")
            if path.suffix.lower() not in known:
                what = "a grid is" if grid else "images are"
                raise DarkroomError(
                    f"{path}: {what} written as {', '.join(known)}, which keeps every pixel and the settings"
                )
            check_writable(path.parent)
            return cls(path, True, grid, path.suffix)
        if path.exists() and not path.is_dir():
            raise DarkroomError(f"{path} is a file; give a .png or a folder")
        check_writable(path)
        return cls(path, False, grid)

    def fitted(self, model: LatentDiffusion) -> Target:
        """With a file type that holds this model's images; a type that was named and cannot is an error."""
        from darkroom.data.image_files import check_suffix, default_suffix

        if self.grid:
            return self
        if not self.single:
            return replace(self, suffix=default_suffix(model.image_channels, model.pixels.dtype))
        check_suffix(self.path, model.image_channels, model.pixels.dtype)
        return self

    def numbering(self) -> int:
        """The first free number in the folder: one more than the highest that a file begins with."""
        if self.single or not self.path.is_dir():
            return 0
        found = (re.match(r"(\d{4,9})-", entry.name) for entry in self.path.iterdir())
        return max((int(match[1]) for match in found if match), default=-1) + 1

    def image(self, number: int, alone: bool, settings: dict[str, Any]) -> Path:
        """The file of one image."""
        if self.single and alone:
            return self.path
        request, index = settings["request"], settings["index"]
        if self.single:
            return self.path.with_name(f"{self.path.stem}-{number:03d}-seed{request['seeds'][index]}{self.suffix}")
        subjects = request["prompts"] or request["class_labels"]
        words = re.sub(r"[^\w]+", "-", str(subjects[index]).lower()) if subjects else ""
        words = words.strip("-_")[:40].strip("-_")
        return self.path / f"{number:04d}-seed{request['seeds'][index]}{'-' if words else ''}{words}{self.suffix}"

    def grid_image(self, number: int) -> Path:
        return self.path if self.single else self.path / f"{number:04d}-grid.png"


def check_writable(folder: Path) -> None:
    """Found out before the images are made, not after."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise DarkroomError(f"cannot save in {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DarkroomError(f"cannot save in {folder}: no permission to write in {place}")


def preview_file(path: Path | None) -> Path | None:
    if path is not None:
        if path.suffix.lower() != ".png" or path.is_dir():
            raise DarkroomError(f"--preview {path}: give the name of a .png, which is overwritten again and again")
        check_writable(path.parent)
    return path


def show_in(file: Path, pixels: PixelFormat) -> Callable[[int, np.ndarray], None]:
    """Writes the unfinished images of a batch into `file`, whole each time, so that a viewer may reload it."""
    from darkroom.data.io import image_grid, write_png

    return lambda done, images: write_png(file, image_grid(images, pixels=pixels))


def write_result(path: Path, image: np.ndarray, settings: dict[str, Any]) -> Path:
    from darkroom.data.image_files import save_image
    from darkroom.png_settings import png_text

    save_image(path, image, png_text(settings))
    return path


def write_grid(
    path: Path, images: list[tuple[np.ndarray, dict[str, Any]]], columns: int | None, pixels: PixelFormat
) -> Path:
    """One picture of all images, row by row, in 8 bits; its record is the request of all of them."""
    from darkroom.data.io import image_grid, write_png
    from darkroom.png_settings import png_text

    first = images[0][1]
    request = dict(first["request"])
    for name in ("prompts", "class_labels", "seeds"):
        if request[name] is not None:
            request[name] = [settings["request"][name][settings["index"]] for _, settings in images]
    if request["conditions"] is not None:
        request["conditions"] = {
            field: [settings["request"]["conditions"][field][settings["index"]] for _, settings in images]
            for field in request["conditions"]
        }
    picture = image_grid([image for image, _ in images], columns, pixels=pixels)
    write_png(path, picture, png_text({**first, "request": request, "index": None}))
    return path
