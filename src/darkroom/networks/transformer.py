"""What DiT and MMDiT share: patches, embeddings of time, label and vector, attention, modulation, the last layer.

Source: Peebles & Xie 2023 (DiT), Esser et al. 2024 (MMDiT). Parameter names are those of both official codes.

Shapes: B batch, C channels, H W latent size, p patch side, N = H*W/p^2 image tokens, D width, h heads,
d head width.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import attention
from darkroom.networks.blocks import TargetTime, pointwise, timestep_embedding, to_tokens, zero_module
from darkroom.networks.slots import Slots

QKNorm = Literal["rms", "ln"]
FREQUENCIES = 256  # width of the sine and cosine features of a time, in both official codes


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): one linear map of each p x p patch, stored as the convolution it equals."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # (B, C*p*p, H/p, W/p) in the order of the flattened weight: a product, whose result lies as tokens want it.
        return pointwise(to_tokens(F.pixel_unshuffle(x, self.patch)), self.proj)


def unpatchify(tokens: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """(B, N, p*p*C) -> (B, C, H, W) with size = (H/p, W/p); each token holds its patch as (row, column, channel)."""
    x = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, size)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """(B,) -> (B, D): sine and cosine features, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(time, FREQUENCIES).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """(B,) integers -> (B, D); the null class is a row like any other."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class VectorEmbedder(nn.Module):
    """(B, V) -> (B, D): two layers."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector.to(next(self.parameters()).dtype))


class Embeddings(Protocol):
    """What a network of either kind has for `summed_embedding`; None: it does not read that slot."""

    t_embedder: TimestepEmbedder
    target_time_embedder: TargetTime | None


def summed_embedding(
    kind: str,
    network: Embeddings,
    time: Tensor,
    target_time: Tensor | None,
    slots: Slots | None,
    label_embedder: LabelEmbedder | None,
    vector_embedder: VectorEmbedder | None,
) -> Tensor:
    """(B,) times and the label and vector slots -> (B, D). `kind` names the network in errors; its two embedders are
    given, because both official codes call different ones `y_embedder`."""
    label = None if slots is None else slots.label
    vector = None if slots is None else slots.vector
    check_slot(kind, "label", label is not None, label_embedder is not None, "num_classes")
    check_slot(kind, "vector", vector is not None, vector_embedder is not None, "adm_in_channels")
    emb = network.t_embedder(time)
    if network.target_time_embedder is not None:
        emb = emb + network.target_time_embedder(time, target_time)
    elif target_time is not None:
        raise DarkroomError(f"{kind}: this network does not read a target time; see its option target_time")
    for embedder, value in ((label_embedder, label), (vector_embedder, vector)):
        if embedder is not None:
            emb = emb + embedder(value)
    return emb


class Mlp(nn.Module):
    """(..., D) -> (..., D): Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(F.gelu(pointwise(x, self.fc1), approximate="tanh"), self.fc2)


class RMSNorm(nn.RMSNorm):
    """(..., d) -> same; torch's fused kernel wants the gain in the dtype of x, which autocast does not see to."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def head_norm(kind: QKNorm | None, head_width: int) -> nn.Module:
    """What queries and keys of each head are normalised by (Esser et al. 2024, sec. 5.3.2: bf16 stays stable)."""
    if kind is None:
        return nn.Identity()
    return (RMSNorm if kind == "rms" else nn.LayerNorm)(head_width, eps=1e-6)


class SelfAttention(nn.Module):
    """Queries, keys and values of one kind of token, and what becomes of the result. In MMDiT two kinds of tokens meet
    between `heads` and `merge`. `last`: only `heads` is needed, the result goes nowhere."""

    def __init__(
        self, width: int, heads: int, qkv_bias: bool = True, qk_norm: QKNorm | None = None, last: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.ln_q = head_norm(qk_norm, width // heads)
        self.ln_k = head_norm(qk_norm, width // heads)
        self.proj = None if last else nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, h, N, d)."""
        q, k, v = pointwise(x, self.qkv).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, h: Tensor) -> Tensor:
        """(B, h, N, d) -> (B, N, D)."""
        assert self.proj is not None
        return pointwise(h.transpose(1, 2).flatten(2), self.proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(attention(*self.heads(x)))


def layer_norm(x: Tensor) -> Tensor:
    """(B, N, D) -> same, without gain and bias: the modulation brings them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D): x (1 + scale) + shift (Peebles & Xie 2023, sec. 3.2, adaLN)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate h, gate (B, D): a residual that begins closed (adaLN-zero)."""
    return torch.addcmul(x, gate[:, None], h)


def modulation(width: int, count: int) -> nn.Sequential:
    """(B, D) -> (B, count*D): the shifts, scales and gates of a block; all 0 at the start."""
    return nn.Sequential(nn.SiLU(), zero_module(nn.Linear(width, count * width)))


class FinalLayer(nn.Module):
    """(B, N, D), (B, D) -> (B, N, p*p*C): norm, modulation, linear; 0 at the start."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = zero_module(nn.Linear(width, patch * patch * out_channels))
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        return pointwise(modulate(layer_norm(x), shift, scale), self.linear)


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """The official start (Peebles & Xie 2023): Xavier everywhere, small embeddings, zeros stay zeros."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (module.weight.is_meta or module.weight.any()):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TimestepEmbedder | VectorEmbedder):
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)


def check_widths(kind: str, hidden_size: int, num_heads: int, depth: int, patch_size: int) -> None:
    """Raises DarkroomError for sizes from which no transformer can be built."""
    for name, value in (("depth", depth), ("patch_size", patch_size), ("num_heads", num_heads)):
        if value < 1:
            raise DarkroomError(f"{kind}: {name} is {value}; give at least 1")
    if hidden_size < 1 or hidden_size % num_heads:
        raise DarkroomError(f"{kind}: hidden_size {hidden_size} cannot be split into num_heads={num_heads} heads")
    if hidden_size % 4:
        raise DarkroomError(
            f"{kind}: hidden_size {hidden_size} is no multiple of 4, which sine and cosine of two axes need"
        )


def joined_input(kind: str, x: Tensor, slots: Slots | None, channels: int, patch: int) -> Tensor:
    """x with the `concat` slot behind its channels, or the DarkroomError that says why it cannot be read."""
    if slots is not None and slots.concat is not None:
        x = torch.cat([x, slots.concat.to(x.dtype)], dim=1)
    if x.shape[1] != channels:
        raise DarkroomError(
            f"{kind}: the input has {x.shape[1]} channels with the concat slot joined, but this network takes "
            f"{channels}; give the right latent and concat maps"
        )
    if x.shape[2] % patch or x.shape[3] % patch:
        raise DarkroomError(
            f"{kind}: the latent's height {x.shape[2]} and width {x.shape[3]} must be multiples of the patch size "
            f"{patch}; choose another size"
        )
    return x


def check_slot(kind: str, name: str, given: bool, taken: bool, option: str) -> None:
    """Raises DarkroomError if a slot is filled that nothing reads, or one is missing that is needed."""
    if given != taken:
        verb = "needs" if taken else "does not read"
        raise DarkroomError(f"{kind}: this network {verb} the conditioning slot {name!r}; see its option {option}")
