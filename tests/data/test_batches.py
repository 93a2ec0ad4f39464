"""Batches are a pure function of the step; ranks slice the joint batch; epochs cover the set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import encoded, write

from darkroom.data.batches import Batches, collate, ordered_batches
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError


@pytest.fixture(scope="module")
def scenes() -> ImageDataset:
    return open_dataset(DataConfig(count=22))


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    def make(**options: Any) -> ImageDataset:
        for number in range(9):
            write(tmp_path / f"{number}.png", encoded(number, size=(16, 12)))
        return open_dataset(DataConfig(str(tmp_path), size=(16, 12), validation=0.0, **options))

    return make


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = all(torch.equal(v, other[k]) for k, v in one.items() if isinstance(v, torch.Tensor))
    return tensors and one.get("text") == other.get("text") and one.keys() == other.keys()


def test_collate(scenes: ImageDataset) -> None:
    batch = collate([scenes[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 64, 64) and batch["image"].dtype == torch.float32
    assert torch.equal(batch["image"], torch.stack([scenes[i]["image"] for i in range(4)]) / 127.5 - 1)
    ends = collate([{"image": torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2)}])["image"]
    assert ends.flatten().tolist() == [-1, 1]
    assert batch["class_label"].dtype == torch.int64 and batch["class_label"].shape == (4,)
    assert batch["segmentation"].shape == (4, 64, 64) and batch["segmentation"].dtype == torch.int64
    assert len(batch["text"]) == len(batch["boxes"]) == 4 and batch["boxes"][0].shape[1] == 5


def test_the_step_alone_decides(scenes: ImageDataset) -> None:
    one, other = Batches(scenes, 4, seed=1), Batches(scenes, 4, seed=1)
    later = other.batch_at(13)
    for step in range(13):
        one.batch_at(step)
    assert same(one.batch_at(13), later)
    assert Batches(scenes, 4, seed=2).indices(13) != one.indices(13)


def test_an_epoch_shows_everything_but_the_remainder_once(scenes: ImageDataset) -> None:
    batches = Batches(scenes, 4, seed=0)
    first, second = ([i for s in range(5) for i in batches.indices(e * 5 + s)] for e in range(2))
    assert len(set(first)) == len(first) == 20 == len(set(second)) and first != second
    assert batches.epoch(5) == 1.0


@pytest.mark.parametrize("count", [1, 3])
def test_a_tiny_set_is_repeated(count: int) -> None:
    batches = Batches(open_dataset(DataConfig(count=count)), 8, seed=0)
    indices = batches.indices(4)
    assert len(indices) == 8 and set(indices) == set(range(count))
    assert batches.batch_at(0)["image"].shape[0] == 8


def test_ranks_slice_the_joint_batch(pictures: Any) -> None:
    data = pictures(flip=True, random_crop=8)
    joint = Batches(data, 4, seed=5)
    parts = [Batches(data, 2, seed=5, rank=r, world_size=2) for r in range(2)]
    for step in range(5):
        expected = joint.batch_at(step)["image"]
        assert torch.equal(torch.cat([p.batch_at(step)["image"] for p in parts]), expected)


def test_micro_batches_follow_one_another(scenes: ImageDataset) -> None:
    plain, split = Batches(scenes, 4, seed=3), Batches(scenes, 4, seed=3, micro_batches=2)
    assert [split.indices(s, m) for s in range(3) for m in range(2)] == [plain.indices(s) for s in range(6)]
    with pytest.raises(ValueError, match="micro-batch 2"):
        split.batch_at(0, 2)


def test_flip_and_crop(pictures: Any) -> None:
    data = pictures(flip=True)
    plain, mirrored = Batches(data, 3, seed=0, augment=False), Batches(data, 3, seed=0)
    flips = []
    for step in range(30):
        for one, other in zip(plain.batch_at(step)["image"], mirrored.batch_at(step)["image"], strict=True):
            flips.append(torch.equal(other, one.flip(-1)))
            assert flips[-1] or torch.equal(other, one)
    assert 30 < sum(flips) < 60
    cropped = Batches(pictures(random_crop=(8, 6)), 3, seed=0)
    assert cropped.batch_at(0)["image"].shape == (3, 3, 6, 8)
    assert same(cropped.batch_at(4), cropped.batch_at(4))
    corners = {tuple(cropped.batch_at(s)["image"][0, :, 0, 0].tolist()) for s in range(20)}
    assert len(corners) > 10
    assert Batches(pictures(), 3, seed=0, crop=(8, 8)).batch_at(0)["image"].shape == (3, 3, 8, 8)
    with pytest.raises(DarkroomError, match="does not fit"):
        Batches(pictures(), 3, seed=0, crop=(32, 32))


def test_prefetch_changes_nothing(scenes: ImageDataset) -> None:
    plain, ahead = Batches(scenes, 4, seed=1), Batches(scenes, 4, seed=1, prefetch=True)
    for step in (0, 1, 2, 7, 8, 3):
        assert same(plain.batch_at(step), ahead.batch_at(step))
    ahead.close()
    assert same(plain.batch_at(4), ahead.batch_at(4))


def test_ordered_batches(scenes: ImageDataset) -> None:
    parts = list(ordered_batches(scenes, 8, limit=20))
    assert [len(p["text"]) for p in parts] == [8, 8, 4]
    assert [t for p in parts for t in p["text"]] == scenes.captions()[:20]


def test_bad_arguments(scenes: ImageDataset) -> None:
    with pytest.raises(DarkroomError, match="batch_size=0"):
        Batches(scenes, 0, seed=0)
    with pytest.raises(DarkroomError, match="empty"):
        Batches([], 4, seed=0)
