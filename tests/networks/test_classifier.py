"""The noisy classifier: golden vectors of the official code, published sizes, and what each pooling promises."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from parity_data import case_names, load_case, weights
from torch import nn

from darkroom.errors import DarkroomError
from darkroom.networks.classifier import CLASSIFIER_SIZES, ClassifierConfig, NoisyClassifier

CASES = [n for n in case_names("unet_ldm") if load_case("unet_ldm", n).spec.get("class") == "EncoderUNetModel"]
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


def small(**options: object) -> NoisyClassifier:
    """Random everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    defaults = {"image_size": 8, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1, "channel_mult": (1, 2)}
    network = NoisyClassifier(ClassifierConfig(**{**defaults, "attention_resolutions": (2,), **options}))  # type: ignore
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TIME = torch.tensor([3.0, 400.0, 999.0])


def test_the_goldens_are_there() -> None:
    assert sorted(CASES) == [f"classifier_{pool}" for pool in POOLS]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_official_code(name: str) -> None:
    case = load_case("unet_ldm", name)
    assert set(case.args) <= {f.name for f in fields(ClassifierConfig)}
    network = NoisyClassifier(ClassifierConfig(**case.args)).eval()
    network.load_state_dict(weights().make_state_dict(case.spec["layout"]), strict=True)
    case.check("logits", network(case.input("x"), case.input("t")), atol=2e-5)


# Millions of parameters; Dhariwal & Nichol 2021, App. I.
@pytest.mark.parametrize(("name", "millions"), [("imagenet-64", 65), ("imagenet-128", 43), ("imagenet-256", 54)])
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        network = NoisyClassifier(CLASSIFIER_SIZES[name])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients(pool: str, use_checkpoint: bool) -> None:
    """They reach every parameter, and the picture, which is what guidance follows; with memory saved too."""
    network, x = small(pool=pool, use_checkpoint=use_checkpoint), X.clone().requires_grad_()
    logits = network(x, TIME)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 1e-4).all()


def test_each_picture_answers_for_itself() -> None:
    for pool in POOLS:
        network = small(pool=pool, use_scale_shift_norm=True, resblock_updown=True)
        torch.testing.assert_close(network(X, TIME)[1:2], network(X[1:2], TIME[1:2]), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(network(X, TIME), network(X, TIME - 1.5), atol=1e-6)


def test_sizes_and_channels() -> None:
    large = torch.randn(1, 3, 12, 16)
    for pool in ("adaptive", "spatial", "spatial_v2"):
        assert small(pool=pool)(large, TIME[:1]).shape == (1, 5)
    with pytest.raises(DarkroomError, match="image_size"):
        small(pool="attention")(large, TIME[:1])
    with pytest.raises(DarkroomError, match="channels"):
        small()(torch.zeros(1, 4, 8, 8), TIME[:1])


def test_bfloat16() -> None:
    network = small(pool="attention")
    expected = network(X, TIME)
    low = network.bfloat16()(X, TIME)
    assert low.dtype == torch.float32 and (low - expected).norm() / expected.norm() < 0.05
