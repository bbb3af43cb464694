"""QLoRA for Mixtral-class models: experts really in 4-bit, the router watched, merges exact, one inference path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.moe import Moe4bitConfig

__all__ = ["Moe4bitConfig"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Late, so that `finetune --help` and recipe errors do not wait for torch.
    if name == "Moe4bitConfig":
        from finetune.moe import Moe4bitConfig

        return Moe4bitConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
