"""Large memory that serves again, instead of going back to the system after every matrix.

Memory that is new is taken page by page, and each page is cleared first: of a merge's 29 s in the system 10 went there
(12.7 GB of matrices, 2 cores of a virtual machine). So a buffer that nothing refers to any more waits for the next one
of its size or less. What is kept is what was in use at one time, until `release`.
"""

from __future__ import annotations

import mmap
import sys
import threading
import weakref

import numpy as np

# Less is the allocator's own business.
_LARGE = 2**22
_lock = threading.RLock()
_free: list[mmap.mmap] = []


def take(size: int) -> np.ndarray:
    """uint8 [size] of any content; it may serve again when the array and all its views are gone."""
    if size < _LARGE:
        return np.empty(size, dtype=np.uint8)
    with _lock:
        fitting = [memory for memory in _free if len(memory) >= size]
        memory = min(fitting, key=len, default=None)
        if memory is not None:
            _free.remove(memory)
        elif _free:
            # In place of one that is too small, so that what is kept does not grow with the number of sizes.
            _free.remove(max(_free, key=len))
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            memory.madvise(mmap.MADV_HUGEPAGE)
    # numpy's views of this array refer to it, and not to what is under it, since that is no array.
    array = np.frombuffer(memory, dtype=np.uint8, count=size)
    weakref.finalize(array, _give_back, memory).atexit = False
    return array


def release() -> None:
    """Gives the memory that is not in use to the system."""
    with _lock:
        _free.clear()


def _give_back(memory: mmap.mmap) -> None:
    with _lock:
        _free.append(memory)
