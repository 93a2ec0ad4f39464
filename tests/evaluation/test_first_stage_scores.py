"""Streamed scores equal those of the whole set at once, and carry what it takes to make them again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from evaluation_stand_in import shapes, stand_in
from tiny_models import tiny_first_stage

from darkroom.build import build_first_stage
from darkroom.data.batches import collate
from darkroom.errors import DarkroomError
from darkroom.evaluation.first_stage import FirstStageScores, evaluate_first_stage
from darkroom.evaluation.metrics import frechet_distance, gradient_energy, psnr, ssim
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder


def evaluate(first_stage: FirstStage, *args: Any, **kwargs: Any) -> FirstStageScores:
    return evaluate_first_stage(first_stage, *args, extractors=stand_in(), **kwargs)


def test_streamed_scores_are_those_of_the_whole_set() -> None:
    first_stage, data = tiny_first_stage(), shapes()
    done: list[tuple[int, int]] = []
    result = evaluate(first_stage, data, batch_size=3, report=lambda i, n: done.append((i, n)))
    assert done == [(3, 10), (6, 10), (9, 10), (10, 10)]
    images = collate([data[i] for i in range(10)])["image"]
    with torch.no_grad():
        latents = first_stage.encode(images).mode()
        decoded = first_stage.decode(latents).clamp(-1, 1)
    distance, embedding = stand_in()
    one, two = embedding.embed(images).double(), embedding.embed(decoded).double()
    expected = {
        "PSNR": float(psnr(decoded, images).mean()),
        "SSIM": float(ssim(decoded, images).mean()),
        "perceptual-stand-in": float(distance.distance(images, decoded).mean()),
        "rFD-stand-in": frechet_distance(one.mean(0), torch.cov(one.T), two.mean(0), torch.cov(two.T)),
        "gradient energy ratio": float(gradient_energy(decoded).sum() / gradient_energy(images).sum()),
    }
    for name, value in expected.items():
        assert result.scores[name] == pytest.approx(value, rel=1e-4), name
    assert result.perceptual == result.scores["perceptual-stand-in"] and result.frechet == result.scores["rFD-stand-in"]
    assert result.scores["encode s/MP"] > 0 and result.scores["decode s/MP"] > 0
    assert "codes used" not in result.scores
    flat = latents.transpose(0, 1).flatten(1).double()
    assert result.latents["mean"] == pytest.approx(flat.mean(1).tolist(), rel=1e-4, abs=1e-6)
    assert result.latents["std"] == pytest.approx(flat.std(1).tolist(), rel=1e-4)
    assert result.images.shape == result.reconstructions.shape == (10, 3, 32, 32)


def test_the_protocol_says_how_to_make_the_scores_again() -> None:
    first_stage, data = tiny_first_stage(), shapes()
    result = evaluate(first_stage, data, facts={"hardware": "an abacus"})
    record = json.loads(json.dumps(result.record))  # plain facts
    protocol = record["protocol"]
    assert protocol["data"]["images"]["digest"] == data.digest and protocol["count"] == 10
    assert protocol["data"]["images"]["size"] == [32, 32] and protocol["posterior"] == "mode"
    assert protocol["hardware"] == "an abacus" and len(protocol["first_stage"]["weights"]) == 64
    assert protocol["perceptual"] == {"name": "perceptual-stand-in", "weights": "0" * 64, "mean": "over images"}
    assert evaluate(first_stage, data, batch_size=4).protocol["first_stage"] == protocol["first_stage"]
    with torch.no_grad():
        next(first_stage.parameters()).add_(1e-3)
    assert evaluate(first_stage, data).protocol["first_stage"]["weights"] != protocol["first_stage"]["weights"]


def test_the_identity_is_perfect() -> None:
    result = evaluate(FirstStage(IdentityAutoencoder(3)), shapes(4))
    scores = result.scores
    assert scores["PSNR"] > 100 and scores["SSIM"] == pytest.approx(1) and result.perceptual == 0
    assert result.frechet == pytest.approx(0, abs=1e-9) and scores["gradient energy ratio"] == 1


def test_several_sets_have_scores_of_their_own() -> None:
    first_stage, sets = (
        tiny_first_stage(),
        {"one": shapes(6, kind="shapes:single"), "two": shapes(9, kind="shapes:pair")},
    )
    result = evaluate(first_stage, sets, batch_size=4, shown=5)
    assert result.sources["one"]["images"] == 6 and result.sources["two"]["images"] == 9
    for name, images in sets.items():
        alone = evaluate(first_stage, images, batch_size=4).scores
        for metric in ("PSNR", "SSIM", "rFD-stand-in", "gradient energy ratio"):
            assert result.sources[name][metric] == pytest.approx(alone[metric], rel=1e-4), metric
    assert result.scores["PSNR"] == pytest.approx(
        (6 * result.sources["one"]["PSNR"] + 9 * result.sources["two"]["PSNR"]) / 15
    )
    assert len(result.images) == 5  # of both sets
    fewer = evaluate(first_stage, sets, count=4)
    assert fewer.protocol["count"] == 8 and fewer.protocol["data"]["two"]["count"] == 4


def test_vq_tells_how_its_codes_are_used() -> None:
    torch.manual_seed(0)
    config = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "embed_dim": 3}
    first_stage = build_first_stage({**config, "codebook_size": 16}).eval()
    first_stage._set(0.5, 2.0)  # the codes are looked up without the normalisation
    data = shapes(5)
    result = evaluate(first_stage, data, batch_size=2)
    images = collate([data[i] for i in range(5)])["image"]
    codebook = first_stage.autoencoder.codebook
    assert codebook is not None
    with torch.no_grad():
        indices = codebook.nearest(first_stage.autoencoder.encode(images).mode())
    assert result.scores["codes used"] == len(indices.unique()) / 16
    assert 1 <= result.scores["perplexity"] <= 16 * result.scores["codes used"]
    assert result.protocol["first_stage"]["codes"] == 16


def test_small_sets_carry_a_warning() -> None:
    first_stage = tiny_first_stage()
    assert "no full covariance" in evaluate(first_stage, shapes(15)).warnings[0]  # 16 features
    assert "biased" in evaluate(first_stage, shapes(20)).warnings[0]
    assert not evaluate(first_stage, shapes(160)).warnings


def test_bad_input_is_one_line() -> None:
    grey = build_first_stage({"channels": 8, "channel_mult": [1], "in_channels": 1, "out_channels": 1})
    with pytest.raises(DarkroomError, match="takes 1"):
        evaluate(grey, shapes(2))
    with pytest.raises(DarkroomError, match="no images"):
        evaluate(tiny_first_stage(), {})
    broken = tiny_first_stage()
    broken.autoencoder.decoder.conv_out.bias.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(DarkroomError, match="not finite"):
        evaluate(broken, shapes(2))
