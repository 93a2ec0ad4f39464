"""Operations that cost more on a CPU than they should, written so that they are fast there, in `channels_last`.

Each equals a plain formula of torch up to rounding, in value and gradient; other devices and layouts get that formula.
"""

from darkroom.kernels.convolutions import Conv1x1, Conv3x3, upsample_conv
from darkroom.kernels.norms import group_norm, norm, norm_silu
from darkroom.kernels.products import attention, linear

__all__ = ["Conv1x1", "Conv3x3", "attention", "group_norm", "linear", "norm", "norm_silu", "upsample_conv"]
