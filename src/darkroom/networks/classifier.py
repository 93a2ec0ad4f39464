"""The noisy classifier: the encoder half of the U-Net, a pooling, and logits of what is in a noisy picture.

Source: Dhariwal & Nichol 2021, sec. 4 and App. I. Options and parameters have the names of the official code's
`EncoderUNetModel`: its weights load with strict=True.

Shapes: B batch, C channels, H W size, N = H*W places, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import attention
from darkroom.networks.blocks import GroupNorm, pointwise, timestep_embedding, to_tokens, zero_module
from darkroom.networks.unet import Stage, UNetConfig, append_encoder, embedding_mlp, middle_block

HIDDEN_FEATURES = 2048  # of the two layers behind the pooling `spatial`


@dataclass
class ClassifierConfig:
    """Sizes and options of `NoisyClassifier`; those that it shares with the U-Net are described at `UNetConfig`.

    image_size:   side of the pictures or latents; only `attention` needs it, and takes no other size
    in_channels:  channels of the pictures or latents
    out_channels: number of classes
    num_heads:    attention heads where num_head_channels is not given
    pool:         "adaptive" mean over the places; "attention" of a query token with learned positions, as in CLIP;
                  "spatial" means of every stage joined, then two layers; "spatial_v2" the same with a norm and SiLU
    """

    image_size: int = 64
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 1000
    num_res_blocks: int | tuple[int, ...] = 2
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_heads: int = 1
    num_head_channels: int | None = None
    dropout: float = 0.0
    conv_resample: bool = True
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_checkpoint: bool = False
    pool: Literal["adaptive", "attention", "spatial", "spatial_v2"] = "adaptive"

    def unet(self) -> UNetConfig:
        """The U-Net whose encoder half this is."""
        return UNetConfig(
            in_channels=self.in_channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=self.attention_resolutions,
            num_heads=self.num_heads,
            num_head_channels=self.num_head_channels,
            dropout=self.dropout,
            conv_resample=self.conv_resample,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            use_new_attention_order=self.use_new_attention_order,
            use_checkpoint=self.use_checkpoint,
        )


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, K): the mean over the places asks all of them (Radford et al. 2021, sec. 2.4)."""

    def __init__(self, size: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.size = size
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != (self.size, self.size):
            raise DarkroomError(
                f"classifier: the attention pooling has learned positions for {self.size}x{self.size} places but there "
                f"are {x.shape[2]}x{x.shape[3]}; give pictures of its image_size, or take another pool"
            )
        tokens = to_tokens(x)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding.T
        qkv = pointwise(tokens, self.qkv_proj)
        q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        # Only the answer to the mean is read.
        answer = attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2)
        return pointwise(answer, self.c_proj)[:, 0]


class NoisyClassifier(nn.Module):
    """`classifier(x, time) -> logits`, (B, C, H, W), (B,) -> (B, K); time in the units of the denoiser's network."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        c = config.unet()
        self.time_embed = embedding_mlp(c.model_channels, c.emb_channels)
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(c.in_channels, c.model_channels, 3, padding=1)])])
        widths = [c.model_channels, *append_encoder(self.input_blocks, c)]
        self.middle_block = middle_block(c, widths[-1])
        self.out = self._head(widths[-1], sum(widths) + widths[-1])

    def _head(self, channels: int, features: int) -> nn.Sequential:
        """features: the channels of all stages together."""
        c, classes = self.config, self.config.out_channels
        if c.pool == "adaptive":
            last = zero_module(nn.Conv2d(channels, classes, 1))
            return nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), last, nn.Flatten())
        if c.pool == "attention":
            heads, _ = c.unet().heads(channels, decoder=False)
            size = c.image_size // 2 ** (len(c.channel_mult) - 1)
            return nn.Sequential(GroupNorm(channels), nn.SiLU(), AttentionPool(size, channels, heads, classes))
        first, last_layer = nn.Linear(features, HIDDEN_FEATURES), nn.Linear(HIDDEN_FEATURES, classes)
        if c.pool == "spatial":
            return nn.Sequential(first, nn.ReLU(), last_layer)
        return nn.Sequential(first, nn.GroupNorm(32, HIDDEN_FEATURES), nn.SiLU(), last_layer)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The result has the dtype of x whatever the precision of the weights."""
        if x.shape[1] != self.config.in_channels:
            raise DarkroomError(
                f"classifier: the input has {x.shape[1]} channels, but this one takes {self.config.in_channels}; "
                "a classifier belongs to one kind of latents"
            )
        dtype = next(self.parameters()).dtype
        emb = self.time_embed(timestep_embedding(time, self.config.model_channels).to(dtype))
        h = x.to(dtype).contiguous(memory_format=torch.channels_last)
        means = []
        for stage in (*self.input_blocks, self.middle_block):
            h = stage(h, emb, None, None)
            means.append(h.mean((2, 3)))
        spatial = self.config.pool in ("spatial", "spatial_v2")
        return self.out(torch.cat(means, dim=1) if spatial else h).to(x.dtype)


def _imagenet(image_size: int, channel_mult: tuple[int, ...], num_res_blocks: int) -> ClassifierConfig:
    return ClassifierConfig(
        image_size=image_size,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(image_size // side for side in (32, 16, 8)),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool="attention",
    )


# The classifiers of ImageNet pixels, Dhariwal & Nichol 2021, App. I, table 12.
CLASSIFIER_SIZES = {
    "imagenet-64": _imagenet(64, (1, 2, 3, 4), 4),
    "imagenet-128": _imagenet(128, (1, 1, 2, 3, 4), 2),
    "imagenet-256": _imagenet(256, (1, 1, 2, 2, 4, 4), 2),
}
