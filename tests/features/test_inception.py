"""FID's Inception: the published layout, and torch-fidelity's own network with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_metrics as reference
import torch
from feature_weights import pictures, randomise
from torch import Tensor

from darkroom.errors import DarkroomError
from darkroom.features import inception
from darkroom.features.inception import Inception, load_inception
from darkroom.features.resizing import resize_tf1
from darkroom.features.weight_files import fill, read_weights


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published layout: a plain dictionary, without counts of training steps."""
    path = tmp_path_factory.mktemp("weights") / inception.FILES[0]
    torch.save(dict(randomise(Inception()).state_dict()), path)
    return path


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    """torch-fidelity's network, which loads the file strictly by its own code."""
    wanted = ["64", "192", "768", "2048", "logits_unbiased"]
    return reference.fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", wanted, feature_extractor_weights_path=str(file)
    )


def normalised(images: Tensor) -> Tensor:
    return (resize_tf1(images.permute(0, 3, 1, 2).float(), (299, 299)) - 128) / 128


def test_layout_of_the_published_file() -> None:
    """94 convolutions with norms, and the last layer, under torchvision's names: its network without the auxiliary
    branch has 23 834 568 parameters, of which 17 216 channels; here are 8 classes more, and running statistics."""
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 94 * 5 + 2
    assert sum(value.numel() for value in state.values()) == 23_834_568 + 8 * 2049 + 2 * 17_216
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6e.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["fc.weight"].shape == (1008, 2048)


def test_equals_the_network_of_torch_fidelity(file: Path, theirs: Any) -> None:
    images = pictures(2, 40)
    images[1] = images[1] // 8 + torch.arange(40, dtype=torch.uint8)[:, None] * 5  # a ramp, nearly without noise
    expected = theirs(images.permute(0, 3, 1, 2))
    with torch.no_grad():
        ours = load_inception(file)(normalised(images))
    for name, one, other in (("2048", ours.embedding, expected[3]), ("logits", ours.logits, expected[4])):
        assert float(other.std(0).mean()) > 1e-3, name  # pictures are told apart
        assert float((one - other).norm() / other.norm()) < 1e-5, name


def test_folding_changes_nothing(file: Path) -> None:
    network = Inception()
    fill(network, read_weights(file), file)
    image = torch.rand(1, 3, 75, 75, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the least that fits
    plain = network(image)
    for one, other in zip(network.fold()(image), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_old_and_new_files_of_torch_are_read(file: Path, tmp_path: Path) -> None:
    """The published file is of before the zip format; counts of training steps, which some copies have, are ignored."""
    state = torch.load(file, weights_only=True)
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    old = tmp_path / inception.FILES[1]
    torch.save(state, old, _use_new_zipfile_serialization=False)
    one, other = load_inception(file).state_dict(), load_inception(old).state_dict()
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    assert not inception.inception_available()
    with pytest.raises(DarkroomError, match=r"pt_inception-2015-12-05-6726825d\.pth") as error:
        load_inception()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
