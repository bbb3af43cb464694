"""Several processes on this machine, joined over gloo, each with the environment that torchrun would give it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable


def be_processes(work: Callable[[], None], processes: int) -> None:
    """Does `work` in so many processes, which have what this one has imported; exits with the worst of their statuses.

    For the main module of a subprocess of the tests: a process that has computed with several threads cannot be forked.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def be(rank: int) -> None:
        import torch

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
        torch.set_num_threads(1)
        work()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=be, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    sys.exit(max(1 if process.exitcode is None else abs(process.exitcode) for process in started))
