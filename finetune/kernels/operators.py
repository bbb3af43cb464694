"""How an operation becomes a `torch.library` operator with two implementations.

Each kernel file describes its operation three times: in plain torch (the truth, and the CPU's implementation), as a raw
Triton kernel (CUDA), and as a fake that only knows shapes. `define` joins them to one operator of the namespace
`moe_qlora`; torch's dispatcher then chooses by device. Without triton, CUDA gets plain torch too.

`torch.library.Library` instead of `custom_op`: its Python wrapper costs tens of microseconds a call, and the loop
backend makes 32 calls a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None
_LIBRARY = torch.library.Library("moe_qlora", "DEF")


def define(
    signature: str, *, plain: Callable[..., Any], cuda: Callable[..., Any] | None, fake: Callable[..., Any]
) -> Any:
    """Registers `signature` ("name(Tensor x, ...) -> Tensor") and returns the operator.

    Args:
        plain: plain torch, right on every device.
        cuda: launches the Triton kernel; None where triton is not installed.
        fake: same signature on meta tensors.
    """
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, plain, "CPU")
    _LIBRARY.impl(name, cuda or plain, "CUDA")
    torch.library.register_fake(f"moe_qlora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.moe_qlora, name).default
