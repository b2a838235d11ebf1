"""The C library's allocator, set for training: memory that a step has freed is there for the next one."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_NEVER = 2**31 - 1
_LARGEST_KEPT = 32 * 2**20
"""The largest that glibc takes. A heap with larger blocks has holes: a worker that trains all of GPT-2 under ZeRO-1 had
4.1 to 4.8 GiB of it, where it has 3.2."""

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(_LARGEST_KEPT),
    "MALLOC_TRIM_THRESHOLD_": str(_NEVER),
}
"""The same for a process to come, whichever of its threads trains: those beside the main one otherwise have heaps of
their own, too small for a tensor."""


def keep_freed_memory() -> bool:
    """Have this process's main thread keep what it frees; whether its C library, glibc, can.

    As it comes, glibc maps large blocks anew for each tensor and gives back what lies free at the heap's end, so that
    the kernel clears the pages of every activation again at every step. That was a fifth of a forward pass of GPT-2
    in bf16. The process then stays as large as its largest step. Blocks of more than 32 MiB are mapped still.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
