"""Integers and vectors as conditions; the noise on image embeddings of SD 2.1 unCLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity_data import load_case

from darkroom.conditioning.augmentation import EMBEDDING_NOISE, Noised, level_embedding
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.vectors import LabelEncoder, LabelEncoderConfig, VectorEncoder, VectorEncoderConfig
from darkroom.diffusion.schedules import DDPMSchedule, make_schedule
from darkroom.errors import DarkroomError


def vector(**options: Any) -> VectorEncoder:
    return VectorEncoder(VectorEncoderConfig(**{"width": 6, **options}))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels() -> None:
    encoder = LabelEncoder(LabelEncoderConfig(count=10))
    assert encoder.widths == {"label": 11} and encoder.null(2).label.tolist() == [10, 10]
    assert encoder.encode([3, 10]).label.tolist() == [3, 10]
    own = LabelEncoder(LabelEncoderConfig(count=10, null_label=0, field="noise_level", drop_rate=1.0))
    assert own.widths == {"label": 10} and own.null(1).label.tolist() == [0]
    assert Conditioner({"n": own})({"noise_level": torch.tensor([4, 5])}, generator()).label.tolist() == [0, 0]
    assert own.from_request("noise_level", 7, (8, 8)) == 7
    for bad in ([11], [-1]):
        with pytest.raises(DarkroomError, match="this model has 0 to 9"):
            encoder.encode(bad)
    assert own.from_request("noise_level", "7", (8, 8)) == 7
    for wrong in ("fox", 11, -1):
        with pytest.raises(DarkroomError, match="is not known; this model has 0 to 9"):
            encoder.from_request("class_label", wrong, (8, 8))
    with pytest.raises(DarkroomError, match="give 0 to 9"):
        LabelEncoder(LabelEncoderConfig(count=10, null_label=10))


def test_vectors_in_either_slot() -> None:
    values = torch.randn(2, 6, generator=generator())
    assert torch.equal(vector().encode(values).vector, values) and vector().widths == {"vector": 6}
    token = vector(slot="context")
    assert torch.equal(token.encode(values).context, values[:, None]) and token.null(3).context.shape == (3, 1, 6)
    assert not vector().null(2).vector.any()
    assert not list(vector().state_dict())
    kept = vector().encode_kept(values, torch.tensor([False, True])).vector
    assert torch.equal(kept, torch.stack([torch.zeros(6), values[1]]))


def test_noise_golden_of_unclip() -> None:
    case = load_case("unet_sd2", "unclip_noise_augmentation")
    schedule = make_schedule(EMBEDDING_NOISE)
    assert isinstance(schedule, DDPMSchedule)
    case.check("betas", schedule.betas, atol=2e-6)
    case.check("alphas_cumprod", schedule.alphas_cumprod, atol=2e-6)
    case.check("level_embedding", level_embedding(case.input("t"), case.args["timestep_dim"]), atol=2e-6)


def test_noised_embeddings() -> None:
    """Noise is added where the embeddings have mean 0 and deviation 1; the level stands behind them."""
    encoder = vector(noise_levels=1000, level_width=4)
    assert encoder.widths == {"vector": 10} and set(encoder.state_dict()) == {"data_mean", "data_std"}
    encoder.data_mean.fill_(5.0)
    encoder.data_std.fill_(2.0)
    values, noise = 5 + 2 * torch.randn(3, 6, generator=generator()), torch.randn(3, 6, generator=generator(1))
    noised = encoder.noised(values, 400, noise)
    level = make_schedule(EMBEDDING_NOISE).level(400.0)
    torch.testing.assert_close(
        noised.values, 5 + 2 * (float(level.alpha) * (values - 5) / 2 + float(level.sigma) * noise)
    )
    result = encoder.encode(noised).vector
    assert torch.equal(result[:, :6], noised.values)
    assert torch.equal(result[:, 6:], level_embedding(torch.full((3,), 400), 4))
    plain = encoder.encode(values).vector
    assert torch.equal(plain[:, :6], values) and plain[0, 6:].tolist() == [1.0, 1.0, 0.0, 0.0]
    drawn = encoder.augment(values.repeat(100, 1), generator())
    assert isinstance(drawn, Noised) and drawn.level.min() < 50 and drawn.level.max() > 950
    assert encoder.noised(values, None, noise).level.tolist() == [0, 0, 0]
    assert vector().augment(values, generator()) is values and vector().noised(values, None, noise) is values


def test_vectors_as_someone_gives_them() -> None:
    encoder = vector()
    for value in (np.arange(6), list(range(6)), torch.arange(6)):
        assert encoder.from_request("embedding", value, (8, 8)).tolist() == [0, 1, 2, 3, 4, 5]
    assert encoder.several([np.arange(6)]) and not encoder.several(list(range(6))) and not encoder.several(np.arange(6))
    with pytest.raises(DarkroomError, match="this model takes 6 numbers"):
        encoder.from_request("embedding", [1.0, 2.0], (8, 8))
    with pytest.raises(DarkroomError, match="an even number"):
        vector(level_width=3)
