"""Reads a merged folder with whatever transformers is installed: ids, logits and greedy tokens of a few prompts.

    python scripts/read_merged.py FOLDER OUT.json

Imports nothing of this toolkit, so that it runs in environments that do not have it. float32 on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is AI?", "Who are you?", "Was ist die Hauptstadt von Deutschland?", "naïve café — 3 × 7 = ?\n\tyes")
NEW_TOKENS = 24


def main(folder: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    document: dict[str, Any] = {
        "version": transformers.__version__,
        "experts": type(
            model.model.layers[0].mlp
            if hasattr(model.model.layers[0], "mlp")
            else model.model.layers[0].block_sparse_moe
        ).__name__,
        "prompts": [],
        "logits": [],
        "greedy": [],
    }
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            document["logits"].append(model(torch.tensor([ids])).logits[0, -1].tolist())
            answer = list(ids)
            for _ in range(NEW_TOKENS):
                answer.append(int(model(torch.tensor([answer])).logits[0, -1].argmax()))
        document["prompts"].append({"text": chat, "ids": ids})
        document["greedy"].append(answer[len(ids) :])
    out.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
