"""The first stages that come with the package: sizes, licences, and how well they do on pictures they never saw."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import darkroom
from darkroom.data.masks import RandomMask, draw_mask
from darkroom.evaluation.metrics import gradient_energy, psnr
from darkroom.features.perceptual import load_perceptual
from darkroom.first_stage.artefacts import flat_colour_test
from darkroom.first_stage.first_stage import FirstStage
from darkroom.model_folder import BUNDLED

HELD_OUT = Path(__file__).parent / "features" / "held_out.tar"


def held_out(kind: str) -> Tensor:
    """(B, 3, 128, 128) in [-1, 1]: pictures of the validation parts."""
    with tarfile.open(HELD_OUT) as tar:
        files = [tar.extractfile(m) for m in tar if m.name.startswith(kind)]
        images = [Image.open(io.BytesIO(f.read())).convert("RGB") for f in files if f is not None]
    return torch.stack([torch.from_numpy(np.array(i)) for i in images]).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "f", "channels", "clothing", "emoji", "flat"),
    [("first-stage-f4", 4, 4, 25.0, 26.0, 26.0), ("first-stage-f8", 8, 8, 21.5, 22.0, 45.0)],
)
def test_the_bundled_first_stages_on_pictures_they_never_saw(
    name: str, f: int, channels: int, clothing: float, emoji: float, flat: float
) -> None:
    first_stage = darkroom.load(name)
    assert isinstance(first_stage, FirstStage)
    assert (first_stage.downsampling, first_stage.latent_channels) == (f, channels)
    for kind, least in (("clothing", clothing), ("emoji", emoji)):
        images = held_out(kind)
        with torch.no_grad():
            latent = first_stage.encode(images).mode()
            back = first_stage.decode(latent).clamp(-1, 1)
        assert float(psnr(images, back).mean()) >= least
        sharpness = float(gradient_energy(back).sum() / gradient_energy(images).sum())
        assert 0.8 < sharpness < 1.15, kind
        assert 0.7 < float(latent.std()) < 1.3  # the latents' scale is that of the model
    assert flat_colour_test(first_stage).colour_error < flat  # of 255


def test_the_bundled_super_resolution_is_nearer_to_the_truth_than_bicubic() -> None:
    """By the perceptual distance, and the small picture comes back; its first stage is the bundled one."""
    assert '"name": "first-stage-f4"' in (BUNDLED / "clothing-sr" / "darkroom.json").read_text()
    images = held_out("clothing")[:4]
    values = ((images + 1) * 127.5).round().to(torch.uint8)
    small = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    small = ((small + 1) * 127.5).round()
    enlarged = F.interpolate(small / 127.5 - 1, size=(128, 128), mode="bicubic").clamp(-1, 1)
    made = [
        darkroom.upscale(picture.byte().permute(1, 2, 0).numpy(), "clothing-sr", consistency=True, device="cpu")
        for picture in small
    ]
    drawn = torch.stack([torch.from_numpy(m.image) for m in made]).permute(0, 3, 1, 2)
    distance, truth = load_perceptual(), values.float() / 127.5 - 1
    ours, bicubic = (float(distance(truth, x).mean()) for x in (drawn.float() / 127.5 - 1, enlarged))
    assert ours < 0.5 * bicubic
    assert all(m.difference < 0.5 for m in made)
    assert sum(p.stat().st_size for p in (BUNDLED / "clothing-sr").rglob("*.safetensors")) <= 6 * 2**20


def test_the_bundled_inpainting_is_nearer_to_the_truth_than_navier_stokes() -> None:
    """By the perceptual distance, under masks of half the picture; what is not masked is the photo."""
    import cv2

    assert '"name": "first-stage-f4"' in (BUNDLED / "clothing-inpaint" / "darkroom.json").read_text()
    photos = ((held_out("clothing")[:8] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rng = np.random.default_rng(0)
    made, classical = [], []
    for number, photo in enumerate(photos):
        hole = draw_mask(rng, (128, 128), RandomMask((0.4, 0.5)))[0] >= 0.5
        result = darkroom.edit(photo, hole, "clothing-inpaint", seeds=number, device="cpu")
        assert np.array_equal(result.images[0][~hole], photo[~hole])
        made.append(result.images[0])
        classical.append(cv2.inpaint(photo, hole.astype(np.uint8) * 255, 3, cv2.INPAINT_NS))
    distance = load_perceptual()
    truth, ours, theirs = (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        for images in (photos, made, classical)
    )
    assert float(distance(truth, ours).mean()) < float(distance(truth, theirs).mean())
    assert sum(p.stat().st_size for p in (BUNDLED / "clothing-inpaint").rglob("*.safetensors")) <= 6 * 2**20


@pytest.mark.parametrize("name", ["first-stage-f4", "first-stage-f8"])
def test_what_lies_beside_the_weights(name: str) -> None:
    folder = BUNDLED / name
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) <= 8 * 2**20
    card = (folder / "README.md").read_text()
    assert "gradient energy ratio, clothing-128-val" in card and "made by `darkroom train" in card
    assert "CC0" in card and len(list(folder.glob("LICENSE-*"))) >= 4
    assert all("train_step" in json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines())
    assert "/" + "work" not in card + (folder / "config.yaml").read_text()
