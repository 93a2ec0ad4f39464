"""The text towers of CLIP: `CLIPText` under the names of the transformers library (CLIP-L in SD 1, SDXL and SD 3, bigG
in SD 3), `OpenCLIPText` under those of OpenCLIP (ViT-H in SD 2, bigG in SDXL).

Source: Radford et al. 2021, sec. 2.4; Cherti et al. 2022. Both are one network: pre-norm transformer, causal attention,
learned positions. They differ in the names of their parameters, in whether q, k, v are packed, and in the activation.

Shapes: B batch, L tokens, D width, h heads, P width of the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import linear

Pool = Literal["none", "plain", "projected"]


class TextFeatures(NamedTuple):
    """context (B, L, D): one vector per token; pooled (B, D), or (B, P) when projected: one per text, if asked for."""

    context: Tensor
    pooled: Tensor | None


class SpecialIds(NamedTuple):
    """The token before each text (None: none), the token behind it, and what fills up short texts."""

    start: int | None
    end: int
    pad: int


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with (Hendrycks & Gimpel 2016, eq. 3)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by the name that configurations of the transformers library give it."""
    if name not in ACTIVATIONS:
        raise DarkroomError(f'text tower: activation "{name}" is not known (known: {", ".join(ACTIVATIONS)})')
    return ACTIVATIONS[name]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, L, D) each -> (B, L, D): token i sees tokens 0 .. i, so that padding behind a text does not change it."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def end_of_text(ids: Tensor, eos_token_id: int | None) -> Tensor:
    """(B, L) -> (B,): where each text ends, the first end token, whose state stands for the whole text.

    With None it is the largest number of the row, which in CLIP's vocabulary is that same token.
    """
    return (ids if eos_token_id is None else ids == eos_token_id).int().argmax(dim=1)


def check_length(ids: Tensor, longest: int) -> None:
    if ids.shape[1] > longest:
        raise DarkroomError(f"text: {ids.shape[1]} tokens for a tower of length {longest}; truncate the ids")


class _Tower(nn.Module):
    """What both towers do with their own parts: embeddings, blocks, final norm, projection."""

    config: Any
    longest: int
    eos_token_id: int | None
    special_ids: SpecialIds
    projected_width: int

    def _parts(self) -> tuple[Tensor, Tensor, nn.ModuleList, nn.LayerNorm]:
        """Token table, position table, blocks, final norm."""
        raise NotImplementedError

    def _project(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, P)."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        return int(self._parts()[0].shape[1])

    def forward(self, ids: Tensor, skip_layers: int = 0, final_norm: bool = True, pool: Pool = "none") -> TextFeatures:
        """Token ids (B, L) -> `TextFeatures`.

        skip_layers: blocks left out at the end of `context`: 0 the last state, 1 the penultimate (SD 2, SDXL, SD 3)
        final_norm:  whether `context` goes through the final LayerNorm: yes in SD 1 and SD 2, no in SDXL and SD 3
        pool:        the last state, after the final norm, at the end of the text: "plain", or through the projection
        """
        check_length(ids, self.longest)
        tokens, positions, blocks, norm = self._parts()
        if not 0 <= skip_layers <= len(blocks):
            raise DarkroomError(f"text tower: skip_layers is {skip_layers}; it has {len(blocks)} layers")
        x = F.embedding(ids, tokens) + positions[: ids.shape[1]]
        wanted = len(blocks) - skip_layers
        for block in blocks[:wanted]:
            x = block(x)
        context = norm(x) if final_norm else x
        if pool == "none":
            return TextFeatures(context, None)
        for block in blocks[wanted:]:
            x = block(x)
        # Only one row per text is needed from here on.
        known = ids.masked_fill(ids >= self.config.vocab_size, 0)  # learned tokens are behind the end token's number
        last = norm(x[torch.arange(len(ids), device=x.device), end_of_text(known, self.eos_token_id)])
        return TextFeatures(context, self._project(last) if pool == "projected" else last)

    def unused(self, skip_layers: int = 0, final_norm: bool = True, pool: Pool = "none") -> list[nn.Parameter]:
        """Parameters that `forward` with these options does not touch: a trained tower freezes them, so that
        optimisers and data-parallel wrappers do not wait for their gradients."""
        used = {id(p) for p in self._parts()[:2]}
        blocks, norm = self._parts()[2:]
        seen = list(blocks if pool != "none" else blocks[: len(blocks) - skip_layers])
        if final_norm or pool != "none":
            seen.append(norm)
        used |= {id(p) for module in seen for p in module.parameters()}
        if pool == "projected":
            used |= {id(p) for name, p in self.named_parameters() if name.startswith("text_projection")}
        return [p for p in self.parameters() if id(p) not in used]


@torch.no_grad()
def initialise(tower: _Tower, projection: Tensor | None) -> None:
    """Weights for training from nothing (Radford et al. 2021, released code): what each block adds shrinks with the
    depth."""
    tokens, positions, blocks, _ = tower._parts()
    nn.init.normal_(tokens, std=0.02)
    nn.init.normal_(positions, std=0.01)
    width = tokens.shape[1]
    residual = width**-0.5 * (2 * max(len(blocks), 1)) ** -0.5
    std = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "in_proj_weight"), width**-0.5),
        **dict.fromkeys(("out_proj", "fc2", "c_proj"), residual),
        **dict.fromkeys(("fc1", "c_fc"), (2 * width) ** -0.5),
    }
    for name, parameter in blocks.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=next(std[part] for part in name.split(".") if part in std))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if projection is not None:
        nn.init.normal_(projection, std=width**-0.5)


# ------------------------------------------------------------------------------------- names of transformers


@dataclass
class CLIPTextConfig:
    """Sizes of `CLIPText`, under the names of `CLIPTextConfig` in the transformers library; the defaults are CLIP-L.

    vocab_size:              token ids are 0 .. vocab_size - 1
    max_position_embeddings: the longest sequence; shorter ones are accepted
    hidden_act:              "quick_gelu" in OpenAI's towers, "gelu" in those of OpenCLIP
    projection_dim:          P, the width that texts and images share
    with_projection:         hold the projection; released files of SD 1 do not
    eos_token_id:            the token at which a text is pooled; 2 stands, as in old configurations, for the largest id
    bos_token_id, pad_token_id: what goes before a text and behind it; the tower itself does not look
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    with_projection: bool = False
    eos_token_id: int = 49407
    bos_token_id: int = 49406
    pad_token_id: int = 49407


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x, layer.weight, layer.bias) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return linear(causal_attention(q, k, v, self.heads), self.out_proj.weight, self.out_proj.bias)


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.act = activation(act)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.act(linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)


class _Layer(nn.Module):
    """(B, L, D) -> (B, L, D): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        c = config
        self.self_attn = _Attention(c.hidden_size, c.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = _MLP(c.hidden_size, c.intermediate_size, c.hidden_act)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class _Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])


class _TextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPText(_Tower):
    """Token ids (B, L) -> `TextFeatures`; parameters `text_model.encoder.layers.0.self_attn.k_proj.weight`, ..."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        _check_heads(config.hidden_size, config.num_attention_heads)
        self.config = config
        self.longest = config.max_position_embeddings
        self.eos_token_id = None if config.eos_token_id == 2 else config.eos_token_id
        largest = config.vocab_size - 1
        self.special_ids = (
            SpecialIds(largest - 1, largest, config.pad_token_id if config.pad_token_id != 1 else largest)
            if self.eos_token_id is None
            else SpecialIds(config.bos_token_id, config.eos_token_id, config.pad_token_id)
        )
        self.projected_width = config.projection_dim
        self.text_model = _TextModel(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if config.with_projection else None
        )
        initialise(self, None if self.text_projection is None else self.text_projection.weight)
        self.register_load_state_dict_pre_hook(_drop_position_ids)

    def _parts(self) -> tuple[Tensor, Tensor, nn.ModuleList, nn.LayerNorm]:
        t = self.text_model
        tables = t.embeddings.token_embedding.weight, t.embeddings.position_embedding.weight
        return *tables, t.encoder.layers, t.final_layer_norm

    def _project(self, pooled: Tensor) -> Tensor:
        if self.text_projection is None:
            raise DarkroomError("text tower: it holds no projection; pool plainly, or build it with_projection")
        return linear(pooled, self.text_projection.weight)


def _drop_position_ids(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files of older releases list the positions 0 .. L-1 as a buffer; there is nothing to read from it."""
    state.pop(f"{prefix}text_model.embeddings.position_ids", None)


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise DarkroomError(f"text tower: width {width} does not divide into {heads} heads")


# ------------------------------------------------------------------------------------------ names of OpenCLIP


@dataclass
class OpenCLIPTextConfig:
    """Sizes of `OpenCLIPText`, under OpenCLIP's names; the defaults are ViT-H-14.

    context_length: the longest sequence; shorter ones are accepted
    embed_dim:      P, the width that texts and images share; null: that of the tower
    quick_gelu:     OpenAI's activation instead of the exact one
    """

    vocab_size: int = 49408
    width: int = 1024
    heads: int = 16
    layers: int = 24
    context_length: int = 77
    embed_dim: int | None = None
    mlp_ratio: float = 4.0
    quick_gelu: bool = False


class _PackedAttention(nn.Module):
    """q, k, v as one matrix, under the names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return linear(causal_attention(q, k, v, self.heads), self.out_proj.weight, self.out_proj.bias)


class _OpenMLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.act = activation(act)
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.act(linear(x, self.c_fc.weight, self.c_fc.bias)), self.c_proj.weight, self.c_proj.bias)


class _ResidualBlock(nn.Module):
    """(B, L, D) -> (B, L, D): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: OpenCLIPTextConfig) -> None:
        super().__init__()
        c = config
        self.ln_1 = nn.LayerNorm(c.width)
        self.attn = _PackedAttention(c.width, c.heads)
        self.ln_2 = nn.LayerNorm(c.width)
        self.mlp = _OpenMLP(c.width, int(c.width * c.mlp_ratio), "quick_gelu" if c.quick_gelu else "gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, config: OpenCLIPTextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([_ResidualBlock(config) for _ in range(config.layers)])


class OpenCLIPText(_Tower):
    """Token ids (B, L) -> `TextFeatures`; parameters `transformer.resblocks.0.attn.in_proj_weight`, ...

    A text is pooled at its largest id, as OpenCLIP does: the end of the text, in CLIP's vocabulary.
    """

    def __init__(self, config: OpenCLIPTextConfig) -> None:
        super().__init__()
        _check_heads(config.width, config.heads)
        self.config = config
        self.longest = config.context_length
        self.eos_token_id = None
        # The vocabulary ends with the start and end tokens, and OpenCLIP pads with 0.
        self.special_ids = SpecialIds(config.vocab_size - 2, config.vocab_size - 1, 0)
        self.projected_width = config.embed_dim or config.width
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim or config.width))
        # The temperature of CLIP's training, here only because every file holds it.
        self.logit_scale = nn.Parameter(torch.tensor(2.6592600), requires_grad=False)
        self.transformer = _Transformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.ln_final = nn.LayerNorm(config.width)
        initialise(self, self.text_projection)

    def _parts(self) -> tuple[Tensor, Tensor, nn.ModuleList, nn.LayerNorm]:
        return self.token_embedding.weight, self.positional_embedding, self.transformer.resblocks, self.ln_final

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled @ self.text_projection


# ------------------------------------------------------------------------------------------------ named sizes

# SD 1, SDXL and SD 3 use ViT-L-14, which pads with the end token; SD 2 ViT-H-14, SDXL and SD 3 ViT-bigG-14, both of
# OpenCLIP, which pads with 0.
CLIP_TEXT_SIZES: Mapping[str, CLIPTextConfig] = {
    "ViT-L-14": CLIPTextConfig(),
    "ViT-H-14": CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=1024,
        pad_token_id=0,
    ),
    "ViT-bigG-14": CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
        pad_token_id=0,
    ),
}
OPEN_CLIP_TEXT_SIZES: Mapping[str, OpenCLIPTextConfig] = {
    "ViT-L-14": OpenCLIPTextConfig(width=768, heads=12, layers=12),
    "ViT-H-14": OpenCLIPTextConfig(),
    "ViT-bigG-14": OpenCLIPTextConfig(width=1280, heads=20, layers=32),
}
