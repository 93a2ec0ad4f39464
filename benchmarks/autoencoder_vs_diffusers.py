"""Our autoencoder against diffusers' `AutoencoderKL`: the same configuration, weights, inputs and thread count.

    python benchmarks/autoencoder_vs_diffusers.py [--rounds 7] [--threads 1] [--row TEXT] [--cpu-time] [--breakdown]

Rows: encode and decode of the official kl-f8 shape and of a narrow one, and the training step of narrow ones (forward,
backward, AdamW, float32). Both sides run in one process, interleaved in turning order; the ratio of a round is their
time over ours, and above 1 we are faster. diffusers runs in its own layout and in channels_last, which its users have
to ask for; the check is against the faster of the two. Before a row is timed both sides must agree to 1e-4 of the
result's largest value: the image, the moments, or the loss and gradient norms of the first and the last layer.

The last column is the share of the machine's convolution peak that our side reaches, counted in the multiplications of
the plain network: ours needs fewer, so that it may pass 100 %. --breakdown says where our time goes. With --check the
exit status is 1 if a median ratio is below 1.15 (encode, decode of kl-f8) or 1.05 (training).

On a machine that is busy with other work, --threads 1 --cpu-time counts the seconds in which this process really ran.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from unet_vs_diffusers import (
    THEIR_LAYOUTS,
    Layout,
    Row,
    Run,
    add_common_arguments,
    begin,
    convolution_peak,
    measure,
    quantile,
)

from darkroom.config import to_dict
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.interop.diffusers_first_stage import stored_shape, to_diffusers_config, to_theirs

TOLERANCE = 1e-4
WANTED = {"encode": 1.15, "decode": 1.15, "training": 1.05}
NARROW_WANTED = 1.0  # encode and decode of narrow networks: not slower

OFFICIAL = AutoencoderConfig()  # kl-f8: 128 channels (1, 2, 4, 4)
NARROW = AutoencoderConfig(channels=32, channel_mult=(1, 2, 4))
MIDDLE = AutoencoderConfig(channels=64, channel_mult=(1, 2, 4), num_res_blocks=1)

# Where time goes, by words in the names of torch's operations; the first that fits.
PARTS = {
    "convolution": ("conv",),
    "norm and SiLU": ("group_norm", "GroupNorm", "silu", "addcmul", "aten::sum"),
    "attention": ("attention",),
    "1x1 and linear": ("linear", "mm"),
    "optimizer": ("adam", "Adam", "zero_grad"),
    "resampling, copies": ("upsample", "pad", "copy", "cat", "stack", "fill", "zero", "UpsampleConv"),
    "additions": ("add", "sub", "mul", "div", "mse"),
}


def make_pair(config: AutoencoderConfig) -> tuple[Autoencoder, Any]:
    torch.manual_seed(0)
    ours = Autoencoder(config)
    plain = to_dict(config)
    theirs: Any = AutoencoderKL.from_config(to_diffusers_config(plain, 0.0, 1.0))
    state = {}
    for name, tensor in ours.state_dict().items():
        place = to_theirs(name, len(config.channel_mult))
        state[place] = tensor.reshape(stored_shape(place, tuple(tensor.shape)))
    theirs.load_state_dict(state, strict=True)
    return ours.eval().to(memory_format=torch.channels_last), theirs.eval()  # type: ignore[call-overload]


def described(config: AutoencoderConfig, batch: int, size: int) -> str:
    return f"{config.channels} wide f{2 ** (len(config.channel_mult) - 1)}, {size}x{size}, batch {batch}"


def with_tolerance(row: Row) -> Row:
    return replace(row, tolerance=TOLERANCE * float(row.ours().abs().max()))


def encode_row(config: AutoencoderConfig, batch: int, size: int) -> Row:
    ours, theirs = make_pair(config)
    image = torch.rand(batch, config.in_channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def make_theirs(layout: Layout) -> Run:
        network, x = copy.deepcopy(theirs).to(memory_format=layout), image.to(memory_format=layout)
        return torch.no_grad()(lambda: network.encode(x, return_dict=False)[0].parameters)

    run = torch.no_grad()(lambda: ours.moments(image))
    return with_tolerance(Row(f"encode, {described(config, batch, size)}", run, make_theirs, 0.0))


def decode_row(config: AutoencoderConfig, batch: int, size: int) -> Row:
    ours, theirs = make_pair(config)
    side = size // ours.downsampling
    latent = torch.randn(batch, config.embed_dim, side, side, generator=torch.Generator().manual_seed(1))

    def make_theirs(layout: Layout) -> Run:
        network, z = copy.deepcopy(theirs).to(memory_format=layout), latent.to(memory_format=layout)
        return torch.no_grad()(lambda: network.decode(z, return_dict=False)[0])

    run = torch.no_grad()(lambda: ours.decode(latent))
    return with_tolerance(Row(f"decode, {described(config, batch, size)}", run, make_theirs, 0.0))


def training_row(config: AutoencoderConfig, batch: int, size: int) -> Row:
    """Squared error of the reconstruction of one posterior sample plus a little KL, and AdamW."""
    ours, theirs = make_pair(config)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, config.in_channels, size, size, generator=generator) * 2 - 1
    side = size // ours.downsampling
    noise = torch.randn(batch, config.embed_dim, side, side, generator=generator)

    def make(network: Any, x: Tensor) -> Run:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
        ends = (network.encoder.conv_in.weight, network.decoder.conv_out.weight)

        def run() -> Tensor:
            optimizer.zero_grad()
            if isinstance(network, Autoencoder):
                posterior = network.encode(x)
                output = network.decode(posterior.sample_with(noise))
            else:
                posterior = network.encode(x, return_dict=False)[0]
                output = network.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
            loss = F.mse_loss(output, x) + 1e-6 * posterior.kl().mean()
            loss.backward()
            optimizer.step()
            return torch.stack([loss.detach(), *(w.grad.norm() for w in ends if w.grad is not None)])

        return run

    def make_theirs(layout: Layout) -> Run:
        network = copy.deepcopy(theirs).train().to(memory_format=layout)
        return make(network, image.to(memory_format=layout))

    run = make(copy.deepcopy(ours).train(), image.contiguous(memory_format=torch.channels_last))
    tolerance = TOLERANCE * float(make(ours.train(), image)().abs().max())
    return Row(f"training step, {described(config, batch, size)}", run, make_theirs, tolerance)


ROWS = [
    lambda: encode_row(OFFICIAL, 1, 192),
    lambda: decode_row(OFFICIAL, 1, 192),
    lambda: encode_row(NARROW, 8, 64),
    lambda: decode_row(NARROW, 8, 64),
    lambda: training_row(NARROW, 8, 64),
    lambda: training_row(MIDDLE, 8, 64),
]


def wanted(name: str) -> float:
    kind = next(kind for kind in WANTED if name.startswith(kind))
    return WANTED[kind] if kind == "training" or f"{OFFICIAL.channels} wide" in name else NARROW_WANTED


def breakdown(run: Run) -> str:
    """Shares of our side's time, by kind of operation."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        part = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "other")
        seconds[part] += event.self_cpu_time_total
    return ", ".join(f"{part} {share / seconds.total():.0%}" for part, share in seconds.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs of each row (default: 7)")
    add_common_arguments(parser)
    parser.add_argument("--breakdown", action="store_true", help="where our time goes, by kind of operation")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a median ratio is below what is wanted")
    args = parser.parse_args(arguments)
    now = begin(parser, args)
    print(f"{'':46} {'ours':>7}  {'diffusers':^19}  {'ratio':>5}  {'10-90 %':^11}  {'to its':>7}  of the peak")
    print(f"{'':46} {'':>7}  {'default':>8} {'ch. last':>9}  {'':5}  {'':11}  {'default':>7}")
    peak, peak_flops = convolution_peak(torch.float32, now)
    slow = []
    for make in ROWS:
        row = make()
        if args.row not in row.name:
            continue
        flops, seconds = measure(row, args.rounds, peak, now)
        median = {side: statistics.median(values) for side, values in seconds.items()}
        best = min(THEIR_LAYOUTS, key=lambda name: median[name])
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[best], strict=True)]
        default = [b / a for a, b in zip(seconds["ours"], seconds["contiguous"], strict=True)]
        ratio = statistics.median(ratios)
        rate, peak_rate = flops / median["ours"] / 1e9, peak_flops / median["peak"] / 1e9
        note = "" if ratio >= wanted(row.name) else f"  BELOW {wanted(row.name)}"
        if note:
            slow.append(row.name)
        print(
            f"{row.name:46} {1000 * median['ours']:5.0f}ms  {1000 * median['contiguous']:6.0f}ms "
            f"{1000 * median['channels_last']:7.0f}ms  {ratio:5.2f}  {quantile(ratios, 0.1):4.2f} - "
            f"{quantile(ratios, 0.9):4.2f}  {statistics.median(default):7.2f}  {rate / peak_rate:4.0%} of "
            f"{peak_rate:.0f} GFLOP/s{note}",
            flush=True,
        )
        if args.breakdown:
            print(f"    ours: {breakdown(row.ours)}", flush=True)
    return 1 if slow and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
