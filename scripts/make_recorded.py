"""Made `tests/recorded/`: what earlier code saved, which later code must still load (tests/test_recorded.py).

It was run once, at commit edf3781 (`old-adapter` with the package of commit 69db321, whose `base.json` does not yet
record `quantizing_dtype` and `experts_sha256`). It imports that commit's modules and does NOT run on later ones, and it
must NOT be adapted and run again to make a failing test pass: a test that fails says that users' own folders no longer
load, or no longer answer as they did. A new format gets a new folder beside the old ones.

    git worktree add /tmp/then edf3781; git worktree add /tmp/before 69db321
    PYTHONPATH=/tmp/then python scripts/make_recorded.py tests/recorded /tmp/before

    base/          a random bf16 Mixtral of 2 layers and 4 experts, with its tokenizer
    run/           a whole run of LoRA on the attention, with the checkpoint after its step 2 of 4
    non-moe/       the adapter of a run that trains all but the experts
    nf4/, bf16/    run/ merged: its experts' own bytes, and onto the base's 16 bits
    old-adapter/   LoRA, as 69db321 saved it
    peft-adapter/  LoRA, as stock PEFT saves it
    truth.json     the prompt, and of each folder its greedy tokens, its experts' hash where they are quantized
    truth.safetensors  and its logits, float32 [positions, vocabulary]

Everything is on a CPU, in float32 with one thread (OMP_NUM_THREADS=1). The current folder was /tmp/moe-qlora, which
the recorded folders name where they name the base. By hand were taken away: run/'s checkpoint-4, and two model cards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from finetune.quant.census import hash_experts
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from finetune.adapter import load

PROMPT = "What comes after 7?"
NEW_TOKENS = 8
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %}"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def make_base(folder: Path, rows: list[str]) -> None:
    """A random model, its weights drawn wide enough that experts are chosen and answers differ."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        rows,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def recipe(output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"path": "./base", "device": "cpu"},
        "data": {"train": "./rows.jsonl", "eval": "./rows.jsonl", "max_eval_rows": 4, "template": "model"},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "logging_steps": 1,
            "max_length": 64,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        "router": {"figures": False},
        "output": {"dir": str(output)},
    }
    for section, values in sections.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def finetune(*args: object, package: Path | None = None) -> None:
    paths = {"PYTHONPATH": str(package)} if package else {}
    subprocess.run([sys.executable, "-m", "finetune", *map(str, args)], check=True, env={**os.environ, **paths})


def train(root: Path, name: str, *, package: Path | None = None, **sections: dict[str, Any]) -> None:
    path = root / f"{name}.yaml"
    path.write_text(json.dumps(recipe(root / name, **sections), indent=1) + "\n", encoding="utf-8")
    finetune("train", path, package=package)
    path.unlink()


def keep_adapter(root: Path, name: str) -> None:
    """Of a run, only its adapter."""
    (root / name).rename(root / "whole")
    (root / "whole" / "adapter").rename(root / name)
    shutil.rmtree(root / "whole")


def make_peft(root: Path) -> None:
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(plain, wanted).save_pretrained(root / "peft-adapter")


@torch.no_grad()
def truth(folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    loaded = load(str(folder), device="cpu", dtype="float32")
    chat = [{"role": "user", "content": PROMPT}]
    ids = loaded.tokenizer.apply_chat_template(chat, return_dict=False)
    tokens = torch.tensor([ids])
    for _ in range(NEW_TOKENS):
        logits = loaded.model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    logits = loaded.model(input_ids=tokens, use_cache=False).logits[0, -4:]
    facts: dict[str, Any] = {"prompt": ids, "greedy": tokens[0, len(ids) :].tolist()}
    if folder.name != "bf16":
        facts["experts_sha256"] = hash_experts(loaded.model)
    return facts, logits.float().contiguous()


def main(root: Path, before: Path) -> None:
    torch.set_num_threads(1)
    root.mkdir(parents=True)
    rows = [(f"What comes after {n}?", f"After {n} comes {n + 1}.") for n in range(32)]
    make_base(root / "base", [f"[INST] {question} [/INST] {answer}" for question, answer in rows])
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in rows
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages), "utf-8")

    train(
        root,
        "run",
        trainable={"method": "attention_lora", "lora": {"r": 4}},
        training={"save_strategy": "steps", "save_steps": 2},
    )
    train(root, "non-moe", quantization={"attention": "16bit"}, trainable={"method": "non_moe"})
    train(root, "old-adapter", package=before, trainable={"method": "attention_lora", "lora": {"r": 4}})
    keep_adapter(root, "non-moe")
    keep_adapter(root, "old-adapter")
    make_peft(root)
    finetune("merge", root / "run" / "adapter", "--output", root / "nf4", "--rows", 0, "--device", "cpu")
    finetune(
        *("merge", root / "run" / "adapter", "--output", root / "bf16", "--format", "bf16"),
        *("--onto", "original", "--device", "cpu"),
    )

    facts, logits = {}, {}
    for name in ("base", "run/adapter", "non-moe", "nf4", "bf16", "old-adapter", "peft-adapter"):
        facts[name], logits[name] = truth(root / name)
    (root / "truth.json").write_text(json.dumps({"asked": PROMPT, "folders": facts}, indent=1) + "\n", "utf-8")
    save_file(logits, root / "truth.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
