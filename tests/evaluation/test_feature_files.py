"""Parts of large sets: the same numbers however the work was cut, interrupted or divided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from extractor_stand_in import WIDTH, quick_extractor

from darkroom.errors import DarkroomError
from darkroom.evaluation.feature_files import EMBEDDING, FeatureFiles, Pictures, observe


class Noise:
    """Images by number, and how often each was asked for."""

    def __init__(self, count: int, stop_at: int | None = None) -> None:
        self.count, self.stop_at = count, stop_at
        self.read_numbers: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: Sequence[int]) -> Pictures:
        if self.stop_at is not None and self.stop_at in numbers:
            raise KeyboardInterrupt
        self.read_numbers += numbers
        images = [
            torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
            for n in numbers
        ]
        return Pictures(torch.stack(images), {"number": torch.tensor([float(n) for n in numbers])}, "told")


def everything(files: FeatureFiles) -> tuple[torch.Tensor, str]:
    return torch.cat([part[EMBEDDING] for part in files.parts([EMBEDDING])]), files.digest()


def test_interrupted_and_divided_work_gives_the_same_parts(tmp_path: Path) -> None:
    extractor = quick_extractor()
    whole = FeatureFiles(tmp_path / "whole", 21, 4)
    observe(Noise(21), whole, extractor)
    broken = FeatureFiles(tmp_path / "broken", 21, 4)
    with pytest.raises(KeyboardInterrupt):
        observe(Noise(21, stop_at=9), broken, extractor)
    rest = Noise(21)
    observe(rest, broken, extractor)
    assert rest.read_numbers == list(range(8, 21))  # what was there is not made again
    shared = FeatureFiles(tmp_path / "shared", 21, 4)
    for rank in (2, 0, 1):
        observe(Noise(21), shared, extractor, rank=rank, size=3)
    for files in (broken, shared):
        assert torch.equal(everything(files)[0], everything(whole)[0]) and files.digest() == whole.digest()
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_read_back(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, 21, 4)
    seen: list[int] = []
    reported: list[int] = []
    observe(
        Noise(21), files, quick_extractor(), report=reported.append, keep=lambda numbers, images: seen.extend(numbers)
    )
    assert seen == list(range(21)) and reported == [4, 4, 4, 4, 4, 1]
    assert torch.equal(files.value("number"), torch.arange(21).float())
    assert files.names == [EMBEDDING, "number"]
    embeddings = everything(files)[0]
    assert torch.equal(files.some(EMBEDDING, 7), embeddings[::3])
    assert torch.equal(files.some(EMBEDDING, 100), embeddings)
    moments = files.moments(WIDTH)
    assert torch.allclose(moments.covariance, torch.cov(embeddings.double().T), atol=1e-12)
    assert files.digest("conditions") and files.digest() != files.digest("conditions")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match="not finite"):
        observe(Noise(3), FeatureFiles(tmp_path, 3, 3), quick_extractor(scale=float("nan")))
    assert not list(tmp_path.glob("*"))
