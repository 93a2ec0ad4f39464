"""SD 3's towers are dropped one by one, and T5 reads as many tokens as it is told."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from text_tower_files import CLIP_G, CLIP_L, T5, encoder
from torch import Tensor

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.text_towers import PartlyDropped, TextTowers
from darkroom.errors import DarkroomError

TOWERS = ("clip_l", "clip_g", "t5")
SMALL: dict[str, Any] = {
    "kind": "sd3_text", "clip_l": {"network": CLIP_L}, "clip_g": {"network": {**CLIP_G, "pad_token_id": 0}},
    "t5": {"network": T5, "length": 20},
}  # fmt: skip
WIDTHS = {
    "clip_l": (slice(0, 77), slice(0, 32)),
    "clip_g": (slice(0, 77), slice(32, 80)),
    "t5": (slice(77, 97), slice(0, 96)),
}
IDS = {"clip": [5, 6, 7], "t5": [5, 6, 7]}


def sd3(**options: Any) -> TextTowers:
    torch.manual_seed(0)
    made = encoder(**{**SMALL, **options})
    assert isinstance(made, TextTowers)
    return made


def part(context: Tensor, tower: str) -> Tensor:
    """The tokens and channels that a tower fills."""
    rows, columns = WIDTHS[tower]
    return context[:, rows, columns]


@torch.no_grad()
@pytest.mark.parametrize("no_text", ["empty", "zeros"])
def test_a_dropped_tower_reads_nothing_and_the_others_everything(no_text: str) -> None:
    ours = sd3(no_text=no_text)
    full, null = ours.encode([IDS]), ours.null(1)
    sets = [frozenset(c) for n in range(4) for c in itertools.combinations(TOWERS, n)]
    mixed = ours.encode([PartlyDropped(IDS, dropped) for dropped in sets])
    for i, dropped in enumerate(sets):
        for tower in TOWERS:
            expected = null if tower in dropped else full
            close = torch.testing.assert_close
            close(part(mixed.context[i : i + 1], tower), part(expected.context, tower), atol=2e-5, rtol=1e-5)
            if tower != "t5":
                where = WIDTHS[tower][1]
                close(mixed.vector[i : i + 1, where], expected.vector[:, where], atol=2e-5, rtol=1e-5)
    assert bool(null.context.any()) == (no_text == "empty")


@torch.no_grad()
def test_each_is_dropped_by_its_own_rate() -> None:
    """The paper's 46.4 %: independent, and all three at once in 10 %."""
    rate, count = 0.464, 20_000
    ours = sd3(drop_rates=dict.fromkeys(TOWERS, rate))
    drawn = ours.augment([IDS] * count, torch.Generator().manual_seed(0))
    table = torch.tensor([[name in value.towers for name in TOWERS] for value in drawn]).double()  # type: ignore
    assert (table.mean(0) - rate).abs().max() < 0.015
    assert torch.corrcoef(table.T).fill_diagonal_(0).abs().max() < 0.03
    assert abs(float(table.all(1).double().mean()) - 0.1) < 0.01
    # One alone: the draws of the others stay as they are.
    one = sd3(drop_rates={"t5": rate}).augment([IDS] * 50, torch.Generator().manual_seed(0))
    assert [value.towers for value in one] == [value.towers & {"t5"} for value in drawn[:50]]  # type: ignore


@torch.no_grad()
def test_in_training() -> None:
    """Only with a generator; the single rate still drops all together."""
    ours = sd3(drop_rates=dict.fromkeys(TOWERS, 1.0), drop_rate=0.0, no_text="zeros")
    conditioner = Conditioner({"text": ours})
    batch = {"text": [IDS, IDS]}
    assert conditioner(batch).context.any()
    assert not conditioner(batch, torch.Generator().manual_seed(0)).context.any()
    together = sd3(drop_rate=1.0, no_text="zeros")
    assert not Conditioner({"text": together})(batch, torch.Generator().manual_seed(0)).context.any()
    mixed = sd3(drop_rates={"t5": 1.0}, drop_rate=0.5, no_text="zeros")
    context = Conditioner({"text": mixed})({"text": [IDS] * 40}, torch.Generator().manual_seed(0)).context
    assert not part(context, "t5").any()
    kept = part(context, "clip_l").flatten(1).any(1)
    assert 8 < int(kept.sum()) < 32 and torch.equal(kept, part(context, "clip_g").flatten(1).any(1))


@pytest.mark.parametrize("rates", [{"t6": 0.1}, {"t5": 1.5}])
def test_bad_rates(rates: dict[str, float]) -> None:
    with pytest.raises(DarkroomError, match="drop_rates"):
        sd3(drop_rates=rates)


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 256])
def test_t5_reads_longer_texts(length: int) -> None:
    """T5's relative positions have no end; CLIP's table has."""
    ours = sd3(t5={"network": T5, "length": length}, use_mask=True)
    result = ours.encode([{"clip": [5], "t5": [*[7] * (length - 10), 1]}])
    assert result.context.shape[1] == 77 + length
    assert int(result.context_mask[0, 77:].sum()) == length - 9  # with the end token
    with pytest.raises(DarkroomError, match="length 78"):
        sd3(clip_l={"network": CLIP_L, "length": 78}, clip_g={"network": CLIP_G, "length": 78})
