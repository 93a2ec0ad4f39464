"""The seam of a repainted part: its colours are shifted, smoothly and inside the mask only, to those around it.

What a model gives back of the known part is never exactly the picture: the first stage changes colours a little. By
that difference a seam would be seen.
Shapes: B batch, C channels, H W picture. Masks: 1 = not known.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from darkroom.conditioning.filling import filled

BLOCK = 4  # pixels; of finer differences the model's picture keeps its own


def without_seam(generated: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """generated (B, C, H, W) + the difference to `picture` where that is known, continued smoothly under the mask
    (B, 1, H, W): Perez et al. 2003 (Poisson image editing), with push-pull for the interpolation. Only what is under
    the mask has a meaning."""
    known = 1 - mask
    size = generated.shape[2:]
    if min(size) < BLOCK:
        return generated
    share = F.avg_pool2d(known, BLOCK, ceil_mode=True)
    difference = F.avg_pool2d((picture - generated) * known, BLOCK, ceil_mode=True) / share.clamp(min=1e-6)
    smooth = filled(difference * (share > 0), (share == 0).to(generated))
    return generated + F.interpolate(smooth, size=size, mode="bilinear", align_corners=False)
