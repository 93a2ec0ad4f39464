"""The image towers of CLIP (Radford et al. 2021), under the names of the transformers library; files with the names of
OpenAI's own code and of OpenCLIP (`visual.transformer.resblocks...`) are translated.

Shapes: B batch, N patches, D width, P width of the projection, which texts are projected to as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features.weight_files import fill, need_weights, read_weights

QUICK = 1.702  # of the sigmoid that stands for GELU in OpenAI's networks


@dataclass(frozen=True)
class CLIPImageConfig:
    """side: of the pictures in pixels, which the positions were learned for. projected: P."""

    width: int = 1024
    depth: int = 24
    heads: int = 16
    patch: int = 14
    side: int = 224
    projected: int = 768


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """(B, L, D) -> (B, L, D), x sigmoid(1.702 x) in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(QUICK * x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """(B, 3, side, side) -> (B, 1 + N, D): the class vector, then one for each patch, with their positions."""

    def __init__(self, config: CLIPImageConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.side // config.patch) ** 2, config.width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(image), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, config: CLIPImageConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """(B, 3, side, side) -> (B, D): the class vector behind the last norm."""

    def __init__(self, config: CLIPImageConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # so spelled in every file
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, image: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(image)))[:, 0])


class CLIPImage(nn.Module):
    """(B, 3, side, side), standardised by CLIP's own statistics -> (B, P). Frozen, in eval mode."""

    def __init__(self, config: CLIPImageConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projected, bias=False)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        side = self.config.side
        if image.shape[-2:] != (side, side):
            raise DarkroomError(f"CLIP: pictures of {side}x{side} are wanted, not {image.shape[-1]}x{image.shape[-2]}")
        return self.visual_projection(self.vision_model(image))


# ---------------------------------------------------------------------------------------------------------- files

_TOP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    **{f"ln_pre.{kind}": f"vision_model.pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_post.{kind}": f"vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")},
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the image tower in a file of either naming, under the names of `CLIPImage`."""
    ours = {n: t for n, t in state.items() if n.startswith(("vision_model.", "visual_projection."))}
    ours.pop("vision_model.embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer in old files
    if ours:
        return ours
    for name, tensor in state.items():
        rest = name.removeprefix("visual.")
        block = _RESBLOCK.fullmatch(rest)
        if rest == name:
            continue
        if rest == "proj":
            ours["visual_projection.weight"] = tensor.t()
        elif rest in _TOP:
            ours[_TOP[rest]] = tensor
        elif block is None:
            ours[name] = tensor  # found to have no place when the network is filled
        else:
            place, part, kind = f"vision_model.encoder.layers.{block[1]}.", block[2], block[3]
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    ours[f"{place}self_attn.{letter}_proj.{kind}"] = third
            else:
                ours[f"{place}{_BLOCK.get(part, part)}.{kind}"] = tensor
    return ours


def clip_file(size: str) -> Path:
    """The weights of one of `CLIP_IMAGE_SIZES`, or a DarkroomError that says where to put them."""
    folder = CLIP_FOLDERS[size]
    names = [f"{folder}/{name}" for name in CLIP_FILES]
    return need_weights(names, f"CLIP {size}", f"huggingface.co/openai/{folder}; beside it its vocabulary")


def load_clip_image(size: str, path: Path | None = None, config: CLIPImageConfig | None = None) -> CLIPImage:
    """With the weights of a published file (default: `clip_file(size)`)."""
    path = path or clip_file(size)
    with torch.device("meta"):
        network = CLIPImage(config or CLIP_IMAGE_SIZES[size])
    network.to_empty(device="cpu")
    fill(network, image_tower(read_weights(path)), path)
    return network


# ------------------------------------------------------------------------------------------------ named sizes

CLIP_IMAGE_SIZES: Mapping[str, CLIPImageConfig] = {
    "vitb32": CLIPImageConfig(width=768, depth=12, heads=12, patch=32, projected=512),
    "vitb16": CLIPImageConfig(width=768, depth=12, heads=12, patch=16, projected=512),
    "vitl14": CLIPImageConfig(),
}
CLIP_FOLDERS = {
    "vitb32": "clip-vit-base-patch32",
    "vitb16": "clip-vit-base-patch16",
    "vitl14": "clip-vit-large-patch14",
}
CLIP_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
