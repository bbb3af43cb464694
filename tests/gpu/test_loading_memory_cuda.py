"""Device memory while a sharded 16-bit checkpoint is quantized onto a GPU."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from finetune.moe import Moe4bitConfig
from finetune.moe.census import take_census
from tests.moe.test_loading_memory import FUSED, SIXTEEN_BIT, SLACK, write_checkpoint


def test_peak_is_the_final_size_and_two_fused_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=Moe4bitConfig("nf4"), dtype=torch.bfloat16, device_map={"": "cuda"}
    )
    peak = torch.cuda.max_memory_allocated() - before
    final = take_census(model).total_bytes
    print(f"final {final / 2**20:.1f} MiB, peak {peak / 2**20:.1f} MiB, one gate_up {FUSED / 2**20:.1f} MiB")
    # The experts of one tensor apart and stacked, or stacked and concatenated: never more than two at once.
    assert final < peak <= final + 2 * FUSED + SLACK < SIXTEEN_BIT
