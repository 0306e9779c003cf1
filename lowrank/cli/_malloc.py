"""glibc maps and unmaps large blocks at every allocation: the pages of a step's logits are then cleared anew each time."""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, up to blocks of 2 GiB, for this process: filling 100 MB sixty times over took 3.2 s and
    1.5 million page faults without (glibc 2.36), 0.6 s and 0.24 million with.  Nothing happens where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, LARGEST)
