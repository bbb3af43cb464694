"""Files that are read or written once, without filling the system's memory with them.

The system keeps what passes through a file, in fresh pages as long as it has free ones. A fresh page is taken and
cleared before it is used, which on a virtual machine costs more than the disk: 2.7 GiB were read with 360 MiB/s, all of
it system time, and with 1430 MiB/s where every 4 MiB were let go of at once, so that few pages served again and again;
written, 320 against 1060 MiB/s (2 cores, Linux 6.18, ext4). And other programs keep their cache.

Elsewhere than on Linux nothing is let go of, and all else is the same.
"""

from __future__ import annotations

import os
import sys
from io import FileIO

BLOCK = 2**22
# Pages that were written can only be let go of once they are on the disk, and one wait for it should not be for little.
WINDOW = 2**25


def read_into(stream: FileIO, start: int, target: memoryview) -> int:
    """Fills `target` (bytes) from `start` on; returns how many bytes there were, fewer only where the file ends."""
    stream.seek(start)
    done = 0
    while done < len(target) and (count := stream.readinto(target[done : done + BLOCK])):
        forget(stream, start + done, count)
        done += count
    return done


def write_from(stream: FileIO, start: int, source: memoryview) -> None:
    """Writes `source` (bytes) from `start` on; what fills a window is on the disk afterwards, a rest need not be."""
    stream.seek(start)
    done = flushed = 0
    while done < len(source):
        done += stream.write(source[done : flushed + WINDOW])
        if done - flushed == WINDOW:
            flush(stream)
            flushed = done


def flush(stream: FileIO) -> None:
    """Waits until the disk has the file, and lets go of all of it: what is read next comes from the disk."""
    os.fsync(stream.fileno())
    forget(stream, 0, 0)


def forget(stream: FileIO, start: int, size: int) -> None:
    """Lets go of whole pages that the disk has; a size of 0 means up to the end."""
    if sys.platform == "linux":
        os.posix_fadvise(stream.fileno(), start, size, os.POSIX_FADV_DONTNEED)
