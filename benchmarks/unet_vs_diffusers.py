"""Our U-Net against diffusers' `UNet2DConditionModel`: the same configuration, weights, inputs and thread count.

    python benchmarks/unet_vs_diffusers.py [--rounds 9] [--threads 1] [--row TEXT] [--cpu-time] [--check]

Rows: forward pass, training step (forward, backward, AdamW), and the whole loop of DDIM with classifier-free guidance.
Both sides run in one process, interleaved in turning order, so that a busy machine slows both
alike; the ratio of a round is their time over ours, and above 1 we are faster. Before a row is timed both sides must
agree on its result. Ours runs in channels_last, theirs in the layout that is faster for it; both use torch's SDPA, a
fused AdamW, and no_grad for inference.

The last column is the share of the machine's convolution peak that our side reaches: the arithmetic of the row over
that of the fastest 3x3 convolution in channels_last, measured between the rows' runs. Only matrix products and
convolutions count as arithmetic. With --check the exit status is 1 if a median ratio is below 0.97.

On a machine that is busy with other work, --threads 1 --cpu-time counts the seconds in which this process really ran.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import make_grid
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.guidance import Guided
from darkroom.interop.diffusers_unet import key_table, to_diffusers_config
from darkroom.networks.unet import UNet, UNetConfig
from darkroom.solvers import SOLVERS

LIMIT = 0.97
STEPS, SCALE = 20, 3.0  # of the generate row

SMALL = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_head_channels=32,
    use_spatial_transformer=True,
    context_dim=128,
    legacy=False,
)
LARGE = UNetConfig(
    model_channels=96,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(2, 4),
    num_head_channels=32,
    use_spatial_transformer=True,
    context_dim=128,
    legacy=False,
)
TOKENS = 32

Run = Callable[[], Tensor]
"""One measured piece of work. Its result (output, loss, latents) is compared before the timing."""

Layout = torch.memory_format
# diffusers leaves the choice to its user; which one is faster depends on the row and on the processor.
THEIR_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Row:
    """make_theirs: their side in a layout. tolerance: the largest allowed difference of the results. dtype: of the
    arithmetic, whose peak the row is compared with."""

    name: str
    ours: Run
    make_theirs: Callable[[Layout], Run]
    tolerance: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    time: Tensor  # (B,)
    context: Tensor  # (B, L, D)
    null: Tensor  # (B, L, D)


def make_inputs(config: UNetConfig, batch: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.in_channels, size, size)
    assert config.context_dim is not None
    tokens = (batch, TOKENS, config.context_dim)
    return Inputs(
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator).float(),
        torch.randn(tokens, generator=generator),
        torch.randn(tokens, generator=generator),
    )


def make_pair(config: UNetConfig) -> tuple[UNet, UNet2DConditionModel]:
    """Both networks with the same weights, none of them zero, so that every layer counts in the agreement."""
    torch.manual_seed(0)
    ours = UNet(config)
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    theirs = UNet2DConditionModel.from_config(to_diffusers_config(config))
    state = ours.state_dict()
    theirs.load_state_dict({name: state[own] for own, name in key_table(config).items()}, strict=True)
    return ours.eval().to(memory_format=torch.channels_last), theirs.eval()


def forward_row(name: str, config: UNetConfig, batch: int, size: int) -> Row:
    given = make_inputs(config, batch, size)
    ours, theirs = make_pair(config)
    conditioning = Conditioning(context=given.context)

    @torch.no_grad()
    def run() -> Tensor:
        return ours(given.x, given.time, conditioning)

    def make_theirs(layout: Layout) -> Run:
        network, x = copy.deepcopy(theirs).to(memory_format=layout), given.x.to(memory_format=layout)
        return torch.no_grad()(lambda: network(x, given.time, given.context, return_dict=False)[0])

    return Row(name, run, make_theirs, tolerance=1e-4)


def training_row(name: str, config: UNetConfig, batch: int, size: int, dtype: torch.dtype) -> Row:
    given = make_inputs(config, batch, size)
    ours, theirs = make_pair(config)

    def step(network: nn.Module, predict: Run) -> Run:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        def run() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = predict()
            loss = F.mse_loss(output.float(), given.noise)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    conditioning = Conditioning(context=given.context)
    run = step(ours.train(), lambda: ours(given.x, given.time, conditioning))

    def make_theirs(layout: Layout) -> Run:
        network, x = copy.deepcopy(theirs).train().to(memory_format=layout), given.x.to(memory_format=layout)
        return step(network, lambda: network(x, given.time, given.context, return_dict=False)[0])

    # The result is the loss, about 1: bfloat16 keeps 8 bits of every activation.
    return Row(name, run, make_theirs, 1e-4 if dtype == torch.float32 else 1e-2, dtype)


def generate_row(name: str, config: UNetConfig, batch: int, size: int) -> Row:
    """DDIM on the paper's table of betas with its original spacing, which diffusers calls `leading` with an offset."""
    given = make_inputs(config, batch, size)
    ours, theirs = make_pair(config)
    schedule_config = ScheduleConfig(kind="ldm")

    schedule = make_schedule(schedule_config)
    denoiser = Denoiser(ours, schedule, "epsilon")

    @torch.no_grad()
    def run() -> Tensor:
        grid = make_grid(schedule, STEPS, "ddim")
        denoise = Guided(denoiser, Conditioning(context=given.context), Conditioning(context=given.null), SCALE)
        return SOLVERS["ddim"](denoise, given.x, grid)

    def make_theirs(layout: Layout) -> Run:
        network, start = copy.deepcopy(theirs).to(memory_format=layout), given.x.to(memory_format=layout)
        scheduler = DDIMScheduler(
            num_train_timesteps=schedule_config.timesteps,
            beta_start=schedule_config.beta_start,
            beta_end=schedule_config.beta_end,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )

        @torch.no_grad()
        def run() -> Tensor:
            # The loop of diffusers' StableDiffusionPipeline.
            scheduler.set_timesteps(STEPS)
            x, context = start * scheduler.init_noise_sigma, torch.cat([given.null, given.context])
            for timestep in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([x, x]), timestep)
                unconditional, conditional = network(both, timestep, context, return_dict=False)[0].chunk(2)
                guided = unconditional + SCALE * (conditional - unconditional)
                x = scheduler.step(guided, timestep, x, return_dict=False)[0]
            return x

        return run

    return Row(name, run, make_theirs, tolerance=1e-3)


def rows() -> list[Row]:
    return [
        forward_row("forward, 64 wide, 16x16, batch 16", SMALL, 16, 16),
        forward_row("forward, 96 wide, 32x32, batch 4", LARGE, 4, 32),
        training_row("training step, 64 wide, 16x16, batch 16", SMALL, 16, 16, torch.float32),
        training_row("the same in bfloat16 autocast", SMALL, 16, 16, torch.bfloat16),
        generate_row(f"DDIM {STEPS} steps + guidance, 64 wide, 16x16, batch 2", SMALL, 2, 16),
    ]


def clock(run: Run, now: Callable[[], float]) -> float:
    start = now()
    run()
    return now() - start


def convolution_peak(dtype: torch.dtype, now: Callable[[], float]) -> tuple[Run, float]:
    """The fastest 3x3 convolution in channels_last out of a few sizes, and its FLOP."""
    candidates, flops = [], []
    for channels, size, batch in ((64, 16, 16), (128, 16, 16), (128, 32, 4), (256, 16, 8), (256, 32, 2), (512, 16, 4)):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(dtype)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size).to(dtype, memory_format=torch.channels_last)
        candidates.append(torch.no_grad()(lambda conv=conv, x=x: conv(x)))
        flops.append(2.0 * batch * size * size * channels * channels * 9)

    def repeated(run: Run, flop: float) -> tuple[Run, float]:
        # A few hundredths of a second each: long enough for the clock, short enough to go between all runs.
        count = max(1, round(2e9 / flop))

        def many() -> Tensor:
            for _ in range(count - 1):
                run()
            return run()

        return many, flop * count

    several = [repeated(run, flop) for run, flop in zip(candidates, flops, strict=True)]
    rates = []
    for run, flop in several:
        run()
        rates.append(flop / min(clock(run, now) for _ in range(3)))
    return several[rates.index(max(rates))]


def count_flops(run: Run) -> int:
    """Matrix products and convolutions, forward and backward; attention as its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def quantile(values: Iterable[float], share: float) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def measure(row: Row, rounds: int, peak: Run, now: Callable[[], float]) -> tuple[int, dict[str, list[float]]]:
    """FLOP of one run, and seconds by side ("ours", "peak", and one for each of their layouts); the order of the sides
    turns with the rounds. Their FLOP count is the row's: torch's counter does not know every product that we use."""
    theirs = {name: row.make_theirs(layout) for name, layout in THEIR_LAYOUTS.items()}
    expected = row.ours()  # also warms up
    for run in theirs.values():
        difference = (run().double() - expected.double()).abs().max().item()
        if not difference <= row.tolerance:
            raise SystemExit(f"{row.name}: the sides differ by {difference:.2g}, more than {row.tolerance:.0e}")
    flops = count_flops(next(iter(theirs.values())))
    sides = {"ours": row.ours, **theirs, "peak": peak}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(clock(sides[name], now))
    return flops, seconds


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What both comparisons with diffusers can be told."""
    parser.add_argument("--threads", type=int, help="threads of both sides (default: torch's own choice)")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of the wall's; with one thread")


def begin(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Callable[[], float]:
    """Set the threads, print what is compared on what, and give the clock."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time compares work, not waiting, only with --threads 1")
    now = time.process_time if args.cpu_time else time.perf_counter
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores{load}, {args.rounds} rounds"
    )
    return now


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs of each row (default: 9)")
    add_common_arguments(parser)
    parser.add_argument("--check", action="store_true", help=f"exit status 1 if a median ratio is below {LIMIT}")
    args = parser.parse_args(arguments)
    now = begin(parser, args)
    print(f"{'':52} {'ours':>7} {'theirs':>7}  {'ratio':>5}  {'10-90 %':^11}  {'GFLOP/s':>8}  of the peak")
    peaks: dict[torch.dtype, tuple[Run, float]] = {}
    slow = []
    for row in rows():
        if args.row not in row.name:
            continue
        if row.dtype not in peaks:
            peaks[row.dtype] = convolution_peak(row.dtype, now)
        peak, peak_flops = peaks[row.dtype]
        flops, seconds = measure(row, args.rounds, peak, now)
        layout = min(THEIR_LAYOUTS, key=lambda name: statistics.median(seconds[name]))
        ours, theirs = seconds["ours"], seconds[layout]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ratios)
        rate = flops / statistics.median(ours) / 1e9
        peak_rate = peak_flops / statistics.median(seconds["peak"]) / 1e9
        note = "" if layout == "channels_last" else f"  ({layout})"
        if ratio < LIMIT:
            slow.append(row.name)
            note += "  SLOWER"
        print(
            f"{row.name:52} {1000 * statistics.median(ours):5.0f}ms {1000 * statistics.median(theirs):5.0f}ms  "
            f"{ratio:5.2f}  {quantile(ratios, 0.1):4.2f} - {quantile(ratios, 0.9):4.2f}  {rate:8.1f}  "
            f"{rate / peak_rate:4.0%} of {peak_rate:.0f}{note}",
            flush=True,
        )
    return 1 if slow and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
