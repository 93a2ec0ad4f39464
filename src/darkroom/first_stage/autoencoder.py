"""The autoencoders of the paper, KL and VQ (Rombach et al. 2022, sec. 3.1 and App. E; network of Esser et al. 2021).

State-dict keys are those of the official checkpoints: `encoder.* decoder.* quant_conv.* post_quant_conv.*`, and
`quantize.embedding.weight` of a VQ autoencoder. A VQ autoencoder's latent is the continuous one before quantisation;
its decoder quantises first, so a denoiser need not produce codes.
Shapes: B batch, C channels, H W image size, f downsampling, E latent channels (`embed_dim`), h = H/f, w = W/f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage.grain import Grain, OutputGrain
from darkroom.first_stage.posterior import Posterior
from darkroom.first_stage.quantizer import Codebook, precise
from darkroom.kernels import Conv1x1, Conv3x3, norm, norm_silu, upsample_conv

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Downsampling is 2^(len(channel_mult) - 1). The defaults are those of the paper's kl-f8 with 4 latent channels."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level / channels
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    attention_levels: tuple[int, ...] = ()  # levels (0 is full size) with attention behind every residual block
    bottleneck_attention: bool = True
    z_channels: int = 4  # between encoder and quant_conv
    embed_dim: int = 4  # channels of the latent
    codebook_size: int | None = None  # None: KL. A number: VQ with that many codes
    quant_conv: bool = True  # False: no 1x1 convolutions around the latent (SD3); z_channels and embed_dim are one
    dropout: float = 0.0
    norm_groups: int = 32  # a level whose width it does not divide uses the greatest common divisor
    decoder_channels: int | None = None  # None: like the encoder
    decoder_num_res_blocks: int | None = None  # None: like the encoder; the decoder has one more per level
    decoder_grain: bool = False  # noise for the decoder to draw texture from (grain.py), at each level it upsamples to
    output_grain: bool = False  # noise on the decoder's image, as strong as its last features say (grain.py)


class Autoencoder(nn.Module):
    """`encode(image) -> Posterior`, `decode(latent) -> image`; latents are unnormalised here (see `FirstStage`)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = None if config.codebook_size is None else Codebook(config.codebook_size, config.embed_dim)
        self.quant_conv = self.post_quant_conv = None
        if config.quant_conv:
            moments = 2 if config.codebook_size is None else 1  # mean and log-variance, or the latent alone
            self.quant_conv = nn.Conv2d(moments * config.z_channels, moments * config.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """f: image pixels per latent position, along each side."""
        return 2 ** (len(self.config.channel_mult) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config.embed_dim

    @property
    def image_channels(self) -> int:
        return self.config.in_channels

    @property
    def codebook(self) -> Codebook | None:
        """The codes of a VQ autoencoder, None for KL."""
        return self.quantize

    def moments(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> [mean | logvar] (B, 2E, h, w), logvar not clamped; VQ: the latent (B, E, h, w)."""
        check_image(image, self.config.in_channels, self.downsampling)
        h = self.encoder(image)
        return h if self.quant_conv is None else self.quant_conv(h)

    def encode(self, image: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> q(z | image) over (B, E, h, w), in float32 whatever the network runs in.

        VQ: the mean is the continuous latent before quantisation, and there is no variance.
        """
        moments = self.moments(image)
        return Posterior(precise(moments)) if self.codebook is not None else Posterior.from_moments(moments)

    def decode(self, latent: Tensor, quantize: bool = True) -> Tensor:
        """(B, E, h, w) -> (B, C, H, W), about [-1, 1]. VQ quantises the latent first, unless `quantize` is False."""
        if self.quantize is not None and quantize:
            latent = self.quantize(latent)
        return self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))

    def decode_mean(self, latent: Tensor) -> Tensor:
        """(B, E, h, w), of VQ quantised -> (B, C, H, W): what `decode` gives, without the grain that it adds."""
        mean: Tensor = self.decoder.conv_out(self.decoder_features(latent))
        return mean

    def decoder_features(self, latent: Tensor) -> Tensor:
        """(B, E, h, w), of VQ quantised -> (B, C, H, W), of which the last convolution makes the mean image."""
        return self.decoder.features(latent if self.post_quant_conv is None else self.post_quant_conv(latent))

    def forward(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Posterior]:
        """The reconstruction of `image` from one sample, and the posterior."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(generator)), posterior


def check_image(image: Tensor, channels: int, downsampling: int) -> None:
    """Raises DarkroomError if an autoencoder with this many channels and this downsampling cannot take `image`."""
    if image.ndim != 4 or image.shape[1] != channels:
        raise DarkroomError(
            f"the first stage takes images of shape (batch, {channels}, height, width), got {tuple(image.shape)}: "
            f"convert the images to {channels} channel(s)"
        )
    height, width = image.shape[-2:]
    if height % downsampling or width % downsampling or not height or not width:
        near = " or ".join(f"{w}x{h}" for w, h in nearest_sizes(width, height, downsampling))
        raise DarkroomError(
            f"the first stage cannot take {width}x{height} pixels: sides must be multiples of {downsampling}, "
            f"for example {near}"
        )


def nearest_sizes(width: int, height: int, multiple: int) -> list[tuple[int, int]]:
    """The next smaller and the next larger (width, height) whose sides are positive multiples of `multiple`."""
    below = tuple(max(side // multiple, 1) * multiple for side in (width, height))
    above = tuple(max(math.ceil(side / multiple), 1) * multiple for side in (width, height))
    return list(dict.fromkeys([(below[0], below[1]), (above[0], above[1])]))


def _check_config(config: AutoencoderConfig) -> None:
    levels = len(config.channel_mult)
    if levels < 1 or min(config.channel_mult) < 1:
        raise DarkroomError(f"channel_mult={tuple(config.channel_mult)}: needs at least one level of positive width")
    if any(not 0 <= level < levels for level in config.attention_levels):
        raise DarkroomError(
            f"attention_levels={tuple(config.attention_levels)}: channel_mult has levels 0..{levels - 1}"
        )
    if not config.quant_conv and config.z_channels != config.embed_dim:
        raise DarkroomError(
            f"z_channels={config.z_channels} and embed_dim={config.embed_dim}: without quant_conv they must be equal"
        )
    numbers = ("in_channels", "out_channels", "channels", "num_res_blocks", "z_channels", "embed_dim", "norm_groups")
    for name in (*numbers, "decoder_channels", "decoder_num_res_blocks", "codebook_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise DarkroomError(f"{name}={value}: must be at least 1")


class Encoder(nn.Module):
    """(B, C, H, W) -> (B, 2*z_channels, h, w); for VQ (B, z_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        groups, last = config.norm_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.channels
        for level, out in enumerate(widths):
            stage = Level()
            for _ in range(config.num_res_blocks):
                stage.add(width, out, groups, config.dropout, level in config.attention_levels)
                width = out
            if level != last:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Bottleneck(width, groups, config.dropout, config.bottleneck_attention)
        self.norm_out = make_norm(width, groups)
        moments = 2 if config.codebook_size is None else 1
        self.conv_out = nn.Conv2d(width, moments * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, C, H, W). `up` is indexed by level (0 is full size) and run from last to first."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.decoder_channels or config.channels
        blocks = (config.decoder_num_res_blocks or config.num_res_blocks) + 1
        widths = [channels * m for m in config.channel_mult]
        groups, width = config.norm_groups, widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Bottleneck(width, groups, config.dropout, config.bottleneck_attention)
        levels: list[Level] = []
        for level in reversed(range(len(widths))):
            stage = Level()
            if config.decoder_grain and level != len(widths) - 1:
                stage.grain = Grain(width)
            for _ in range(blocks):
                stage.add(width, widths[level], groups, config.dropout, level in config.attention_levels)
                width = widths[level]
            if level != 0:
                stage.upsample = Upsample(width)
            levels.insert(0, stage)
        self.up = nn.ModuleList(levels)
        self.norm_out = make_norm(width, groups)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.grain = OutputGrain(width) if config.output_grain else None

    def forward(self, z: Tensor) -> Tensor:
        features = self.features(z)
        mean: Tensor = self.conv_out(features)
        return mean if self.grain is None else mean + self.grain(features.detach())  # noise has nothing to teach them

    def features(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return norm_silu(self.norm_out, x)


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it or not, then the change of resolution; in a
    decoder with grain that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.grain: Grain | None = None
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def add(self, channels: int, out_channels: int, groups: int, dropout: float, attention: bool) -> None:
        self.block.append(ResBlock(channels, out_channels, groups, dropout))
        if attention:
            self.attn.append(Attention(out_channels, groups))

    def forward(self, x: Tensor) -> Tensor:
        if self.grain is not None:
            x = self.grain(x)
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Bottleneck(nn.Module):
    def __init__(self, channels: int, groups: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups, dropout)
        self.attn_1 = Attention(channels, groups) if attention else None
        self.block_2 = ResBlock(channels, channels, groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if self.attn_1 is not None:
            x = self.attn_1(x)
        return self.block_2(x)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = make_norm(channels, groups)
        self.conv1 = Conv3x3(channels, out_channels)
        self.norm2 = make_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.nin_shortcut = Conv1x1(channels, out_channels) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(self.dropout(norm_silu(self.norm2, h)))
        return _add(x if self.nin_shortcut is None else self.nin_shortcut(x), h)


class Attention(nn.Module):
    """Single-head self-attention over all positions: x + proj(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = make_norm(channels, groups)
        self.q = Conv1x1(channels, channels)
        self.k = Conv1x1(channels, channels)
        self.v = Conv1x1(channels, channels)
        self.proj_out = Conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = norm(self.norm, x)
        # (B, C, H, W) -> (B, 1 head, H*W, C): a view where the memory format is channels_last.
        q, k, v = (conv(h).permute(0, 2, 3, 1).reshape(b, 1, height * width, c) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return _add(x, self.proj_out(h.reshape(b, height, width, c).permute(0, 3, 1, 2)))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 that pads right and bottom only, by one: the official weights expect it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.conv)


def _add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch; without gradients in the memory of `branch`, which nothing else holds."""
    if torch.is_grad_enabled() or x.dtype != branch.dtype:
        return x + branch
    return branch.add_(x)


def make_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=NORM_EPSILON)
