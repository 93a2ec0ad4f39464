"""Fields for conditions: low resolution, masks, depth, label maps and vectors, from rules and from files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import encoded, label_map, pixels, write, write_shard
from PIL import Image

from darkroom.data.batches import Batches, collate
from darkroom.data.degradations import LowResolution, blurred, degrade
from darkroom.data.latent_cache import LatentCache
from darkroom.data.masks import RandomMask, draw_mask
from darkroom.data.resizing import bicubic
from darkroom.data.shapes import COLOURS, depth_map, draw_scene, render
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.data.transforms import crop_example, crop_step, flip_example
from darkroom.errors import DarkroomError

# ---- low resolution


def test_smaller_is_the_bicubic_of_pillow() -> None:
    """In floating point to rounding; of uint8, which Pillow also rounds between the axes, within one step."""
    image = torch.from_numpy(pixels(3, (48, 32)).transpose(2, 0, 1).copy())
    small = degrade(image, LowResolution(4))
    assert small.shape == (3, 8, 12) and small.dtype == torch.uint8
    theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    difference = np.abs(small.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.6
    for size in ((8, 12), (11, 7), (32, 48), (50, 96)):
        ours = bicubic(image.float(), size)
        for mine, plane in zip(ours.numpy(), image.numpy(), strict=True):
            picture = Image.fromarray(plane.astype(np.float32))
            other = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
            assert np.abs(mine - other).max() < 1e-3


def test_smaller_is_keys_kernel_stretched_by_the_factor() -> None:
    """Against the formula in float64, far from the border."""
    row = torch.rand(1, 1, 64, generator=torch.Generator().manual_seed(0))

    def keys(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    places = np.arange(64) + 0.5
    for i, value in enumerate(bicubic(row.expand(1, 4, 64), (1, 16))[0, 0].tolist()):
        weights = keys((places - (i + 0.5) * 4) / 4)
        if 2 <= i < 14:
            assert value == pytest.approx(weights @ row[0, 0].double().numpy() / weights.sum(), abs=1e-6)


def test_blur_is_a_gaussian() -> None:
    """Of a single point: the squared distance has the asked variance along both axes, and nothing is lost."""
    point = torch.zeros(1, 2, 41, 41)
    point[..., 20, 20] = 1
    spot = blurred(point, 2.0)[0, 1]
    offsets = torch.arange(41.0) - 20
    assert float(spot.sum()) == pytest.approx(1, abs=1e-5)
    for axis in (0, 1):
        assert float((spot.sum(axis) * offsets**2).sum()) == pytest.approx(4.0, rel=0.03)
    flat = torch.full((1, 3, 9, 9), 7.0)
    torch.testing.assert_close(blurred(flat, 1.5), flat)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_the_type_and_the_range_stay(dtype: torch.dtype) -> None:
    image = torch.zeros(1, 16, 16)
    image[:, :, 8:] = 200
    for rule in (LowResolution(2), LowResolution(1, blur=1.0), LowResolution(4, blur=0.5)):
        made = degrade(image.to(dtype), rule)
        assert made.dtype == dtype and made.shape[-1] == 16 // rule.factor
        assert float(made.float().min()) >= 0 and float(made.float().max()) <= 200


def test_rules_that_do_nothing_are_refused() -> None:
    bad: list[dict[str, Any]] = [{"factor": 0}, {"factor": 1}, {"blur": -1.0}, {"blur": (2.0, 1.0)}, {"blur": 100.0}]
    for options in (*bad, {"pipeline": "bsr", "blur": 1.0}):
        with pytest.raises(DarkroomError, match=r"data\.low_resolution"):
            LowResolution(**options)  # type: ignore[arg-type]
    for options in ({"share": (0.0, 0.5)}, {"share": (0.5, 0.4)}, {"everything": 2.0}):
        with pytest.raises(DarkroomError, match=r"data\.repaint_mask"):
            RandomMask(**options)  # type: ignore[arg-type]


# ---- masks


@pytest.mark.parametrize("size", [(32, 32), (64, 24), (8, 8)])
def test_masks_cover_what_the_rule_says(size: tuple[int, int]) -> None:
    rule = RandomMask((0.1, 0.5))
    masks = [draw_mask(np.random.default_rng(seed), size, rule) for seed in range(100)]
    assert all(m.shape == (1, size[1], size[0]) and set(np.unique(m)) <= {0, 1} for m in masks)
    shares = np.array([m.mean() for m in masks])
    assert shares.min() >= 0.1 and shares.max() <= 0.5 and shares.std() > 0.02
    assert len({m.tobytes() for m in masks}) > 60


def test_everything_and_narrow_shares() -> None:
    everything = [draw_mask(np.random.default_rng(s), (16, 16), RandomMask(everything=0.5)).all() for s in range(200)]
    assert 70 < sum(everything) < 130
    narrow = [draw_mask(np.random.default_rng(s), (32, 32), RandomMask((0.33, 0.34))).mean() for s in range(20)]
    assert all(abs(share - 0.335) < 0.02 for share in narrow)  # a stripe, where nothing random fits


# ---- derived fields


def config(**options: Any) -> DataConfig:
    return DataConfig(
        **{"count": 12, "size": 32, "low_resolution": LowResolution(4), "repaint_mask": RandomMask(), **options}
    )


def test_derived_fields_stand_beside_the_others() -> None:
    data, plain = open_dataset(config()), open_dataset(DataConfig(count=12, size=32))
    assert data.fields == (*plain.fields, "low_resolution", "repaint_mask")
    assert data.digest == plain.digest and data.captions() == plain.captions() and len(data) == 12
    assert (data.low_resolution_factor, plain.low_resolution_factor) == (4, None)
    assert data.map_names == plain.map_names == ["background", *data.class_names]
    example = data[3]
    assert torch.equal(example["image"], plain[3]["image"])
    assert torch.equal(example["low_resolution"], degrade(example["image"], LowResolution(4)))
    assert torch.equal(example["repaint_mask"], data[3]["repaint_mask"])
    assert not torch.equal(example["repaint_mask"], data[4]["repaint_mask"])
    assert set(data.without_image(3, ["repaint_mask", "text"])) == {"repaint_mask", "text"}
    assert torch.equal(data.without_image(3)["low_resolution"], example["low_resolution"])
    assert data.describe()["fields"] == list(data.fields)
    only = open_dataset(config(low_resolution=None))
    assert only.fields == (*plain.fields, "repaint_mask")


def test_a_batch_of_everything() -> None:
    data = open_dataset(config())
    batch = collate([data[i] for i in range(3)], data.pixels)
    expected = {
        "image": (3, 3, 32, 32),
        "low_resolution": (3, 3, 8, 8),
        "repaint_mask": (3, 1, 32, 32),
        "depth": (3, 1, 32, 32),
        "segmentation": (3, 32, 32),
    }
    assert {name: tuple(batch[name].shape) for name in expected} == expected
    assert batch["low_resolution"].min() >= -1 and batch["low_resolution"].dtype == torch.float32


def test_masks_differ_from_epoch_to_epoch_and_not_between_ranks() -> None:
    data = open_dataset(config())
    whole = Batches(data, 4, seed=1)
    masks = [whole.batch_at(step)["repaint_mask"] for step in range(6)]
    assert torch.equal(masks[2], Batches(data, 4, seed=1).batch_at(2)["repaint_mask"])
    by_index = {i: [] for i in range(12)}
    for step in range(6):
        for i, mask in zip(whole.indices(step), masks[step], strict=True):
            by_index[i].append(mask)
    assert all(not torch.equal(*seen) for seen in by_index.values())  # twice in two epochs
    halves = [Batches(data, 2, seed=1, rank=r, world_size=2).batch_at(3)["repaint_mask"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), masks[3])
    still = Batches(data, 4, seed=1, augment=False)
    (index,) = still.indices(0)[:1]
    assert torch.equal(still.batch_at(0)["repaint_mask"][0], data[index]["repaint_mask"])


def test_flips_and_crops_keep_the_fields_together() -> None:
    example = open_dataset(config())[0]
    example["image"] = example["image"].float()
    example["low_resolution"] = degrade(example["image"], LowResolution(4))
    flipped = flip_example(example)
    for name in ("image", "low_resolution", "repaint_mask", "depth", "segmentation"):
        assert torch.equal(flipped[name], example[name].flip(-1)), name
    assert crop_step(example, 16, 8) == 4 and crop_step({"image": example["image"]}, 15, 7) == 1
    cropped = crop_example(example, 8, 4, 16, 8)
    assert torch.equal(cropped["low_resolution"], example["low_resolution"][:, 1:3, 2:6])
    for name in ("image", "repaint_mask", "depth"):
        assert torch.equal(cropped[name], example[name][:, 4:12, 8:24]), name
    with pytest.raises(DarkroomError, match="random_crop 15x8 does not fit"):
        crop_step(example, 15, 8)


def test_random_crops_fall_on_the_blocks() -> None:
    data = open_dataset(config(random_crop=16))
    batches = Batches(data, 4, seed=0)
    for step in range(3):
        batch = batches.batch_at(step)
        assert batch["image"].shape[2:] == (16, 16) and batch["low_resolution"].shape[2:] == (4, 4)
        assert batch["repaint_mask"].shape[2:] == (16, 16)
        # Away from the border, where the crop sees less, the small picture is that of the crop.
        again = torch.stack([degrade(image, LowResolution(4)) for image in batch["image"]])
        error = (batch["low_resolution"] - again)[..., 1:3, 1:3].abs()
        assert error.max() < 0.05


def test_a_cache_gives_the_image_where_it_is_wanted(tmp_path: Path) -> None:
    data = open_dataset(config())

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images[:, :2, ::4, ::4]

    options: dict[str, Any] = {"autoencoder": "x"}
    both = LatentCache.build(data, encode, tmp_path, wanted=["image", "repaint_mask"], **options)
    assert both.fields == ("moments", "image", "repaint_mask") and set(both[2]) == set(both.fields)
    assert torch.equal(both[2]["image"], data[2]["image"]) and both.mask_rule == RandomMask()
    low = LatentCache.build(data, encode, tmp_path, wanted=["low_resolution"], **options)
    assert set(low[2]) == {"moments", "low_resolution"}
    batch = Batches(both, 4, seed=0).batch_at(0)
    assert batch["image"].min() >= -1 and batch["moments"].shape == (4, 2, 8, 8)


# ---- depth of shapes


def test_depth_of_shapes_lies_on_the_objects() -> None:
    for index in range(20):
        scene = draw_scene(index)
        depth, labels = depth_map(scene), render(scene)[1]
        assert depth.shape == labels.shape and depth.dtype == np.float32
        assert np.array_equal(depth >= 0.25, labels > 0) or np.mean((depth >= 0.25) != (labels > 0)) < 0.02
        assert depth.max() == 1 and depth.min() == 0
        if len(scene.objects) == 2:
            centres = [depth[int(o.y), int(o.x)] for o in scene.objects if o.shape != "ring"]
            assert set(centres) <= {1.0, 0.5} and scene.objects[0].colour in COLOURS


# ---- from files


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """A sample of 12x8 with everything beside it."""
    rows, columns = np.mgrid[:8, :12]
    return {
        f"{number}.png": encoded(number, size=(12, 8)),
        f"{number}.seg.png": label_map(np.where(columns < 6, 1, 255)),
        f"{number}.mask.png": label_map(np.where(rows < 4, 255, 0)),
        f"{number}.depth.npy": npy((rows * 12 + columns + number * 1000).astype(np.float32)),
        f"{number}.emb.npy": npy(np.arange(4) + number),
        f"{number}.txt": b"a picture",
    }


@pytest.mark.parametrize("where", ["folder", "shard", "listed"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_companions_of_pictures(tmp_path: Path, where: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / ("data.tar" if where == "shard" else "data")
    files = {name: data for number in range(4) for name, data in members(number).items()}
    if where == "shard":
        write_shard(source, dict(files))
    else:
        if where == "listed":
            lines = [f'{{"file_name": "{n}.png", "text": "listed"}}' for n in range(4)]
            files = {k: v for k, v in files.items() if not k.endswith(".txt")} | {
                "metadata.jsonl": "\n".join(lines).encode()
            }
        for name, data in files.items():
            write(source / name, data)
    if not in_memory:
        monkeypatch.setattr("darkroom.data.pictures.PictureDataset.__init__.__defaults__", (0,))
    data = open_dataset(DataConfig(source=str(source), size=(12, 8), validation=0.0))
    assert data.in_memory == in_memory  # type: ignore[attr-defined]
    assert not data.problems and len(data) == 4
    assert data.fields == ("image", "text", "segmentation", "repaint_mask", "depth", "embedding")
    example = data[2]
    assert example["segmentation"].dtype == torch.int64 and example["segmentation"][0].tolist() == [1] * 6 + [255] * 6
    assert example["repaint_mask"][0, :, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert example["depth"].dtype == torch.float32 and float(example["depth"][0, 1, 3]) == 2015.0
    assert example["embedding"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert example["text"] == ("listed" if where == "listed" else "a picture")
    assert data.without_image(2, ["text"]) == {"text": example["text"]}
    batch = collate([data[i] for i in range(4)], data.pixels)
    assert batch["embedding"].shape == (4, 4) and batch["depth"].shape == (4, 1, 8, 12)
    ruled = open_dataset(DataConfig(source=str(source), size=(12, 8), validation=0.0, repaint_mask=RandomMask()))
    assert ruled.mask_rule is None and torch.equal(ruled[2]["repaint_mask"], example["repaint_mask"])


def test_companions_are_cropped_and_resized_like_the_picture(tmp_path: Path) -> None:
    for name, data in members(0).items():
        write(tmp_path / name, data)
    example = open_dataset(DataConfig(source=str(tmp_path), size=4, validation=0.0))[0]
    assert example["segmentation"].tolist() == [[1, 1, 255, 255]] * 4
    assert example["repaint_mask"][0, :, 0].tolist() == [1, 1, 0, 0]
    # The middle 8x8 of 12x8, halved: means of 2x2 blocks, up to the wider filter's share at the border.
    expected = np.array([[r * 12 + c for c in range(2, 10)] for r in range(8)]).reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(example["depth"][0].numpy() - expected).max() < 2.0


def test_a_change_in_a_companion_changes_the_digest(tmp_path: Path) -> None:
    for name, data in members(0).items():
        write(tmp_path / name, data)
    settings = DataConfig(source=str(tmp_path), size=(12, 8), validation=0.0)
    before = open_dataset(settings).digest
    write(tmp_path / "0.emb.npy", npy(np.ones(4)))
    assert open_dataset(settings).digest != before


def test_missing_and_broken_companions_are_listed(tmp_path: Path) -> None:
    for number in range(4):
        for name, data in members(number).items():
            write(tmp_path / name, data)
    (tmp_path / "1.depth.npy").unlink()
    write(tmp_path / "2.emb.npy", npy(np.ones((2, 2))))
    data = open_dataset(DataConfig(source=str(tmp_path), size=(12, 8), validation=0.0))
    assert len(data) == 2
    reasons = {Path(name).name: reason for name, reason in data.problems}
    assert reasons["1.png"] == "no depth map" and "expected finite numbers (D,)" in reasons["2.png"]
