"""Super-resolution and deblurring of pictures of any size: overlapping windows of one canvas, denoised together."""

from darkroom.upscaling.upscaler import Upscaled, Upscaler, UpscaleSettings, upscale

__all__ = ["UpscaleSettings", "Upscaled", "Upscaler", "upscale"]
