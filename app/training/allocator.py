"""The C library's allocator, set for training: memory that a step has freed is there for the next one."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, <malloc.h>
_NEVER = 2**31 - 1

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_NEVER)}
"""The same for a process to come, whichever of its threads trains: those beside the main one otherwise have heaps of
their own, too small for a tensor."""


def keep_freed_memory() -> bool:
    """Have this process's main thread keep what it frees; whether its C library, glibc, can.

    As it comes, glibc maps large blocks anew for each tensor and gives back what lies free at the heap's end, so that
    the kernel clears the pages of every activation again at every step. That was a fifth of a forward pass of GPT-2
    in bf16. The process then stays as large as its largest step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
