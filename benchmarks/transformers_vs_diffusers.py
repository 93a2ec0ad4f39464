"""Our DiT and MMDiT against diffusers' transformers: the same configuration, weights, inputs and thread count.

    python benchmarks/transformers_vs_diffusers.py [--rounds 5] [--threads 1] [--row TEXT] [--cpu-time]

Rows: forward pass and forward + backward of each network. Both sides run in one process in turning order, so that a
busy machine slows both alike; the ratio of a round is their time over ours, and above 1 we are faster. Before a row is
timed both sides must agree on its result.

On a machine that is busy with other work, --threads 1 --cpu-time counts the seconds in which this process really ran.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from unet_vs_diffusers import add_common_arguments, begin, clock, quantile

from darkroom.conditioning.types import Conditioning
from darkroom.interop.diffusers_transformers import (
    dit_table,
    dit_to_diffusers_config,
    sd3_table,
    sd3_to_diffusers_config,
)
from darkroom.interop.tensor_source import Table, inverse
from darkroom.networks.dit import DiT, DiTConfig
from darkroom.networks.mmdit import MMDiT, MMDiTConfig

DIT = DiTConfig(hidden_size=384, depth=4, num_heads=6, num_classes=1001, out_channels=8)
MMDIT = MMDiTConfig(
    hidden_size=384,
    depth=4,
    num_heads=6,
    qk_norm="rms",
    context_dim=256,
    adm_in_channels=128,
    pos_embed_max_size=48,
    pos_embed_base_size=16,
)
TOKENS = 77
TOLERANCE = 1e-4

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    name: str
    ours: Run
    theirs: Run


def randomised(network: nn.Module) -> nn.Module:
    """No weight is zero, so that every layer counts in the agreement."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.eval()


def fill(theirs: nn.Module, ours: nn.Module, table: Table) -> None:
    """The same weights, under their names."""
    state = ours.state_dict()
    shapes = {name: tuple(state[name].shape) for name in table}
    targets = inverse(table, shapes, dict.fromkeys(table, "float32"))
    theirs.load_state_dict({name: target.made(state) for name, target in targets.items()}, strict=True)


def dit_pair(batch: int, size: int) -> tuple[Run, Run]:
    ours = randomised(DiT(DIT))
    theirs = DiTTransformer2DModel.from_config(dit_to_diffusers_config(DIT))
    fill(theirs, ours, dit_table(DIT))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the official frequencies
    theirs.eval()
    x, time, label = torch.randn(batch, 4, size, size), torch.full((batch,), 500.0), torch.arange(batch)
    return lambda: ours(x, time, Conditioning(label=label)), lambda: theirs(x, time, class_labels=label).sample


def mmdit_pair(batch: int, size: int) -> tuple[Run, Run]:
    ours = randomised(MMDiT(MMDIT))
    theirs = SD3Transformer2DModel.from_config(sd3_to_diffusers_config(MMDIT))
    fill(theirs, ours, sd3_table(MMDIT))
    theirs.eval()
    x, time = torch.randn(batch, 16, size, size), torch.full((batch,), 500.0)
    assert MMDIT.context_dim is not None and MMDIT.adm_in_channels is not None
    context, vector = torch.randn(batch, TOKENS, MMDIT.context_dim), torch.randn(batch, MMDIT.adm_in_channels)
    return (
        lambda: ours(x, time, Conditioning(context=context, vector=vector)),
        lambda: theirs(x, encoder_hidden_states=context, pooled_projections=vector, timestep=time).sample,
    )


def trained(run: Run) -> Run:
    """Forward and backward; the result is the loss. Gradients add up, which costs both sides the same."""

    def step() -> Tensor:
        loss = run().square().mean()
        loss.backward()
        return loss.detach()

    return step


def rows() -> list[Row]:
    result = []
    for name, make in (("DiT, 384 wide", dit_pair), ("MMDiT, 384 wide", mmdit_pair)):
        ours, theirs = make(4, 32)
        no_grad = torch.no_grad()
        result.append(Row(f"{name}, forward, 32x32, batch 4", no_grad(ours), no_grad(theirs)))
        result.append(Row(f"{name}, forward and backward", trained(ours), trained(theirs)))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each row (default: 5)")
    add_common_arguments(parser)
    args = parser.parse_args(arguments)
    now = begin(parser, args)
    print(f"{'':44} {'ours':>7} {'theirs':>7}  {'ratio':>5}  {'10-90 %':^11}")
    for row in rows():
        if args.row not in row.name:
            continue
        difference = float((row.ours() - row.theirs()).abs().max())  # also warms up
        if not difference <= TOLERANCE:
            raise SystemExit(f"{row.name}: the sides differ by {difference:.2g}, more than {TOLERANCE:.0e}")
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(args.rounds):
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                seconds[side].append(clock(row.ours if side == "ours" else row.theirs, now))
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        ours, theirs = (1000 * statistics.median(seconds[side]) for side in ("ours", "theirs"))
        print(
            f"{row.name:44} {ours:5.0f}ms {theirs:5.0f}ms  {statistics.median(ratios):5.2f}  "
            f"{quantile(ratios, 0.1):4.2f} - {quantile(ratios, 0.9):4.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
