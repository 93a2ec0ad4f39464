"""The table of networks that look at pictures."""

from __future__ import annotations

import pytest
import torch

from darkroom.errors import DarkroomError
from darkroom.evaluation.extractors import EXTRACTORS, open_extractor
from darkroom.features.perceptual import load_perceptual


def pictures(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed)).byte()


def test_the_bundled_network_is_always_there_and_never_called_fid() -> None:
    extractor = open_extractor("darkroom")
    images = pictures(3)
    embedding, probabilities = extractor(images)
    assert embedding.shape == (3, extractor.width) and embedding.dtype == torch.float32 and probabilities is None
    assert (extractor.fd_name, extractor.kd_name) == ("FD-darkroom", "KD-darkroom")
    network = load_perceptual()
    assert extractor.weights == network.sha256
    expected = network.embed(images.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-6)


def test_names_that_are_not_known_are_one_line() -> None:
    with pytest.raises(DarkroomError, match="darkroom") as error:
        open_extractor("darkrom")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_pictures_of_another_layout_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        open_extractor("darkroom")(images)


def test_every_row_of_the_table_has_the_name_it_is_found_by() -> None:
    assert open_extractor().name in EXTRACTORS
