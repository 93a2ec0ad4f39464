"""A recipe that changes the kind of a part begins that part anew: the options of the old kind are not its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from darkroom.errors import DarkroomError
from darkroom.networks.dit import DiTConfig
from darkroom.networks.unet import UNetConfig
from darkroom.recipe_source import new_recipe
from darkroom.training.recipe import Recipe, find_recipe, read_recipe, resolve


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return resolve(read_recipe(path))


def test_another_network_on_a_base(tmp_path: Path) -> None:
    got = recipe(tmp_path, "base: shapes-tiny\ndenoiser:\n  network: {kind: dit, hidden_size: 64, num_heads: 4}\n")
    assert got.denoiser.network == DiTConfig(hidden_size=64, num_heads=4)
    base = resolve(read_recipe(find_recipe("shapes-tiny")))
    assert got.denoiser.schedule == base.denoiser.schedule and got.conditioner == base.conditioner


def test_the_same_network_keeps_what_the_base_says(tmp_path: Path) -> None:
    base = resolve(read_recipe(find_recipe("shapes-tiny"))).denoiser.network
    assert isinstance(base, UNetConfig)
    for kind in ("", "kind: unet, "):
        got = recipe(tmp_path, f"base: shapes-tiny\ndenoiser:\n  network: {{{kind}dropout: 0.5}}\n").denoiser.network
        assert isinstance(got, UNetConfig)
        assert (got.dropout, got.model_channels, got.channel_mult) == (0.5, base.model_channels, base.channel_mult)


def test_and_back_again(tmp_path: Path) -> None:
    (tmp_path / "dit.yaml").write_text("base: shapes-tiny\ndenoiser: {network: {kind: dit, depth: 3}}\n")
    deeper = recipe(tmp_path, "base: dit.yaml\ndenoiser: {network: {num_heads: 2}}\n")
    assert deeper.denoiser.network == DiTConfig(depth=3, num_heads=2)
    again = recipe(tmp_path, "base: dit.yaml\ndenoiser: {network: {kind: unet}}\n")
    assert again.denoiser.network == UNetConfig()


def test_another_encoder_under_an_old_name(tmp_path: Path) -> None:
    got = recipe(tmp_path, "base: shapes-tiny\nconditioner: {text: {kind: class, width: 8}}\n")
    assert got.conditioner["text"].kind == "class"
    other = recipe(tmp_path, "base: shapes-tiny\nconditioner: {class: {kind: class, width: 8}, text: null}\n")
    assert list(other.conditioner) == ["class"]


def test_from_the_command_line_in_any_order() -> None:
    for changes in (
        {"denoiser.network.kind": "dit", "denoiser.network.depth": 3},
        {"denoiser.network.depth": 3, "denoiser.network.kind": "dit"},
    ):
        assert new_recipe("shapes-tiny", changes=changes)[0].denoiser.network == DiTConfig(depth=3)


def test_options_of_another_kind_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match=r'"denoiser.network.model_channels"'):
        recipe(tmp_path, "base: shapes-tiny\ndenoiser: {network: {kind: dit, model_channels: 64}}\n")
    with pytest.raises(DarkroomError, match=r'"denoiser.network.kind" is .dti'):
        recipe(tmp_path, "base: shapes-tiny\ndenoiser: {network: {kind: dti}}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: shapes-tiny\nobjective: {alone_rate: 2}\n", '"objective.alone_rate" is 2: give a share from 0 to 1'),
        ("base: first-stage-grain\nfirst_stage: {train: {grain_share: 3}}\n", "a share of 3 of the missing grain"),
    ],
)
def test_what_is_used_late_is_checked_at_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        recipe(tmp_path, text)
