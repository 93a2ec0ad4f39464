"""What the tests of DiT and MMDiT share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(channels: int = 4, size: tuple[int, int] = (8, 8), batch: int = 2) -> tuple[Tensor, Tensor]:
    return randn(batch, channels, *size, seed=1), torch.linspace(3, 900, batch)


def opened(network: nn.Module) -> Any:
    """Layers that start at 0 get random weights, so that everything shows in the output."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def conditioning(**changes: Any) -> Conditioning:
    """All five slots for a batch of two."""
    slots = {
        "context": randn(2, 5, 24),
        "context_mask": torch.ones(2, 5, dtype=torch.bool),
        "vector": randn(2, 6),
        "concat": randn(2, 2, 8, 8),
        "label": torch.tensor([0, 4]),
    }
    return Conditioning(**{**slots, **changes})


def changes_output(network: Any, one: Conditioning, other: Conditioning) -> bool:
    x, time = inputs()
    with torch.no_grad():
        return bool((network(x, time, one) - network(x, time, other)).abs().max() > 1e-4)


def check_slots(network: Any) -> None:
    """Each slot changes the output; what a mask hides does not."""
    base = conditioning()
    for name, value in (
        ("context", randn(2, 5, 24, seed=9)),
        ("vector", randn(2, 6, seed=9)),
        ("concat", randn(2, 2, 8, 8, seed=9)),
        ("label", torch.tensor([1, 2])),
    ):
        assert changes_output(network, base, conditioning(**{name: value})), name
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    spoilt = torch.where(mask[:, :, None], randn(2, 5, 24), 100 * randn(2, 5, 24, seed=8))
    hidden = conditioning(context_mask=mask)
    assert changes_output(network, base, hidden)
    assert not changes_output(network, hidden, conditioning(context=spoilt, context_mask=mask))
    short = conditioning(context=randn(2, 5, 24)[:, :3], context_mask=None)
    assert not changes_output(network, hidden, short)


def saved_numbers(network: Any) -> int:
    """How many numbers a forward pass keeps for its backward pass, the parameters not counted."""
    own = {p.data_ptr() for p in network.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    x, time = inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(x, time, conditioning(), time / 2)
    assert result.requires_grad
    return sum(seen.values())


def check_gradients(plain: Any, thrifty: Any) -> None:
    """Every parameter and input has a gradient, the same with activation checkpointing."""
    assert saved_numbers(thrifty) < 0.5 * saved_numbers(plain)
    x, time = inputs()
    target_time = time / 2
    for network in (plain, thrifty):
        network(x, time, conditioning(), target_time).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is not None and a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5)
    slots = conditioning()
    leaves = [x] + [t for t in (slots.context, slots.vector, slots.concat) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    for grad in torch.autograd.grad(thrifty(x, time, slots, target_time).square().sum(), leaves):
        assert grad.isfinite().all() and grad.any()


def check_target_time(plain: Any, jumping: Any) -> None:
    """The option adds parameters and leaves the function as it was; trained, the distance is what counts."""
    x, time = inputs()
    extra = set(dict(jumping.named_parameters())) - set(dict(plain.named_parameters()))
    assert extra and all(name.startswith("target_time_embed") for name in extra)
    missing = jumping.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == extra and not missing.unexpected_keys
    with torch.no_grad():
        expected = plain(x, time, conditioning())
        assert torch.equal(jumping(x, time, conditioning()), expected)
        assert torch.equal(jumping(x, time, conditioning(), time / 2), expected)
        opened(jumping)
        far, near = (jumping(x, time, conditioning(), time * share) for share in (0.1, 0.9))
        assert (far - near).abs().max() > 1e-3
        assert torch.equal(jumping(x, time, conditioning(), time), jumping(x, time, conditioning()))


def check_precision(network: Any) -> None:
    """Weights in bfloat16, or autocast: near the float32 result, which keeps the dtype of x."""
    x, time = inputs()
    with torch.no_grad():
        expected = network(x, time, conditioning())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = network(x, time, conditioning())
        low = network.bfloat16()(x, time, conditioning())
    for result, bound in ((mixed, 0.01), (low, 0.03)):
        assert result.dtype == x.dtype
        assert (result - expected).norm() / expected.norm() < bound


def check_batch(network: Any) -> None:
    """An image does not depend on its batch."""
    x, time = inputs(batch=5)
    slots = Conditioning(context=randn(5, 6, 24), vector=randn(5, 6), concat=randn(5, 2, 8, 8), label=torch.arange(5))
    with torch.no_grad():
        whole, alone = network(x, time, slots), network(x[2:3], time[2:3], slots[2:3])
    torch.testing.assert_close(whole[2:3], alone, atol=1e-5, rtol=1e-5)
