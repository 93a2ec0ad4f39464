"""Loss terms and discriminator against the official code, and each term against its closed form in float64."""

from __future__ import annotations

import math

import pytest
import torch
from first_stage_golden import TOLERANCE, assert_golden, load_topic, make_inputs, state_dict

from darkroom.first_stage import losses
from darkroom.first_stage.discriminator import Discriminator

CASES = load_topic("autoencoder_losses")


@pytest.mark.parametrize("name", ["patchgan_3", "patchgan_2"])
def test_official_discriminator(name: str) -> None:
    case = CASES[name]
    model = Discriminator(case.args["input_nc"], case.args["ndf"], case.args["n_layers"], norm="batch")
    model.load_state_dict(state_dict(case), strict=True)
    x = make_inputs(case)["x"]
    assert_golden(model.eval()(x), case, "logits_eval")
    assert_golden(model.train()(x), case, "logits_train")


def test_official_gan_losses() -> None:
    case = CASES["gan_losses"]
    given = make_inputs(case)
    real, fake, weights = given["logits_real"], given["logits_fake"], given["weights"]
    assert_golden(losses.discriminator_loss(real, fake, "hinge"), case, "hinge_d_loss")
    assert_golden(losses.discriminator_loss(real, fake, "vanilla"), case, "vanilla_d_loss")
    assert_golden(losses.adversarial_loss(fake), case, "g_loss")
    assert_golden(losses.hinge_loss(real, fake, weights), case, "hinge_with_exemplar_weights")


def test_official_delay() -> None:
    for name, entry in CASES["adopt_weight"].spec["outputs"].items():
        _, weight, _, step, _, threshold = name.split("_")
        assert losses.delayed(float(weight), int(step), int(threshold)) == pytest.approx(entry["value"], abs=TOLERANCE)


def test_closed_forms() -> None:
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 3, 1, 4, 4, generator=g, dtype=torch.float64)
    pairs = list(zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True))
    hinge = [max(0.0, 1 - r) + max(0.0, 1 + f) for r, f in pairs]
    assert float(losses.hinge_loss(real, fake)) == pytest.approx(0.5 * sum(hinge) / len(hinge), abs=1e-12)
    # The vanilla loss is half the sum of the two cross-entropies of a classifier.
    entropy = [-math.log(1 / (1 + math.exp(-r))) - math.log(1 - 1 / (1 + math.exp(-f))) for r, f in pairs]
    assert float(losses.vanilla_loss(real, fake)) == pytest.approx(0.5 * sum(entropy) / len(entropy), abs=1e-12)
    equal = losses.hinge_loss(real, fake, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(equal, losses.hinge_loss(real, fake))


def test_reconstruction_likelihoods() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 3, 4, 5, generator=g, dtype=torch.float64)
    s = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    # |x - y| / b + log b with b = exp(s): the Laplace density without its log 2.
    laplace = torch.distributions.Laplace(y, s.exp())
    expected = (-laplace.log_prob(x) - math.log(2)).sum() / 2
    ours = losses.reconstruction_nll(losses.reconstruction_error(x, y, "l1"), s)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(expected, s))
    squared = losses.reconstruction_error(x, y, "l2")
    torch.testing.assert_close(losses.reconstruction_nll(squared), (x - y).square().sum() / 2)


def test_the_best_log_variance_is_that_of_the_error() -> None:
    """The minimum over s of sum(e / exp(s) + s) is at exp(s) = mean(e)."""
    error = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = error.mean().log().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.reconstruction_nll(error, s), s)
    assert abs(float(gradient)) < 1e-9


def test_adaptive_weight() -> None:
    a, b = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert float(losses.adaptive_weight(a, b)) == pytest.approx(5 / (2 + 1e-4), abs=1e-12)
    assert float(losses.adaptive_weight(a, torch.zeros(2, dtype=torch.float64))) == 1e4
    assert float(losses.adaptive_weight(a, b, maximum=2.0)) == 2.0


def test_group_norm_makes_logits_independent_of_the_batch() -> None:
    torch.manual_seed(0)
    model = Discriminator(3, 8, 2, norm="group").train()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-6, rtol=1e-5)


def test_chroma_weight_leaves_brightness_and_multiplies_the_rest() -> None:
    """d = m + r with m the mean over channels: d^2 becomes (m + w r)^2, and a grey error stays what it was."""
    grey = torch.full((1, 3, 2, 2), 0.5)
    nothing = torch.zeros_like(grey)
    assert losses.reconstruction_error(grey, nothing, "l2", chroma_weight=3.0).equal(grey.square())
    coloured = torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)
    error = losses.reconstruction_error(coloured, torch.zeros_like(coloured), "l1", chroma_weight=3.0)
    torch.testing.assert_close(error, 3.0 * coloured.abs())
    both = coloured + 0.1
    squared = losses.reconstruction_error(both, torch.zeros_like(both), "l2", chroma_weight=2.0)
    assert squared.flatten().tolist() == pytest.approx([1.3**2, 0.1**2, 1.1**2])
    assert losses.reconstruction_error(both, torch.zeros_like(both), "l1").equal(both.abs())


def test_relativistic_loss_sees_only_differences() -> None:
    """Jolicoeur-Martineau 2018: what raises both logits alike changes nothing; the two players' gradients are opposite
    in sign, and their losses at d = real - fake differ by d."""
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    loss = losses.discriminator_loss(real, fake, "relativistic")
    by_hand = [math.log(1 + math.exp(d)) for d in (fake - real).flatten().tolist()]
    assert float(loss) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-12)
    torch.testing.assert_close(losses.discriminator_loss(real + 7, fake + 7, "relativistic"), loss)
    torch.testing.assert_close(losses.adversarial_loss(fake, real) - loss, (real - fake).mean())


def test_the_squared_slope_of_a_linear_discriminator_is_that_of_its_weights() -> None:
    """E[(D(x + s e) - D(x))^2] / s^2 = |w|^2 for D(x) = <w, x>, whatever the step s."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(48, generator=g, dtype=torch.float64)
    x, noise = (torch.randn(20_000, 48, generator=g, dtype=torch.float64) for _ in range(2))
    for step in (0.01, 0.5):
        slope = losses.squared_slope(x @ w, (x + step * noise) @ w, step)
        assert float(slope) == pytest.approx(float(w.square().sum()), rel=0.03)
