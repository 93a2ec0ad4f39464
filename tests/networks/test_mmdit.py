"""MMDiT: golden vectors of the official code, its layout and sizes, and what each option does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_data import PARITY, Case, case_names, load_case, weights
from transformer_checks import (
    check_batch,
    check_gradients,
    check_precision,
    check_slots,
    check_target_time,
    conditioning,
    inputs,
    opened,
    randn,
)

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import make_grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.guidance import Guided
from darkroom.networks.mmdit import MMDIT_SIZES, MMDiT, MMDiTConfig
from darkroom.solvers import SOLVERS

GOLDENS = [n for n in case_names("sd3") if load_case("sd3", n).spec.get("class") == "MMDiTX"]
# Entries of a published layout that are no choice here: each follows from the others or is fixed in the official code.
NO_OPTIONS = {"class", "head_dim", "timestep_frequency_dim", "last_block_context_pre_only"}


def golden_network(name: str) -> MMDiT:
    """Own position table, everything else from the golden's weights; the table must be the golden's."""
    case = load_case("sd3", name)
    recipe = case.spec["derived"]["pos_embed"]
    network = MMDiT(MMDiTConfig(**case.args, pos_embed_base_size=round(recipe["grid"] * recipe["coord_scale"]))).eval()
    own = network.pos_embed.clone()
    network.load_state_dict(weights().make_state_dict(case.spec["layout"], case.spec["derived"]), strict=True)
    torch.testing.assert_close(own, network.pos_embed, atol=1e-6, rtol=0)
    return network


def golden_conditioning(case: Case, prefix: str = "") -> Conditioning:
    return Conditioning(context=case.input(f"{prefix}context"), vector=case.input(f"{prefix}pooled"))


# ---- the official code


def test_the_goldens_are_there() -> None:
    assert GOLDENS == ["mmdit", "mmdit_nonsquare", "mmdit_qknorm_dual", "mmdit_qknorm"]


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_official_output(name: str) -> None:
    case, network = load_case("sd3", name), golden_network(name)
    slots = golden_conditioning(case)
    case.check("velocity", network(case.input("x"), case.input("t"), slots), atol=2e-5)
    if "velocity_skip_layer_1" in case.spec["outputs"]:
        skipped = network(case.input("x"), case.input("t"), slots, skip_layers=[1])
        case.check("velocity_skip_layer_1", skipped, atol=2e-5)


def golden_denoiser() -> Denoiser:
    return Denoiser(golden_network("mmdit"), make_schedule(ScheduleConfig(kind="flow", shift=3.0)), "velocity")


@torch.no_grad()
def test_official_denoiser() -> None:
    case, denoiser = load_case("sd3", "denoised"), golden_denoiser()
    level = denoiser.schedule.level(case.input("sigma").double() * 1000)
    case.check("denoised", denoiser(case.input("x"), level, golden_conditioning(case)), atol=2e-5)


@pytest.mark.parametrize(("name", "solver"), [("trajectory_euler_5", "euler"), ("trajectory_dpmpp_2m_5", "dpm++2m")])
@torch.no_grad()
def test_official_trajectory(name: str, solver: str) -> None:
    """Guided solvers at the official sigmas: x before every step and the result."""
    case, denoiser = load_case("sd3", name), golden_denoiser()
    grid = make_grid(denoiser.schedule, case.args["steps"], spacing="sd3")
    torch.testing.assert_close(grid.levels.sigma.float(), case.output("sigmas"), atol=1e-6, rtol=0)
    denoise = Guided(
        denoiser, golden_conditioning(case), golden_conditioning(case, "uncond_"), case.args["guidance_scale"]
    )
    steps: list[torch.Tensor] = []
    noise = case.input("noise")

    def note(step: int, level: NoiseLevel, x: torch.Tensor, x0: torch.Tensor) -> None:
        steps.append(x)

    options = {"frame": "flow"} if solver == "dpm++2m" else {}
    x = SOLVERS[solver](denoise, noise, grid, lambda i: torch.zeros_like(noise), callback=note, **options)
    case.check("x", torch.stack([*steps, x]), atol=0, relative=1e-4)


def test_names_and_shapes_of_sd3_medium() -> None:
    layout = weights().load_layout(PARITY / "layouts" / "sd3-medium.json.gz")
    prefix = "model.diffusion_model."
    expected = {k.removeprefix(prefix): v for k, v in layout["layout"].items() if k.startswith(prefix)}
    args = {k: v for k, v in layout["hyper_parameters"]["transformer"].items() if k not in NO_OPTIONS}
    config = MMDIT_SIZES["sd3-medium"]
    assert all(getattr(config, k) == (tuple(v) if isinstance(v, list) else v) for k, v in args.items())
    with torch.device("meta"):
        network = MMDiT(config)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == expected


@pytest.mark.parametrize(("name", "billions"), [("sd3-medium", 2.03), ("sd3.5-medium", 2.24), ("sd3.5-large", 8.06)])
def test_published_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        network = MMDiT(MMDIT_SIZES[name])
    assert round(sum(p.numel() for p in network.parameters()) / 1e9, 2) == billions


# ---- ours


def small(**options: Any) -> MMDiT:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "context_dim": 24,
        "pos_embed_max_size": 6,
    }
    return opened(MMDiT(MMDiTConfig(**{**defaults, **options})))


FULL: dict[str, Any] = {"num_classes": 5, "adm_in_channels": 6, "in_channels": 6}


def test_every_slot_is_read() -> None:
    check_slots(small(**FULL))
    check_slots(small(**FULL, x_block_self_attn_layers=(0,), qk_norm="ln", qkv_bias=False))


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_batch(small(**FULL))


def test_gradients_and_checkpointing() -> None:
    options = {**FULL, "target_time": True, "qk_norm": "rms", "x_block_self_attn_layers": (1, 2)}
    plain, thrifty = small(**options), small(**options, use_checkpoint=True)
    # The last block's text gives keys and values alone: nothing reads its queries, so no gradient tells of them.
    for network in (plain, thrifty):
        del network.joint_blocks[2].context_block.attn.ln_q
        network.joint_blocks[2].context_block.attn.ln_q = torch.nn.Identity()
    check_gradients(plain, thrifty)


def test_target_time() -> None:
    plain = small(**FULL)
    check_target_time(plain, MMDiT(MMDiTConfig(**{**vars(plain.config), "target_time": True})))


def test_precision() -> None:
    check_precision(small(**FULL, qk_norm="rms"))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (14, 6), (2, 2), (20, 20)])
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_any_size_and_aspect_ratio(size: tuple[int, int], fit: str) -> None:
    network, (x, time) = small(position_fit=fit), inputs(size=size)
    slots = Conditioning(context=randn(2, 5, 24))
    result = network(x, time, slots)
    assert result.shape == x.shape and result.isfinite().all()
    assert (network(x.flip(-1), time, slots).flip(-1) - result).abs().max() > 1e-3


def test_starts_closed() -> None:
    torch.manual_seed(0)
    network = MMDiT(MMDiTConfig(in_channels=6, out_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=24))
    x, time = inputs(channels=6)
    slots = Conditioning(context=randn(2, 5, 24))
    assert not network(x, time, slots).any()
    text, image = randn(2, 5, 32), randn(2, 16, 32)
    block: Any = network.joint_blocks[0]
    for before, after in zip((text, image), block(text, image, randn(2, 32), None), strict=True):
        assert torch.equal(before, after)


def test_leaving_out_all_layers_leaves_the_ends() -> None:
    network, (x, time) = small(), inputs()
    one, other = (Conditioning(context=randn(2, 5, 24, seed=s)) for s in (1, 2))
    a, b = (network(x, time, slots, skip_layers=range(3)) for slots in (one, other))
    assert torch.equal(a, b) and not torch.allclose(network(x, time, one), network(x, time, other), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_dim": None}, "kind: dit"),
        ({"x_block_self_attn_layers": [3]}, "blocks 0 to 2"),
        ({"pos_embed_max_size": 0}, "pos_embed_max_size is 0"),
        ({"num_heads": 3}, "num_heads=3"),
    ],
)
def test_impossible_configs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DarkroomError, match=words) as error:
        small(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "slots", "words"),
    [
        ({}, None, "'context'"),
        ({}, Conditioning(vector=randn(2, 6)), "'vector'"),
        ({"adm_in_channels": 6}, Conditioning(context=randn(2, 5, 24)), "adm_in_channels"),
        ({}, Conditioning(context=randn(2, 5, 24), label=torch.zeros(2).long()), "num_classes"),
        ({"in_channels": 7}, conditioning(vector=None, label=None), "takes 7"),
    ],
)
def test_wrong_inputs(options: dict[str, Any], slots: Conditioning | None, words: str) -> None:
    x, time = inputs()
    with pytest.raises(DarkroomError, match=words):
        small(**options)(x, time, slots)


def test_a_target_time_that_nothing_reads() -> None:
    x, time = inputs()
    with pytest.raises(DarkroomError, match="target_time"):
        small()(x, time, Conditioning(context=randn(2, 5, 24)), time)
