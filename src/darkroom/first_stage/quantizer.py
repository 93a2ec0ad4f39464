"""The codebook of a VQ autoencoder (van den Oord et al. 2017; Esser et al. 2021, sec. 3.1), with the official key
`embedding.weight`.

Shapes: B batch, E latent channels, h w latent size, K codes, P = B*h*w positions.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distances that are held at once: 64 MiB of float32.
DISTANCES = 2**24


class Codebook(nn.Module):
    """K codes of E channels. `codebook(z)` is the nearest code at each position, with straight-through gradients."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        # The official start, K codes within 1/K of zero. Embedding skips it where weights are read from a file.
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    @property
    def size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def channels(self) -> int:
        return self.embedding.embedding_dim

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B, E, h, w) -> (B, h, w) int64: argmin_k |z - e_k|^2, by |e_k|^2 - 2 z.e_k in at least float32."""
        b, _, h, w = z.shape
        codes = precise(self.embedding.weight)
        rows = z.detach().to(codes.dtype).permute(0, 2, 3, 1).reshape(b * h * w, -1)  # (P, E)
        with torch.autocast(z.device.type, enabled=False):
            squares, columns = codes.square().sum(1), codes.t()
            at_once = max(1, DISTANCES // self.size)
            found = [torch.addmm(squares, part, columns, alpha=-2.0).argmin(1) for part in rows.split(at_once)]
        return torch.cat(found).view(b, h, w)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) -> the codes (B, E, h, w)."""
        return F.embedding(indices, self.embedding.weight).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Tensor:
        """(B, E, h, w) -> quantised z; its gradient with respect to z is the identity (straight-through)."""
        return straight_through(z, self.lookup(self.nearest(z)))


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """The value of `quantised` with the gradient of z (Bengio et al. 2013). All of one shape."""
    return cast(Tensor, _StraightThrough.apply(z, quantised.detach().to(z.dtype)))


class _StraightThrough(torch.autograd.Function):
    # z + (quantised - z).detach() says the same, but rounds the codes.
    @staticmethod
    def forward(ctx: object, z: Tensor, quantised: Tensor) -> Tensor:
        return quantised.clone()

    @staticmethod
    def backward(ctx: object, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0], None


def codebook_loss(z: Tensor, quantised: Tensor, beta: float = 0.25) -> Tensor:
    """(): mean |sg[q] - z|^2 + beta * mean |q - sg[z]|^2, q the codes, sg stops the gradient; shapes alike.

    The first term commits the encoder, the second moves the codes. The official code has beta on the second one (the
    paper of van den Oord et al. 2017, eq. 3, on the first), and its models were trained so.
    """
    commitment = (z - quantised.detach()).square().mean()
    movement = (quantised - z.detach()).square().mean()
    return commitment + beta * movement


def code_counts(indices: Tensor, size: int) -> Tensor:
    """(K,) int64: how often each code occurs in `indices` of any shape."""
    return torch.bincount(indices.reshape(-1), minlength=size)


def perplexity(counts: Tensor) -> Tensor:
    """(): exp(entropy) of the codes' frequencies (K,): K when all are used alike, 1 when one is used alone."""
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.exp(-(p * torch.log(p.clamp_min(1e-30))).sum()).float()


@torch.no_grad()
def revive_codes(codebook: Codebook, counts: Tensor, z: Tensor, generator: torch.Generator) -> int:
    """Move each code that was never used (`counts` (K,) is 0) onto a latent of z (B, E, h, w); gives their number.

    Dead codes have no gradient and would stay dead (Dhariwal et al. 2020, sec. 4.1: random restarts). Positions are
    drawn without repetition while there are enough, and a little noise (1 % of the spread) keeps copies apart.
    """
    dead = (counts == 0).nonzero().flatten()
    if not len(dead):
        return 0
    rows = z.detach().permute(0, 2, 3, 1).flatten(0, 2).to(codebook.embedding.weight)  # (P, E)
    order = torch.randperm(len(rows), generator=generator)
    chosen = order.repeat(-(-len(dead) // len(rows)))[: len(dead)].to(rows.device)
    noise = torch.randn(len(dead), rows.shape[1], generator=generator).to(rows)
    codebook.embedding.weight[dead] = rows[chosen] + 0.01 * rows.std(0, correction=0) * noise
    return len(dead)


def precise(t: Tensor) -> Tensor:
    """float32, or float64 if it is that already."""
    return t if t.dtype == torch.float64 else t.float()
