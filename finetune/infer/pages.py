"""The pool of keys and values, in pages of 64 tokens, and who owns which page.

A row gets a page just before a token needs it; `batch.py` decides which row is pre-empted when none is left. Page 0
belongs to no row: rows that pad a batch to its bucket write there, and so does a probe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.moe import MoeArch

PAGE = 64


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def page_bytes(arch: MoeArch, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * arch.layers * PAGE * arch.kv_heads * arch.head_dim * dtype.itemsize


class PagePool:
    """Keys and values of every layer, [pages, PAGE, G, D] each, zeros at first."""

    def __init__(self, arch: MoeArch, pages: int, dtype: torch.dtype, device: torch.device):
        assert pages >= 2, "a pool needs a page besides the one for padding"
        shape = (pages, PAGE, arch.kv_heads, arch.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(arch.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(arch.layers)]
        self.pages = pages - 1
        self._free = list(range(pages - 1, 0, -1))

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    def allocate(self, pages: list[int], tokens: int, *, spare: int = 0) -> bool:
        """Adds pages to a row's until they hold so many tokens; adds none if fewer than `spare` would be left.

        Returns:
            Whether the row's pages hold so many tokens.
        """
        wanted = pages_for(tokens) - len(pages)
        if wanted > 0 and wanted + spare > len(self._free):
            return False
        pages += [self._free.pop() for _ in range(wanted)]
        return True

    def free(self, pages: list[int]) -> None:
        """Frees all of a row's pages."""
        self._free += pages
        pages.clear()

    def write(self, layer: int, slots_T: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Writes tokens to the flat places `slots` (page * PAGE + offset, int64)."""
        self.keys[layer].view(-1, *key_TGD.shape[1:])[slots_T] = key_TGD
        self.values[layer].view(-1, *value_TGD.shape[1:])[slots_T] = value_TGD
