"""Random weights in the layouts of published files, of which activations neither vanish nor explode."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Convolutions and linear layers keep the scale of what they see; all else is near its neutral value, not at it."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * (1.5 / fan) ** 0.5)
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=draw) * 0.1)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.copy_(torch.rand(module.weight.shape, generator=draw) * 0.6 + 0.7)
            module.bias.copy_(torch.randn(module.bias.shape, generator=draw) * 0.2)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=draw) * 0.2)
                module.running_var.copy_(torch.rand(module.bias.shape, generator=draw) + 0.5)
    return network


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """uint8 (B, H, W, 3)."""
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed)).byte()


# transformers' names of DINOv2 -> those of the published files; q, k and v are joined there.
DINOV2_NAMES = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    ("layernorm", "norm"),
)
ATTENTION = re.compile(r"(.*)attention\.(?:attention\.)?(q_proj|query|k_proj|key|v_proj|value)\.(weight|bias)")


def dinov2_as_published(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' DINOv2 under the published names."""
    state = {}
    joined: dict[str, list[Tensor]] = {}  # they come in this order
    for name, tensor in theirs.items():
        part = ATTENTION.fullmatch(name)
        if part is not None:
            name = f"{part[1]}attn.qkv.{part[3]}"
            joined.setdefault(name, []).append(tensor)
            tensor = torch.cat(joined[name])
        for pattern, ours in DINOV2_NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    return state
