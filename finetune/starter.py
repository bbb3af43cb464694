"""A recipe for a model, a data set and a card: `finetune init`.

The choices are those that an experienced colleague would start from, each with its reason in a comment of the file, and
each from a measurement: the length of a row from the data's own tokens, the micro-batch from the memory estimate, the
accumulation and the epochs from how much there is to learn. Nothing is written before data and estimate have passed.

Leaves out what only a trial shows: the best learning rate and rank (docs/choosing.md).
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.console import gib
from finetune.data import apply_template, document, prepare_data, require_sound
from finetune.disk import write_text
from finetune.errors import DeviceError, FinetuneError
from finetune.memory import MemoryEstimate, preflight
from finetune.moe import BaseSpec, check_base, load_tokenizer_of
from finetune.recipe import SCHEMA, Recipe, load_recipe

_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_COVERED = 0.99  # share of the conversations that fit into a row whole
_MICRO_BATCHES = (8, 4, 2, 1)
_TOKENS_PER_STEP = 8192  # as the classic recipes: 8 x 1024
_CONVERSATIONS_PER_STEP = 8  # where there are too few to fill rows with
_STEPS_AT_LEAST = 20  # of an epoch: fewer updates teach little
_FEW_TOKENS = 2_000_000  # below this, three epochs
_NARROW = 1024  # a model below this hidden size takes, and needs, a larger learning rate


@dataclass(frozen=True)
class Wish:
    """What the user says.

    Attributes:
        model, data: folder or file, or hub id.
        columns: our name of a column to the data's, where the form is not recognized.
        gpu_gib: memory of the card to train on; None for the machine at hand.
        device: "cuda" or "cpu".
    """

    model: str
    data: str
    columns: dict[str, str]
    gpu_gib: float | None
    device: str


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it was chosen from."""

    wish: Wish
    rows: int
    tokens: int
    hidden_size: int
    covered: float
    held_out: int
    length: int
    packing: bool = True
    micro_batch: int = 1
    accumulation: int = 1
    epochs: int = 1

    @property
    def steps(self) -> int:
        """Of one epoch, about."""
        return max(1, self.examples // (self.micro_batch * self.accumulation))

    @property
    def examples(self) -> int:
        """What a batch is made of: packed rows, or conversations."""
        return self.tokens // self.length if self.packing else self.rows - self.held_out


def write_starter(wish: Wish, target: Path) -> tuple[Plan, MemoryEstimate, dict[str, Any]]:
    """Writes a recipe that `finetune data check` and `finetune preflight` accept.

    Returns:
        what was chosen, its memory estimate, and the report on the data (`finetune data check --json`).

    Raises:
        FinetuneError: the file exists; the model, its tokenizer or the data cannot be read, or the data teach nothing.
        DeviceError: no micro-batch fits.
    """
    if target.exists():
        raise FinetuneError("there is a file already", where=str(target), fix="name another with --output")
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "recipe.yaml"
        plan, report = _measured(wish, draft)
        plan, memory = _fitting(plan, draft, report["parts"][0]["lengths"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, recipe_text(plan, target))
    return plan, memory, report


def _measured(wish: Wish, draft: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan before any choice that memory decides, and the report on the data, no row of which is cut."""
    plan = Plan(wish, rows=0, tokens=0, hidden_size=_NARROW, covered=1, held_out=1, length=_LENGTHS[-1])
    recipe = _loaded(plan, draft)
    base = BaseSpec(recipe.model.path, recipe.model.revision, recipe.quantization.attention)
    _, arch = check_base(base)
    tokenizer = load_tokenizer_of(base, arch)
    template = apply_template(tokenizer, recipe.data.template)
    report = document(recipe, prepare_data(recipe, tokenizer), name=wish.data, template=template)
    require_sound(report)
    used = sum(part["used"] for part in report["parts"])
    tokens = report["parts"][0]["tokens"]
    return replace(plan, rows=used, tokens=tokens, hidden_size=arch.hidden, held_out=held_out(used)), report


def _fitting(measured: Plan, draft: Path, lengths: dict[str, Any]) -> tuple[Plan, MemoryEstimate]:
    """The longest row that the data want and the card holds, with the largest micro-batch that fits."""
    wanted = next((length for length in _LENGTHS if covered(lengths, length) >= _COVERED), _LENGTHS[-1])
    wish = measured.wish
    bytes_given = None if wish.gpu_gib is None else int(wish.gpu_gib * 2**30)
    for length in reversed(_LENGTHS[: _LENGTHS.index(wanted) + 1]):
        for micro_batch in _MICRO_BATCHES:
            plan = paced(replace(measured, length=length, covered=covered(lengths, length)), micro_batch)
            memory = preflight(_loaded(plan, draft), torch.device(wish.device), device_bytes=bytes_given)
            if memory.fits:
                return plan, memory
    assert memory.device_bytes is not None, "what is not known fits"
    raise DeviceError(
        f"the model does not fit: one row of {length} tokens needs {gib(memory.total_bytes)}, and the device has "
        f"{gib(memory.device_bytes)}",
        where=wish.model,
        fix="take a larger card or a smaller model; `finetune recipe list` says which model trains on which card",
    )


def paced(plan: Plan, micro_batch: int) -> Plan:
    """With a step and a number of epochs that suit how much there is to learn."""
    plan = replace(plan, packing=plan.tokens // plan.length >= 4 * _STEPS_AT_LEAST)
    most = _TOKENS_PER_STEP // plan.length if plan.packing else _CONVERSATIONS_PER_STEP
    examples = max(1, min(most, plan.examples // _STEPS_AT_LEAST))
    micro_batch = min(micro_batch, 2 ** (examples.bit_length() - 1))
    epochs = 3 if plan.tokens < _FEW_TOKENS else 1
    return replace(plan, micro_batch=micro_batch, accumulation=examples // micro_batch, epochs=epochs)


def covered(lengths: dict[str, Any], length: int) -> float:
    """Share of the conversations that are surely no longer than `length` tokens, by the report's histogram."""
    if lengths["longest"] <= length:
        return 1.0
    bins = lengths["histogram"]
    return sum(each["rows"] for each in bins if each["to"] - 1 <= length) / sum(each["rows"] for each in bins)


def held_out(rows: int) -> int:
    """Conversations to evaluate on: a tenth, and 200 at most."""
    return min(200, max(1, rows // 10))


def _loaded(plan: Plan, draft: Path) -> Recipe:
    draft.write_text(recipe_text(plan, draft), encoding="utf-8")
    return load_recipe(draft)


def recipe_text(plan: Plan, target: Path) -> str:
    """The file: every choice with its reason. Paths below the recipe's folder are relative to it, others absolute."""
    wish, cpu = plan.wish, plan.wish.device == "cpu"
    card = "the CPU" if cpu else "the GPU at hand" if wish.gpu_gib is None else f"a GPU with {wish.gpu_gib:g} GiB"
    rate = "2e-4" if plan.hidden_size > _NARROW else "2e-3"
    size = "the usual one for LoRA" if plan.hidden_size > _NARROW else "a small model takes ten times the usual 2e-4"
    columns = ", ".join(f"{ours}: {_word(theirs)}" for ours, theirs in wish.columns.items())
    fitting = "every conversation" if plan.covered == 1 else f"{plan.covered:.1%} of the conversations"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        "#",
        f"# QLoRA of {wish.model} on {wish.data}, for {card}. Written by `finetune init`.",
        f"# launch:   finetune train {shlex.quote(str(target))}",
        "",
        "model:",
        f"  path: {_path(wish.model, target)}",
        *(["  device: cpu"] if cpu else []),
        "",
        "quantization:",
        "  experts: nf4 # 4-bit and frozen",
        "  attention: nf4 # 16bit costs 1 to 3 GiB more and is a little closer to the original",
        "",
        "trainable:",
        "  method: attention_lora # or non_moe: everything but the experts, with attention: 16bit",
        "  lora:",
        "    r: 16 # more for much data or a new style; memory hardly changes",
        "    alpha: 32",
        "    target_modules: [q_proj, k_proj, v_proj, o_proj]",
        "",
        "data:",
        f"  train: {_path(wish.data, target)}",
        *([f"  columns: {{{columns}}} # our name: the data's"] if columns else []),
        f"  eval_rows: {plan.held_out} # conversations held out of train, to see whether it learns or memorizes",
        "",
        "training:",
        f"  num_train_epochs: {plan.epochs} # {plan.steps} steps each; where the held-out loss rises, fewer are better",
        *(["  packing: true # short conversations share a row, and do not see each other"] if plan.packing else []),
        *(["  eval_packing: false"] if plan.packing else []),
        f"  max_length: {plan.length} # tokens; {fitting} at most so long; of others the first turns train",
        f"  per_device_train_batch_size: {plan.micro_batch} # rows at a time",
        f"  per_device_eval_batch_size: {plan.micro_batch}",
        f"  gradient_accumulation_steps: {plan.accumulation} # so often, then one step",
        f"  learning_rate: {rate} # {size}",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.03 # below 1: a share of all steps",
        *([] if cpu else ["  bf16: true"]),
        "  gradient_checkpointing: auto # recomputes only what does not fit",
        *(["  dataloader_num_workers: 0 # a worker would compete for the cores"] if cpu else []),
        *(["  dataloader_pin_memory: false"] if cpu else []),
        f"  logging_steps: {min(10, plan.steps)}",
        "  eval_strategy: epoch",
        "  eval_on_start: true # the base's loss, to compare with",
        "  save_strategy: epoch",
        "  save_total_limit: 2",
        "",
        "output:",
        f"  dir: {_word('outputs/' + target.stem)}",
    ]
    return "\n".join(lines) + "\n"


def _path(given: str, target: Path) -> str:
    """As the recipe says it: relative where the file lies below the recipe's folder, absolute, or a hub id."""
    path = Path(given).expanduser()
    if not path.exists():
        return _word(given)
    path, folder = path.absolute(), target.absolute().parent
    return _word(f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else str(path))


def _word(text: str) -> str:
    """A YAML scalar; JSON's quotes are YAML's too."""
    return text if re.fullmatch(r"[\w./@+-]+", text) else json.dumps(text, ensure_ascii=False)
