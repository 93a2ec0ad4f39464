"""DINOv2 (Oquab et al. 2023), under the names of the published weights `dinov2_vit{s,b,l}14[_reg4]_pretrain.pth`.

A vision transformer with a class token, patches of 14 pixels, pre-norm blocks, and a learned factor on what each block
adds. It was trained without labels: Frechet distances of its embeddings follow people's judgement of pictures better
than Inception's (Stein et al. 2023).

Shapes: B batch, H W size of the pictures, N = H/14 * W/14 patches, R registers, D width, G side of the trained grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features.weight_files import fill, need_weights, read_weights

EPSILON = 1e-6  # of the norms
OFFSET = 0.1  # patches that the positions of the networks without registers are stretched by


@dataclass(frozen=True)
class DinoV2Config:
    """grid: side of the square of patches that the positions were learned for. registers: extra tokens behind the class
    token (Darcet et al. 2023)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    grid: int = 37
    patch: int = 14
    registers: int = 0


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """x * gamma, (D,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + gamma1 * attention(norm(x)), then x + gamma2 * mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, D)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class DinoV2(nn.Module):
    """(B, 3, H, W), standardised by the statistics of ImageNet, sides multiples of the patch -> (B, D), the class token
    behind the last norm. Frozen, in eval mode."""

    def __init__(self, config: DinoV2Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the training; here because every file holds it
        self.patch_embed = PatchEmbed(width, config.patch)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        patch = self.config.patch
        if height % patch or width % patch:
            raise DarkroomError(f"DINOv2: sides of {width}x{height} are no multiples of its patch of {patch} pixels")
        first = self.cls_token.expand(len(image), -1, -1)
        x = torch.cat([first, self.patch_embed(image)], 1) + self.positions(height // patch, width // patch)
        if self.config.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(image), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows * columns, D): the trained positions, interpolated to another grid than theirs.

        The networks without registers are used with an old habit of DINO: the distance between positions is that of a
        grid larger by `OFFSET`, which moves all of them a little. Those with registers smooth instead.
        """
        grid = self.config.grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        if self.config.registers:
            moved = F.interpolate(square, (rows, columns), mode="bicubic", antialias=True)
        else:
            factors = [(rows + OFFSET) / grid, (columns + OFFSET) / grid]
            moved = F.interpolate(square, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], moved.flatten(2).transpose(1, 2)], 1)


def _name(size: str) -> str:
    letters, registers = size.removesuffix("-reg4"), "_reg4" if size.endswith("-reg4") else ""
    return f"dinov2_{letters}{registers}_pretrain.pth"


def dinov2_file(size: str) -> Path:
    """The published weights of one of `DINOV2_SIZES`, or a DarkroomError that says where to put them."""
    return need_weights([_name(size)], f"DINOv2 {size}", "dl.fbaipublicfiles.com/dinov2, see its repository")


def load_dinov2(size: str, path: Path | None = None, config: DinoV2Config | None = None) -> DinoV2:
    """With the weights of the published file (default: `dinov2_file(size)`)."""
    path = path or dinov2_file(size)
    with torch.device("meta"):
        network = DinoV2(config or DINOV2_SIZES[size])
    network.to_empty(device="cpu")
    fill(network, read_weights(path), path)
    return network


# ------------------------------------------------------------------------------------------------ named sizes

_PLAIN = {
    "vits14": DinoV2Config(384, 12, 6),
    "vitb14": DinoV2Config(768, 12, 12),
    "vitl14": DinoV2Config(1024, 24, 16),
}
DINOV2_SIZES: Mapping[str, DinoV2Config] = {
    **_PLAIN,
    **{f"{name}-reg4": DinoV2Config(c.width, c.depth, c.heads, registers=4) for name, c in _PLAIN.items()},
}
