"""One optimizer step through the trainer: the gradient is that of the global batch, however it is cut up.

Truth: a plain transformers model in float64 with the dequantized weights and stock PEFT's adapter. It sees the
conversations of the step one by one, unpadded and unpacked, and the loss is written out over all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base
from finetune.router.capture import RouterCapture
from tests.conftest import REPOSITORY
from tests.models import dequantized_twin
from tests.router import auxiliary_run
from tests.router.auxiliary_run import ready_to_step
from tests.running import run_finetune

BALANCE, Z, EXPERTS, TOP_K, VOCAB = 1.0, 0.1, 4, 2, 260
# name: packing, routers train, checkpointing; then how its step is cut up
CASES: dict[str, tuple[bool, bool, str]] = {
    "padded": (False, False, "none"),
    "padded, router": (False, True, "full"),
    "packed": (True, False, "full"),
    "packed, router": (True, True, "none"),
}
LAYOUTS = {
    "padded": ("at once", "one by one", "two processes"),
    "padded, router": ("one by one", "two processes"),
    "packed": ("at once", "two processes"),
    "packed, router": ("at once", "one by one"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral over bytes whose routers choose: wider weights than the initial ones."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS}
    config = MixtralConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.1)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}?{{ turn.content }}!"
        "{% else %}{{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations from short to long, which a step of all of them sees in any order; packed they fill four."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for number in range(1, 9):
        turns = [
            {"role": "user", "content": "abc"[: number % 3 + 1]},
            {"role": "assistant", "content": "7531" * number},
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write(folder: Path, name: str, base: Path, rows: Path, **sections: dict[str, Any]) -> Path:
    recipe: dict[str, Any] = {
        "model": {"path": str(base), "device": "cpu"},
        "quantization": {"attention": "16bit"},
        "data": {"train": str(rows), "template": "model"},
        "training": {
            "max_steps": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "max_length": 64,
            "max_grad_norm": 0,
            "save_strategy": "no",
            "eval_strategy": "no",
        },
        "router": {"log": False, "figures": False, "aux": "train", "balance_coef": BALANCE, "z_coef": Z},
        "output": {"dir": str(folder / name)},
    }
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def cut(packing: bool, layout: str) -> dict[str, int]:
    """Micro-batch and accumulation of a step of everything: eight rows, or four packed ones."""
    count = 4 if packing else 8
    batch, steps = {"at once": (count, 1), "one by one": (1, count), "two processes": (count // 4, 2)}[layout]
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}


def sections_of(case: str, layout: str) -> dict[str, dict[str, Any]]:
    packing, router, checkpointing = CASES[case]
    training: dict[str, Any] = {"gradient_checkpointing": checkpointing, "packing": packing, **cut(packing, layout)}
    if packing:
        training["pad_to_multiple_of"] = 16
    return {"trainable": {"router": router}, "training": training}


@pytest.fixture(scope="module")
def two_processes(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases for two processes, by one launch; a folder of runs by case."""
    folder = tmp_path_factory.mktemp("two")
    cases = [case for case in CASES if "two processes" in LAYOUTS[case]]
    recipes = [str(write(folder, case, base, rows, **sections_of(case, "two processes"))) for case in cases]
    done = subprocess.run(
        [sys.executable, auxiliary_run.__file__, "2", *recipes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def reference(base: Path, rows: Path, before: dict[str, Tensor]) -> tuple[float, float, float, dict[str, Tensor]]:
    """Loss, balance and z-loss of all conversations, and the gradient of loss + coefficients, in float64."""
    loaded = load_base(BaseSpec(str(base), attention="16bit"), device="cpu")
    routers = any("mlp.gate" in name for name in before)
    targets = [f"self_attn.{name}_proj" for name in "qkvo"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, modules_to_save=["mlp.gate"] if routers else None)
    model: Any = get_peft_model(dequantized_twin(loaded.model, torch.float64), config).double().train()
    parameters = dict(model.named_parameters())
    assert before.keys() == {name for name, p in parameters.items() if p.requires_grad}
    for name, value in before.items():
        parameters[name].data = value.double()
    nll, supervised = torch.zeros((), dtype=torch.float64), 0
    logits: list[list[Tensor]] = [[], []]
    for row in encode_source(Reading(Source(str(rows))), loaded.tokenizer, Supervision()).dataset:
        output = model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                nll = nll - output.logits[0, position].log_softmax(0)[label]
                supervised += 1
        for layer, layer_logits in enumerate(output.router_logits):
            logits[layer].append(layer_logits)
    balance, z = [], []
    for tokens in (torch.cat(layer) for layer in logits):
        chosen = Counter(e for t in tokens.tolist() for e in sorted(range(EXPERTS), key=lambda e: -t[e])[:TOP_K])
        shares = torch.tensor([chosen[e] for e in range(EXPERTS)]).double() / (TOP_K * len(tokens))
        balance.append(EXPERTS * (shares * tokens.softmax(1).mean(0)).sum())
        z.append(tokens.logsumexp(1).square().mean())
    loss, balance_mean, z_mean = nll / supervised, torch.stack(balance).mean(), torch.stack(z).mean()
    auxiliary = BALANCE * balance_mean + Z * z_mean
    share = torch.autograd.grad(auxiliary, [parameters[name] for name in before], retain_graph=True)
    (loss + auxiliary).backward()
    gradients = {name: parameters[name].grad for name in before}
    assert all(part.norm() > 0.05 * gradients[name].norm() for name, part in zip(before, share, strict=True))
    return loss.item(), balance_mean.item(), z_mean.item(), gradients


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_global_batch(
    case: str, base: Path, rows: Path, two_processes: Path, tmp_path: Path
) -> None:
    runs = {}
    for layout in LAYOUTS[case]:
        runs[layout] = two_processes / case if layout == "two processes" else tmp_path / layout
        if layout != "two processes":
            auxiliary_run.step(write(tmp_path, layout, base, rows, **sections_of(case, layout)))
    before = torch.load(next(iter(runs.values())) / "step.pt")["before"]
    loss, balance, z, expected = reference(base, rows, before)
    assert len(expected) == 16 + (2 if CASES[case][1] else 0)
    for layout, run in runs.items():
        logged = json.loads((run / "step.json").read_text())
        # The loss is the loss alone; the auxiliary losses, weighing as much as a tenth of it, stand beside it.
        assert logged["loss"] == pytest.approx(loss, rel=1e-5), layout
        assert logged["router/aux/balance"] == pytest.approx(balance, rel=1e-5), layout
        assert logged["router/aux/z"] == pytest.approx(z, rel=1e-5), layout
        assert logged["router/aux/weighted"] == pytest.approx(BALANCE * balance + Z * z, rel=1e-5), layout
        found = torch.load(run / "step.pt")["gradients"]
        assert found.keys() == expected.keys(), layout
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            # Measured: 7e-7 at most, float32 against float64.
            assert error < 1e-5, (layout, name, error)


def test_dropout_repeats_in_the_pass_that_counts(base: Path, rows: Path, tmp_path: Path) -> None:
    """With accumulation the loads come from an extra pass: exactly those of the passes that train."""
    sections = {"training": cut(False, "one by one"), "trainable": {"lora": {"dropout": 0.5}}}
    ready, _ = ready_to_step(write(tmp_path, "run", base, rows, **sections))
    auxiliary = ready.trainer.auxiliary
    assert auxiliary is not None
    with RouterCapture(ready.trainer.model, num_experts=EXPERTS, top_k=TOP_K) as capture:
        ready.trainer.train()
        trained = capture.snapshot("train")
    assert auxiliary._totals is not None
    counts, tokens = auxiliary._totals
    assert tokens == trained.tokens
    assert torch.equal(counts, trained.counts)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_resumes_exactly(base: Path, rows: Path, tmp_path: Path) -> None:
    """With dropout, accumulation and trained routers: random state, optimizer and routers come back."""
    training: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    training |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    trainable = {"lora": {"dropout": 0.2}, "router": True, "router_learning_rate": 5e-3}
    recipe = write(tmp_path, "run", base, rows, training=training, trainable=trainable)
    ran = run_finetune("train", recipe)
    assert ran.status == 0
    assert "routers are frozen" not in ran.stdout
    expected = losses(tmp_path / "run")
    assert len(expected) == 4
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    assert run_finetune("train", recipe, "--resume").status == 0
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize(("method", "moves"), [("attention_lora", "the attention"), ("non_moe", "attention, norms")])
def test_what_a_frozen_router_leaves_to_move_is_said(
    base: Path, rows: Path, tmp_path: Path, method: str, moves: str
) -> None:
    ran = run_finetune("train", write(tmp_path, "run", base, rows, trainable={"method": method}))
    assert ran.status == 0, ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if "router.aux" in line]
    assert line.startswith(f"router.aux: train only moves {moves}")
    assert line.endswith(": the routers are frozen (trainable.router: true trains them)")
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "router/aux/weighted" in logged
