"""The first stage's train step: an autoencoder phase, and once it has begun a discriminator phase.

Autoencoder: minimises  nll(reconstruction, perceptual) + regulariser + w * adversarial, where the regulariser is
kl_weight * KL or codebook_weight * codebook loss, and w balances the gradients of nll and adversarial term at the
decoder's last layer (Rombach et al. 2022, App. G; Esser et al. 2021, eq. 6-7). As in the official code the terms of a
KL autoencoder are sums over an image, those of a VQ autoencoder means over elements.
Discriminator: tells the images from the reconstructions of the same step.
Shapes: B batch, C channels, H W size of image or crop.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.features.laplacian import NormalisedLaplacianDistance
from darkroom.features.lpips import load_lpips, lpips_available
from darkroom.features.perceptual import load_perceptual
from darkroom.features.psnr import psnr
from darkroom.features.texture import TextureDistance
from darkroom.first_stage.autoencoder import Autoencoder
from darkroom.first_stage.discriminator import Discriminator, DiscriminatorNorm
from darkroom.first_stage.losses import (
    ADAPTIVE_WEIGHT_MAX,
    DiscriminatorLossKind,
    ReconstructionKind,
    adaptive_weight,
    adversarial_loss,
    delayed,
    discriminator_loss,
    reconstruction_error,
    reconstruction_nll,
    squared_slope,
)
from darkroom.first_stage.quantizer import (
    code_counts,
    codebook_loss,
    perplexity,
    precise,
    revive_codes,
    straight_through,
)
from darkroom.training.loop import Phase, all_parameters
from darkroom.training.optim import OptimizerConfig

Batch = dict[str, Any]
SLOPE_STEP = 0.05  # deviation of the noise over which a discriminator's slope is measured, of images in [-1, 1]
DISCRIMINATOR_BETAS = (0.5, 0.9)  # official; it follows an adversary that changes, so it forgets soon
Perceptual = Literal["auto", "darkroom", "laplacian", "vgg", "none"]


@dataclass(frozen=True)
class FirstStageTrainConfig:
    """What the first stage is trained for. The KL weight is the official one: all terms are sums over an image."""

    reconstruction: ReconstructionKind = "l1"
    chroma_weight: float = 1.0  # of an error's part that differs between the channels: most of a photo's variance is
    # brightness, and a short run with 1 (the paper's) may end before it has learned all colours
    learn_log_variance: bool = False  # of the reconstruction's likelihood; it starts at `log_variance`
    log_variance: float = 0.0
    perceptual: Perceptual = "auto"  # "auto": LPIPS ("vgg") where its files are present, else our own network
    perceptual_weight: float = 1.0
    texture_weight: float = 0.0  # of the distance between local textures: against the blur that squared errors reward
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0  # VQ: of the codebook loss
    codebook_beta: float = 0.25  # VQ: of the term that moves the codes, beside the commitment of the encoder
    quantize_start: int = 0  # VQ: train step from which the decoder is given codes. Before, it is given the latent, and
    # all codes then begin on latents: where f is large, codes of an encoder that knows nothing teach it nothing
    revive_codes_every: int | None = None  # VQ: after this many train steps codes that were not used once are moved
    # onto latents of the batch, and at step 0 all of them, so that the codebook begins on the data. None: never
    initial_posterior_std: float = 0.1  # of a fresh autoencoder; with the natural 1 the noise hides the latent at first
    discriminator_start: int = 50_001  # train step from which the adversarial term counts
    discriminator_warmup: int = 0  # train steps before `discriminator_start` in which only the discriminator learns
    discriminator_weight: float = 0.5  # 0: no discriminator at all
    adaptive_weight_max: float = ADAPTIVE_WEIGHT_MAX  # a discriminator that is lost has next to no gradient: a lower
    # ceiling than the official one keeps the autoencoder from following its noise until it has found back
    discriminator_factor: float = 1.0
    discriminator_loss: DiscriminatorLossKind = "hinge"
    discriminator_channels: int = 32  # official: 64
    discriminator_layers: int = 3
    discriminator_norm: DiscriminatorNorm = "group"  # official: "batch"
    discriminator_smoothness: float = 0.0  # of the penalty on its slope, at images and at reconstructions: one that
    # follows every pixel tells all reconstructions from images at once, and what it then says is of no use to them
    # Its own rate, constant after a warm-up: a rate at which a fresh autoencoder learns fast silences a discriminator
    # for good, since its weights begin near 0. None: the autoencoder's rate and curve, as in the official code.
    discriminator_learning_rate: float | None = 2e-4
    crop: int | None = None  # train on random squares of this side; None: whole images
    crop_steps: int | None = None  # crop only before this train step; then whole images, so that norms meet what they
    # will meet in use. None: crop to the end
    train_encoder: bool = True  # False: only the decoder learns, so that latents and denoisers made with it stay valid
    decoder_noise: float = (
        0.0  # more noise on z (its standard deviation): the decoder then forgives a denoiser's errors
    )
    flip: bool = False  # mirror each image left to right with probability 1/2
    flat_share: float = 0.0  # of images replaced by one flat random colour: norms over positions see nothing like it in
    # photos, and an autoencoder that never met it may shift the colour of a clear sky
    scale: Literal["element", "image"] = "element"  # "element" divides the official KL loss ("image") by C*H*W, so that
    # gradient clipping and reported losses mean the same at every size; AdamW's steps do not change. VQ: always means


def discriminator_begins(config: FirstStageTrainConfig) -> int:
    """The train step from which the discriminator learns. The autoencoder hears of it at `discriminator_start`."""
    return max(0, config.discriminator_start - config.discriminator_warmup)


def quieten_posterior(autoencoder: Autoencoder, std: float) -> None:
    """Let a fresh encoder's posterior begin at about this standard deviation, by the bias of its log-variance."""
    if autoencoder.codebook is not None:
        return  # no variance
    last = autoencoder.encoder.conv_out if autoencoder.quant_conv is None else autoencoder.quant_conv
    with torch.no_grad():
        assert last.bias is not None
        last.bias[autoencoder.latent_channels :] = 2.0 * math.log(std)


class FirstStageStep:
    """Both phases and what they share. `modules` is what a checkpoint saves, `ema_modules` what is averaged."""

    def __init__(self, autoencoder: Autoencoder, config: FirstStageTrainConfig) -> None:
        self.autoencoder, self.config = autoencoder, config
        # The codebook stays with the encoder: stored indices then keep their meaning too.
        for part in (autoencoder.encoder, autoencoder.quant_conv, autoencoder.codebook):
            if part is not None:
                part.requires_grad_(config.train_encoder)
        if autoencoder.decoder.grain is not None:
            autoencoder.decoder.grain.requires_grad_(False)  # it is measured when the training has ended
        self.perceptual = resolve_perceptual(config, autoencoder.config.out_channels)
        self.likelihood = Likelihood(config)
        self.pairs = Pairs()
        self.discriminator: Discriminator | None = None
        self.modules: dict[str, nn.Module] = {"autoencoder": autoencoder}
        self.ema_modules: dict[str, nn.Module] = {"autoencoder": autoencoder}
        self.code_use: CodeUse | None = None
        if autoencoder.codebook is not None:
            self.code_use = self.modules["code_use"] = CodeUse(autoencoder.codebook.size)
        if config.learn_log_variance:
            self.modules["likelihood"] = self.likelihood
        if config.discriminator_weight > 0 and config.discriminator_factor > 0:
            self.discriminator = Discriminator(
                autoencoder.config.out_channels,
                config.discriminator_channels,
                config.discriminator_layers,
                config.discriminator_norm,
            )
            self.modules["discriminator"] = self.discriminator
        distance = make_perceptual(self.perceptual)
        texture = TextureDistance() if config.texture_weight > 0 else None
        frozen = Frozen(self.discriminator, distance, texture, self.code_use)
        first = AutoencoderPhase(autoencoder, self.likelihood, frozen, config, self.pairs)
        self.phases = [Phase("autoencoder", first, all_parameters([first]))]
        if self.discriminator is not None:
            second = DiscriminatorPhase(self.discriminator, config, self.pairs)
            parameters = all_parameters([self.discriminator])
            rate = config.discriminator_learning_rate
            optimizer = None if rate is None else OptimizerConfig(rate, betas=DISCRIMINATOR_BETAS, warmup_steps=20)
            self.phases.append(Phase("discriminator", second, parameters, discriminator_begins(config), optimizer))
        for module in self.modules.values():  # convolutions are faster in this layout; the values are the same
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def validation_loss(self, batches: list[Batch], seed: int = 0) -> dict[str, float]:
        """On whole images from the posterior's mode: mean PSNR in dB, absolute error, KL in nats per image; for VQ the
        perplexity of the codes and the share of them that occurs."""
        device = next(self.autoencoder.parameters()).device
        codebook = self.autoencoder.codebook
        used = None if codebook is None else torch.zeros(codebook.size, dtype=torch.int64, device=device)
        count, decibels, absolute, kl = 0, 0.0, 0.0, 0.0
        for batch in batches:
            image = batch["image"].to(device)
            posterior = self.autoencoder.encode(image)
            reconstruction = self.autoencoder.decode(posterior.mode()).float().clamp(-1.0, 1.0)
            decibels += float(psnr(reconstruction, image).sum())
            absolute += float((reconstruction - image).abs().flatten(1).mean(1).sum())
            kl += float(posterior.kl().sum())
            if codebook is not None and used is not None:
                used += code_counts(codebook.nearest(posterior.mean), codebook.size)
            count += image.shape[0]
        if count == 0:
            return {}
        scores = {"psnr": decibels / count, "validation_loss": absolute / count}
        if used is None:
            return scores | {"validation_kl": kl / count}
        share = float((used > 0).double().mean())
        return scores | {"validation_perplexity": float(perplexity(used)), "validation_codes_used": share}


class Likelihood(nn.Module):
    """The log-variance of the reconstruction: a parameter when it is learned, a buffer when it is fixed."""

    log_variance: Tensor

    def __init__(self, config: FirstStageTrainConfig) -> None:
        super().__init__()
        value = torch.tensor(float(config.log_variance))
        if config.learn_log_variance:
            self.log_variance = nn.Parameter(value)
        else:
            self.register_buffer("log_variance", value)


class CodeUse(nn.Module):
    """How often each code was chosen since dead codes were last looked for, by all processes together: each of them
    resumes from the checkpoint of the first one."""

    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))


@dataclass(frozen=True)
class Frozen:
    """What the autoencoder phase uses and does not train. No modules of the phase, so that they are neither averaged,
    nor synchronised, nor saved with it."""

    discriminator: Discriminator | None
    perceptual: nn.Module | None
    texture: nn.Module | None
    code_use: CodeUse | None


class Pairs:
    """(image, detached reconstruction) of each micro-batch, handed from the first phase to the second in order."""

    def __init__(self) -> None:
        self._train_step = -1
        self._queue: deque[tuple[Tensor, Tensor]] = deque()

    def push(self, train_step: int, image: Tensor, reconstruction: Tensor) -> None:
        if train_step != self._train_step:  # what a skipped step left behind is not of this step
            self._queue.clear()
            self._train_step = train_step
        self._queue.append((image, reconstruction.detach()))

    def pop(self, train_step: int) -> tuple[Tensor, Tensor]:
        if train_step != self._train_step or not self._queue:
            raise RuntimeError(f"the discriminator phase of step {train_step} has no reconstruction of that step")
        return self._queue.popleft()


class AutoencoderPhase(nn.Module):
    """One forward for DDP. Submodules are what this phase trains."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        likelihood: Likelihood,
        frozen: Frozen,
        config: FirstStageTrainConfig,
        pairs: Pairs,
    ) -> None:
        super().__init__()
        self.autoencoder, self.likelihood, self.config, self.pairs = autoencoder, likelihood, config, pairs
        self._frozen = frozen
        self._revived_at = -1

    def forward(self, batch: Batch, generator: torch.Generator, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.autoencoder.parameters()).device
        config = self.config
        if config.crop_steps is not None and train_step >= config.crop_steps:
            config = replace(config, crop=None)
        image = augment(batch["image"].to(device), config, generator)
        f, channels = self.autoencoder.downsampling, self.autoencoder.latent_channels
        shape = (image.shape[0], channels, image.shape[2] // f, image.shape[3] // f)
        noise = torch.randn(shape, generator=generator).to(image)
        every, start = config.revive_codes_every, config.quantize_start
        begins = train_step == start > 0
        again = every is not None and train_step >= start and train_step % every == 0
        if (begins or again) and self._frozen.code_use is not None and config.train_encoder:
            self._revive(image, train_step, generator)
        return self.loss(image, noise, train_step)

    def loss(self, image: Tensor, noise: Tensor, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective for one draw of the posterior's noise, (B, E, h, w). Its gradient at the reconstruction is
        computed here and attached, so that the perceptual network and the discriminator run backward only once: the
        adaptive weight needs their gradients apart from each other before the autoencoder's backward pass begins."""
        config, codebook = self.config, self.autoencoder.codebook
        discriminator, perceptual = self._frozen.discriminator, self._frozen.perceptual
        posterior = self.autoencoder.encode(image.contiguous(memory_format=torch.channels_last))
        z = posterior.sample_with(noise)
        if config.decoder_noise > 0:  # one draw of the joint variance: std^2 + decoder_noise^2
            z = posterior.mean + torch.sqrt(posterior.variance + config.decoder_noise**2) * noise
        if codebook is not None:
            indices = codebook.nearest(z)
            quantised = codebook.lookup(indices)
            z = z if train_step < config.quantize_start else straight_through(z, quantised)
        output = self.autoencoder.decode_mean(z)  # grain is no part of what is trained
        factor = delayed(config.discriminator_factor, train_step, config.discriminator_start)
        leaf = precise(output.detach()).requires_grad_()
        adversarial = distance = None
        if discriminator is not None and factor > 0:
            real = None
            if config.discriminator_loss == "relativistic":
                with torch.no_grad():
                    real = precise(discriminator(image))
            adversarial = adversarial_loss(precise(discriminator(leaf)), real)
        if perceptual is not None:
            distance = perceptual.to(image.device)(image, leaf)
        texture = None
        if self._frozen.texture is not None:
            texture = self._frozen.texture(precise(image), leaf)
        with torch.autocast(image.device.type, enabled=False):
            error = reconstruction_error(precise(image), leaf, config.reconstruction, config.chroma_weight)
            metrics = {"reconstruction": error.detach().mean()}
            if distance is not None:
                metrics["perceptual"] = distance.detach().mean()
                error = error + config.perceptual_weight * precise(distance).view(-1, 1, 1, 1)
            if texture is not None:
                metrics["texture"] = texture.detach().mean()
                error = error + config.texture_weight * texture.view(-1, 1, 1, 1)
            log_variance = self.likelihood.log_variance
            # VQ: means over elements instead of sums, before the adaptive weight is taken.
            unit = 1.0 if codebook is None else 1.0 / image[0].numel()
            nll = reconstruction_nll(error, log_variance.detach()) * unit
            (gradient,) = torch.autograd.grad(nll, leaf)
            total = nll.detach()
            if adversarial is not None:
                (adversarial_gradient,) = torch.autograd.grad(adversarial, leaf)
                weight = config.discriminator_weight * self._adaptive_weight(output, gradient, adversarial_gradient)
                gradient = gradient + (weight * factor) * adversarial_gradient
                total = total + weight * factor * adversarial.detach()
                metrics |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
            if discriminator is not None and train_step >= discriminator_begins(config):
                self.pairs.push(train_step, image, leaf)
            loss = _WithGradient.apply(output, gradient, total)
            metrics["nll"] = nll.detach()
            if codebook is None:
                kl = posterior.kl().mean()
                loss = loss + config.kl_weight * kl
                metrics["kl"] = kl.detach()
            else:
                movement = codebook_loss(posterior.mean, precise(quantised), config.codebook_beta)
                quantises = train_step >= config.quantize_start
                loss = loss + (config.codebook_weight if quantises else 0.0) * movement  # 0: DDP wants all parameters
                counts = code_counts(indices, codebook.size)
                metrics |= {"codebook": movement.detach(), "perplexity": perplexity(counts)}
                metrics["codes_used"] = (counts > 0).float().mean()
                if self._frozen.code_use is not None:
                    self._frozen.code_use.counts += _over_processes(counts).to(self._frozen.code_use.counts.device)
            if config.learn_log_variance:
                learned = reconstruction_nll(error.detach(), log_variance) * unit
                loss = loss + (learned - learned.detach())
                metrics["log_variance"] = log_variance.detach()
            return loss * (_scale(config, image) if codebook is None else 1.0), metrics

    @torch.no_grad()
    def _revive(self, image: Tensor, train_step: int, generator: torch.Generator) -> None:
        """Dead codes begin again on latents of this batch. Several processes take the first one's choice."""
        codebook, use = self.autoencoder.codebook, self._frozen.code_use
        assert codebook is not None and use is not None
        if train_step == self._revived_at:  # a later micro-batch of the step
            return
        self._revived_at = train_step
        counts = torch.zeros_like(use.counts) if train_step == self.config.quantize_start else use.counts
        z = self.autoencoder.encode(image.contiguous(memory_format=torch.channels_last)).mean
        revive_codes(codebook, counts, z, generator)
        if _several_processes():
            torch.distributed.broadcast(codebook.embedding.weight, 0)
        use.counts.zero_()

    def _adaptive_weight(self, output: Tensor, gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
        """From the gradients at decoder.conv_out.weight; averaged over processes first, so that all of them use the
        weight that one process would compute on the joint batch."""
        last = self.autoencoder.decoder.conv_out.weight
        both = [
            torch.autograd.grad(output, last, g.to(output.dtype), retain_graph=True)[0]
            for g in (gradient, adversarial_gradient)
        ]
        gradients = precise(torch.stack(both))
        gradients = _over_processes(gradients)
        if _several_processes():
            gradients /= torch.distributed.get_world_size()
        return adaptive_weight(gradients[0], gradients[1], self.config.adaptive_weight_max)


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _over_processes(values: Tensor) -> Tensor:
    """The sum of what every process gives, on all of them."""
    if _several_processes():
        torch.distributed.all_reduce(values)
    return values


class DiscriminatorPhase(nn.Module):
    """One forward for DDP: the discriminator on the images and reconstructions of the autoencoder phase."""

    def __init__(self, discriminator: Discriminator, config: FirstStageTrainConfig, pairs: Pairs) -> None:
        super().__init__()
        self.discriminator, self.config, self.pairs = discriminator, config, pairs

    def forward(self, batch: Batch, generator: torch.Generator, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, reconstruction = self.pairs.pop(train_step)
        real, fake = self._logits(image.to(reconstruction), reconstruction)
        config = self.config
        with torch.autocast(image.device.type, enabled=False):
            factor = delayed(config.discriminator_factor, train_step, discriminator_begins(config))
            loss = factor * discriminator_loss(real, fake, config.discriminator_loss)
        metrics = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        if config.discriminator_smoothness > 0:
            near = [x + SLOPE_STEP * torch.randn(x.shape, generator=generator).to(x) for x in (image, reconstruction)]
            slope = squared_slope(torch.cat([real, fake]), torch.cat(self._logits(*near)), SLOPE_STEP)
            loss = loss + factor * config.discriminator_smoothness * slope
            metrics["squared_slope"] = slope.detach()
        return loss, metrics

    def _logits(self, image: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        if self.discriminator.independent:  # one call, same logits
            both = torch.cat([image.to(reconstruction), reconstruction])
            real, fake = self.discriminator(both.contiguous(memory_format=torch.channels_last)).chunk(2)
        else:  # batch norm: images and reconstructions are normalised apart, as in the official code
            real, fake = self.discriminator(image), self.discriminator(reconstruction)
        return precise(real), precise(fake)


class _WithGradient(torch.autograd.Function):
    """`value`, whose gradient with respect to x is `gradient` (computed before)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0]).to(ctx.dtype), None, None


def augment(image: Tensor, config: FirstStageTrainConfig, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) -> (B, C, crop, crop): each image cropped, mirrored or made flat, by draws of `generator`."""
    batch, _, height, width = image.shape
    if config.crop is not None and (height, width) != (config.crop, config.crop):
        if min(height, width) < config.crop:
            raise DarkroomError(
                f"crop={config.crop} is larger than the images ({width}x{height}): lower crop or raise the size"
            )
        top = torch.randint(height - config.crop + 1, (batch,), generator=generator).tolist()
        left = torch.randint(width - config.crop + 1, (batch,), generator=generator).tolist()
        side = config.crop
        image = torch.stack([x[:, t : t + side, u : u + side] for x, t, u in zip(image, top, left, strict=True)])
    if config.flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        image = torch.where(mirrored.to(image.device).view(-1, 1, 1, 1), image.flip(-1), image)
    if config.flat_share > 0:
        flat = torch.rand(batch, generator=generator) < config.flat_share
        colour = torch.rand(batch, image.shape[1], 1, 1, generator=generator) * 2 - 1
        image = torch.where(flat.to(image.device).view(-1, 1, 1, 1), colour.to(image), image)
    return image


def resolve_perceptual(
    config: FirstStageTrainConfig, channels: int = 3
) -> Literal["darkroom", "laplacian", "vgg", "none"]:
    """What "auto" means on this machine and for images of this many channels; record the answer with the run."""
    if config.perceptual == "none" or config.perceptual_weight == 0:
        return "none"
    if config.perceptual == "auto":
        return "vgg" if channels in (1, 3) and lpips_available() else "darkroom"
    return config.perceptual


def make_perceptual(name: Literal["darkroom", "laplacian", "vgg", "none"]) -> nn.Module | None:
    if name == "vgg":
        return load_lpips()
    if name == "darkroom":
        return load_perceptual()
    return NormalisedLaplacianDistance() if name == "laplacian" else None


def _scale(config: FirstStageTrainConfig, image: Tensor) -> float:
    return 1.0 / image[0].numel() if config.scale == "element" else 1.0
