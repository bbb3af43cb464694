"""`finetune evaluate --tasks` with tasks and data of the test's own: scores beside those worked out by hand.

Needs the extra `harness`, whose installation takes longer than these tests: `scripts/test_harness.sh` brings it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import LoadedModel, load_base, load_tokenizer
from tests.export.tunings import tuned
from tests.running import refused, run_finetune

CHOICES = ("red house", "blue river", "green field", "black horse")
QUESTIONS = [
    {"question": f"What is number {number} of the list?", "choices": list(CHOICES), "answer": number % 4}
    for number in range(12)
]
PROMPTS = [f"Question: {row['question']}\nAnswer:" for row in QUESTIONS]
SOLVED = {"question": "What is the colour of grass?", "choices": list(CHOICES), "answer": 1}
PAGES = [{"page": f"The {word} went down to the river, and there it stayed."} for word in ("fox", "old man", "sun")]

MULTIPLE_CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl, train: {folder}/solved.jsonl}}, cache_dir: {folder}/c}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
metadata: {{version: 3}}
"""
ROLLING = """
task: own_pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pages.jsonl}}, cache_dir: {folder}/c}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1}}
"""
GENERATED = """
task: own_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.jsonl}}, cache_dir: {folder}/c}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: said
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def adapter(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    """An adapter that changes much, and the model it stays on."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    return folder, tuned(small_mixtral, folder, scale=0.3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in (("choice", MULTIPLE_CHOICE), ("pages", ROLLING), ("answer", GENERATED)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "solved.jsonl").write_text(lines([SOLVED]))
    (folder / "questions.jsonl").write_text(lines(QUESTIONS))
    (folder / "pages.jsonl").write_text(lines(PAGES))
    return folder


def log_probabilities(model: Any, tokens: Sequence[int], first: int) -> list[float]:
    """Of each token from `first` on, given those before it: one row by itself, in float64 from the logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].double()
    return [float(logits[at - 1].log_softmax(-1)[tokens[at]]) for at in range(first, len(tokens))]


def of_choices(model: Any, tokenizer: Any, prompts: Sequence[str], between: str = " ") -> dict[str, float]:
    """Means over the first questions, each with its prompt; `between` stands before a choice."""
    found = {"acc": 0.0, "acc_norm": 0.0, "brier_score": 0.0}
    for row, prompt in zip(QUESTIONS, prompts, strict=False):
        special = not prompt.startswith(tokenizer.bos_token)
        start = len(tokenizer(prompt, add_special_tokens=special)["input_ids"])
        rows = [tokenizer(prompt + between + choice, add_special_tokens=special)["input_ids"] for choice in CHOICES]
        sums = [sum(log_probabilities(model, tokens, start)) for tokens in rows]
        a_letter = [total / len(choice) for total, choice in zip(sums, CHOICES, strict=True)]
        shares = torch.tensor(sums, dtype=torch.float64).softmax(0).tolist()
        found["acc"] += sums.index(max(sums)) == row["answer"]
        found["acc_norm"] += a_letter.index(max(a_letter)) == row["answer"]
        found["brier_score"] += sum((share - (at == row["answer"])) ** 2 for at, share in enumerate(shares))
    return {name: total / len(prompts) for name, total in found.items()}


def of_pages(model: Any, tokenizer: Any) -> dict[str, float]:
    nll, size = 0.0, 0
    for row in PAGES:
        # The harness puts the first token before a text that already begins with it.
        tokens = [tokenizer.bos_token_id, *tokenizer(row["page"])["input_ids"]]
        nll -= sum(log_probabilities(model, tokens, 1))
        size += len(row["page"].encode())
    return {"byte_perplexity": math.exp(nll / size)}


def by_hand(model: Any, tokenizer: Any) -> dict[str, float]:
    return of_choices(model, tokenizer, PROMPTS) | of_pages(model, tokenizer)


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    row = tokenizer(prompt)["input_ids"]
    begun = len(row)
    for _ in range(tokens):
        with torch.no_grad():
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    return str(tokenizer.decode(row[begun:], skip_special_tokens=True))


def scored(model: object, tasks: Path, *more: object, names: str = "own_choice,own_pages") -> dict[str, Any]:
    ran = run_finetune("evaluate", model, "--tasks", names, "--tasks-path", tasks, "--json", "--device", "cpu", *more)
    assert ran.status == 0, ran.stderr
    return ran.document


def values(document: dict[str, Any]) -> dict[str, float]:
    return {score["metric"]: score["value"] for score in document["scores"]}


def test_scores_are_those_of_the_logits(
    adapter: tuple[Path, LoadedModel], small_mixtral: Path, tasks: Path, tmp_path: Path
) -> None:
    """An adapter, its base on its own, and both merges: each as stored, and the merges beside the adapter."""
    folder, live = adapter
    made = scored(folder, tasks, "--batch-size", 5, "--output", tmp_path / "scores.json")
    want = by_hand(live.model, live.tokenizer)
    assert values(made) == pytest.approx(want, rel=1e-5)
    assert json.loads((tmp_path / "scores.json").read_text()) == made

    for form in ("nf4", "bf16"):
        merged = run_finetune("merge", folder, "--output", tmp_path / form, "--format", form, "--device", "cpu")
        assert merged.status == 0, merged.stderr
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    of_bf16 = values(scored(tmp_path / "bf16", tasks))
    assert of_bf16 == pytest.approx(by_hand(plain, live.tokenizer), rel=1e-5)
    of_nf4 = values(scored(tmp_path / "nf4", tasks))
    with live.model.disable_adapter():  # type: ignore[operator]
        of_base = by_hand(live.model, live.tokenizer)
    for name in ("byte_perplexity", "brier_score"):
        moved = abs(want[name] - of_base[name])
        assert moved > 1e-3 * want[name]
        assert abs(of_nf4[name] - want[name]) < moved / 10
        assert abs(of_bf16[name] - want[name]) < moved / 10


def test_what_the_document_says(adapter: tuple[Path, LoadedModel], tasks: Path) -> None:
    folder, live = adapter
    made = scored(folder, tasks, "--num-fewshot", 1, "--limit", 5, names="own_choice")
    assert made["tasks"] == ["own_choice"]
    solved = f"Question: {SOLVED['question']}\nAnswer: {CHOICES[1]}\n\n"
    want = of_choices(live.model, live.tokenizer, [solved + prompt for prompt in PROMPTS[:5]])
    assert values(made) == pytest.approx(want, rel=1e-5)
    score = made["scores"][0]
    about = ("task", "version", "shots", "examples", "metric", "filter", "higher_is_better")
    assert [score[name] for name in about] == ["own_choice", 3, 1, 5, "acc", "none", True]
    # The standard error of a mean of hits, from the sample's variance.
    assert score["stderr"] == pytest.approx(math.sqrt(want["acc"] * (1 - want["acc"]) / 4))
    assert made["model"]["kind"] == "adapter"
    assert made["model"]["stored"] == "nf4 experts, nf4 attention"
    assert made["model"]["base"]["fingerprint"] == live.base.fingerprint
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert made["model"]["weights"] == {"adapter_model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert made["harness"]["lm_eval_version"] == version("lm_eval")
    assert made["harness"]["configs"]["own_choice"]["output_type"] == "multiple_choice"


def test_generated_answers(small_mixtral: Path, tasks: Path) -> None:
    """Prompts of several lengths in one batch; what is expected is what one-by-one decoding gave, but for one."""
    model = AutoModelForCausalLM.from_pretrained(small_mixtral, dtype=torch.float32)
    tokenizer = load_tokenizer(str(small_mixtral))
    prompts = ("Tell me", "What is the name of the river", "Once upon a time there was", "No")
    rows = [{"question": prompt, "said": greedy(model, tokenizer, prompt, 6)} for prompt in prompts]
    rows[3]["said"] += "!"
    (tasks / "answers.jsonl").write_text(lines(rows))
    base = load_base(BaseSpec(str(small_mixtral), attention="16bit"), device="cpu")
    made = scored(small_mixtral, tasks, names="own_answer")
    assert values(made) == {"exact_match": 0.75}
    assert made["model"]["stored"] == "float32"
    assert made["model"]["base"]["fingerprint"] == base.base.fingerprint


def test_the_chat_template(adapter: tuple[Path, LoadedModel], tasks: Path) -> None:
    folder, live = adapter
    tokenizer: Any = live.tokenizer
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    made = scored(folder, tasks, "--apply-chat-template", "--limit", 0.25, names="own_choice")
    assert values(made) == pytest.approx(of_choices(live.model, tokenizer, prompts, between=""), rel=1e-5)


def test_the_table(adapter: tuple[Path, LoadedModel], tasks: Path) -> None:
    args = ("--tasks", "own_choice,own_pages", "--tasks-path", tasks, "--limit", 3, "--device", "cpu")
    ran = run_finetune("evaluate", adapter[0], *args)
    assert ran.status == 0, ran.stderr
    for words in (
        f"lm-evaluation-harness {version('lm_eval')}",
        "own_choice",
        "acc_norm",
        "nf4 experts, nf4 attention",
    ):
        assert words in ran.stdout
    assert re.search(r"acc +│ +0\.\d{4} │ 0\.\d{4} │", ran.stdout), ran.stdout


def test_a_group_beside_the_harness_own_tasks(adapter: tuple[Path, LoadedModel], tasks: Path) -> None:
    group = "group: own_group\ntask: [own_choice]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 2}\n"
    (tasks / "group.yaml").write_text(group)
    made = scored(adapter[0], tasks, "--limit", 3, names="own_gr*")
    assert made["tasks"] == ["own_group"]
    of_group, of_task = ([s for s in made["scores"] if s["task"] == name] for name in ("own_group", "own_choice"))
    assert of_group[0]["version"] == "2"
    assert of_group[0]["value"] == of_task[0]["value"]  # of one task: its own


# ---- refused; what is refused before the harness is looked for: tests/evaluate/test_harness.py -------------------


def test_a_task_that_there_is_not(adapter: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    says = ("no task 'hellaswagg'", "nearest: hellaswag")
    refused(tmp_path, "evaluate", adapter[0], "--tasks", "hellaswagg", "--device", "cpu", says=says)


def test_no_task(adapter: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    says = ("no task is named", "--tasks ' , '", "hellaswag,arc_easy")
    refused(tmp_path, "evaluate", adapter[0], "--tasks", " , ", "--device", "cpu", says=says)


def test_a_tokenizer_without_a_chat_template(small_mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(small_mixtral, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    args = ("evaluate", tmp_path / "plain", "--tasks", "own_choice", "--apply-chat-template", "--device", "cpu")
    refused(tmp_path, *args, says=("has no chat template", f"--apply-chat-template: {tmp_path / 'plain'}"))


def test_data_that_cannot_be_fetched(adapter: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(MULTIPLE_CHOICE.format(folder=tmp_path).replace(": json", ": no-one/far-away"))
    args = ("evaluate", adapter[0], "--tasks", "own_choice", "--tasks-path", tmp_path, "--device", "cpu")
    says = ("the data set of task own_choice cannot be fetched", "no-one/far-away", "without HF_HUB_OFFLINE")
    refused(tmp_path, *args, says=says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("unsafe_code: true", "runs the code that the model writes"),
        ("doc_to_image: picture", "shows pictures"),
        ("process_docs: !function own.prepare", "needs a package that is not installed: No module named 'not_there'"),
        ("output_type: guess", "own_choice or its data set cannot be read: "),
        ("dataset_kwargs: {data_files: {test: gone.jsonl}}", "gone.jsonl"),
    ],
)
def test_tasks_that_do_not_go(
    adapter: tuple[Path, LoadedModel], tasks: Path, tmp_path: Path, line: str, says: str
) -> None:
    key = line.split(":")[0]
    kept = [old for old in MULTIPLE_CHOICE.format(folder=tasks).splitlines() if not old.startswith(f"{key}:")]
    (tmp_path / "task.yaml").write_text("\n".join([*kept, line]))
    (tmp_path / "own.py").write_text("import not_there\n")
    args = ("evaluate", adapter[0], "--tasks", "own_choice", "--tasks-path", tmp_path, "--device", "cpu")
    refused(tmp_path, *args, says=(says, "--tasks"))
