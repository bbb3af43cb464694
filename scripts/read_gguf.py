"""Reads a GGUF with llama-cpp-python and compares ids and greedy tokens with what scripts/read_merged.py wrote.

    python scripts/read_gguf.py MODEL.gguf TRANSFORMERS.json

Imports nothing of this toolkit. Exit status 1 where the ids differ, or the tokens of an f16 file.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from llama_cpp import Llama


def main(path: str, reference: Path) -> int:
    expected = json.loads(reference.read_text(encoding="utf-8"))
    model = Llama(path, n_ctx=512, verbose=False)
    same_ids, same, total = 0, 0, 0
    for prompt, greedy in zip(expected["prompts"], expected["greedy"], strict=True):
        ids = model.tokenize(prompt["text"].encode(), add_bos=False, special=True)
        same_ids += ids == prompt["ids"]
        found = list(
            itertools.islice(model.generate(prompt["ids"], top_k=1, temp=0.0, repeat_penalty=1.0), len(greedy))
        )
        # After the first other token the texts are different ones.
        agree = next((n for n, (a, b) in enumerate(zip(found, greedy, strict=True)) if a != b), len(greedy))
        same, total = same + agree, total + len(greedy)
    prompts = len(expected["prompts"])
    print(f"{Path(path).name}: ids of {same_ids}/{prompts} prompts, {same}/{total} greedy tokens as transformers")
    return int(same_ids < prompts or ("f16" in Path(path).name and same < total))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
