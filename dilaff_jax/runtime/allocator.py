"""How the C library hands out memory, where it matters: training on a CPU."""

import ctypes
import logging
import sys

# The names in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Lets this process keep what it frees; returns whether the C library could be told.

    XLA asks for the memory of a step anew in every step, and glibc gives it back to the system in
    between, page by page: a sixth of a light network's step goes into getting it again. The process
    then never shrinks, and needs no more at its peak (benchmarks/light_step.py). Like
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_ARENA_MAX=1, but from within.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    told = all(mallopt(name, value) == 1 for name, value in settings.items())
    logging.info("memory that is freed is kept: %s", told)
    return told
