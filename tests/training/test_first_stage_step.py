"""The first stage's train step: official loss assembly, gradients, phases, repeatability and several processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "first_stage"))
from first_stage_golden import TOLERANCE, autoencoder_config, load_topic, make_inputs, state_dict

from darkroom.errors import DarkroomError
from darkroom.features.laplacian import NormalisedLaplacianDistance
from darkroom.features.texture import TextureDistance
from darkroom.first_stage.autoencoder import Autoencoder, AutoencoderConfig
from darkroom.first_stage.losses import adversarial_loss, reconstruction_error, reconstruction_nll
from darkroom.training.first_stage_step import (
    AutoencoderPhase,
    FirstStageStep,
    FirstStageTrainConfig,
    augment,
    quieten_posterior,
    resolve_perceptual,
)

TINY = AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, norm_groups=4)
CONFIG = FirstStageTrainConfig(
    perceptual="laplacian",
    kl_weight=1e-3,
    discriminator_start=1,
    discriminator_channels=8,
    discriminator_layers=1,
    learn_log_variance=True,
)


def make(config: FirstStageTrainConfig = CONFIG, seed: int = 0) -> FirstStageStep:
    torch.manual_seed(seed)
    return FirstStageStep(Autoencoder(TINY), config)


def images(count: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(step: FirstStageStep) -> AutoencoderPhase:
    module = step.phases[0].module
    assert isinstance(module, AutoencoderPhase)
    return module


def make_optimizers(step: FirstStageStep) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(phase.parameters, lr=1e-3) for phase in step.phases]


def run_steps(step: FirstStageStep, optimizers: list[Any], start: int, stop: int, accumulation: int = 1) -> list[float]:
    """The loop's protocol: phase by phase, each over all micro-batches."""
    losses = []
    for train_step in range(start, stop):
        batches = [{"image": images(seed=10 * train_step + m)} for m in range(accumulation)]
        for p, (phase, optimizer) in enumerate(zip(step.phases, optimizers, strict=True)):
            if train_step < phase.starts_at:
                continue
            optimizer.zero_grad()
            for m, batch in enumerate(batches):
                loss, _ = phase.module(batch, generator(1000 * train_step + 10 * p + m), train_step)
                (loss / accumulation).backward()
                losses.append(float(loss.detach()))
            optimizer.step()
    return losses


def test_official_loss_assembly() -> None:
    cases = load_topic("autoencoder_losses")
    case = cases["kl_loss_assembly"]
    arguments, given = case.args, make_inputs(case)
    official = arguments["loss"]
    config = FirstStageTrainConfig(
        perceptual="none",
        kl_weight=official["kl_weight"],
        log_variance=case.spec["derived"]["loss.logvar"]["value"],
        discriminator_start=official["disc_start"],
        discriminator_weight=official["disc_weight"],
        discriminator_layers=official["disc_num_layers"],
        discriminator_channels=64,
        discriminator_norm="batch",
        scale="image",
    )
    step = FirstStageStep(Autoencoder(autoencoder_config(arguments["ddconfig"], arguments["embed_dim"])), config)
    weights = state_dict(case)
    autoencoder = {k: v for k, v in weights.items() if not k.startswith("loss.")}
    step.autoencoder.load_state_dict(autoencoder, strict=True)
    assert step.discriminator is not None
    prefix = "loss.discriminator."
    discriminator = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    step.discriminator.load_state_dict(discriminator, strict=True)
    values = {name: entry["value"] for name, entry in case.spec["outputs"].items()}

    def close(actual: Tensor, expected: float) -> None:
        assert float(actual.detach()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)

    for train_step in (0, 10):
        loss, metrics = first(step).loss(given["x"], given["eps"], train_step)
        expected = values[f"step{train_step}_optimizer0"]
        close(loss, expected["total_loss"])
        close(metrics["nll"], expected["nll_loss"])
        close(metrics["kl"], expected["kl_loss"])
        close(metrics["reconstruction"], expected["rec_loss"])
        assert ("adversarial" in metrics) == (train_step == 10)
    close(metrics["adversarial"], expected["g_loss"])
    close(metrics["adaptive_weight"], expected["d_weight"])
    loss, metrics = step.phases[1].module({}, generator(0), 10)
    close(loss, values["step10_optimizer1"]["disc_loss"])
    close(metrics["logits_real"], values["step10_optimizer1"]["logits_real"])
    close(metrics["logits_fake"], values["step10_optimizer1"]["logits_fake"])
    assert step.phases[1].starts_at == official["disc_start"]  # the official loss is 0 before


def vq_step(case: Any, weight: float = 0.75) -> FirstStageStep:
    """The official VQ objective of a golden case, with its weights."""
    arguments = case.args
    official = arguments["loss"]
    config = FirstStageTrainConfig(
        perceptual="none",
        codebook_weight=official["codebook_weight"],
        discriminator_start=official["disc_start"],
        discriminator_weight=weight,
        discriminator_layers=official["disc_num_layers"],
        discriminator_channels=64,
        discriminator_norm="batch",
    )
    model = Autoencoder(autoencoder_config(arguments["ddconfig"], arguments["embed_dim"], arguments["n_embed"]))
    step = FirstStageStep(model, config)
    weights = state_dict(case)
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("loss.")}, strict=True)
    if step.discriminator is not None:
        prefix = "loss.discriminator."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        step.discriminator.load_state_dict(own, strict=True)
    return step


def test_official_vq_loss_assembly() -> None:
    case = load_topic("autoencoder_losses")["vq_loss_assembly"]
    given = make_inputs(case)
    step = vq_step(case, case.args["loss"]["disc_weight"])
    values = {name: entry.get("value") for name, entry in case.spec["outputs"].items()}
    noise = torch.zeros(2, 3, 16, 16)

    def close(actual: Tensor, expected: float) -> None:
        assert float(actual.detach()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)

    for train_step in (0, 10):
        loss, metrics = first(step).loss(given["x"], noise, train_step)
        expected = values[f"step{train_step}_optimizer0"]
        close(loss, expected["total_loss"])
        close(metrics["nll"], expected["nll_loss"])
        close(metrics["codebook"], expected["quant_loss"])
        close(metrics["reconstruction"], expected["rec_loss"])
    close(metrics["adversarial"], expected["g_loss"])
    close(metrics["adaptive_weight"], expected["d_weight"])
    loss, metrics = step.phases[1].module({}, generator(0), 10)
    close(loss, values["step10_optimizer1"]["disc_loss"])
    close(metrics["logits_real"], values["step10_optimizer1"]["logits_real"])
    close(metrics["logits_fake"], values["step10_optimizer1"]["logits_fake"])


def test_official_gradients_through_the_quantiser() -> None:
    case = load_topic("autoencoder_losses")["vq_loss_assembly"]
    step = vq_step(case, weight=0.0)
    loss, _ = first(step).loss(make_inputs(case)["x"], torch.zeros(2, 3, 16, 16), 0)
    loss.backward()
    codebook, last = step.autoencoder.codebook, step.autoencoder.encoder.conv_out.weight
    assert codebook is not None and codebook.embedding.weight.grad is not None and last.grad is not None
    case.check("grad_codebook", codebook.embedding.weight.grad)
    case.check("grad_encoder_conv_out", last.grad)


def test_codes_come_alive_and_their_use_is_counted() -> None:
    """At step 0 all codes move onto the data; later those that no image chose since."""
    torch.manual_seed(0)
    config = replace(CONFIG, revive_codes_every=3, discriminator_weight=0.0)
    step = FirstStageStep(Autoencoder(replace(TINY, codebook_size=16)), config)
    codebook = step.autoencoder.codebook
    assert codebook is not None and step.code_use is not None and "code_use" in step.modules
    batch = {"image": images(seed=5)}
    _, metrics = step.phases[0].module(batch, generator(0), 0)
    assert float(metrics["codes_used"]) > 0.6 and float(metrics["perplexity"]) > 5  # near zero it would be about one
    assert int(step.code_use.counts.sum()) == 4 * 8 * 8
    far = codebook.embedding.weight.detach().clone()
    far[3:] += 1e3  # only three codes are within reach
    with torch.no_grad():
        codebook.embedding.weight.copy_(far)
    step.code_use.counts.zero_()
    for train_step in (1, 2):
        step.phases[0].module(batch, generator(train_step), train_step)
        assert codebook.embedding.weight.equal(far)
    step.phases[0].module(batch, generator(3), 3)
    assert float(codebook.embedding.weight.detach().abs().max()) < 100
    assert int(step.code_use.counts.sum()) == 4 * 8 * 8  # counted anew
    scores = step.validation_loss([batch])
    assert 0 < scores["validation_codes_used"] <= 1 and scores["validation_perplexity"] >= 1
    assert "validation_kl" not in scores


def test_codes_can_begin_later_on_latents_that_mean_something() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, quantize_start=2, discriminator_weight=0.0)
    step = FirstStageStep(Autoencoder(replace(TINY, codebook_size=16)), config)
    codebook, image = step.autoencoder.codebook, images(seed=5)
    assert codebook is not None
    with torch.no_grad():
        codebook.embedding.weight.add_(1e3)  # far from every latent
    noise = torch.zeros(4, 3, 8, 8)
    _, metrics = step.phases[0].module.loss(image, noise, 1)  # type: ignore[operator]
    with torch.no_grad():
        decoded = step.autoencoder.decode(step.autoencoder.encode(image).mode(), quantize=False)
    assert float(metrics["reconstruction"]) == pytest.approx(float((decoded - image).abs().mean()), rel=1e-5)
    for train_step in (0, 1):
        loss, _ = step.phases[0].module({"image": image}, generator(train_step), train_step)
        loss.backward()
    assert codebook.embedding.weight.grad is not None and not codebook.embedding.weight.grad.any()
    assert float(codebook.embedding.weight.detach().abs().min()) > 100
    _, metrics = step.phases[0].module({"image": image}, generator(2), 2)
    assert float(codebook.embedding.weight.detach().abs().max()) < 100  # moved onto latents
    assert float(metrics["codes_used"]) > 0.6
    before = codebook.embedding.weight.detach().clone()
    step.phases[0].module({"image": image}, generator(3), 3)
    assert codebook.embedding.weight.equal(before)  # once


def test_a_frozen_encoder_keeps_its_codebook() -> None:
    config = replace(CONFIG, train_encoder=False, revive_codes_every=1, discriminator_weight=0.0)
    step = FirstStageStep(Autoencoder(replace(TINY, codebook_size=16)), config)
    codebook = step.autoencoder.codebook
    assert codebook is not None
    before = codebook.embedding.weight.detach().clone()
    run_steps(step, make_optimizers(step), 0, 2)
    assert codebook.embedding.weight.equal(before)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_gradients_are_those_of_the_whole_expression(reconstruction: Any) -> None:
    """The phase attaches gradients that it computed in parts; here the same loss is differentiated in one piece."""
    config = replace(CONFIG, reconstruction=reconstruction, log_variance=-0.5, discriminator_factor=0.7)
    step = make(config)
    assert step.discriminator is not None
    for module in (step.autoencoder, step.likelihood, step.discriminator):
        module.double()
    image, noise = images().double(), torch.randn(4, 4, 8, 8, generator=generator(1), dtype=torch.float64)
    parameters = step.phases[0].parameters
    loss, metrics = first(step).loss(image, noise, 5)
    ours = torch.autograd.grad(loss, parameters)

    posterior = step.autoencoder.encode(image)
    output = step.autoencoder.decode(posterior.sample_with(noise))
    error = reconstruction_error(image, output, reconstruction)
    error = error + NormalisedLaplacianDistance()(image, output).view(-1, 1, 1, 1)
    nll = reconstruction_nll(error, step.likelihood.log_variance)
    adversarial = adversarial_loss(step.discriminator(output))
    last = step.autoencoder.decoder.conv_out.weight
    (a,), (b,) = (torch.autograd.grad(t, last, retain_graph=True) for t in (nll, adversarial))
    weight = 0.5 * a.norm() / (b.norm() + 1e-4)
    whole = (nll + 0.7 * weight.detach() * adversarial + 1e-3 * posterior.kl().mean()) / image[0].numel()
    torch.testing.assert_close(loss, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(metrics["adaptive_weight"], weight, rtol=1e-9, atol=0)
    for mine, expected in zip(ours, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-12)


def test_phases_change_only_their_own_parameters() -> None:
    step = make()
    assert step.discriminator is not None
    assert set(step.modules) == {"autoencoder", "likelihood", "discriminator"}
    assert set(step.ema_modules) == {"autoencoder"}
    own = {id(p) for p in step.phases[0].parameters}
    assert own == {id(p) for m in (step.autoencoder, step.likelihood) for p in m.parameters()}
    batch = {"image": images()}
    step.phases[0].module(batch, generator(0), 1)[0].backward()
    assert all(p.grad is not None for p in step.phases[0].parameters)
    assert all(p.grad is None and p.requires_grad for p in step.discriminator.parameters())
    before = [p.grad.clone() for p in step.phases[0].parameters if p.grad is not None]
    step.phases[1].module(batch, generator(0), 1)[0].backward()
    assert all(p.grad is not None for p in step.discriminator.parameters())
    after = [p.grad for p in step.phases[0].parameters if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_adversarial_before_its_start_or_without_weight() -> None:
    step = make()
    assert step.discriminator is not None
    step.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    _, metrics = step.phases[0].module({"image": images()}, generator(0), 0)
    assert "adversarial" not in metrics and not step.pairs._queue
    off = make(replace(CONFIG, discriminator_weight=0.0))
    assert off.discriminator is None and len(off.phases) == 1 and "discriminator" not in off.modules
    _, metrics = off.phases[0].module({"image": images()}, generator(0), 10**9)
    assert "adversarial" not in metrics


def test_the_discriminator_sees_the_reconstructions_of_its_step() -> None:
    step = make()
    one, two = images(seed=1), images(seed=2)
    step.phases[0].module({"image": one}, generator(0), 1)  # a step that was skipped: its phase two never came
    for image in (one, two):
        step.phases[0].module({"image": image}, generator(0), 2)
    assert [torch.equal(a, b) for (a, _), b in zip(step.pairs._queue, (one, two), strict=True)] == [True, True]
    assert not any(r.requires_grad for _, r in step.pairs._queue)
    with pytest.raises(RuntimeError, match="step 3"):
        step.phases[1].module({}, generator(0), 3)
    step.phases[1].module({}, generator(0), 2)
    step.phases[1].module({}, generator(0), 2)
    with pytest.raises(RuntimeError, match="step 2"):
        step.phases[1].module({}, generator(0), 2)


def test_group_norm_discriminator_in_one_call_is_the_same() -> None:
    step = make()
    assert step.discriminator is not None
    step.phases[0].module({"image": images()}, generator(0), 1)
    image, fake = step.pairs._queue[0]
    _, metrics = step.phases[1].module({}, generator(0), 1)
    torch.testing.assert_close(metrics["logits_real"], step.discriminator(image).mean())
    torch.testing.assert_close(metrics["logits_fake"], step.discriminator(fake).mean())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_continued_run_is_bit_equal(norm: Any) -> None:
    config = replace(CONFIG, discriminator_norm=norm, crop=8, flip=True)
    whole = make(config)
    losses = run_steps(whole, make_optimizers(whole), 0, 4, accumulation=2)
    part = make(config)
    optimizers = make_optimizers(part)
    head = run_steps(part, optimizers, 0, 2, accumulation=2)
    copy = make(config, seed=99)
    for name, module in copy.modules.items():
        module.load_state_dict(part.modules[name].state_dict())
    copies = make_optimizers(copy)
    for target, source in zip(copies, optimizers, strict=True):
        target.load_state_dict(source.state_dict())
    assert head + run_steps(copy, copies, 2, 4, accumulation=2) == losses
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, copy.modules[name].state_dict()[key]), key


def test_it_learns() -> None:
    step = make(replace(CONFIG, learn_log_variance=False, kl_weight=1e-6))
    optimizer = torch.optim.AdamW(step.phases[0].parameters, lr=5e-3)
    image = nn.functional.interpolate(images(4, 4), size=16, mode="bilinear")
    before = step.validation_loss([{"image": image}])
    for _ in range(60):
        loss, _ = step.phases[0].module({"image": image}, generator(0), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = step.validation_loss([{"image": image}])
    assert set(after) == {"psnr", "validation_loss", "validation_kl"}
    assert after["validation_loss"] < 0.7 * before["validation_loss"] and after["psnr"] > before["psnr"] + 3


def test_validation_is_the_direct_computation() -> None:
    step = make()
    batches = [{"image": images(3)}, {"image": images(2, seed=1)}]
    image = torch.cat([b["image"] for b in batches])
    with torch.no_grad():
        posterior = step.autoencoder.encode(image)
        error = step.autoencoder.decode(posterior.mode()).clamp(-1, 1) - image
    values = step.validation_loss(batches)
    psnr = (20 * torch.log10(2 / error.square().mean((1, 2, 3)).sqrt())).mean()
    assert values["psnr"] == pytest.approx(float(psnr), rel=1e-5)
    assert values["validation_loss"] == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert values["validation_kl"] == pytest.approx(float(posterior.kl().mean()), rel=1e-5)
    assert step.validation_loss([]) == {}


def test_bfloat16_keeps_losses_in_float32() -> None:
    step = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = step.phases[0].module({"image": images()}, generator(0), 1)
        disc, _ = step.phases[1].module({}, generator(0), 1)
    exact, expected = step.phases[0].module({"image": images()}, generator(0), 1)
    assert loss.dtype == disc.dtype == torch.float32 and all(v.dtype == torch.float32 for v in metrics.values())
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert float(metrics["nll"]) == pytest.approx(float(expected["nll"]), rel=0.02)
    (loss + disc).backward()
    for phase in step.phases:
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in phase.parameters)


def test_a_quiet_posterior_at_the_start() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(TINY)
    mean = autoencoder.encode(images()).mean
    quieten_posterior(autoencoder, 0.1)
    posterior = autoencoder.encode(images())
    assert torch.equal(posterior.mean, mean) and 0.05 < float(posterior.std.detach().mean()) < 0.2


def test_crops_and_flips() -> None:
    ramp = torch.arange(20 * 30, dtype=torch.float32).view(1, 1, 20, 30).expand(64, 1, 20, 30)
    config = FirstStageTrainConfig(crop=8)
    out = augment(ramp, config, generator(0))
    assert out.shape == (64, 1, 8, 8) and torch.equal(out, augment(ramp, config, generator(0)))
    corner = out[:, 0, 0, 0]
    top, left = corner // 30, corner % 30
    assert (int(top.min()), int(left.min())) == (0, 0) and (int(top.max()), int(left.max())) == (12, 22)
    torch.testing.assert_close(out[:, 0] - corner.view(-1, 1, 1), ramp[:, 0, :8, :8])
    flipped = augment(ramp, FirstStageTrainConfig(flip=True), generator(0))
    mirrored = (flipped == ramp.flip(-1)).all(-1).all(-1).all(-1)
    assert 16 < int(mirrored.sum()) < 48 and torch.equal(flipped[~mirrored], ramp[~mirrored])
    assert augment(ramp, FirstStageTrainConfig(), generator(0)) is ramp
    some = augment(ramp, FirstStageTrainConfig(flat_share=0.25), generator(0))
    flat = some.flatten(1).std(1) == 0
    assert 6 < int(flat.sum()) < 28 and torch.equal(some[~flat], ramp[~flat])
    assert (
        float(some[flat].min()) >= -1 and float(some[flat].max()) <= 1 and some[flat][:, 0, 0, 0].unique().numel() > 6
    )
    with pytest.raises(DarkroomError, match=r"crop=24 is larger than the images \(30x20\)"):
        augment(ramp, FirstStageTrainConfig(crop=24), generator(0))


def test_auto_perceptual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_WEIGHTS", str(tmp_path))
    assert resolve_perceptual(FirstStageTrainConfig()) == "darkroom"
    with pytest.raises(DarkroomError, match="LPIPS weights not found"):
        make(FirstStageTrainConfig(perceptual="vgg"))
    for name in ("vgg16-397923af.pth", "vgg.pth"):
        (tmp_path / name).touch()
    assert resolve_perceptual(FirstStageTrainConfig()) == "vgg"
    assert resolve_perceptual(FirstStageTrainConfig(), channels=4) == "darkroom"
    assert resolve_perceptual(FirstStageTrainConfig(perceptual="none")) == "none"
    assert resolve_perceptual(FirstStageTrainConfig(perceptual_weight=0.0)) == "none"


# --- several processes ------------------------------------------------------------------------------------------


def train_distributed(rank: int, world: int, folder: str) -> None:
    """Three steps on this rank's part of a joint batch, in float64 so that only the order of sums can differ."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    step = make(replace(CONFIG, discriminator_norm="group"), seed=rank)  # DDP hands out the weights of rank 0
    modules = []
    for phase in step.phases:
        phase.module.double()
        modules.append(
            nn.parallel.DistributedDataParallel(phase.module, broadcast_buffers=False) if world > 1 else phase.module
        )
    optimizers = make_optimizers(step)
    each = 4 // world
    record: list[float] = []
    for train_step in range(3):
        batch = {"image": images(seed=train_step)[rank * each : (rank + 1) * each].double()}
        for phase, module, optimizer in zip(step.phases, modules, optimizers, strict=True):
            if train_step < phase.starts_at:
                continue
            g = generator(train_step)
            torch.randn(rank * each, 4, 8, 8, generator=g)  # the joint draw, from this rank's images on
            optimizer.zero_grad()
            loss, metrics = module(batch, g, train_step)
            loss.backward()
            optimizer.step()
            if "adaptive_weight" in metrics:
                record.append(float(metrics["adaptive_weight"]))
    state = {f"{n}.{k}": v for n, m in step.modules.items() for k, v in m.state_dict().items()}
    torch.save((state, record), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joint_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_distributed, args=(2, str(tmp_path)), nprocs=2)
    threads = torch.get_num_threads()
    try:
        train_distributed(0, 1, str(tmp_path))
    finally:
        torch.set_num_threads(threads)
    alone, weights = torch.load(tmp_path / "1-0.pt")
    start = {k: v.double() for n, m in make().modules.items() for k, v in m.state_dict(prefix=f"{n}.").items()}
    assert len(weights) == 2
    for rank in range(2):
        state, record = torch.load(tmp_path / f"2-{rank}.pt")
        assert record == pytest.approx(weights, rel=1e-9)
        for key, value in alone.items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-9, msg=f"rank {rank}: {key}")
    assert all(float((alone[k] - start[k]).abs().max()) > 1e-4 for k in start if k.endswith("conv_out.weight"))


def revive_distributed(rank: int, world: int, folder: str) -> None:
    """Three steps of a VQ autoencoder with dead codes revived at steps 0 and 2; each process has its own images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/vq", rank=rank, world_size=world)
    torch.manual_seed(rank)
    config = replace(CONFIG, revive_codes_every=2, discriminator_weight=0.0)
    step = FirstStageStep(Autoencoder(replace(TINY, codebook_size=32)), config)
    module = nn.parallel.DistributedDataParallel(step.phases[0].module, broadcast_buffers=False)
    (optimizer,) = make_optimizers(step)
    codebook, counted = step.autoencoder.codebook, []
    assert codebook is not None and step.code_use is not None
    for train_step in range(3):
        optimizer.zero_grad()
        loss, _ = module({"image": images(seed=10 * train_step + rank)}, generator(train_step + 100 * rank), train_step)
        loss.backward()
        optimizer.step()
        counted.append(int(step.code_use.counts.sum()))
    torch.save((codebook.embedding.weight.detach(), counted), f"{folder}/vq-{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_on_the_codes_that_they_revive(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(revive_distributed, args=(2, str(tmp_path)), nprocs=2)
    (one, counted), (two, others) = (torch.load(tmp_path / f"vq-{rank}.pt") for rank in range(2))
    assert one.equal(two) and float(one.std()) > 0.02  # on the data; the official start is within 1/32 of zero
    # Counted together: a run that is resumed gives all processes what the first one saved.
    assert counted == others == [2 * 4 * 64, 2 * 8 * 64, 2 * 4 * 64]


def test_the_discriminator_has_its_own_rate_unless_told() -> None:
    phase = make().phases[1]
    assert phase.optimizer is not None and phase.optimizer.betas == (0.5, 0.9)
    assert (phase.optimizer.learning_rate, phase.optimizer.decay) == (CONFIG.discriminator_learning_rate, "constant")
    assert make(replace(CONFIG, discriminator_learning_rate=None)).phases[1].optimizer is None


def test_texture_is_added_to_the_error_of_every_element() -> None:
    config = replace(CONFIG, discriminator_weight=0.0, learn_log_variance=False, perceptual="none")
    image, noise = images(), torch.zeros(4, 4, 8, 8)
    plain, texture = first(make(config)), first(make(replace(config, texture_weight=2.0)))
    with torch.no_grad():
        reconstruction = plain.autoencoder.decode(plain.autoencoder.encode(image).sample_with(noise))
    expected = 2.0 * TextureDistance()(image, reconstruction).mean()
    (one, _), (other, metrics) = plain.loss(image, noise, 0), texture.loss(image, noise, 0)
    torch.testing.assert_close(other - one, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["texture"], expected / 2)


def test_a_discriminator_that_warms_up_learns_before_the_autoencoder_hears_of_it() -> None:
    step = make(replace(CONFIG, discriminator_start=3, discriminator_warmup=2))
    assert step.phases[1].starts_at == 1
    for n, (learns, heard) in {0: (False, False), 1: (True, False), 2: (True, False), 3: (True, True)}.items():
        _, metrics = first(step).loss(images(), torch.zeros(4, 4, 8, 8), n)
        assert ("adversarial" in metrics) == heard
        if learns:
            loss, _ = step.phases[1].module({}, generator(0), n)
            assert loss.requires_grad and float(loss.detach()) > 0
        else:
            with pytest.raises(RuntimeError, match="no reconstruction"):
                step.phases[1].module({}, generator(0), n)


def test_the_relativistic_loss_compares_with_the_image() -> None:
    """Nothing for the autoencoder to gain once it is at the image; otherwise the pull of softplus(D(x) - D(y))."""
    step = make(replace(CONFIG, discriminator_loss="relativistic"))
    assert step.discriminator is not None
    image, noise = images(), torch.zeros(4, 4, 8, 8)
    _, metrics = first(step).loss(image, noise, 5)
    with torch.no_grad():
        output = step.autoencoder.decode(step.autoencoder.encode(image).sample_with(noise))
        expected = F.softplus(step.discriminator(image) - step.discriminator(output)).mean()
    torch.testing.assert_close(metrics["adversarial"], expected)


def test_the_ceiling_of_the_adaptive_weight() -> None:
    free, bounded = make(), make(replace(CONFIG, adaptive_weight_max=1e-3))
    image, noise = images(), torch.zeros(4, 4, 8, 8)
    assert float(first(free).loss(image, noise, 5)[1]["adaptive_weight"]) > 0.5 * 1e-3
    weight = first(bounded).loss(image, noise, 5)[1]["adaptive_weight"]
    assert float(weight) == pytest.approx(CONFIG.discriminator_weight * 1e-3)


def test_a_smooth_discriminator_pays_for_its_slope_at_images_and_reconstructions() -> None:
    weight = 100.0  # so that a step on the whole loss is one on the slope
    free, smooth = make(), make(replace(CONFIG, discriminator_smoothness=weight))
    losses = []
    for step in (free, smooth):
        first(step).loss(images(), torch.zeros(4, 4, 8, 8), 5)
        losses.append(step.phases[1].module({}, generator(0), 5))
    (plain, without), (total, metrics) = losses
    assert "squared_slope" not in without and float(metrics["squared_slope"]) > 0
    torch.testing.assert_close(total - plain, weight * metrics["squared_slope"])
    parameters = [p for p in smooth.phases[1].parameters if p.requires_grad]
    rate, before = 1e-4, float(metrics["squared_slope"])
    total.backward()
    with torch.no_grad():
        for p in parameters:
            p -= rate * p.grad
    first(smooth).loss(images(), torch.zeros(4, 4, 8, 8), 5)
    _, after = smooth.phases[1].module({}, generator(0), 5)
    assert 0 < float(after["squared_slope"]) < before


def test_grain_on_the_image_is_not_trained_and_teaches_nothing() -> None:
    """It is measured afterwards: the loss and its gradients are those of the mean image."""
    config = replace(CONFIG, discriminator_weight=0.0, learn_log_variance=False, perceptual="none", texture_weight=3.0)
    image, noise, shape = images(), torch.zeros(4, 4, 8, 8), make(CONFIG).autoencoder.config
    losses, plain = [], Autoencoder(shape)
    for grain in (False, True):
        autoencoder = Autoencoder(replace(shape, output_grain=grain))
        autoencoder.load_state_dict(autoencoder.state_dict() | plain.state_dict())
        step = FirstStageStep(autoencoder, config)
        if step.autoencoder.decoder.grain is not None:
            torch.nn.init.ones_(step.autoencoder.decoder.grain.variance.bias)  # type: ignore[arg-type]
        loss, _ = first(step).loss(image, noise, 0)
        loss.backward()
        losses.append(loss.detach())
        gradients = {name: p.grad for name, p in step.autoencoder.named_parameters()}
        assert {name for name, g in gradients.items() if g is None} == (
            {"decoder.grain.variance.weight", "decoder.grain.variance.bias"} if grain else set()
        )
    torch.testing.assert_close(*losses)
