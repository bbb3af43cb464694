"""How a MoE is stored: experts in NF4 or fewer bits (HQQ), and attention in NF4 or 16-bit.

Written into a saved model's config.json as `quantization_config`, so that the folder says what it is. transformers
without this toolkit skips a quantization that it does not know, with a warning, and leaves the experts random: a second
key, `transformers_weights`, stops it. transformers reads that as the name of the weights' file, refuses one that is no
safetensors, and repeats it in its error; the quantizer takes it away before. `save_pretrained` called from Python does
not write it: transformers strips the key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.checkpoint import read_json
from finetune.errors import ModelError
from finetune.kernels import ExpertStorage

QUANT_METHOD = "moe_4bit"
AttentionStorage = Literal["nf4", "16bit"]
REFUSAL_KEY = "transformers_weights"
_REFUSAL = (
    "these weights are for moe-qlora: run `from finetune import Moe4bitConfig` before from_pretrained, or serve the "
    "folder with `finetune serve FOLDER`. Its experts are quantized in a way that transformers alone does not read, "
    "and would leave random; `finetune merge ADAPTER --format bf16` writes a folder that transformers reads alone"
)


@register_quantization_config(QUANT_METHOD)
@dataclass
class Moe4bitConfig(QuantizationConfigMixin):
    """Fused experts quantized each by itself, the rest 16-bit.

    Args:
        attention: "nf4" keeps q/k/v/o as bitsandbytes `Linear4bit`; "16bit" leaves them in the load dtype.
        experts: "nf4" in blocks of 64 with double quantization, "hqq3" or "hqq2" with 3 or 2 bits in groups of 64.

    Raises:
        ModelError: a storage that does not exist, or a saved config of another format version.
    """

    attention: AttentionStorage
    experts: ExpertStorage

    def __init__(
        self,
        /,  # a config.json may hold a key of that name as well
        attention: AttentionStorage = "nf4",
        experts: ExpertStorage = "nf4",
        format_version: int | None = None,
        **kwargs: Any,
    ):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum upstream, a plain string for plugins
        self.attention = attention
        self.experts = experts
        # NF4 stays version 1, so that earlier releases of this toolkit read it.
        own_version = 1 if experts == "nf4" else 2
        self.format_version = own_version if format_version is None else format_version
        require_storage(attention, experts, where="Moe4bitConfig.")
        if self.format_version != own_version:
            raise ModelError(
                f"this folder was saved in format {format_version} of {QUANT_METHOD}",
                where="config.json: quantization_config.format_version",
                allowed=f"{own_version} for experts in {experts}",
                fix="upgrade moe-qlora, or quantize the original checkpoint again with `finetune quantize`",
            )
        # `from_dict` of upstream passes whatever the folder holds; only the method's own name may be left.
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise ModelError(
                f"unknown keys {sorted(unknown)} in the quantization config",
                where="Moe4bitConfig",
                allowed="attention, experts, format_version",
                fix="remove them",
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; NF4 experts go unsaid, as in version 1."""
        content = super().to_dict()
        if self.experts == "nf4":
            del content["experts"]
        return content


def require_storage(attention: str, experts: str, *, where: str) -> None:
    """Refuses a storage that does not exist; `where` stands before "attention" or "experts".

    Raises:
        ModelError: names those that do.
    """
    for name, value, known, fix in (
        ("attention", attention, AttentionStorage, "nf4 for the least memory, 16bit to train or merge it exactly"),
        ("experts", experts, ExpertStorage, "nf4 for quality, hqq3 or hqq2 where the experts would not fit"),
    ):
        if value not in get_args(known):
            raise ModelError(
                f"{name.removesuffix('s')} storage {value!r} does not exist",
                where=f"{where}{name}",
                allowed=", ".join(get_args(known)),
                fix=f"use {fix}",
            )


def refuse_without_toolkit(folder: Path) -> None:
    """Has transformers refuse the saved, quantized model in `folder` where this toolkit is not imported."""
    file = folder / "config.json"
    config = read_json(file) | {REFUSAL_KEY: _REFUSAL}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def of_plain_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json for weights that are not quantized."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", REFUSAL_KEY)}
