"""The table of networks that look at pictures: what each is called, and what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_metrics as reference
import torch
from feature_weights import pictures, randomise
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.evaluation.extractors import EXTRACTORS, open_extractor
from darkroom.features import inception
from darkroom.features.clip_image import CLIP_IMAGE_SIZES, CLIPImage, CLIPImageConfig
from darkroom.features.dinov2 import DINOV2_SIZES, DinoV2, DinoV2Config
from darkroom.features.perceptual import load_perceptual
from darkroom.features.weight_files import fill, read_weights
from darkroom.safe_files import sha256_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    return tmp_path


def test_the_bundled_network_is_always_there_and_never_called_fid(folder: Path) -> None:
    extractor = open_extractor("auto")
    images = pictures(3)
    embedding, probabilities = extractor(images)
    assert embedding.shape == (3, extractor.width) and embedding.dtype == torch.float32 and probabilities is None
    assert (extractor.name, extractor.fd_name, extractor.kd_name) == ("darkroom", "FD-darkroom", "KD-darkroom")
    network = load_perceptual()
    assert extractor.weights == network.sha256
    expected = network.embed(images.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / inception.FILES[0]
    torch.save(dict(randomise(inception.Inception()).state_dict()), path)
    return path


def test_inception_by_both_protocols(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch-fidelity, pixels in and numbers out; and with the resize of clean-fid before its own network."""
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(inception_weights.parent))
    theirs = reference.fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    images = pictures(2, 48)
    digest = sha256_of(inception_weights)
    extractor = open_extractor()  # what "auto" takes, now that the file is there
    assert extractor.name == "inception-tf" and extractor.weights == digest and extractor.has_classes
    expected, logits = theirs(images.permute(0, 3, 1, 2))
    embedding, probabilities = extractor(images)
    assert float((embedding - expected).norm() / expected.norm()) < 1e-5
    assert probabilities is not None and probabilities.shape == (2, 1008)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-6)
    # Random weights are not FID's, and are not called so.
    assert (extractor.fd_name, extractor.kd_name) == (f"FD-inception-{digest[:8]}", f"KD-inception-{digest[:8]}")

    clean = open_extractor("inception-clean")
    resize = reference.clean_resize.build_resizer("clean")
    resized = torch.stack([torch.from_numpy(resize(picture)) for picture in images.numpy()]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = inception.load_inception(inception_weights)((resized - 128) / 128).embedding
    embedding, _ = clean(images)
    assert float((embedding - expected).norm() / expected.norm()) < 1e-5
    assert clean.fd_name == f"FD-inception-{digest[:8]}-clean" and clean.resize != extractor.resize


class Layers(nn.Module):
    """The network as clean-fid asks for it: normalised pixels -> (B, 2048, 1, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(x).embedding
        return embedding[:, :, None, None]


class Program(nn.Module):
    """What clean-fid loads: a program with the network in `layers`."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_clean_fid_around_a_program_of_the_same_graph(
    inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clean-fid's own loading, resize and normalisation, with the network as TorchScript in its file's place."""
    network = inception.Inception()  # its norms unfolded
    fill(network, read_weights(inception_weights), inception_weights)
    layers = torch.jit.trace(Layers(network), torch.zeros(1, 3, inception.SIDE, inception.SIDE))
    torch.jit.script(Program(layers)).save(tmp_path / "inception-2015-12-05.pt")
    theirs = reference.clean_inception.InceptionV3W(str(tmp_path), download=False, resize_inside=False)
    images = pictures(2, 48, seed=3)
    images[1] = images[1] // 8 + torch.arange(48, dtype=torch.uint8)[:, None] * 4  # a ramp, nearly without noise
    resize = reference.clean_resize.build_resizer("clean")
    pixels = torch.stack([torch.from_numpy(resize(picture)) for picture in images.numpy()]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(pixels)
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(inception_weights.parent))
    embedding, _ = open_extractor("inception-clean")(images)
    assert expected.shape == embedding.shape and float(expected.std(0).mean()) > 1e-3  # pictures are told apart
    assert float((embedding - expected).norm() / expected.norm()) < 1e-5


def test_the_published_inception_alone_is_fid(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(inception_weights.parent))
    monkeypatch.setattr(inception, "PUBLISHED", sha256_of(inception_weights)[:8])
    one, other = open_extractor("inception-tf"), open_extractor("inception-clean")
    assert (one.fd_name, one.kd_name, other.fd_name, other.kd_name) == ("FID", "KID", "FID-clean", "KID-clean")


def test_dinov2_and_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks in the place of the large ones: their pictures are resized and standardised as for those."""
    monkeypatch.setattr("darkroom.features.dinov2.DINOV2_SIZES", {"vits14": DinoV2Config(32, 1, 2)})
    monkeypatch.setattr(
        "darkroom.features.clip_image.CLIP_IMAGE_SIZES", {"vitb32": CLIPImageConfig(32, 1, 2, 32, 224, 24)}
    )
    dino, clip = randomise(DinoV2(DinoV2Config(32, 1, 2))), randomise(CLIPImage(CLIPImageConfig(32, 1, 2, 32, 224, 24)))
    torch.save(dino.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    (folder / "clip-vit-base-patch32").mkdir()
    torch.save(clip.state_dict(), folder / "clip-vit-base-patch32" / "pytorch_model.bin")
    white = torch.full((1, 20, 30, 3), 255, dtype=torch.uint8)
    for name, network, size, width, mean, std in (
        ("dinov2-vits14", dino, "vits14", 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("clip-vitb32", clip, "vitb32", 24, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ):
        extractor = open_extractor(name)
        embedding, probabilities = extractor(white)
        assert embedding.shape == (1, width) == (1, extractor.width) and probabilities is None
        standard = ((1.0 - torch.tensor(mean)) / torch.tensor(std)).view(1, 3, 1, 1).expand(1, 3, 224, 224)
        torch.testing.assert_close(embedding, network(standard), rtol=1e-4, atol=1e-5)
        assert extractor.fd_name.endswith(size) and extractor.fd_name.startswith("FD-")


@pytest.mark.parametrize("name", [name for name in EXTRACTORS if name != "darkroom"])
def test_a_missing_file_is_named_in_one_line(name: str, folder: Path) -> None:
    with pytest.raises(DarkroomError, match="no weights here; put ") as error:
        open_extractor(name)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_known_are_one_line() -> None:
    with pytest.raises(DarkroomError, match="darkroom") as error:
        open_extractor("darkrom")
    assert "\n" not in str(error.value)
    assert {f"dinov2-{size}" for size in DINOV2_SIZES} | {f"clip-{size}" for size in CLIP_IMAGE_SIZES} < set(EXTRACTORS)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_pictures_of_another_layout_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        open_extractor("darkroom")(images)
