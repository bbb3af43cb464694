"""A model folder's tensors, read one at a time and never all at once.

Why not safetensors' own reader: it maps the file, and what was read of a map counts as this process's memory until the
file is closed; a merge would grow by the base's 93 GB. Here a tensor is read into memory of its own and is gone when
it is dropped. Rows of a stacked tensor (one expert of a layer) are read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.checkpoint import TensorInfo, incomplete, read_tensor_infos, shard_files
from finetune.errors import AdapterError, FinetuneError, ModelError
from finetune.export import buffers
from finetune.export.page_cache import read_into

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


class Tensors:
    """The tensors of safetensors files, by name.

    Raises:
        FinetuneError: a file's header is damaged, or a tensor has a dtype that no checkpoint of these models has.
    """

    def __init__(self, files: Iterable[Path], *, kind: type[FinetuneError] = ModelError):
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_tensor_infos(file, kind=kind):
                if info.dtype not in _DTYPES:
                    raise kind(
                        f"{info.name} has the dtype {info.dtype}",
                        where=str(file),
                        allowed=", ".join(_DTYPES),
                        fix="use the 16-bit checkpoint",
                    )
                self._infos[info.name] = info

    @classmethod
    def of_model(cls, folder: Path) -> Tensors:
        return cls(shard_files(folder))

    @classmethod
    def of_adapter(cls, file: Path) -> Tensors:
        return cls([file], kind=AdapterError)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Checks names and shapes before hours are spent.

        Raises:
            ModelError: names what is missing, or of another shape.
        """
        missing = [name for name in shapes if name not in self._infos]
        if missing:
            raise incomplete(missing)
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ModelError(
                    f"a weight of the checkpoint has the shape {list(self.shape(name))}",
                    where=f"{self._infos[name].file}: {name}",
                    allowed=f"{list(shape)} by config.json",
                    fix="download the checkpoint again, or use the config.json that belongs to it",
                )

    def read(self, name: str, *, row: int | None = None) -> Tensor:
        """The tensor as it is stored, or only `tensor[row]`, in memory of its own."""
        info = self._infos[name]
        dtype = _DTYPES[info.dtype]
        shape = info.shape if row is None else info.shape[1:]
        raw = buffers.take(prod(shape) * dtype.itemsize)
        _fill(raw, info, (row or 0) * raw.nbytes)
        return torch.from_numpy(raw).view(dtype).view(shape)

    def read_joined(self, names: Sequence[str]) -> Tensor:
        """`torch.cat` of tensors along their first dimension; of one dtype, they are read into one memory."""
        infos = [self._infos[name] for name in names]
        if len({info.dtype for info in infos}) > 1:
            return torch.cat([self.read(name) for name in names])
        dtype = _DTYPES[infos[0].dtype]
        sizes = [prod(info.shape) * dtype.itemsize for info in infos]
        raw = buffers.take(sum(sizes))
        for info, into in zip(infos, np.split(raw, np.cumsum(sizes)[:-1]), strict=True):
            _fill(into, info, 0)
        return torch.from_numpy(raw).view(dtype).view(-1, *infos[0].shape[1:])


def _fill(raw: np.ndarray, info: TensorInfo, start: int) -> None:
    """Fills bytes from a tensor's, from `start` on."""
    with info.file.open("rb", buffering=0) as stream:
        count = read_into(stream, info.start + start, raw.data)
    assert count == raw.nbytes, (info, start, count)  # the header and the file's size were compared
