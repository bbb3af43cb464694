"""How a plain torch function becomes a `torch.library` operator that has a Triton kernel as well.

Every operation is written twice: in plain torch, which is the truth and what a CPU runs, and as a raw kernel for CUDA.
`operator` joins both to one operator of the namespace `moe_qlora`; torch's dispatcher then chooses by device. Without
triton, CUDA gets plain torch too.

`torch.library.Library` instead of `custom_op`: its Python wrapper costs tens of microseconds a call, and the loop
backend makes 32 calls a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import infer_schema

HAS_TRITON = find_spec("triton") is not None
_LIBRARY = torch.library.Library("moe_qlora", "DEF")
P = ParamSpec("P")
R = TypeVar("R")


class Operator(Generic[P, R]):
    """Called as its plain function, whatever the device.

    Attributes:
        plain: the plain function, right on every device.
        empty: uninitialised outputs of the right shapes and dtypes, for the same arguments.
    """

    def __init__(
        self,
        plain: Callable[P, R],
        empty: Callable[..., Any],
        launch: Callable[..., None] | Literal[False],
        writes: Sequence[str],
        on_kernels: Callable[..., bool],
    ):
        self.plain, self.empty, self._launch, self._on_kernels = plain, empty, launch, on_kernels
        name = plain.__name__.lstrip("_")
        _LIBRARY.define(infer_schema(plain, op_name=name, mutates_args=writes))
        _LIBRARY.impl(name, plain, "CPU")
        _LIBRARY.impl(name, self._on_cuda if launch else plain, "CUDA")
        torch.library.register_fake(f"moe_qlora::{name}", empty, lib=_LIBRARY)
        self._call = getattr(torch.ops.moe_qlora, name).default

    def _on_cuda(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.by_kernel(*args, **kwargs) if self._on_kernels(*args) else self.plain(*args, **kwargs)

    def by_kernel(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same by the kernel, on any device that runs it."""
        assert self._launch
        outputs = self.empty(*args)
        self._launch(*args, *(outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)))
        result: R = outputs
        return result

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self._call(*args, **kwargs)
        return result


def operator(
    *,
    launch: Callable[..., None] | Literal[False],
    empty: Callable[..., Any] = lambda *args: None,
    writes: Sequence[str] = (),
    on_kernels: Callable[..., bool] = lambda *args: True,
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Registers a function of plain torch under its name, less the underscore before it.

    Args:
        launch: starts the kernel; takes the function's arguments and then its outputs. False without triton.
        empty: makes the outputs for the function's arguments; also what torch asks on meta tensors.
        writes: the arguments that the function writes to.
        on_kernels: whether the kernel serves these arguments on CUDA.
    """
    return lambda plain: Operator(plain, empty, launch, writes, on_kernels)


def runs_on_kernels(x: Tensor, *others: object) -> bool:
    """Whether the kernels of decoding serve these rows; float32 models keep their precision with plain torch."""
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float32
