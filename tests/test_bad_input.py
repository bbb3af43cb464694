"""What a user can get wrong in recipe, data, device, prompt and output folder: one message, status 2, nothing written.

Each case goes through the command line in this process, and the whole folder it works in is compared, byte for byte,
before and after. Models and adapters that cannot be used are in test_bad_models.py; what goes wrong while files are
written is in test_interrupted.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.running import refused, run_finetune

Write = Callable[..., Path]
ABSENT = "<absent>"


# ---- recipe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"data": {"train": ABSENT}},
            ("the key `data.train` is missing", "recipe.yaml:6: data.train", "add `train:` under `data:`"),
        ),
        (
            {"training": {"learning_rat": 1e-4}},
            ("unknown key `learning_rat` in `training`", "recipe.yaml:", "fix: write `learning_rate`"),
        ),
        (
            {"training": {"learning_rate": "fast"}},
            ("`training.learning_rate` cannot be 'fast'", "recipe.yaml:14: ", "allowed: a number"),
        ),
        (
            {"trainable": {"method": "lora"}, "router": {"log": 1}},
            ("2 faults in the recipe", "trainable.method", "attention_lora", "router.log", "true or false"),
        ),
        (
            {"trainable": {"method": "non_moe"}},
            ("NF4 weights cannot be trained", "quantization.attention", "set `quantization.attention: 16bit`"),
        ),
    ],
    ids=["missing key", "misspelled key", "wrong type", "several faults", "sections contradict"],
)
def test_a_recipe_that_does_not_fit(
    write_recipe: Write, tmp_path: Path, sections: dict[str, dict[str, object]], says: tuple[str, ...]
) -> None:
    recipe = write_recipe(**sections)
    for command in ("train", "preflight"):
        assert refused(tmp_path, command, recipe, "--json", says=says).stdout == ""


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, "train", tmp_path / "none.yaml", says=("cannot read the recipe: No such file", "none.yaml"))


def test_a_path_that_no_disk_holds(write_recipe: Write, tmp_path: Path) -> None:
    says = ("a path is too long for a file system", "where: aaaa", "names of at most 255 bytes", "check the path")
    refused(tmp_path, "preflight", write_recipe(model={"path": "a" * 5000}), says=says)
    refused(tmp_path, "generate", "a" * 5000, "--prompt", "Hello", says=says)


def test_an_override_that_sets_nothing(write_recipe: Write, tmp_path: Path) -> None:
    says = ("`training.max_steps` sets nothing", "--set training.max_steps", "allowed: section.key=value", "1e-4")
    refused(tmp_path, "train", write_recipe(), "--set", "training.max_steps", says=says)
    says = ("unknown section `trainin`", "--set trainin.seed=1", "fix: write `training`")
    refused(tmp_path, "train", write_recipe(), "--set", "trainin.seed=1", says=says)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
            ("requires the save and eval strategy to match", "Evaluation strategy: ", "Save strategy: "),
        ),
        ({"optim": "galore_adamw"}, ("You need to install `galore_torch`",)),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ("min_lr_rate should be set through the `lr_scheduler_kwargs`",)),
        # This one only the trainer finds, when the output folder is claimed.
        ({"padding_free": True}, ("`padding_free=True` without packing",)),
    ],
    ids=["strategies", "optimizer", "scheduler", "trainer"],
)
def test_settings_that_trl_refuses(
    write_recipe: Write, tmp_path: Path, training: dict[str, object], says: tuple[str, ...]
) -> None:
    says = ("TRL refuses these settings: ", *says, "where: training", "fix: change the setting")
    refused(tmp_path, "train", write_recipe(training=training), says=says)


# ---- device, hub, prompt --------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network(write_recipe: Write, tmp_path: Path) -> None:
    """conftest sets HF_HUB_OFFLINE=1."""
    model = "mistralai/Mixtral-8x7B-v0.1"
    says = (f"'{model}' is neither a local folder nor a model that could be fetched", "model.path", "the network")
    refused(tmp_path, "train", write_recipe(model={"path": model}), says=says)
    refused(tmp_path, "generate", model, "--prompt", "Hello", says=says)
    data = "OpenAssistant/oasst_top1_2023-08-25"
    says = (f"'{data}' is neither a local file or folder nor a data set", f"where: {data}", "connect to the network")
    refused(tmp_path, "train", write_recipe(data={"train": data, "eval": ABSENT}), says=says)


def test_a_device_or_attention_that_does_not_exist(
    write_recipe: Write, small_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = ("a GPU is asked for and torch sees none", "model.device: cuda", "auto, cpu, cuda", "nvidia-smi")
    refused(tmp_path, "train", write_recipe(model={"device": "cuda"}), says=says)
    refused(tmp_path, "generate", small_mixtral, "--prompt", "Hello", "--device", "cuda", says=says)
    says = ("there is no device 'gpu'", "--device", "auto, cpu, cuda")
    refused(tmp_path, "generate", small_mixtral, "--prompt", "Hello", "--device", "gpu", says=says)
    says = ("no attention function 'flash'", "model.attn_implementation", "flash_attention_2, ", "=auto")
    refused(tmp_path, "train", write_recipe(model={"attn_implementation": "flash"}), says=says)


def test_a_prompt_that_is_empty_or_too_long(small_mixtral: Path, tmp_path: Path) -> None:
    generate = ("generate", small_mixtral, "--device", "cpu", "--prompt")
    refused(tmp_path, *generate, " \n", says=("the prompt is empty", "--prompt", "give some text"))
    says = ("the prompt has ", "--prompt", "allowed: fewer than 512", "shorten the prompt")
    refused(tmp_path, *generate, "word " * 600, says=says)
    model = _with_template(None, small_mixtral, tmp_path / "model")
    says = ("tokenizer has no chat template", str(model), "use --raw")
    refused(tmp_path, "generate", model, "--device", "cpu", "--prompt", "Hello", says=says)


def _with_template(template: str | None, model: Path, folder: Path) -> Path:
    """A copy of a model folder whose tokenizer has another chat template, or none."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


# ---- data -----------------------------------------------------------------------------------------------------


def _rows(*roles: str) -> str:
    messages = [{"role": role, "content": "Good morning"} for role in roles]
    return json.dumps({"messages": messages}) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, ("there is no data file 'rows.jsonl'", "rows.jsonl", "check the path in the recipe")),
        ("", ("the data file is empty", "rows.jsonl", "name a file that holds conversations")),
        ("\n\n", ("the data set holds no rows", "rows.jsonl")),
        (
            _rows("user", "assistant") + '{"messages": [\n',
            ("1 of 2 rows cannot be used", "not valid JSON", "rows.jsonl line 2", "data.max_refused"),
        ),
        (
            _rows("user", "critic"),
            (
                "1 of 1 rows cannot be used",
                "role 'critic' is unknown; if it is the user's, set data.roles: {critic: user}",
                "rows.jsonl line 1",
            ),
        ),
        (_rows("user"), ("1 of 1 rows cannot be used", "no assistant turn", "rows.jsonl line 1", "correct them")),
    ],
    ids=["missing", "empty", "no rows", "malformed", "unknown role", "no assistant"],
)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_data_that_cannot_be_used(
    write_recipe: Write, tmp_path: Path, key: str, text: str | None, says: tuple[str, ...]
) -> None:
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    refused(tmp_path, "train", write_recipe(data={key: str(file)}), says=says)


def test_data_in_which_nothing_is_supervised(write_recipe: Write, small_mixtral: Path, tmp_path: Path) -> None:
    says = ("no conversation is left", "longer than training.max_length 4", "rows.jsonl", "raise training.max_length")
    refused(tmp_path, "train", write_recipe(training={"max_length": 4}), says=says)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = _with_template(template, small_mixtral, tmp_path / "model")
    recipe = write_recipe(model={"path": str(model)}, data={"template": "model"})
    says = ("no supervised turn ends with the end of sequence", "never learn to stop", "set data.template to one that")
    refused(tmp_path, "train", recipe, says=says)


# ---- output ---------------------------------------------------------------------------------------------------


def test_an_output_folder_that_holds_something(write_recipe: Write, small_mixtral: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    run.write_text("a file")
    refused(tmp_path, "train", recipe, says=("the output folder is a file", f"output.dir: {run}", "choose another"))
    says = ("cannot be written: ", str(run), "choose a folder that you may write to")
    refused(tmp_path, "train", recipe, "--set", f"output.dir={run}/below", says=says)
    run.unlink()
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for options in ((), ("--overwrite",)):
        says = ("already holds other files: thesis.tex", f"output.dir: {run}", "--overwrite replaces a run, never")
        refused(tmp_path, "train", recipe, *options, says=says)
    (run / "run.json").write_text("{}")
    says = ("already holds a run", f"output.dir: {run}", "--resume", "--overwrite", "another output.dir")
    refused(tmp_path, "train", recipe, says=says)
    says = ("the output folder is not empty", str(run), "choose another --output")
    refused(tmp_path, "merge", tmp_path / "adapter", "--output", run, says=says)
    refused(tmp_path, "quantize", small_mixtral, "--output", run, says=says)
    says = ("cannot be written: ", "choose a folder that you may write to")
    below = run / "thesis.tex" / "out"
    refused(tmp_path, "quantize", small_mixtral, "--device", "cpu", "--output", below, says=says)


def test_what_costs_least_is_checked_first(write_recipe: Write, small_mixtral: Path, tmp_path: Path) -> None:
    """Output folder, then the model's headers, then the data: nobody waits for what will be refused anyway."""
    run, model = tmp_path / "run", tmp_path / "model"
    run.mkdir()
    (run / "file").touch()
    shutil.copytree(small_mixtral, model)
    (model / "model.safetensors").write_bytes(b"")
    recipe = write_recipe(model={"path": str(model)}, data={"train": str(tmp_path / "none.jsonl")})
    refused(tmp_path, "train", recipe, says=("already holds other files",))
    (run / "file").unlink()
    refused(tmp_path, "train", recipe, says=("model.safetensors is truncated",))
    shutil.copy(small_mixtral / "model.safetensors", model)
    refused(tmp_path, "train", recipe, says=("there is no data file",))


def test_nothing_to_resume(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe()
    says = ("there is no run to resume", f"output.dir: {tmp_path / 'run'}", "start it without --resume")
    refused(tmp_path, "train", recipe, "--resume", says=says)
    says = ("--resume continues a run and --overwrite replaces it", "leave one of them out")
    refused(tmp_path, "train", recipe, "--resume", "--overwrite", says=says)


def test_resuming_with_another_recipe(write_recipe: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = write_recipe()
    shown = run_finetune("recipe", "show", recipe, "--json").document["recipe"]
    (run / "run.json").write_text(json.dumps({"recipe": shown}))
    changes = ("--set", "training.seed=1", "--set", "trainable.lora.r=8", "--set", "router.log=false")
    says = (
        "the recipe is not the one this run was started with",
        "router.log was True, is False; trainable.lora.r was 16, is 8; training.seed was 42, is 1",
        f"output.dir: {run}",
        "resume with that recipe",
    )
    refused(tmp_path, "train", recipe, "--resume", *changes, says=says)


def test_debug_shows_where_it_was_raised(write_recipe: Write, tmp_path: Path) -> None:
    ran = run_finetune("train", write_recipe(model={"path": str(tmp_path / "none")}), "--debug")
    assert ran.status == 2
    assert ran.stderr.startswith("Traceback (most recent call last):")
    assert "check_model_folder" in ran.stderr
    assert "does not exist\n  where: model.path" in ran.stderr


def test_a_sharded_run_does_not_resume(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(tmp_path, "train", write_recipe(), "--resume", says=("a sharded run (FSDP) cannot be resumed",))
