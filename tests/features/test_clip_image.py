"""CLIP's image tower: transformers' CLIPModel and OpenAI's own network (as torch-fidelity has it), same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_metrics as reference
import torch
from feature_weights import noise, randomise
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from darkroom.errors import DarkroomError
from darkroom.features.clip_image import CLIP_IMAGE_SIZES, CLIPImage, CLIPImageConfig, clip_file, load_clip_image

TINY = CLIPImageConfig(width=32, depth=3, heads=4, patch=8, side=40, projected=24)


def test_equals_transformers(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 40,
        "patch_size": 8,
    }
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    randomise(theirs)
    # As saved by the library: both towers in one file; old files have the numbers of the positions in it.
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    save_file(state, tmp_path / "model.safetensors")
    ours = load_clip_image("", tmp_path / "model.safetensors", TINY)
    image = noise(2, 3, 40, 40)
    with torch.no_grad():
        found = theirs.eval().get_image_features(image)
        expected = getattr(found, "pooler_output", found)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


def test_equals_the_network_of_openai(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = reference.fidelity_clip.VisionTransformer(40, 8, 32, 3, 4, 24)
    randomise(theirs)
    state = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state["token_embedding.weight"] = torch.zeros(3, 2)  # the text tower stands beside it
    torch.save(state, tmp_path / "vit.pt")
    ours = load_clip_image("", tmp_path / "vit.pt", TINY)
    image = noise(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs.eval()(image), rtol=1e-4, atol=1e-5)
    torch.save(state | {"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(DarkroomError, match=r"visual\.layer1\.0\.conv1\.weight, which has no place"):
        load_clip_image("", tmp_path / "resnet.pt", TINY)


def test_layouts_of_the_published_sizes() -> None:
    """Parameters of the image towers with their projection: 87.8, 86.2 and 304.0 million."""
    for size, millions in (("vitb32", 87.85), ("vitb16", 86.19), ("vitl14", 303.97)):
        with torch.device("meta"):
            state = CLIPImage(CLIP_IMAGE_SIZES[size]).state_dict()
        assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_where_to_put_the_file_and_sizes_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    with pytest.raises(DarkroomError, match=r"clip-vit-large-patch14/model\.safetensors"):
        clip_file("vitl14")
    place = tmp_path / "clip-vit-base-patch32" / "pytorch_model.bin"
    place.parent.mkdir()
    place.touch()
    assert clip_file("vitb32") == place
    with pytest.raises(DarkroomError, match="pictures of 40x40 are wanted"):
        CLIPImage(TINY)(noise(1, 3, 48, 40))
