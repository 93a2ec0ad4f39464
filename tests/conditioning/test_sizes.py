"""SDXL's sizes as a vector: the embedding of diffusers, defaults of a request, what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_facts import Facts

from darkroom.conditioning.classes import ClassEncoder, ClassEncoderConfig
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.sizes import SizesEncoder, SizesEncoderConfig
from darkroom.errors import DarkroomError


def sizes(**options: Any) -> SizesEncoder:
    return SizesEncoder(SizesEncoderConfig(**options))


def test_equals_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    values = torch.tensor([[768.0, 1024.0, 0.0, 17.0, 512.0, 512.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(values.flatten()).reshape(2, -1)
    result = sizes().encode(values).vector
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(sizes().encode(values.tolist()).vector, result)
    assert Conditioner({"sizes": sizes()}).vector_dim == 1536  # with bigG's 1280 the 2816 of SDXL
    refiner = sizes(parts=("original_size", "crop", "aesthetic_score"))
    assert refiner.widths == {"vector": 5 * 256}
    assert refiner.from_size((30, 20)).tolist() == [20, 30, 0, 0, 6]


def test_absent_sizes_are_those_of_a_whole_picture() -> None:
    encoder = sizes(size=(96, 64))
    assert encoder.stays and encoder.from_size((96, 64)).tolist() == [64, 96, 0, 0, 64, 96]
    expected = encoder.encode([[64, 96, 0, 0, 64, 96]] * 2).vector
    assert torch.equal(encoder.null(2).vector, expected)
    # Data that does not know them: beside another condition, which tells how many examples there are.
    conditioner = Conditioner({"class": ClassEncoder(ClassEncoderConfig(classes=["a"], width=4)), "sizes": encoder})
    assert torch.equal(conditioner({"class_label": torch.tensor([0, 0])}).vector, expected)
    assert torch.equal(Conditioner({"sizes": encoder})({"moments": torch.zeros(2, 1)}).vector, expected)
    with pytest.raises(DarkroomError, match="reads the field 'class_label'"):
        conditioner({"text": ["a"]})
    assert SizesEncoderConfig().completed("sizes", Facts(size=(96, 64))).size == (96, 64)
    assert SizesEncoderConfig(size=(8, 8)).completed("sizes", Facts(size=(96, 64))).size == (8, 8)


def test_errors() -> None:
    encoder = sizes()
    for value in ([1, 2, 3], "large", [1, 2, 3, 4, 5, float("nan")]):
        with pytest.raises(DarkroomError, match="give 6 numbers: original_size, crop, target_size"):
            encoder.from_request("sizes", value, (64, 64))
    with pytest.raises(DarkroomError, match="give 6 numbers"):
        encoder.encode(torch.zeros(2, 5))
    with pytest.raises(DarkroomError, match="width 7"):
        sizes(width=7)
    with pytest.raises(DarkroomError, match="0 parts"):
        sizes(parts=())
    assert encoder.several([[1, 2, 3, 4, 5, 6]]) and not encoder.several([1, 2, 3, 4, 5, 6])
