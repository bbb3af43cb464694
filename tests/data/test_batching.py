"""Packing and batches: by counting real and padded tokens, and by training runs that say which rows they saw.

Measured with the lengths of the bundled set (1,130 conversations, 46 tokens in the mean, 239 at most), 20,000 drawn:
packing at 4096 has 99.7% real tokens, 8 rows by chance 36%, length-grouped 96%, a budget of 4096 tokens 96%.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from finetune.data.batching import (
    RowBatches,
    TokenBudgetBatches,
    pack,
    packing_efficiency,
    padding_efficiency,
    row_lengths,
    shuffled,
    training_batches,
)
from finetune.errors import DataError
from tests.data import loader_run
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "finetune" / "data" / "templates" / "mistral_v1.jinja"
TRAIN = ROOT / "recipes" / "tiny-mixtral" / "data" / "train.jsonl"


@pytest.fixture(scope="module")
def bundled(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of each bundled conversation."""
    rows = [json.loads(line)["messages"] for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    made: Any = tokenizer.apply_chat_template(
        rows, chat_template=TEMPLATE.read_text(encoding="utf-8"), return_dict=True
    )
    return np.array([len(ids) for ids in made["input_ids"]])


@pytest.fixture(scope="module")
def mix(bundled: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).choice(bundled, 20_000)


def numbered(lengths: np.ndarray) -> Dataset:
    """Rows whose tokens are all the row's number."""
    ids = [[number] * int(length) for number, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


# ---- packing --------------------------------------------------------------------------------------------------------


def test_packed_rows_hold_whole_examples_each_once(bundled: np.ndarray) -> None:
    packed = pack(numbered(bundled), 512)
    seen = []
    for row in packed:
        assert row["input_ids"] == row["labels"]
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 512
        begin = 0
        for length in row["seq_lengths"]:
            [number] = set(row["input_ids"][begin : begin + length])
            assert length == bundled[number]
            seen.append(number)
            begin += length
    assert sorted(seen) == list(range(len(bundled)))
    assert packing_efficiency(bundled, 512) == bundled.sum() / (len(packed) * 512)


def test_at_least_98_percent_is_real_at_4096(bundled: np.ndarray, mix: np.ndarray) -> None:
    assert packing_efficiency(mix, 4096) > 0.99
    # The bundled set itself fills 12.7 rows of 4096 tokens, so 13 is as few as there can be.
    assert packing_efficiency(bundled, 4096) == bundled.sum() / (13 * 4096)


def test_lengths_are_those_of_a_selection(mix: np.ndarray) -> None:
    rows = numbered(mix[:2500])
    assert row_lengths(rows).tolist() == mix[:2500].tolist()
    assert row_lengths(rows.select([7, 3, 3])).tolist() == mix[[7, 3, 3]].tolist()
    assert row_lengths(rows.select([])).tolist() == []


def test_examples_that_are_too_long_are_counted_as_packed() -> None:
    assert packing_efficiency([10, 10, 30], 10) == 1.0
    assert packing_efficiency([6, 6], 10) == 0.6


def test_a_selection_is_packed_by_its_own_lengths(mix: np.ndarray) -> None:
    rows = numbered(np.concatenate([mix[:3000], np.full(500, 400)]))
    packed = pack(rows.select(range(3000)), 4096)
    assert mix[:3000].sum() / (len(packed) * 4096) > 0.98


# ---- batches of a token budget --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.integers(0, 60),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
    st.integers(0, 3),
)
@settings(max_examples=400, deadline=None)
def test_every_row_once_within_the_budget_and_as_many_batches_for_each(
    lengths: list[int], more: int, processes: int, multiple: int, epoch: int
) -> None:
    padded = [-(-length // multiple) * multiple for length in lengths]
    budget = max(padded) + more
    seen: list[list[int]] = []
    counts = set()
    for process in range(processes):
        batches = TokenBudgetBatches(
            lengths, budget, seed=1, process=process, processes=processes, pad_to_multiple_of=multiple
        )
        batches.set_epoch(epoch)
        mine = list(batches)
        assert mine == list(batches)
        assert len(mine) == len(batches)
        counts.add(len(mine))
        seen += mine
    assert len(counts) == 1
    assert all(len(batch) * max(padded[row] for row in batch) <= budget for batch in seen)
    rows = [row for batch in seen for row in batch]
    assert set(rows) == set(range(len(lengths)))
    if len(rows) > len(lengths):  # single rows that do not come out even
        assert all(len(batch) == 1 for batch in seen)
        assert len(rows) - len(lengths) < processes


def test_an_epoch_is_shuffled_and_the_next_one_otherwise(mix: np.ndarray) -> None:
    batches = TokenBudgetBatches(mix, 4096, seed=5)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert len(first) == len(second) == len(batches)
    assert [sorted(batch) for batch in first] != [sorted(batch) for batch in second]
    longest = np.array([mix[batch].max() for batch in first])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # long batches are not at one end
    companions = [set(batch) for batch in second]
    of_first = set(first[0])
    assert max(len(of_first & batch) for batch in companions) < len(of_first)
    again = TokenBudgetBatches(mix, 4096, seed=5)
    assert list(again) == first
    assert list(TokenBudgetBatches(mix, 4096, seed=6)) != first


def test_a_row_longer_than_the_budget_is_a_users_mistake() -> None:
    with pytest.raises(DataError) as caught:
        TokenBudgetBatches([10, 2000, 30], 1024)
    text = str(caught.value)
    assert "a batch of 1024 tokens cannot hold the longest row, which has 2000" in text
    assert "where: data.tokens_per_batch" in text
    assert "allowed: 2000 or more" in text
    assert "fix: raise data.tokens_per_batch, or lower training.max_length" in text


def test_padding_efficiency_by_hand() -> None:
    lengths = [10, 10, 10, 5]
    assert padding_efficiency(lengths, batch_size=4) == 35 / 40
    assert padding_efficiency(lengths, batch_size=1) == 1.0
    assert padding_efficiency(lengths, batch_size=1, budget=30) == 35 / 35  # three of ten, and the short one alone


def test_padding_efficiency_on_the_bundled_mix(mix: np.ndarray) -> None:
    random = padding_efficiency(mix, batch_size=8)
    order = np.random.default_rng(1).permutation(mix).reshape(-1, 8)
    assert abs(random - mix.sum() / (order.max(axis=1).sum() * 8)) < 0.01
    assert padding_efficiency(mix, batch_size=8, grouped=True) > 0.9
    assert padding_efficiency(mix, batch_size=8, budget=4096) > 0.95
    assert mix.sum() / (len(TokenBudgetBatches(mix, 4096)) * 4096) > 0.9  # of the budget


# ---- in the trainer -------------------------------------------------------------------------------------------------


KINDS = ("budget", "random", "sequential", "group_by_length")


def seen_by(out: Path, kind: str, process: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{kind}-{process}.json").read_text(encoding="utf-8"))


def epochs_of(seen: list[list[int]], per_epoch: int) -> list[list[list[int]]]:
    return [seen[begin : begin + per_epoch] for begin in range(0, len(seen), per_epoch)]


def rows_of(batches: list[list[int]]) -> list[int]:
    return sorted(row for batch in batches for row in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_takes_the_rows_that_were_left(tmp_path: Path, kind: str) -> None:
    """With accumulation, from within the first epoch and within the second."""
    loader_run.run(tmp_path, kind, 2, 3)
    whole = seen_by(tmp_path, kind)
    per_epoch = whole["per_epoch"]
    in_epoch = -(-per_epoch // 3)  # steps
    assert whole["steps"] == whole["max_steps"] == 2 * in_epoch
    epochs = epochs_of(whole["seen"], per_epoch)
    for epoch in epochs:
        assert rows_of(epoch) == list(range(75))
    assert (epochs[0] != epochs[1]) is (kind != "sequential")
    second = in_epoch + 3 - in_epoch % 3  # the first checkpoint of the second epoch, at a third step
    for saved, batches in ((3, 9), (second, per_epoch + (second - in_epoch) * 3)):
        loader_run.run(tmp_path, kind, 2, 3, checkpoint=tmp_path / kind / f"checkpoint-{saved}")
        assert seen_by(tmp_path, kind)["seen"] == whole["seen"][batches:], saved


@pytest.mark.slow
def test_two_processes_share_an_epoch(tmp_path: Path) -> None:
    """75 rows in batches of four are nine steps of eight rows and one of three."""
    done = subprocess.run(
        [sys.executable, loader_run.__file__, str(tmp_path), "2", *KINDS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        found = [seen_by(tmp_path, kind, process) for process in range(2)]
        assert found[0]["per_epoch"] == found[1]["per_epoch"]
        assert found[0]["steps"] == found[1]["steps"] == found[0]["max_steps"]
        epochs = [epochs_of(one["seen"], one["per_epoch"]) for one in found]
        for mine, other in zip(*epochs, strict=True):
            assert rows_of(mine + other) == list(range(75)), kind
        assert rows_of(found[0]["held_out"] + found[1]["held_out"]) == list(range(75)), kind


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_comes_once_whatever_the_processes(processes: int, size: int) -> None:
    for rows in range(1, 30):
        shares = [
            RowBatches(shuffled(rows, 3), rows, size, process=process, processes=processes)
            for process in range(processes)
        ]
        batches = [list(share) for share in shares]
        steps = -(-rows // (size * processes))
        assert [len(share) for share in shares] == [len(one) for one in batches] == [steps] * processes
        assert all(1 <= len(batch) <= size for one in batches for batch in one)
        own = [one[: share.own] for one, share in zip(batches, shares, strict=True)]
        assert rows_of([batch for one in own for batch in one]) == list(range(rows))
        repeated = sum(len(one) - share.own for one, share in zip(batches, shares, strict=True))
        assert [share.repeated for share in shares] == [repeated] * processes
        if size > 1 and rows >= processes:
            assert repeated == 0


def test_one_process_takes_the_rows_that_upstream_takes(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[number] for number in range(23)]})
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[], seed=7)
    trainer = Trainer(loader_run.Model(), args, train_dataset=rows)
    upstream, batches = trainer.get_train_dataloader(), training_batches(trainer)
    assert batches is not None
    for epoch in (0, 1, 5):
        upstream.set_epoch(epoch)
        batches.set_epoch(epoch)
        assert [batch["input_ids"][:, 0].tolist() for batch in upstream] == list(batches)


def test_length_grouped_batches_are_transformers_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, mix: np.ndarray
) -> None:
    lengths = mix[:400]
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(tiny_model("mixtral"), args, train_dataset=numbered(lengths), processing_class=tokenizer)
    real = padded = 0
    for batch in trainer.get_train_dataloader():
        assert isinstance(batch["input_ids"], torch.Tensor)
        real += int((batch["labels"] != -100).sum())
        padded += batch["input_ids"].numel()
    assert real == lengths.sum()
    assert real / padded == pytest.approx(padding_efficiency(lengths, batch_size=4, grouped=True), abs=0.03)
    assert real / padded > 1.5 * padding_efficiency(lengths, batch_size=4)
