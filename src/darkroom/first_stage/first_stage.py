"""FirstStage: an autoencoder and the one place where latents are shifted and scaled.

    latent = (z - shift) * scale        so that latents of the training images have mean 0 and standard deviation 1

(Rombach et al. 2022, App. G, rescale by the standard deviation; measured over a data set instead of its first batch.)
Shapes: B batch, C image channels, E latent channels, H W image size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import Autoencoder
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.posterior import Posterior


class FirstStage(nn.Module):
    """`encode(image) -> Posterior` and `decode(latent) -> image`, latents normalised. `shift`, `scale`: () or (E,)."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder | IdentityAutoencoder,
        shift: Tensor | float | None = None,
        scale: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self._set(0.0 if shift is None else shift, 1.0 if scale is None else scale)

    @property
    def trainable(self) -> Autoencoder:
        """The autoencoder, where there is something to train; the identity raises DarkroomError."""
        if isinstance(self.autoencoder, IdentityAutoencoder):
            raise DarkroomError("the first stage is the identity and has nothing to train: give another one, or none")
        return self.autoencoder

    @property
    def downsampling(self) -> int:
        return self.autoencoder.downsampling

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.latent_channels

    @property
    def image_channels(self) -> int:
        return self.autoencoder.image_channels

    def encode(self, image: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> the posterior of the normalised latent (B, E, h, w)."""
        return self.normalise_posterior(self.autoencoder.encode(image))

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent (B, E, h, w) -> image (B, C, H, W), about [-1, 1]."""
        return self.autoencoder.decode(self.denormalise(latent))

    def normalise(self, z: Tensor) -> Tensor:
        """(z - shift) * scale, (B, E, h, w)."""
        shift, scale = self._spread(z)
        return (z - shift) * scale

    def normalise_posterior(self, posterior: Posterior) -> Posterior:
        """The distribution of (z - shift) * scale, z from the autoencoder's own posterior."""
        _, scale = self._spread(posterior.mean)
        logvar = None if posterior.logvar is None else posterior.logvar + 2.0 * torch.log(scale.abs())
        return Posterior(self.normalise(posterior.mean), logvar)

    def denormalise(self, latent: Tensor) -> Tensor:
        """z = latent / scale + shift, (B, E, h, w)."""
        shift, scale = self._spread(latent)
        return latent / scale + shift

    @torch.no_grad()
    def measure(
        self, batches: Iterable[Tensor | Mapping[str, Any]], generator: torch.Generator, per_channel: bool = False
    ) -> None:
        """Sets shift and scale so that posterior samples of these images have mean 0 and standard deviation 1.

        `batches`: images (B, C, H, W), or batch dicts with `image`. The sums are streamed in float64 around the mean
        so far (Chan et al. 1983), hence neither the order of magnitude nor the number of images costs precision.
        """
        was_training = self.training
        self.eval()
        device = next(self.autoencoder.parameters(), self.shift).device
        count, mean = 0, torch.zeros(self.latent_channels, dtype=torch.float64)
        squares = torch.zeros(self.latent_channels, dtype=torch.float64)
        try:
            for batch in batches:
                image = batch["image"] if isinstance(batch, Mapping) else batch
                z = self.autoencoder.encode(image.to(device)).sample(generator).double().cpu()
                z = z.transpose(0, 1).flatten(1)  # (E, B*h*w)
                n = z.shape[1]
                batch_mean = z.mean(1)
                delta = batch_mean - mean
                squares += (z - batch_mean[:, None]).square().sum(1) + delta.square() * (count * n / (count + n))
                mean += delta * (n / (count + n))
                count += n
        finally:
            self.train(was_training)
        if count == 0:
            raise DarkroomError("cannot measure the latents of no images: give at least one batch")
        if not per_channel:  # channels hold equally many elements each
            total = mean.mean()
            squares = (squares + count * (mean - total).square()).mean()
            mean = total
        std = (squares / count).sqrt()
        if not bool(torch.isfinite(std).all()) or bool((std <= 0).any()):
            raise DarkroomError(
                f"the latents of these images have standard deviation {std.tolist()}: "
                "the autoencoder is not trained or has diverged"
            )
        self._set(mean, 1.0 / std)

    def _set(self, shift: Tensor | float, scale: Tensor | float) -> None:
        device = next(self.autoencoder.parameters(), self.shift).device
        values = {}
        for name, value in (("shift", shift), ("scale", scale)):
            tensor = torch.as_tensor(value, dtype=torch.float32)
            if tensor.shape not in ((), (self.latent_channels,)):
                raise DarkroomError(
                    f"{name} has shape {tuple(tensor.shape)}: "
                    f"must be a number or one number per latent channel ({self.latent_channels})"
                )
            values[name] = tensor.to(device)
        self.shift, self.scale = values["shift"], values["scale"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # One number or one per channel: the checkpoint decides.
        for name in ("shift", "scale"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape in ((), (self.latent_channels,)):
                own = getattr(self, name)
                if own.shape != saved.shape:
                    setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """shift and scale in the device and dtype of x, shaped to broadcast over its channels."""
        shift, scale = (t.to(device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for t in (self.shift, self.scale))
        return shift, scale
