"""The C library's memory during a training on a CPU: what a step frees is there for the next one."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# Where glibc's own adaptation ends in every process that has freed a block of this size.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_DEFAULT_MMAP_MAX = 65536
# Whoever has set one of these has decided for the whole process.
_DECIDED_BY = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


@contextlib.contextmanager
def freed_memory_kept(enabled: bool = True) -> Iterator[None]:
    """Keep freed memory in the process, where it goes back to the system otherwise; at the end it does go back.

    glibc maps every block above 32 MiB anew, and gives free memory above 64 MiB back at once. The tensors of a batch
    are that large, and SMOOT, which keeps the graph of the clean view while it runs the masked one, frees twice as much
    at once as standard training: the next step faults every page in again, whatever the number of threads.

    Args:
        enabled: does nothing otherwise, as on systems without glibc, and where the environment sets glibc's allocator.
    """
    if not enabled or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _DECIDED_BY):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.malloc_trim(0)
