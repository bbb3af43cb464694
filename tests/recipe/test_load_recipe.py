"""Reading recipes: paths, defaults, the way back to YAML, and the message of every fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe, resolved_yaml
from tests.recipe.recipe_texts import SMALLEST, faults_of, message, write


def test_the_smallest_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST))
    assert recipe.model_dump() == {
        "model": {
            "path": "some/model",
            "revision": None,
            "dtype": "auto",
            "attn_implementation": "auto",
            "experts_backend": "auto",
            "fused_layers": "auto",
            "device": "auto",
        },
        "quantization": {"experts": "nf4", "attention": "nf4"},
        "trainable": {
            "method": "attention_lora",
            "lora": {
                "r": 16,
                "alpha": 32,
                "dropout": 0.0,
                "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
                "use_rslora": False,
                "use_dora": False,
            },
            "router": False,
            "router_learning_rate": None,
        },
        "data": {
            "train": "some/data",
            "train_split": "train",
            "more": (),
            "train_weight": 1.0,
            "mixture": "all_exhausted",
            "streaming": False,
            "eval": None,
            "eval_split": None,
            "eval_fraction": None,
            "eval_rows": None,
            "format": "auto",
            "columns": {},
            "roles": {},
            "template": "auto",
            "loss_on": "all",
            "too_long": "truncate",
            "deduplicate": "off",
            "max_refused": 0.05,
            "tokens_per_batch": None,
            "max_rows": None,
            "max_eval_rows": None,
        },
        "training": {
            "learning_rate": 2e-4,
            "gradient_checkpointing": "auto",
            "seed": 42,
            "logging_steps": 10,
            "logging_nan_inf_filter": False,
        },
        "memory": {"budget_gib": None},
        "router": {
            "log": True,
            "metrics": "brief",
            "probe_tokens": 4096,
            "probe_every": None,
            "alarms": {"action": "warn", "load_change": 40.0, "dead_experts": True, "entropy": 0.5},
            "aux": "monitor",
            "balance_coef": 0.01,
            "z_coef": 0.001,
            "figures": True,
        },
        "logging": {
            "wandb": "disabled",
            "tensorboard": False,
            "trackio": False,
            "project": "moe-qlora",
            "run_name": None,
        },
        "output": {"dir": "out", "push_to_hub": None},
    }


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    empty = "router:\nquantization:\n  # experts: nf4\ntraining:\ntrainable:\n  lora:\n"
    assert load_recipe(write(tmp_path, SMALLEST + empty)) == load_recipe(write(tmp_path, SMALLEST))


def test_relative_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes" / "tiny"
    folder.mkdir(parents=True)
    text = "model: {path: ./model}\ndata: {train: ../data.jsonl, eval: ./x/../held.jsonl}\noutput: {dir: ./out}\n"
    write(folder, text)
    monkeypatch.chdir(tmp_path)
    for spelled in (Path("recipes/tiny/r.yaml"), folder / "r.yaml"):
        recipe = load_recipe(spelled)
        assert recipe.model.path == str(folder / "model")
        assert recipe.data.train == str(tmp_path / "recipes" / "data.jsonl")
        assert recipe.data.eval == str(folder / "held.jsonl")
        assert recipe.output.dir == "./out"


def test_relative_paths_on_the_command_line_start_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, SMALLEST)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(path, ["model.path=./model"]).model.path == str(tmp_path / "elsewhere" / "model")


def test_other_paths_stay_as_written_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    text = (
        SMALLEST.replace("some/model", "~/models/m")
        .replace("some/data", ".hidden/data")
        .replace("dir: out", "dir: ~/out")
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.model.path == "/home/somebody/models/m"
    assert recipe.data.train == ".hidden/data"
    assert recipe.output.dir == "/home/somebody/out"


def test_resolved_yaml_reads_back_to_an_equal_recipe_from_anywhere(tmp_path: Path) -> None:
    text = (
        'model: {path: ./m, revision: "010"}\ndata: {train: a, eval_split: "no"}\noutput: {dir: o}\n'
        'training: {learning_rate: "1e-5", optim: sgd, lr_scheduler_kwargs: {num_cycles: 2, note: "null"}}\n'
    )
    recipe = load_recipe(write(tmp_path, text))
    (tmp_path / "deeper").mkdir()
    resolved = resolved_yaml(recipe)
    assert load_recipe(write(tmp_path / "deeper", resolved)) == recipe
    sections = [line[:-1] for line in resolved.splitlines() if line.endswith(":") and line[0] != " "]
    assert sections == [
        "model",
        "quantization",
        "trainable",
        "data",
        "training",
        "memory",
        "router",
        "logging",
        "output",
    ]


def test_every_fault_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = (
        "modle:\n  path: x\n"
        "model:\n  path: some/model\n  dtype: bf16\n"
        "trainable:\n  lora:\n    r: 0\n    target_modules: [q_proj, 3]\n"
        "data:\n  tran: x\n"
        "training:\n  learning_rat: 1\n  max_steps: ten\n"
    )
    faults = faults_of(tmp_path, text, ["training.seed=x"])
    assert [(fault.what, str(fault.where).replace(f"{tmp_path}/", "")) for fault in faults] == [
        ("`model.dtype` cannot be 'bf16'", "r.yaml:5: model.dtype"),
        ("`trainable.lora.r` cannot be 0", "r.yaml:8: trainable.lora.r"),
        ("`trainable.lora.target_modules[1]` cannot be 3", "r.yaml:9: trainable.lora.target_modules[1]"),
        ("the key `data.train` is missing", "r.yaml:10: data.train"),
        ("unknown key `tran` in `data`", "r.yaml:11: data.tran"),
        ("unknown key `learning_rat` in `training`", "r.yaml:13: training.learning_rat"),
        ("`training.max_steps` cannot be 'ten'", "r.yaml:14: training.max_steps"),
        ("`training.seed` cannot be 'x'", "--set training.seed=x"),
        ("the section `output` is missing", "r.yaml:1: output"),
        ("unknown section `modle`", "r.yaml:1: modle"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "modell: 3",
            "unknown section `modell`\n  where: r.yaml:7: modell\n"
            "  allowed: model, quantization, trainable, data, training, memory, router, logging, output\n"
            "  fix: write `model`",
        ),
        (
            "learning_rate: 3",
            "unknown section `learning_rate`\n  where: r.yaml:7: learning_rate\n"
            "  allowed: model, quantization, trainable, data, training, memory, router, logging, output\n"
            "  fix: move it to `training.learning_rate`",
        ),
        (
            "quantization:\n  atention: nf4",
            "unknown key `atention` in `quantization`\n  where: r.yaml:8: quantization.atention\n"
            "  allowed: experts, attention\n  fix: write `attention`",
        ),
        (
            "trainable:\n  r: 8",
            "unknown key `r` in `trainable`\n  where: r.yaml:8: trainable.r\n"
            "  allowed: method, lora, router, router_learning_rate\n  fix: move it to `trainable.lora.r`",
        ),
        (
            "router:\n  zzz: 8",
            "unknown key `zzz` in `router`\n  where: r.yaml:8: router.zzz\n"
            "  allowed: log, metrics, probe_tokens, probe_every, alarms, aux, balance_coef, z_coef, figures\n"
            "  fix: remove it",
        ),
        (
            "quantization:\n  attention: 4bit",
            "`quantization.attention` cannot be '4bit'\n  where: r.yaml:8: quantization.attention\n"
            "  allowed: 'nf4' or '16bit'\n  fix: write `16bit`",
        ),
        (
            "memory:\n  budget_gib: 0",
            "`memory.budget_gib` cannot be 0\n  where: r.yaml:8: memory.budget_gib\n  allowed: greater than 0",
        ),
        (
            "memory:\n  budget: 40",
            "unknown key `budget` in `memory`\n  where: r.yaml:8: memory.budget\n"
            "  allowed: budget_gib\n  fix: write `budget_gib`",
        ),
        (
            "router:\n  log: yes",
            "`router.log` cannot be 'yes'\n  where: r.yaml:8: router.log\n"
            "  allowed: true or false\n  fix: write `true`",
        ),
        (
            "router:\n  balance_coef: -0.1",
            "`router.balance_coef` cannot be -0.1\n  where: r.yaml:8: router.balance_coef\n"
            "  allowed: greater than or equal to 0",
        ),
        (
            "trainable:\n  lora:\n    dropout: 1",
            "`trainable.lora.dropout` cannot be 1\n  where: r.yaml:9: trainable.lora.dropout\n  allowed: less than 1",
        ),
        (
            "trainable:\n  lora:\n    r: 8.0",
            "`trainable.lora.r` cannot be 8.0\n  where: r.yaml:9: trainable.lora.r\n  allowed: a whole number",
        ),
        (
            "trainable:\n  lora:\n    r: true",
            "`trainable.lora.r` cannot be true\n  where: r.yaml:9: trainable.lora.r\n  allowed: a whole number",
        ),
        (
            "trainable:\n  lora:\n    target_modules: q_proj",
            "`trainable.lora.target_modules` cannot be 'q_proj'\n  where: r.yaml:9: trainable.lora.target_modules\n"
            "  allowed: a list",
        ),
        (
            "trainable:\n  lora:\n    target_modules: [q_proj, q_proj]",
            "q_proj named twice\n  where: r.yaml:9: trainable.lora.target_modules\n  fix: name each module once",
        ),
        (
            "trainable:\n  lora:\n    target_modules: all-linear",
            "cannot train 'all-linear' with LoRA: it would attach to the router and to the experts, which are "
            "frozen in 4 bits\n"
            "  where: r.yaml:9: trainable.lora.target_modules\n"
            "  allowed: q_proj, k_proj, v_proj, o_proj\n"
            "  fix: write target_modules: [q_proj, k_proj, v_proj, o_proj], which is all that takes LoRA here, or "
            "leave the key out; trainable.method: non_moe trains everything but the experts in full",
        ),
        (
            "trainable:\n  lora:\n    target_modules: [w1, q_proj]",
            "cannot train 'w1' with LoRA: the experts are frozen in 4 bits, LoRA trains the attention only\n"
            "  where: r.yaml:9: trainable.lora.target_modules\n"
            "  allowed: q_proj, k_proj, v_proj, o_proj\n  fix: remove it",
        ),
        (
            "trainable:\n  lora:\n    target_modules: [q_proj, qproj]",
            "cannot train 'qproj' with LoRA: the attention has no projection of that name\n"
            "  where: r.yaml:9: trainable.lora.target_modules\n"
            "  allowed: q_proj, k_proj, v_proj, o_proj\n  fix: did you mean 'q_proj'?",
        ),
        (
            "memory:\n  budget_gib: 1e308",
            "`memory.budget_gib` cannot be 1e+308\n  where: r.yaml:8: memory.budget_gib\n"
            "  allowed: less than or equal to 1000000",
        ),
        (
            "logging: offline",
            "`logging` is a section, and cannot be 'offline'\n  where: r.yaml:7: logging\n"
            "  allowed: a mapping: one indented key a line\n  fix: write keys under `logging:`",
        ),
        (
            "training: [1]",
            "`training` is a section, and cannot be a list\n  where: r.yaml:7: training\n"
            "  allowed: a mapping: one indented key a line\n  fix: write keys under `training:`",
        ),
        (
            "trainable:\n  router_learning_rate: 0.001",
            "`trainable.router_learning_rate` is the routers', and they do not train\n"
            "  where: r.yaml:8: trainable.router_learning_rate\n  allowed: null\n"
            "  fix: remove it, or set `trainable.router: true`",
        ),
        (
            "router:\n  aux: train\n  balance_coef: 0\n  z_coef: 0.0",
            "`router.aux: train` has nothing to train on: `router.balance_coef` and `router.z_coef` are both 0\n"
            "  where: r.yaml:8: router.aux\n  allowed: off, monitor\n"
            "  fix: set one of the coefficients, or `router.aux: monitor`",
        ),
        (
            "trainable:\n  method: non_moe",
            "`trainable.method: non_moe` trains the attention in full, and NF4 weights cannot be trained\n"
            "  where: r.yaml:1: quantization.attention\n  allowed: 16bit\n"
            "  fix: set `quantization.attention: 16bit`, or train with `trainable.method: attention_lora`",
        ),
        (
            "training:\n  eval_strategy: epoch",
            "`training.eval_strategy` asks for evaluation, and there is nothing to evaluate on\n"
            "  where: r.yaml:8: training.eval_strategy\n"
            "  fix: set `data.eval`, `data.eval_split` or `data.eval_fraction`, or `training.eval_strategy: no`",
        ),
        (
            "router:\n  log: true\nrouter:\n  log: true",
            "`router` is written twice, first at r.yaml:7\n  where: r.yaml:9: router\n  fix: keep one of the two",
        ),
    ],
)
def test_messages(tmp_path: Path, line: str, expected: str) -> None:
    assert message(tmp_path, SMALLEST + line).replace(f"{tmp_path}/", "") == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "  eval_rows: 5\n  eval_fraction: 0.1\n",
            "`eval_fraction` and `eval_rows` both say how many conversations are held out\n"
            "  where: r.yaml:5: data.eval_rows\n  fix: keep one of the two",
        ),
        (
            "  eval_rows: 5\n  eval: b\n",
            "`eval_rows` draws the held-out conversations from `train`, and `eval` names others\n"
            "  where: r.yaml:5: data.eval_rows\n  fix: keep one of the two",
        ),
        (
            "  more:\n    - {path: b, wieght: 2}\n",
            "unknown key `wieght` in `data.more[0]`\n  where: r.yaml:6: data.more[0].wieght\n"
            "  allowed: path, split, weight, format, columns, roles, max_rows\n  fix: write `weight`",
        ),
        (
            "  tokens_per_batch: 4096\ntraining:\n  packing: true\n",
            "`training.packing` fills rows to `training.max_length`; batches by tokens are of rows as they are\n"
            "  where: r.yaml:5: data.tokens_per_batch\n  fix: remove one of the two",
        ),
    ],
)
def test_messages_of_the_data_section(tmp_path: Path, lines: str, expected: str) -> None:
    text = SMALLEST.replace("  train: some/data\n", "  train: some/data\n" + lines)
    assert message(tmp_path, text).replace(f"{tmp_path}/", "") == expected


def test_further_sources_start_at_the_recipes_folder(tmp_path: Path) -> None:
    lines = "  train: ./a.jsonl\n  more:\n    - {path: ../b.jsonl, weight: 2}\n    - {path: some/set}\n"
    text = SMALLEST.replace("  train: some/data\n", lines)
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = load_recipe(write(folder, text))
    assert [source.path for source in recipe.data.more] == [str(tmp_path / "b.jsonl"), "some/set"]
    assert [source.weight for source in recipe.data.more] == [2, 1]


def test_a_missing_key_and_a_missing_section(tmp_path: Path) -> None:
    assert message(tmp_path, SMALLEST.replace("  path: some/model\n", "")) == (
        "the key `model.path` is missing\n  where: r.yaml:1: model.path\n  fix: add `path:` under `model:`"
    )
    assert message(tmp_path, SMALLEST.replace("output:\n  dir: out\n", "")) == (
        "the section `output` is missing\n  where: r.yaml:1: output\n  fix: add `output:` with `dir`"
    )


def test_an_empty_text_is_no_path(tmp_path: Path) -> None:
    only = message(tmp_path, SMALLEST.replace("some/model", "''"))
    assert only.startswith("`model.path` cannot be ''\n  where: r.yaml:2: model.path\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the recipe is empty\n  where: r.yaml\n  fix: start from a file in recipes/"),
        (b"# only a comment\n", "the recipe is empty\n  where: r.yaml\n  fix: start from a file in recipes/"),
        (b"---\nnull\n", "the recipe is empty\n  where: r.yaml\n  fix: start from a file in recipes/"),
        (
            b"\n- model\n",
            "a recipe is a mapping of sections, and this is a list\n  where: r.yaml:2\n"
            "  fix: start from a file in recipes/",
        ),
        (
            b"model:\n  path: caf\xe9\n",
            "the recipe is not UTF-8 text\n  where: r.yaml:2\n  fix: save it as UTF-8",
        ),
        (
            b"model:\n  path: [\n",
            "not valid YAML: expected the node content, but found '<stream end>'\n  where: r.yaml:3:1\n"
            "  fix: correct the line, or quote the text in it",
        ),
        (
            b"x" * 1_000_001,
            "more than 1,000,000 bytes, and so not a recipe\n  where: r.yaml\n  fix: name a recipe file",
        ),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    assert message(tmp_path, content) == expected


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, b"\xef\xbb\xbf" + SMALLEST.encode())).output.dir == "out"


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "none.yaml"): ("No such file or directory", "check the path"),
        str(tmp_path): ("Is a directory", "name the .yaml file in it"),
        str(write(tmp_path, SMALLEST) / "x"): ("Not a directory", "check the path"),
    }
    for path, (reason, fix) in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == f"cannot read the recipe: {reason}\n  where: {path}\n  fix: {fix}"
    with pytest.raises(RecipeError, match="embedded null byte"):
        load_recipe("a\0b")


def test_a_pipe_is_read_like_a_file() -> None:
    reading, writing = os.pipe()
    os.write(writing, SMALLEST.encode())
    os.close(writing)
    assert load_recipe(f"/dev/fd/{reading}").output.dir == "out"
    os.close(reading)
