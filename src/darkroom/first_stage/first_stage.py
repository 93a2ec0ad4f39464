"""FirstStage: an autoencoder and the one place where latents are shifted and scaled.

    latent = (z - shift) * scale        so that latents of the training images have mean 0 and standard deviation 1

(Rombach et al. 2022, App. G, rescale by the standard deviation; measured over a data set instead of its first batch.)
Shapes: B batch, C image channels, E latent channels, H W image size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage import tiling
from darkroom.first_stage.autoencoder import Autoencoder
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.posterior import Posterior
from darkroom.first_stage.preview import PreviewDecoder
from darkroom.first_stage.statistics import LatentStatistics, RunningMoments
from darkroom.pixel_format import PixelFormat


class FirstStage(nn.Module):
    """`encode(image) -> Posterior` and `decode(latent) -> image`, latents normalised. `shift`, `scale`: () or (E,).

    `pixels`: what the numbers in files mean to it; 8 bits unless its config says otherwise.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder | IdentityAutoencoder,
        shift: Tensor | float | None = None,
        scale: Tensor | float | None = None,
        pixels: PixelFormat | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._preview: tuple[PreviewDecoder | None] = (None,)
        self.pixels = pixels or PixelFormat()
        # What the official file that it came from held besides, for its export: `Kept` of interop/kept_tensors.py.
        self.kept: Any = None
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

    def encode(self, image: Tensor, tile: tiling.Tile = None) -> Posterior:
        """(B, C, H, W) in [-1, 1] of any size -> the posterior of the normalised latent (B, E, h, w), h = ceil(H/f).

        tile: the whole image at once (None), or strips of about that many pixels square that give the same result in
        bounded memory and without gradients, or "auto", or a `Tiling` (tiling.py).
        """
        _check_floating(image, "encode: the image")
        return self.normalise_posterior(tiling.encode(self.autoencoder, self.pad(image), tile))

    def decode(self, latent: Tensor, tile: tiling.Tile = None, size: tuple[int, int] | None = None) -> Tensor:
        """Normalised latent (B, E, h, w) -> image (B, C, H, W), about [-1, 1]; `tile` as for `encode`.

        size: (width, height) of the image that was encoded, if they are no multiples of f: what was padded is cut off.
        """
        _check_floating(latent, "decode: the latent")
        f, (h, w) = self.downsampling, latent.shape[-2:]
        width, height = (w * f, h * f) if size is None else size
        if (-(-width // f), -(-height // f)) != (w, h):
            raise DarkroomError(
                f"a latent of {w}x{h} is no image of {width}x{height}: sides must be above {(w - 1) * f}x{(h - 1) * f} "
                f"and at most {w * f}x{h * f}"
            )
        return tiling.decode(self.autoencoder, self.denormalise(latent), tile)[..., :height, :width]

    def pad(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> sides that are multiples of f: the last column and row are repeated, right and below."""
        height, width = image.shape[-2:]
        right, bottom = -width % self.downsampling, -height % self.downsampling
        if image.ndim != 4 or not height or not width or not (right or bottom):
            return image  # as it is; the autoencoder names what it cannot take
        return F.pad(image, (0, right, 0, bottom), mode="replicate")

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

    def from_moments(self, moments: Tensor) -> Posterior:
        """The unnormalised posterior of cached moments: (B, 2E, h, w) mean and log-variance, or (B, E, h, w) the latent
        of a deterministic (VQ) encoder."""
        return Posterior(moments) if moments.shape[1] == self.latent_channels else Posterior.from_moments(moments)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor | Mapping[str, Any]], kind: LatentStatistics = "global") -> None:
        """Sets shift and scale so that posterior samples of these images have mean 0 and standard deviation 1.

        `batches`: images (B, C, H, W), or batch dicts with `image` or with `moments` from a latent cache. With a cache
        nothing is encoded: it holds what was before shift and scale.
        """
        was_training = self.training
        self.eval()
        device = self.device
        moments = RunningMoments(self.latent_channels)
        try:
            for batch in batches:
                if isinstance(batch, Mapping) and "moments" in batch:
                    moments.add(self.from_moments(batch["moments"].float()))
                else:
                    image = batch["image"] if isinstance(batch, Mapping) else batch
                    moments.add(self.autoencoder.encode(image.to(device)))
        finally:
            self.train(was_training)
        self._set(*moments.shift_and_scale(kind))
        self.__dict__.pop("reference", None)  # it is no longer the bundled one that it may have been

    # --- preview --------------------------------------------------------------------------------------------------

    @property
    def preview(self) -> PreviewDecoder | None:
        """The small decoder that shows latents quickly; not among the weights, a model folder keeps it beside them."""
        return self._preview[0]

    @preview.setter
    def preview(self, decoder: PreviewDecoder | None) -> None:
        if decoder is not None:
            for name in ("latent_channels", "image_channels", "downsampling"):
                own, its = getattr(self, name), getattr(decoder.config, name)
                if own != its:
                    raise DarkroomError(
                        f"this preview decoder is for {name.replace('_', ' ')} {its}, the first stage has {own}"
                    )
            decoder.to(self.device).requires_grad_(False)
        self._preview = (decoder,)  # in a tuple it is no submodule: state_dict stays that of the first stage alone

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "preview":  # torch would take any module that is assigned for a submodule
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def preview_of(self, latent: Tensor) -> Tensor:
        """Normalised latent (B, E, h, w) -> a quick image (B, C, H, W) of it, about [-1, 1]."""
        if self.preview is None:
            raise DarkroomError(
                "this first stage has no preview decoder: make one with `darkroom train preview --first-stage MODEL`"
            )
        shift, scale = (t.to(latent).view(1, -1, 1, 1) for t in (self.preview.shift, self.preview.scale))
        return self.preview((self.denormalise(latent) - shift) * scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FirstStage:
        if self.preview is not None:  # it moves along
            self.preview._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return self.shift.device

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


def _check_floating(x: Tensor, what: str) -> None:
    """Integers and arrays would fail deep inside a convolution, or worse, be taken for values in [-1, 1]."""
    if not isinstance(x, Tensor):
        raise DarkroomError(f"{what} is a {type(x).__name__}: give a tensor (B, C, H, W) in floating point")
    if not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.")
        raise DarkroomError(f"{what} has type {kind}: convert it to floating point (images: in [-1, 1])")
