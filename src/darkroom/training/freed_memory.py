"""What becomes of the memory that one training step frees before the next one asks for it.

glibc gives every block above 32 MiB back to the system as soon as it is free and takes it anew each time; the kernel
then clears all its pages again. A step on 8 pictures of 128x128 without a first stage spent a seventh of its time there
(benchmarks/freed_memory.py).
"""

from __future__ import annotations

import ctypes
import os

SWITCH = "DARKROOM_KEEP_MEMORY"  # environment: 0 leaves the C library as it is
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_NEVER = -1
_TOP = 64 * 2**20


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed for what is asked for next, and say whether it agreed.

    For the rest of the process, whose memory then stays at its greatest. False where the C library is another one, or
    DARKROOM_KEEP_MEMORY is 0.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _TOP))
    return all(mallopt(name, value) == 1 for name, value in wanted)
