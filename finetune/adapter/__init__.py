"""What was tuned, through one door: every command that reads an adapter asks `Adapter`.

Why: kind, base, scaling, targets, tokenizer and chat template are facts of the adapter, and where each command read
them for itself, one answered with the base's template and another merged what it should have refused. Here they are
read once (settings.py, files.py), checked before anything is loaded, and put on a base (lora.py, non_moe.py) as they
were trained. Leaves out what trains (adapter/) and the arithmetic of a merge (export/).
"""

from finetune.adapter.adapter import Adapter, is_adapter, load, open_tuned, put_side_by_side, require_tuned
from finetune.adapter.lora import add_adapters, load_adapter, save_adapter
from finetune.adapter.non_moe import load_non_moe, save_non_moe

__all__ = [
    "Adapter",
    "add_adapters",
    "is_adapter",
    "load",
    "load_adapter",
    "load_non_moe",
    "open_tuned",
    "put_side_by_side",
    "require_tuned",
    "save_adapter",
    "save_non_moe",
]
