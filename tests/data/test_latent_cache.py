"""The latent cache serves exactly what the autoencoder gave, is never stale, and survives interruption."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import encoded, write
from torch import Tensor, nn

from darkroom.data import latent_cache
from darkroom.data.batches import Batches, collate
from darkroom.data.latent_cache import LatentCache, module_hash
from darkroom.data.pictures import PictureDataset
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError


class Encoder:
    """(B, 3, H, W) -> (B, 4, H/4, W/4), not symmetric under mirroring; counts the images it sees."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Conv2d(3, 4, 4, stride=4)
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.module(images)


@pytest.fixture
def data() -> ImageDataset:
    return open_dataset(DataConfig(count=20))


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    def make(**options: Any) -> ImageDataset:
        for number in range(8):
            write(tmp_path / "pictures" / f"{number}.png", encoded(number, size=(16, 12)))
        config = DataConfig(str(tmp_path / "pictures"), size=(16, 12), validation=0.0, **options)
        return open_dataset(config)

    return make


def build(data: ImageDataset, encoder: Encoder, folder: Path, **options: Any) -> LatentCache:
    return LatentCache.build(data, encoder, folder, autoencoder=encoder.module, **({"batch_size": 6} | options))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_moments_are_those_of_the_encoder(data: ImageDataset, tmp_path: Path, dtype: str, tolerance: float) -> None:
    encoder = Encoder()
    cache = build(data, encoder, tmp_path, dtype=dtype)
    assert len(cache) == 20 and encoder.seen == 20
    assert cache.fields == ("moments", "text", "class_label", "boxes", "segmentation", "depth")
    with torch.no_grad():
        expected = torch.cat([encoder.module(collate([data[i] for i in r])["image"]) for r in _ranges(20, 6)])
    stored = torch.stack([cache[i]["moments"] for i in range(20)])
    assert stored.dtype == torch.float32
    assert (stored - expected).abs().le(tolerance * expected.abs() + 1e-7 * bool(tolerance)).all()
    assert cache[3]["text"] == data[3]["text"] and "image" not in cache[3] and cache.captions() == data.captions()


def _ranges(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def test_batches_come_from_the_cache(data: ImageDataset, tmp_path: Path) -> None:
    cache = build(data, Encoder(), tmp_path)
    images, latents = Batches(data, 4, seed=1).batch_at(7), Batches(cache, 4, seed=1).batch_at(7)
    assert latents["moments"].shape == (4, 4, 16, 16) and latents["text"] == images["text"]
    assert "image" not in latents


def test_flips_are_stored(pictures: Any, tmp_path: Path) -> None:
    data, encoder = pictures(flip=True), Encoder()
    cache = build(data, encoder, tmp_path / "cache")
    assert encoder.seen == 16
    images, latents = Batches(data, 4, seed=0), Batches(cache, 4, seed=0)
    for step in range(6):  # the same draws flip the picture and choose the stored moments
        with torch.no_grad():
            expected = encoder.module(images.batch_at(step)["image"])
        assert torch.allclose(latents.batch_at(step)["moments"], expected, atol=1e-6)


def test_opened_again_and_never_stale(data: ImageDataset, tmp_path: Path) -> None:
    first = Encoder(0)
    build(data, first, tmp_path)
    again = Encoder(0)
    build(data, again, tmp_path)
    assert again.seen == 0
    trained = Encoder(1)
    cache = build(data, trained, tmp_path)  # other weights
    assert trained.seen == 20
    with torch.no_grad():
        assert torch.allclose(cache[0]["moments"], trained.module(collate([data[0]])["image"])[0], atol=1e-6)
    other = open_dataset(DataConfig(count=20, seed=9))
    build(other, trained, tmp_path)  # other data
    assert trained.seen == 40
    build(other, trained, tmp_path, dtype="float16")
    assert trained.seen == 60


def test_damaged_cache_is_computed_again(data: ImageDataset, tmp_path: Path) -> None:
    build(data, Encoder(), tmp_path)
    (tmp_path / "moments.bin").write_bytes(b"short")
    encoder = Encoder()
    build(data, encoder, tmp_path)
    assert encoder.seen == 20
    (tmp_path / "cache.json").write_text("{")
    build(data, encoder, tmp_path)
    assert encoder.seen == 40


def test_interrupted_work_is_continued(data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SYNC_EXAMPLES", 6)
    whole = build(data, Encoder(), tmp_path / "whole")

    class Stops(Encoder):
        def __call__(self, images: Tensor) -> Tensor:
            if self.seen >= 12:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        build(data, Stops(), tmp_path / "cut")
    with open(tmp_path / "cut" / "moments.partial", "ab") as file:
        file.write(b"a half-written batch")
    encoder, steps = Encoder(), []
    cache = build(data, encoder, tmp_path / "cut", progress=lambda done, count: steps.append((done, count)))
    assert encoder.seen == 8 and steps == [(18, 20), (20, 20)]
    assert all(torch.equal(cache[i]["moments"], whole[i]["moments"]) for i in range(20))
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [".lock", "cache.json", "moments.bin"]
    # A partial file of another autoencoder is not continued.
    with pytest.raises(KeyboardInterrupt):
        build(data, Stops(), tmp_path / "cut2")
    other = Encoder(5)
    build(data, other, tmp_path / "cut2")
    assert other.seen == 20


def test_refusals(pictures: Any, tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match="random_crop to null"):
        build(pictures(random_crop=8), Encoder(), tmp_path / "c")
    with pytest.raises(DarkroomError, match="float8"):
        build(pictures(), Encoder(), tmp_path / "c", dtype="float8")

    def broken(images: Tensor) -> Tensor:
        return images[:, :2, ::4, ::4] * float("nan")

    with pytest.raises(DarkroomError, match="not finite"):
        LatentCache.build(pictures(), broken, tmp_path / "c", autoencoder="broken")


def test_a_full_disk_leaves_nothing(data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DarkroomError, match="No space left on device"):
        build(data, Encoder(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_empty_set(pictures: Any, tmp_path: Path) -> None:
    pictures()
    empty = open_dataset(DataConfig(str(tmp_path / "pictures"), size=(16, 12), validation=0.0), "validation")
    assert len(empty) == 0
    assert len(build(empty, Encoder(), tmp_path / "c")) == len(build(empty, Encoder(), tmp_path / "c")) == 0


def test_replaced_pictures_keep_their_own_words(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "p" / f"{number}.png", encoded(number) if number else b"junk")
        write(tmp_path / "p" / f"{number}.txt", f"text {number}")
    config = DataConfig(str(tmp_path / "p"), size=8, validation=0.0)
    for _ in range(2):  # computed, then opened
        data = PictureDataset(config, "train", in_memory_bytes=0)
        cache = build(data, Encoder(), tmp_path / "c")
        assert [cache[i]["text"] for i in range(3)] == ["text 1", "text 1", "text 2"]
        assert torch.equal(cache[0]["moments"], cache[1]["moments"])


def test_module_hash() -> None:
    assert module_hash(Encoder(0).module) == module_hash(Encoder(0).module) != module_hash(Encoder(1).module)
    half = Encoder(0).module.half()
    assert module_hash(half) != module_hash(Encoder(0).module)
    assert module_hash(nn.BatchNorm1d(2)) == module_hash(nn.BatchNorm1d(2))  # a scalar buffer
