"""Plausible mistakes of a first hour: each is answered by one message that names the way out, and writes nothing.

A row of the table has a name, the files that lie in the folder one works in, the command as one types it, and a regular
expression for the message with its fix (`.` matches a line's end too). MODEL is the folder of the bundled model, in
files and commands.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from finetune.cli import app
from tests.conftest import REPOSITORY
from tests.running import contents, run_finetune

MODEL = str(REPOSITORY / "recipes" / "tiny-mixtral" / "model")


class Mistake(NamedTuple):
    name: str
    files: Mapping[str, str | bytes]
    command: str
    says: str
    status: int = 2  # 1 where a report says what is wrong


def recipe(data: str, more: str = "") -> str:
    """A recipe whose `data` section is this flow mapping, with further sections below."""
    return f"model: {{path: MODEL, device: cpu}}\ndata: {data}\noutput: {{dir: out}}\n{more}"


def checked(name: str, file: str, content: str | bytes, says: str, *, status: int = 2, keys: str = "") -> Mistake:
    """`finetune data check` of a recipe that trains on a file with this content; `keys` are more of `data`."""
    files = {file: content, "recipe.yaml": recipe(f"{{train: ./{file}{keys}}}")}
    return Mistake(name, files, "finetune data check recipe.yaml", says, status)


ROW = '{"question": "What is 1+1?", "answer": "2"}'

DATA = [
    checked("an empty file", "rows.jsonl", "", "the data file is empty.*fix: name a file that holds conversations"),
    checked(
        "UTF-16 as Excel and PowerShell write it",
        "rows.csv",
        "question,answer\na,b\n".encode("utf-16"),
        "the file is UTF-16.*fix: save it as UTF-8: `iconv -f UTF-16",
    ),
    checked(
        "a file that Windows wrote",
        "rows.csv",
        "question,answer\nWo ist das Café?,Da\n".encode("cp1252"),
        "rows.csv row 1: bytes that cannot be read.*fix: save the file as UTF-8.*iconv -f CP1252",
    ),
    checked(
        "UTF-16 without a byte order mark",
        "rows.csv",
        "question,answer\na,b\n".encode("utf-16-le"),
        "the file is UTF-16.*fix: save it as UTF-8: `iconv -f UTF-16",
    ),
    checked(
        "a JSON list under the name of JSON lines",
        "rows.jsonl",
        f"[\n{ROW},\n{ROW}\n]\n",
        "one JSON list over several lines, not one object a line.*fix: name it rows.json, or .*jq -c",
    ),
    checked(
        "an object over several lines in JSON lines",
        "rows.jsonl",
        '{\n  "question": "a",\n  "answer": "b"\n}\n',
        "rows.jsonl line 1: not valid JSON: it ends in the middle of a value.*fix: write one object a line",
    ),
    checked(
        "Python's dicts as they are printed",
        "rows.jsonl",
        "{'question': 'a', 'answer': 'b'}\n",
        "not valid JSON.*fix: these are Python's dicts.*json.dumps",
    ),
    checked(
        "a quote that is never closed",
        "rows.csv",
        'question,answer\n"a,b\n',
        "row 1: not CSV: unexpected end of data.*fix: write cells as a CSV library does.*double quotes",
    ),
    checked(
        "a comma outside quotes",
        "rows.csv",
        "question,answer\na,b\nYes, or no?,no\n",
        "more or fewer cells than the header's 2; a text with commas in it goes in double quotes.*row 2.*fix: ",
        status=1,
    ),
    checked(
        "plain text", "rows.txt", "Once upon a time", "ends in '.txt' is not read.*fix: write questions and answers"
    ),
    checked("a spreadsheet", "rows.xlsx", b"PK\3\4", "ends in '.xlsx' is not read.*fix: save the sheet as CSV"),
    checked("an archive", "rows.zip", b"PK\3\4", "ends in '.zip' is not read.*fix: unpack it"),
    checked(
        "a list of rows with a comma missing",
        "rows.json",
        f"[{ROW}\n{ROW}]",
        "not valid JSON: Expecting ',' delimiter: line 2.*fix: correct the file, or name it .jsonl",
    ),
    checked(
        "columns of other names",
        "rows.csv",
        "Frage,Antwort\na,b\n",
        "no column holds conversations; the columns are: Frage, Antwort.*"
        "fix: name the columns with question and answer: data.columns: {prompt: Frage, completion: Antwort}",
    ),
    checked(
        "two columns that could be the answer",
        "rows.csv",
        "question,answer,response\na,b,c\n",
        "`answer` and `response` could each be the answer.*fix: .*data.columns: {prompt: question, completion: answer}",
    ),
    checked(
        "data.columns the other way round",
        "rows.csv",
        "question,answer\na,b\n",
        "written the other way round: our name comes first.*fix: write data.columns: "
        "{prompt: question, completion: answer}",
        keys=", columns: {question: prompt, answer: completion}",
    ),
    checked(
        "a misspelled column in data.columns",
        "rows.csv",
        "question,answer\na,b\n",
        "data.columns.prompt needs a column `qestion`; the columns are: question, answer.*"
        "write data.columns: {prompt: question, completion: answer}",
        keys=", columns: {prompt: qestion, completion: answer}",
    ),
    checked(
        "data.roles the other way round",
        "rows.jsonl",
        '{"messages": [{"role": "customer", "content": "a"}, {"role": "agent", "content": "b"}]}\n',
        "written the other way round: the role in your data comes first.*"
        "fix: write data.roles: {customer: user, agent: assistant}",
        keys=", roles: {user: customer, assistant: agent}",
    ),
    checked(
        "a role that nobody knows",
        "rows.jsonl",
        '{"messages": [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        "role 'customer' is unknown; if it is the user's, set data.roles: {customer: user}.*fix: ",
        status=1,
    ),
    checked(
        "questions without an answer",
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        "no assistant turn, so nothing to learn.*rows.jsonl line 1.*fix: correct them, let `finetune data check",
        status=1,
    ),
    checked(
        "pairs for training on preferences",
        "rows.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "not done here.*fix: to train on the chosen answers alone, set data.columns: {completion: chosen}",
    ),
    Mistake(
        "a folder without data",
        {"rows/read.me": "hello", "recipe.yaml": recipe("{train: ./rows}")},
        "finetune data check recipe.yaml",
        "the folder holds no data files.*fix: name a folder with data files",
    ),
    Mistake(
        "a data file that is not there",
        {"rows.jsonl": ROW, "recipe.yaml": recipe("{train: ./row.jsonl}")},
        "finetune data check recipe.yaml",
        "there is no data file 'row.jsonl'.*what is there: rows.jsonl.*fix: check the path",
    ),
]

RECIPE = recipe("{train: ./rows.jsonl}")


def of_recipe(name: str, text: str, says: str, *, options: str = "") -> Mistake:
    """`finetune train` of this recipe, beside which its data lies."""
    return Mistake(name, {"recipe.yaml": text, "rows.jsonl": ROW}, f"finetune train recipe.yaml {options}", says)


RECIPES = [
    Mistake(
        "a recipe that is not there", {}, "finetune train none.yaml", "cannot read the recipe.*fix: check the path"
    ),
    Mistake(
        "a folder instead of a recipe",
        {"recipes/mine.yaml": RECIPE},
        "finetune train recipes",
        "cannot read the recipe: Is a directory.*fix: name the .yaml file in it",
    ),
    of_recipe(
        "tabs", "model:\n\tpath: MODEL\n", "'\\\\t' that cannot start any token.*recipe.yaml:2:1.*fix: correct the line"
    ),
    of_recipe(
        "a section twice",
        f"{RECIPE}model: {{path: x}}\n",
        "`model` is written twice, first at.*fix: keep one of the two",
    ),
    of_recipe(
        "a bracket that is not closed",
        RECIPE.replace("cpu}", "cpu"),
        "not valid YAML: expected ',' or '}'.*recipe.yaml:2:.*fix: correct the line",
    ),
    of_recipe("an empty recipe", "", "the recipe is empty.*fix: start from a file in recipes/"),
    of_recipe(
        "keys of another trainer",
        f"{RECIPE}training: {{epochs: 3, lr: 1e-4, batch_size: 4}}\n",
        "fix: write `num_train_epochs`.*fix: write `learning_rate`.*fix: write `per_device_train_batch_size`",
    ),
    of_recipe(
        "a section in the wrong place",
        f"{RECIPE}lora: {{r: 8}}\n",
        "unknown section `lora`.*fix: move it to `trainable.lora`",
    ),
    of_recipe(
        "values of a wrong type",
        f"{RECIPE}training: {{max_steps: ten}}\ntrainable: {{lora: {{r: 0}}}}\n",
        "`trainable.lora.r` cannot be 0.*allowed: greater than 0.*`training.max_steps` cannot be 'ten'.*a whole number",
    ),
    of_recipe(
        "--set without a value",
        RECIPE,
        "`training.max_steps` sets nothing.*allowed: section.key=value.*fix: name a key and a value",
        options="--set training.max_steps",
    ),
    of_recipe(
        "--set without the section",
        RECIPE,
        "unknown section `max_steps`.*fix: move it to `training.max_steps`",
        options="--set max_steps=3",
    ),
    of_recipe(
        "--set with a typo",
        RECIPE,
        "unknown key `max_stpes` in `training`.*fix: write `max_steps`",
        options="--set training.max_stpes=3",
    ),
    of_recipe(
        "resuming what never ran",
        RECIPE,
        "there is no run to resume.*fix: start it without --resume",
        options="--resume",
    ),
    Mistake(
        "a bundled recipe by half its name",
        {},
        "finetune recipe copy mixtral",
        "there is no bundled recipe.*`finetune recipe list` shows all",
    ),
]


def of_model(name: str, says: str, *, config: Mapping[str, object] | None = None, **files: str | bytes) -> Mistake:
    """`finetune generate` with a folder that holds the bundled model's config with these changes, and such files."""
    changed = json.dumps({**json.loads(Path(MODEL, "config.json").read_text()), **(config or {})})
    held = {f"model/{file.replace('__', '.')}": content for file, content in files.items()}
    command = "finetune generate model --prompt Hello --device cpu"
    return Mistake(name, {"model/config.json": changed, **held}, command, says)


WEIGHTS = save({"weight": np.zeros(1, np.float32)})
INDEX = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})

MODELS = [
    Mistake(
        "a model folder that is not there",
        {"models/mixtral/config.json": "{}"},
        "finetune generate ./models/mixtrall --prompt Hello",
        "'models/mixtrall' does not exist.*fix: check the path; 'models' holds mixtral",
    ),
    Mistake(
        "the weights' file instead of its folder",
        {"model/model.safetensors": WEIGHTS},
        "finetune generate model/model.safetensors --prompt Hello",
        "is a file.*fix: name the folder that holds the model, as in 'model'",
    ),
    Mistake(
        "a GGUF file",
        {"model.gguf": b"GGUF"},
        "finetune generate ./model.gguf --prompt Hello",
        "is a file.*fix: GGUF is not read here: name the folder of the original checkpoint",
    ),
    Mistake(
        "a folder without config.json",
        {"model/model.safetensors": WEIGHTS},
        "finetune generate model --prompt Hello",
        "there is no config.json.*fix: name a folder that transformers or peft saved",
    ),
    of_model("weights that are not there", "no safetensors weights.*fix: download the weights as well"),
    of_model(
        "pickle files",
        "no safetensors weights.*fix: convert the checkpoint to safetensors: load it with transformers",
        pytorch_model__bin=b"\x80",
    ),
    of_model("a folder of GGUF", "no safetensors weights.*fix: GGUF is not read here", model__gguf=b"GGUF"),
    of_model(
        "a shard that is missing",
        "1 of 1 shards are missing: model-00001-of-00002.safetensors.*fix: download or copy",
        model__safetensors__index__json=INDEX,
    ),
    of_model(
        "a clone without Git LFS",
        "only a pointer of Git LFS.*fix: fetch the weights with `git lfs pull`",
        model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ),
    of_model(
        "a download that broke off",
        "model.safetensors is truncated.*fix: download or copy the file again",
        model__safetensors=WEIGHTS[:-1],
    ),
    of_model(
        "a model that is no mixture of experts",
        "'llama' is not a mixture of experts.*fix: use a Mixtral, Qwen3-MoE or OLMoE checkpoint",
        config={"model_type": "llama"},
        model__safetensors=WEIGHTS,
    ),
    *(
        of_model(
            f"a checkpoint in {method.upper()}",
            f"already quantized with {method}.*fix: start from the original 16-bit checkpoint",
            config={"quantization_config": {"quant_method": method, "bits": 4}},
            model__safetensors=WEIGHTS,
        )
        for method in ("gptq", "awq")
    ),
    Mistake(
        "one GPU by its number",
        {},
        "finetune generate MODEL --prompt Hello --device cuda:0",
        "there is no device 'cuda:0'.*fix: choose one of them; CUDA_VISIBLE_DEVICES selects the GPU",
    ),
    Mistake(
        "an impossible top_p",
        {},
        "finetune generate MODEL --prompt Hello --top-p 2",
        "top_p is 2.0.*allowed: above 0, at most 1",
    ),
]

ADAPTERS = [
    Mistake(
        "merging a model",
        {},
        "finetune merge MODEL --output merged",
        "there is no adapter to merge.*fix: this is a model: there is nothing to merge",
    ),
    Mistake("merging what is not there", {}, "finetune merge none --output merged", "no adapter.*fix: check the path"),
    Mistake(
        "a format that does not exist",
        {},
        "finetune merge MODEL --output merged --format int4",
        "--format 'int4' does not exist.*allowed: nf4, bf16, fp16, gguf.*fix: choose one of them",
    ),
    Mistake(
        "looking for an adapter in a model",
        {},
        "finetune adapter inspect MODEL",
        "adapter_config.json is missing.*fix: give the folder that a training run saved",
    ),
    Mistake(
        "an adapter without a name",
        {},
        "finetune chat MODEL --adapter runs/adapter",
        "does not name an adapter.*allowed: NAME=PATH.*fix: put a name of your choice before the folder",
    ),
    Mistake(
        "pushing what is no run", {}, "finetune push . --repo-id me/mine", "not the folder of a run.*fix: name the"
    ),
    Mistake(
        "a repository with spaces",
        {},
        "finetune push . --repo-id 'my model/x/y'",
        "cannot be the name of a repository.*fix: choose another name",
    ),
    Mistake(
        "a report on what is no run",
        {},
        "finetune router report .",
        "there is no run in this folder.*fix: name the `output.dir` of a run",
    ),
]

OTHER_RECIPES = [
    *(
        Mistake(
            f"a data file as a recipe: {name}",
            {name: content},
            f"finetune {command} {name}",
            f"this is a data file, not a recipe.*fix: .*`finetune data check {name} --model MODEL`.*set data.train",
        )
        for name, content, command in (
            ("rows.jsonl", f"{ROW}\n{ROW}\n", "data check"),
            ("rows.csv", "question,answer\na,b\n", "train"),
            ("rows.json", f"[{ROW}]", "preflight"),
            ("rows.parquet", b"PAR1", "train"),
        )
    ),
    Mistake(
        "a misspelled data file with --model",
        {"rows.jsonl": ROW},
        "finetune data check row.jsonl --model MODEL",
        "there is no data file 'row.jsonl'.*what is there: rows.jsonl.*fix: check the path",
    ),
    Mistake(
        "a recipe of axolotl",
        {
            "axolotl.yaml": "base_model: mistralai/Mixtral-8x7B-v0.1\nload_in_4bit: true\ndatasets:\n"
            "  - path: tatsu-lab/alpaca\n    type: alpaca\nsequence_len: 4096\nmicro_batch_size: 2\nadapter: qlora\n"
            "lora_r: 32\nspecial_tokens:\n"
        },
        "finetune train axolotl.yaml",
        "a recipe of axolotl.*fix: start from `finetune recipe list`.*base_model: model.path\n.*"
        "load_in_4bit: quantization.experts\n.*datasets.path: data.train\n.*sequence_len: training.max_length\n.*"
        "micro_batch_size: training.per_device_train_batch_size\n.*adapter: trainable.method.*"
        "lora_r: trainable.lora.r\n.*special_tokens: leave it out: the tokenizer",
    ),
    Mistake(
        "a recipe of LLaMA-Factory",
        {
            "lf.yaml": "model_name_or_path: mistralai/Mixtral-8x7B-v0.1\nstage: sft\ndo_train: true\n"
            "finetuning_type: lora\nlora_rank: 8\ndataset: alpaca\ncutoff_len: 2048\nlearning_rate: 1.0e-4\n"
        },
        "finetune preflight lf.yaml",
        "a recipe of LLaMA-Factory.*fix: .*model_name_or_path: model.path\n.*do_train: leave it out.*"
        "lora_rank: trainable.lora.r\n.*cutoff_len: training.max_length\n.*learning_rate: training.learning_rate",
    ),
    Mistake(
        "a recipe of torchtune",
        {
            "tune.yaml": "model:\n  _component_: torchtune.models.mistral.lora_mistral_7b\n  lora_rank: 64\n"
            "checkpointer:\n  _component_: torchtune.training.Hf\n  checkpoint_dir: /tmp/M\nepochs: 3\n"
        },
        "finetune train tune.yaml",
        "a recipe of torchtune.*fix: .*model.lora_rank: trainable.lora.r\n.*checkpointer.checkpoint_dir: model.path\n"
        ".*epochs: training.num_train_epochs",
    ),
    Mistake(
        "settings of `trl sft`",
        {"sft.yaml": "model_name_or_path: mistralai/Mixtral-8x7B-v0.1\ndataset_name: a/b\nmax_seq_length: 1024\n"},
        "finetune train sft.yaml",
        "a recipe of TRL.*fix: .*dataset_name: data.train\n.*max_seq_length: training.max_length",
    ),
    Mistake(
        "LoRA on all linear layers",
        {
            "rows.jsonl": ROW,
            "r.yaml": recipe("{train: ./rows.jsonl}", "trainable: {lora: {target_modules: all-linear}}"),
        },
        "finetune train r.yaml",
        "cannot train 'all-linear' with LoRA: it would attach to the router and to the experts, which are frozen.*"
        r"fix: write target_modules: \[q_proj, k_proj, v_proj, o_proj\].*trainable.method: non_moe",
    ),
]

MISTAKES = [*DATA, *OTHER_RECIPES, *RECIPES, *MODELS, *ADAPTERS]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_one_message_names_the_way_out(mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in mistake.files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.replace("MODEL", MODEL).encode())
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    program, *arguments = shlex.split(mistake.command.replace("MODEL", MODEL))
    assert program == "finetune"
    ran = run_finetune(*arguments)
    assert ran.status == mistake.status, ran.stderr
    said = ran.stdout + ran.stderr
    assert said.count("error: ") == 1, "one message"
    message = said[said.index("error: ") :]
    assert re.search(mistake.says, message, re.DOTALL), message
    assert "Traceback" not in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("trian recipe.yaml", "No such command 'trian'. Did you mean 'train'?"),
        ("router analyse model", "No such command 'analyse'. Did you mean 'analyze'?"),
        ("train recipe.yaml --overwritte", "No such option: --overwritte.*--overwrite"),
        (
            "train",
            "Usage: finetune train .OPTIONS. .recipe.*Try 'finetune train (-h|--help)'.*Missing argument 'recipe'",
        ),
        ("merge adapter", "Usage: finetune merge.*Missing option '--output'"),
        ("generate model Hello", "Usage: finetune generate.*Missing option '--prompt'"),
        ("train recipe.yaml --set training.max_steps 3", "Got unexpected extra argument.*3"),
        ("preflight recipe.yaml --gpu-gib 0", "'--gpu-gib': 0.0 is no size; give a number above 0"),
        ("preflight recipe.yaml --gpu-gib 80GB", "'--gpu-gib': Input should be a valid number"),
        ("serve model --port 99999", "'--port': Input should be less than or equal to 65535"),
    ],
)
def test_a_command_that_is_typed_wrong(command: str, says: str) -> None:
    """The parser's own messages: with the usage, and the nearest word."""
    ran = CliRunner(env={"COLUMNS": "200"}).invoke(app, shlex.split(command), prog_name="finetune")
    assert ran.exit_code == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", ran.output).split())
    assert re.search(says, said), said
