"""What generated images are held against: real examples agree with themselves, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darkroom.data.degradations import LowResolution
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.evaluation.checks import AGREEMENT, OVERLAP, is_shapes_set, pair_check, shapes_check
from darkroom.evaluation.discriminant import LinearDiscriminant
from darkroom.evaluation.extractors import PerceptualDistance
from darkroom.evaluation.metrics import psnr
from darkroom.evaluation.picture_sources import eight_bits
from darkroom.pixel_format import PixelFormat


@pytest.fixture(scope="module")
def shapes() -> ImageDataset:
    return open_dataset(DataConfig(source="shapes:single", size=64, count=40), "train")


def test_real_pictures_agree_with_what_they_show(shapes: ImageDataset) -> None:
    examples = [shapes[i] for i in range(8)]
    images = torch.stack([e["image"] for e in examples]).permute(0, 2, 3, 1)
    check = shapes_check(shapes.fields, shapes.class_names)
    right, wrong = check(images, examples), check(images.roll(1, 0), examples)
    assert set(right) == {*AGREEMENT.values(), *OVERLAP.values()}
    for name, values in right.items():
        assert float(values.mean()) > 0.9 and float(wrong[name].mean()) < 0.6, name
    assert set(shapes_check(["text"], [])(images, examples)) == {"caption agreement"}


def test_who_can_be_judged_exactly(shapes: ImageDataset) -> None:
    config = DataConfig(source="shapes", size=32, count=2, low_resolution=LowResolution(2))
    assert is_shapes_set(shapes) and is_shapes_set(open_dataset(config))
    assert not is_shapes_set(
        open_dataset(DataConfig(source="phantoms16", size=32, count=2, channels=1, pixels="uint16"))
    )


def test_pairs_are_compared_with_the_picture_that_was_degraded(shapes: ImageDataset) -> None:
    examples = [shapes[i] for i in range(3)]
    images = torch.stack([e["image"] for e in examples]).permute(0, 2, 3, 1)
    noisy = (images.int() + 9).clamp(0, 255).to(torch.uint8)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean((1, 2, 3))

    values = pair_check(shapes, PerceptualDistance("stand-in", distance, "0" * 64))(noisy, examples)
    network = [x.permute(0, 3, 1, 2).double() / 127.5 - 1 for x in (noisy, images)]
    assert torch.allclose(values["PSNR"], psnr(*network), atol=1e-4)
    assert bool((values["SSIM"] < 1).all()) and bool((values["stand-in"] > 0).all())


def test_other_pictures_are_shown_with_eight_bits() -> None:
    grey = torch.tensor([[[[0], [65535]]]], dtype=torch.int32)
    assert eight_bits(grey.to(torch.uint16), PixelFormat.of("uint16"))[0, 0].tolist() == [[0, 0, 0], [255, 255, 255]]
    many = torch.arange(5, dtype=torch.uint8).view(1, 1, 1, 5)
    assert eight_bits(many, PixelFormat())[0, 0, 0].tolist() == [0, 1, 2]


def test_the_classifier_is_the_best_one_for_its_gaussians() -> None:
    """Equal to the closed form with the true means and covariance, where there are many images."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 2, 1]]).double()
    mix = torch.tensor([[1.0, 0.4, 0], [0, 0.8, 0.3], [0, 0, 0.6]]).double()
    labels = torch.randint(3, (9000,), generator=generator)
    labels[:4000] = 1  # the shares of the classes must not matter
    x = torch.randn(9000, 3, generator=generator).double() @ mix + means[labels]
    classifier = LinearDiscriminant(3, 4)
    for part, names in zip(x.split(500), labels.float().split(500), strict=True):
        classifier.update(torch.cat([part, part[:1]]), torch.cat([names, torch.tensor([float("nan")])]))
    classifier.fit()
    inverse = torch.linalg.inv(mix.T @ mix)
    exact = x @ inverse @ means.T - 0.5 * ((means @ inverse) * means).sum(1)
    said = classifier.scores(x)
    assert bool((said[:, 3] == -torch.inf).all())  # a class without images
    assert float((said.argmax(1) == exact.argmax(1)).double().mean()) > 0.97
