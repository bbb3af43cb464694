"""An adapter on the bundled tiny Mixtral as a run would save it, with random weights: input for the checks of readers.

python scripts/reader_fixture.py outputs/check/input      writes outputs/check/input/adapter
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from finetune.adapter.lora import add_attention_lora, save_adapter
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base

BASE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-mixtral" / "model"


def main(folder: Path) -> None:
    adapter = folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    loaded = load_base(BaseSpec(str(BASE)), device="cpu")
    torch.manual_seed(0)
    model = add_attention_lora(loaded.model, loaded.arch, r=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    save_adapter(model, adapter)
    loaded.tokenizer.save_pretrained(adapter)
    loaded.base.save(adapter)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
