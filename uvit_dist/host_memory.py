"""Memory of a process on a CPU: what is freed stays with it, and large tensors lie in huge pages."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable

from torch import Tensor

log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""What Linux is advised of memory: to use huge pages in future, and to move what is there now into such."""
MAPPED_FROM = 2**30
"""Bytes from which on a tensor's memory comes from the kernel and goes back to it."""
HUGE_PAGE, HUGE_FROM = 2**21, 2**25
"""Bytes of a huge page, and those from which on a tensor is put into such."""


def keep_memory(mapped_from: int = MAPPED_FROM) -> bool:
    """Have the process keep the memory of tensors that are freed, for the next ones. Returns whether that could be set.

    Else glibc gives tensors of 32 MiB and more, and what is free at the end of its heap, back to the kernel, which
    hands out pages filled with zeros again, at each step: a fiftieth of a step's time or more.
    mapped_from: bytes from which on a piece of memory is given back as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and mallopt(_M_TRIM_THRESHOLD, -1) == 1 and mallopt(_M_MMAP_THRESHOLD, mapped_from) == 1
    if not kept:
        log.debug("this C library does not let a process keep the memory of freed tensors")
    return kept


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Put tensors of a CPU, any shape and dtype, where they lie, into huge pages. Returns the bytes that may have them.

    For memory that is gone through from end to end at each step: in pages of 4 KiB an update of the EMA took 1.4 times
    as long (docs/performance.md). Small tensors are left out, and where the kernel has no huge pages nothing is done.
    Huge pages for all tensors (THP_MEM_ALLOC_ENABLE) made a training step slower.
    """
    madvise, done = getattr(ctypes.CDLL(None), "madvise", None), 0
    for tensor in tensors:
        if madvise is None or tensor.device.type != "cpu" or tensor.nbytes < HUGE_FROM or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - begin
        if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE) == 0:
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_COLLAPSE)  # Linux 6.1; before, in a while
            done += size
    return done
