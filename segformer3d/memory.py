"""The allocator's habits: training steps reuse the same large buffers over and over."""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_INT_MAX = 2**31 - 1
_PAD_BYTES = 256 * 2**20


def keep_freed_buffers() -> bool:
    """Let the C allocator keep what is freed, instead of giving it back and asking anew.

    glibc gives each large buffer back to the kernel when it is freed, which then hands out zeroed
    pages one fault at a time: on CPUs more than half of a training step. Call it once, before the
    first large buffer. Freed memory then stays with the process.

    Returns:
        Whether it was done: only glibc is known.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # The thresholds are ints here: 2 GiB less a byte is the most that can be said.
    settings = (
        (_MMAP_THRESHOLD, _INT_MAX),
        (_TRIM_THRESHOLD, _INT_MAX),
        (_TOP_PAD, _PAD_BYTES),
    )
    done = [mallopt(name, value) == 1 for name, value in settings]
    return all(done)
