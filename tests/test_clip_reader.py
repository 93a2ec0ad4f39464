"""CLIP score of pictures and texts: against torchmetrics with transformers' network, both towers from one file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference_metrics as reference
import torch
from feature_weights import pictures, randomise
from text_tower_files import CLIP_L, clip_tokenizer, write_clip_vocabulary
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from darkroom.clip_reader import TEXT_NETWORKS, ClipReader, open_clip_reader
from darkroom.errors import DarkroomError
from darkroom.features.clip_image import CLIP_FOLDERS, CLIPImageConfig

SIDE = 32
IMAGE = CLIPImageConfig(width=32, depth=2, heads=4, patch=8, side=SIDE, projected=32)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXTS = ["the red fox", "a cat", "the ox", "red"]


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small CLIP of transformers, saved where ours looks for the published one, without its vocabulary."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=CLIP_L, projection_dim=32)).eval()
    randomise(model)
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    monkeypatch.delenv("DARKROOM_VOCABULARIES", raising=False)
    monkeypatch.setattr("darkroom.features.clip_image.CLIP_IMAGE_SIZES", {"vitl14": IMAGE})
    monkeypatch.setitem(TEXT_NETWORKS, "vitl14", CLIP_L)
    model.save_pretrained(tmp_path / CLIP_FOLDERS["vitl14"])
    return model


@pytest.fixture
def reader(theirs: Any, tmp_path: Path) -> ClipReader:
    write_clip_vocabulary(tmp_path / CLIP_FOLDERS["vitl14"])
    return open_clip_reader()


class _Tensors:
    """The network as torchmetrics calls it: this version of transformers wraps what it gives."""

    config = SimpleNamespace()

    def __init__(self, model: Any) -> None:
        self.model = model

    def to(self, device: Any) -> _Tensors:
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        found = self.model.get_image_features(pixels)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.model.get_text_features(ids, mask)
        return getattr(found, "pooler_output", found)


def processor(images: list[Tensor] | None = None, text: list[str] | None = None, **_: Any) -> dict[str, Tensor]:
    """What CLIPProcessor does to pictures that have the size of the network."""
    if text is not None:
        return dict(clip_tokenizer()(text, padding=True, return_tensors="pt"))
    assert images is not None
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return {"pixel_values": torch.stack([(image / 255 - mean) / std for image in images])}


def test_equals_torchmetrics(theirs: Any, reader: ClipReader) -> None:
    images = pictures(4, SIDE)
    images[1:3] //= 4
    scores = reader(images, TEXTS)
    for image, text, ours in zip(images.permute(0, 3, 1, 2), TEXTS, scores, strict=True):
        with torch.no_grad():
            cosine, _ = reference.metrics_clip._clip_score_update(image, text, _Tensors(theirs), processor)
        assert float(ours) == pytest.approx(max(0.0, float(cosine)), rel=1e-4, abs=1e-4)
    assert float(scores.std()) > 0.1 and float(scores.max()) > 1.0  # or nothing has been compared


def test_what_it_is_called_and_made_of(reader: ClipReader) -> None:
    assert (
        reader.name == "CLIP score-vitl14" and reader.images.name == "clip-vitl14" and len(reader.images.weights) == 64
    )
    long = "the red fox " * 60
    assert reader.texts([long]).shape == (1, 32)


def test_a_missing_vocabulary_is_one_line(theirs: Any, tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=r"no vocabulary beside .*put vocab\.json and merges\.txt") as error:
        open_clip_reader()
    assert "\n" not in str(error.value)


def test_missing_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    with pytest.raises(DarkroomError, match="clip-vit-base-patch16") as error:
        open_clip_reader(size="vitb16")
    assert "\n" not in str(error.value)
