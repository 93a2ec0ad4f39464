"""Back-projection: the corrected picture made smaller is the small picture, value for value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.data.degradations import LowResolution, degrade
from darkroom.upscaling.consistency import BOUND, consistent, smaller


def photo(size: int, seed: int, top: float = 255) -> torch.Tensor:
    """(3, size, size) with detail at all scales, edges, and areas at both ends of the range."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size)))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    field = np.fft.irfft2(spectrum / np.maximum(np.hypot(fy, fx), 1 / size), s=(size, size))
    values = 0.5 + field / (2.5 * field.std()) + 0.3 * (np.indices((size, size))[1] > size / 2)
    return torch.from_numpy((np.clip(values, 0, 1) * top).round().astype(np.float32))


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_result_made_smaller_is_the_picture(factor: int, seed: int) -> None:
    truth = photo(64, seed).to(torch.uint8)
    small = degrade(truth, LowResolution(factor))
    start = photo(64, seed + 10)  # quite another picture
    result, difference = consistent(start, small.float(), 0, 255)
    assert difference < BOUND and float(result.min()) >= 0 and float(result.max()) <= 255
    stored = result.to(torch.uint8)
    assert torch.equal(stored.float(), result)  # whole numbers already
    assert torch.equal(degrade(stored, LowResolution(factor)), small)
    for plane, target in zip(stored.numpy(), small.numpy(), strict=True):  # Pillow without its rounding to 8 bits
        picture = Image.fromarray(plane.astype(np.float32)).resize(target.shape[::-1], Image.Resampling.BICUBIC)
        assert np.abs(np.clip(np.asarray(picture), 0, 255) - target).max() < 0.5


def test_a_picture_that_is_consistent_stays() -> None:
    truth = photo(32, 0)
    small = degrade(truth.to(torch.uint8), LowResolution(4)).float()
    result, difference = consistent(truth, small, 0, 255)
    assert difference < BOUND and (result - truth).abs().max() <= 2
    again, _ = consistent(result, small, 0, 255)
    assert torch.equal(again, result)


def test_sixteen_bits_and_floating_point() -> None:
    truth = photo(32, 1, 65535).to(torch.int32).to(torch.uint16)
    small = degrade(truth, LowResolution(2))
    result, difference = consistent(photo(32, 5, 65535), small.float(), 0, 65535)
    assert difference < BOUND
    assert torch.equal(degrade(result.to(torch.int32).to(torch.uint16), LowResolution(2)), small)
    target = smaller(photo(32, 2) / 255, (16, 16))
    result, difference = consistent(photo(32, 6) / 255, target, 0, 1, whole=False)
    assert difference < 2**-15 and float((smaller(result, (16, 16)) - target).abs().max()) == pytest.approx(difference)


def test_what_no_picture_can_give_is_told_apart() -> None:
    """A white pixel on black: bicubic would need more than white."""
    small = torch.zeros(1, 8, 8)
    small[0, 4, 4] = 255
    result, difference = consistent(torch.full((1, 32, 32), 128.0), small, 0, 255)
    assert difference > 1 and result.isfinite().all()
    assert float((smaller(result, (8, 8)) - small).abs().max()) == pytest.approx(difference)
    plain, before = torch.full((1, 32, 32), 128.0), 128
    assert difference < before / 2 < float((smaller(plain, (8, 8)) - small).abs().max())
