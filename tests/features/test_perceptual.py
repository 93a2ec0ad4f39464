"""Our perceptual network: it ranks distortions as it should (pytest -s prints the numbers), and is usable as a loss.

The pictures are a small part of the held-out ones (`held_out.tar`; sources and licences in `held_out.txt`);
`benchmarks/perceptual_validation.py` makes the same table on all of them.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from darkroom.errors import DarkroomError
from darkroom.evaluation.distortion_ranking import (
    DEVIATIONS,
    STRENGTHS,
    Distance,
    distances_by_strength,
    shift_before_blur,
    spearman,
)
from darkroom.evaluation.metrics import psnr, ssim
from darkroom.features.perceptual import BUNDLED, PerceptualConfig, PerceptualNetwork, load_perceptual
from darkroom.model_folder import bundled
from darkroom.perceptual_job import save_perceptual

HELD_OUT = Path(__file__).parent / "held_out.tar"
ASKED = ("blur", "noise", "jpeg", "shift", "colour", "block")


@pytest.fixture(scope="module")
def network() -> PerceptualNetwork:
    return load_perceptual()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """(28, 3, 128, 128) in [-1, 1]."""
    found = []
    with tarfile.open(HELD_OUT) as shard:
        for member in shard:
            file = shard.extractfile(member)
            assert file is not None
            found.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def distances(network: PerceptualNetwork) -> dict[str, Distance]:
    """Larger is further."""
    return {"PSNR": lambda a, b: -psnr(a, b), "SSIM": lambda a, b: 1 - ssim(a, b), "ours": network}


def test_ranks_distortions_by_strength(distances: dict[str, Distance], pictures: Tensor) -> None:
    assert set(ASKED) <= set(STRENGTHS)
    print("\nmean Spearman correlation of strength and distance, 28 held-out pictures")
    middle = pictures[..., 16:112, 16:112]
    for kind in STRENGTHS:
        found = {name: spearman(distances_by_strength(d, middle, kind)) for name, d in distances.items()}
        print(
            f"{kind:8}" + "".join(f"  {n} {float(r.mean()):.3f} (worst {float(r.min()):.2f})" for n, r in found.items())
        )
        assert float(found["ours"].mean()) >= 0.95, kind


def test_tells_a_blur_from_a_shift_by_one_pixel(distances: dict[str, Distance], pictures: Tensor) -> None:
    print("\nshare of held-out pictures that are nearer to themselves moved by one pixel than blurred")
    shares: dict[str, list[float]] = {name: [] for name in distances}
    for deviation in DEVIATIONS:
        for name, distance in distances.items():
            shares[name].append(float(shift_before_blur(distance, pictures, deviation).float().mean()))
        row = "".join(f"  {name} {values[-1]:.3f}" for name, values in shares.items())
        print(f"blur of {deviation:4} pixels {row}")
    ours, pixels, structure = (np.array(shares[name]) for name in ("ours", "PSNR", "SSIM"))
    assert (ours[1:] >= 0.95).all()  # a blur of 1 pixel and more can be seen
    assert (ours >= np.maximum(pixels, structure)).all()
    assert ours.mean() > max(pixels.mean(), structure.mean()) + 0.3


def test_spearman_against_scipy() -> None:
    values = torch.tensor([[1.0, 5.0], [1.0, 4.0], [3.0, 4.5], [2.0, 4.5], [7.0, -1.0]])
    expected = [spearmanr(values[:, i].numpy(), range(5)).statistic for i in range(2)]
    torch.testing.assert_close(spearman(values), torch.tensor(expected, dtype=torch.float64))


def test_a_distance(network: PerceptualNetwork, pictures: Tensor) -> None:
    x, y = pictures[:4], pictures[4:8]
    assert torch.equal(network(x, x), torch.zeros(4))
    torch.testing.assert_close(network(x, y), network(y, x))
    assert bool((network(x, y) > 0.1).all())
    torch.testing.assert_close(network(x, y)[1:2], network(x[1:2], y[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 7), (16, 16), (17, 31), (64, 40)])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_every_size_and_channel_count_with_gradients(
    network: PerceptualNetwork, channels: int, size: tuple[int, int]
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, channels, *size, generator=g) * 2 - 1
    y = (torch.rand(2, channels, *size, generator=g) * 2 - 1).requires_grad_()
    value = network(x, y)
    assert value.shape == (2,) and value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value.sum(), y)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().amax()) > 0
    embedding = network.embed(x)
    assert embedding.shape == (2, network.embedding_width) and embedding.dtype == torch.float32


def test_flat_pictures_have_finite_gradients(network: PerceptualNetwork) -> None:
    for level in (-1.0, 0.0, 1.0):
        x = torch.full((1, 3, 32, 32), level)
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, y).sum(), y)
        assert torch.equal(gradient, torch.zeros_like(gradient))
        y = (x + 1e-3).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, y).sum(), y)
        assert bool(torch.isfinite(gradient).all())


def test_other_channel_counts_are_averages_of_grey_pictures(network: PerceptualNetwork, pictures: Tensor) -> None:
    x, y = pictures[:2, :2, :48, :48], pictures[2:4, :2, :48, :48]
    each = [network(x[:, i : i + 1].expand(-1, 3, -1, -1), y[:, i : i + 1].expand(-1, 3, -1, -1)) for i in range(2)]
    torch.testing.assert_close(network(x, y), torch.stack(each).mean(0))
    grey = x[:, :1]
    torch.testing.assert_close(network.embed(grey), network.embed(grey.expand(-1, 3, -1, -1)))


def test_bfloat16_autocast(network: PerceptualNetwork, pictures: Tensor) -> None:
    x, y = pictures[:4, :, :64, :64], pictures[:4, :, 4:68, :64]
    exact = network(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, embedding = network(x, y), network.embed(x)
        assert torch.equal(network(x, x), torch.zeros(4))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.005)
    assert torch.equal(embedding, network.embed(x))


def test_identity_and_files(network: PerceptualNetwork, tmp_path: Path) -> None:
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert sum(f.stat().st_size for f in BUNDLED.glob("*.safetensors")) <= 5 * 2**20
    assert "perceptual" not in bundled()  # `load` gives models; this is none
    save_perceptual(network, tmp_path / "copy", {})
    again = load_perceptual(tmp_path / "copy")
    assert again.sha256 == network.sha256
    with torch.no_grad():
        again.stages[0].convolutions[0].weight[0] += 0.1  # type: ignore[union-attr, index, operator]
    assert again.sha256 != network.sha256
    save_perceptual(PerceptualNetwork(PerceptualConfig(widths=(8, 8))), tmp_path / "other", {})
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "copy" / "model.safetensors").read_bytes())
    with pytest.raises(DarkroomError, match=r"does not fit its config\.json"):
        load_perceptual(tmp_path / "other")
    with pytest.raises(DarkroomError, match="no perceptual network here"):
        load_perceptual(tmp_path)
