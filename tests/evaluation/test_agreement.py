"""Does a picture show what was asked for: against torchmetrics, and scenes whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import reference_metrics as reference
import torch
from torch import Tensor

from darkroom.data.shapes import Scene, draw_scene, render
from darkroom.evaluation.agreement import box_agreement, caption_agreement, class_hits, clip_score, map_agreement


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(index, split="validation") for index in range(6)]


@pytest.fixture(scope="module")
def drawn(scenes: list[Scene]) -> tuple[Tensor, list[np.ndarray]]:
    """The pictures, and their label maps."""
    pictures, maps = zip(*(render(scene) for scene in scenes), strict=True)
    return torch.from_numpy(np.stack(pictures)), list(maps)


@pytest.mark.parametrize("top", [1, 3])
def test_class_accuracy_equals_torchmetrics(top: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(200, 7, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    expected = reference.metrics_accuracy.multiclass_accuracy(scores, labels, 7, average="micro", top_k=top)
    assert float(class_hits(scores, labels, top=top).mean()) == pytest.approx(float(expected), rel=1e-6)


def test_a_classifier_that_cannot_tell_is_right_about_none() -> None:
    labels = torch.arange(4)
    assert class_hits(torch.zeros(4, 4), labels).tolist() == [0.0] * 4
    assert class_hits(torch.eye(4), labels).tolist() == [1.0] * 4
    assert class_hits(torch.eye(4), labels.flip(0)).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="top 5"):
        class_hits(torch.eye(4), labels, top=5)


def test_clip_score_of_known_vectors() -> None:
    images = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    texts = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100.0, 100.0 / 2**0.5, 0.0, 0.0])
    with pytest.raises(ValueError, match="twice"):
        clip_score(images, texts[:1])


def test_true_scenes_agree_and_those_of_others_do_not(
    scenes: list[Scene], drawn: tuple[Tensor, list[np.ndarray]]
) -> None:
    pictures, maps = drawn
    captions, boxes = [scene.caption for scene in scenes], [scene.boxes for scene in scenes]
    assert caption_agreement(pictures, captions).tolist() == [1.0] * 6
    turned = pictures.roll(1, 0)
    assert float(caption_agreement(turned, captions).mean()) < 0.5
    for right, wrong in (
        (box_agreement(pictures, boxes), box_agreement(turned, boxes)),
        (map_agreement(pictures, maps), map_agreement(turned, maps)),
    ):
        assert right.accepted.tolist() == [1.0] * 6 and float(right.overlap.min()) > 0.85
        assert float(wrong.accepted.mean()) < 0.5 and float(wrong.overlap.mean()) < float(right.overlap.min())
    as_tensors = map_agreement(pictures, torch.from_numpy(np.stack(maps)))
    assert as_tensors.overlap.equal(map_agreement(pictures, maps).overlap)


def test_the_overlap_of_a_map_is_its_miou(scenes: list[Scene], drawn: tuple[Tensor, list[np.ndarray]]) -> None:
    """A map with one label painted over: that label has an overlap of 0, the background loses its area."""
    pictures, maps = drawn
    single = next(i for i, scene in enumerate(scenes) if len(scene.objects) == 1)
    empty = np.zeros_like(maps[single])
    found = map_agreement(pictures[single : single + 1], [empty])
    share = float((maps[single] == 0).mean())
    assert found.accepted.tolist() == [0.0]
    assert float(found.overlap) == pytest.approx(share / 2, abs=0.01)
