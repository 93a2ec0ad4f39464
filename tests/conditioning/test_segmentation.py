"""Label maps: golden vectors of the official rescaler, and both arrangements as encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_facts import Facts
from parity_data import Case, load_case, weights

from darkroom.build import build_conditioner, conditioner_config
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import Parts
from darkroom.conditioning.segmentation import (
    SegmentationEncoder,
    SegmentationEncoderConfig,
    SegmentationTokens,
    SegmentationTokensConfig,
    SpatialRescaler,
    one_hot,
)
from darkroom.errors import DarkroomError

CLASSES = ["sky", "tree", "road"]
PARTS = Parts(downsampling=4, latent_channels=3)


def golden_rescaler(case: Case) -> SpatialRescaler:
    a = case.args
    rescaler = SpatialRescaler(
        a["n_stages"],
        a.get("in_channels", 3),
        a.get("out_channels"),
        a.get("method", "bilinear"),
        a.get("bias", False),
    )
    rescaler.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    return rescaler


@pytest.mark.parametrize("name", ["spatial_rescaler", "spatial_rescaler_no_map", "spatial_rescaler_bicubic_bias"])
@torch.no_grad()
def test_rescaler_golden(name: str) -> None:
    case = load_case("conditioners_ldm", name)
    case.check("y", golden_rescaler(case)(case.input("x")), atol=2e-5)


def official_encoder(case: Case, args: dict[str, Any], layout: dict[str, Any], prefix: str = "") -> SegmentationEncoder:
    """Our encoder with the official weights: `rescaler.` is the official module."""
    classes = [str(i) for i in range(args["in_channels"])]
    config = SegmentationEncoderConfig(classes=classes, channels=args["out_channels"], stages=args["n_stages"])
    encoder = SegmentationEncoder(config.fitted(Parts()))
    state = weights().make_state_dict(layout, case.spec.get("derived"))
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    encoder.rescaler.load_state_dict(own, strict=True)
    return encoder


@torch.no_grad()
def test_semantic_map_golden() -> None:
    case = load_case("conditioners_ldm", "semantic_map_path")
    encoder = official_encoder(case, case.args, case.spec["layout"])
    case.check("y", encoder.encode(case.input("labels")).concat, atol=2e-5)


@torch.no_grad()
def test_condition_of_the_tiny_semantic_checkpoint() -> None:
    case = load_case("latent_diffusion_tiny", "tiny_semantic")
    args = case.args["cond_stage_config"]["args"]
    encoder = official_encoder(case, args, case.spec["layout"], "cond_stage_model.")
    case.check("concat_condition", encoder.encode(case.input("labels")).concat, atol=2e-5)


def test_one_hot() -> None:
    labels = torch.tensor([[[0, 2], [255, 1]]])
    expected = F.one_hot(torch.tensor([[[0, 2], [3, 1]]]), 4)[..., :3].permute(0, 3, 1, 2).float()
    assert torch.equal(one_hot(labels, 3), expected)  # 255 is no label


def encoder(**options: Any) -> SegmentationEncoder:
    torch.manual_seed(0)
    return SegmentationEncoder(SegmentationEncoderConfig(classes=CLASSES, **options).fitted(PARTS))


def tokens(**options: Any) -> SegmentationTokens:
    torch.manual_seed(0)
    return SegmentationTokens(SegmentationTokensConfig(classes=CLASSES, **{"width": 16, "grid": 4, **options}))


def labels(batch: int = 2) -> torch.Tensor:
    return torch.randint(3, (batch, 32, 48), generator=torch.Generator().manual_seed(1))


def test_sizes_follow_from_the_first_stage() -> None:
    assert encoder().widths == {"concat": 3} and encoder().config.stages == 2
    assert encoder(channels=5, stages=1).encode(labels()).concat.shape == (2, 5, 16, 24)
    assert encoder().encode(labels()).concat.shape == (2, 3, 8, 12)
    with pytest.raises(DarkroomError, match='"segmentation" needs stages and channels'):
        SegmentationEncoderConfig(classes=CLASSES).fitted(Parts())


@pytest.mark.parametrize("bias", [False, True])
def test_null_is_no_label_anywhere(bias: bool) -> None:
    built = encoder(bias=bias)
    null = built.null(2).concat
    expected = built.encode(torch.full((2, 32, 48), 255)).concat
    assert null.shape == (2, 3, 1, 1)
    torch.testing.assert_close(null.expand_as(expected), expected)
    kept = built.encode_kept(labels(), torch.tensor([True, False])).concat
    torch.testing.assert_close(kept, torch.stack([built.encode(labels()).concat[0], expected[1]]))


def test_tokens_tell_the_shares_of_each_cell() -> None:
    """One row of tokens per row of cells; equal cells differ only by their position."""
    built = tokens()
    context = built.encode(labels()).context
    assert context.shape == (2, 16, 16) and built.widths == {"context": 16}
    one = torch.zeros(1, 32, 48, dtype=torch.int64)
    other = one.clone()
    other[:, 8:16, 24:36] = 2  # the cell in row 1, column 2 of 4x4
    changed = (built.encode(one).context != built.encode(other).context).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [4 + 2]
    built.position.data.zero_()
    cells = built.encode(one).context[0]
    torch.testing.assert_close(cells, cells[:1].expand(16, -1))


def test_detail_sees_inside_a_cell() -> None:
    left, right = torch.zeros(2, 1, 32, 32, dtype=torch.int64)
    left[..., :4], right[..., 4:8] = 1, 1
    fine, coarse = tokens(detail=2), tokens(detail=1)
    assert not torch.allclose(fine.encode(left).context, fine.encode(right).context)
    torch.testing.assert_close(coarse.encode(left).context, coarse.encode(right).context)


def test_null_of_tokens() -> None:
    built = tokens()
    torch.testing.assert_close(built.null(2).context, built.encode(torch.full((2, 32, 48), 255)).context)
    kept = built.encode_kept(labels(), torch.tensor([False, True])).context
    torch.testing.assert_close(kept[0], built.null(1).context[0])
    torch.testing.assert_close(kept[1], built.encode(labels()).context[1])


def test_both_arrangements_read_one_field() -> None:
    conditioner = Conditioner({"map": encoder(), "tokens": tokens()})
    result = conditioner({"segmentation": labels()})
    assert (
        conditioner.fields == ("segmentation",) and conditioner.concat_channels == 3 and conditioner.context_dim == 16
    )
    assert result.concat.shape == (2, 3, 8, 12) and result.context.shape == (2, 16, 16)


def test_maps_as_someone_gives_them() -> None:
    built, small = encoder(), np.array([[0, 1], [2, 255]], np.uint8)
    read = built.from_request("segmentation", small, (4, 4))
    assert read.dtype == torch.int64 and torch.equal(read, torch.from_numpy(small.repeat(2, 0).repeat(2, 1)).long())
    assert torch.equal(built.from_request("segmentation", read, (4, 4)), read)
    assert torch.equal(built.from_request("segmentation", small[None], (2, 2)), torch.from_numpy(small).long())
    recorded = built.record("segmentation", read)
    assert recorded["shape"] == [4, 4] and len(recorded["sha256"]) == 64
    for value, message in (
        (np.full((4, 4), 3, np.uint8), "has the id 3; this model knows 0 to 2"),
        (np.zeros((4, 4), np.float32), "give whole numbers"),
        (np.zeros((4, 6), np.uint8), "is 6x4, the image 4x4"),
        (np.zeros((4, 4, 3), np.uint8), "no map of one channel"),
        ("map.png", "give an array or a tensor, not str"),
    ):
        with pytest.raises(DarkroomError, match=message):
            built.from_request("segmentation", value, (4, 4))


@pytest.mark.parametrize("kind", [SegmentationEncoderConfig, SegmentationTokensConfig])
def test_classes_come_from_the_data(kind: Any) -> None:
    complete = conditioner_config({"map": kind()}, Facts(["a"], map_names=CLASSES))
    assert complete["encoders"]["map"]["classes"] == CLASSES
    with pytest.raises(DarkroomError, match="needs label maps"):
        conditioner_config({"map": kind()}, Facts(["a"]))
    with pytest.raises(DarkroomError, match="no classes"):
        build_conditioner({"encoders": {"map": {"kind": kind().kind, "classes": []}}}, None) if (
            kind is SegmentationTokensConfig
        ) else SegmentationEncoder(kind().fitted(PARTS))
