"""What tensors hold at most while code runs on the CPU, counted storage by storage.

Every operation that passes torch's dispatcher is seen, in the forward and in the backward pass; an operator of our own
counts as one operation, so what its plain implementation makes inside is left out, as a Triton kernel makes nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakOfTensors(TorchDispatchMode):
    """`peak`: most bytes at a time of storages that were made inside, and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def know(self, *tensors: torch.Tensor) -> None:
        """Tensors that were there before; they do not count."""
        for tensor in tensors:
            self._add(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, counts=True)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._known and self._known[key]() is storage:
            return

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
