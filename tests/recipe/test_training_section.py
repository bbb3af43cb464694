"""The `training` section: passed through when TRL knows it, refused with its owner when another section does."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import SFTConfig

from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.training import DEFAULTS, OWNERS, check_training, open_fields, training_schema
from finetune.recipe.training_fields import training_fields
from tests.recipe.recipe_texts import SMALLEST, faults_of, message, write

# The newer names are in transformers since 5.18.
CHECKPOINTING_ELSEWHERE = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
} & set(training_fields())


def with_training(*lines: str) -> str:
    return SMALLEST + "training:\n" + "".join(f"  {line}\n" for line in lines)


def test_the_section_builds_an_sft_config(tmp_path: Path) -> None:
    text = with_training(
        'learning_rate: "3e-4"',
        "num_train_epochs: 2",
        "warmup_steps: .1",
        "lr_scheduler_type: cosine_with_min_lr",
        "lr_scheduler_kwargs: {min_lr: 1e-6}",
        "save_strategy: no",
        "bf16: false",
        "max_length: null",
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.training.pop("gradient_checkpointing") == "auto", "ours, not TRL's"
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **recipe.training)
    assert config.learning_rate == 3e-4
    assert isinstance(recipe.training["num_train_epochs"], int)
    assert config.warmup_steps == 0.1
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert config.save_strategy == "no"
    assert config.max_length is None
    assert (config.seed, config.logging_steps) == (42, 10)


def test_defaults_yield_to_what_is_given() -> None:
    assert check_training({})[0] == dict(DEFAULTS)
    assert check_training({"seed": 1, "logging_steps": 2})[0]["seed"] == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, "full"), (False, "none"), ("full", "full"), ("none", "none"), ("auto", "auto")],
)
def test_checkpointing_is_one_of_three_words(given: object, meant: str) -> None:
    values, faults = check_training({"gradient_checkpointing": given})
    assert (values["gradient_checkpointing"], faults) == (meant, [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "output_dir: x",
            "`output_dir` is decided by `output.dir`, not under `training`\n  where: r.yaml:8: training.output_dir\n"
            "  fix: set `output.dir` instead",
        ),
        (
            "router_aux_loss_coef: 0.1",
            "`router_aux_loss_coef` is decided by `router.balance_coef`, not under `training`\n"
            "  where: r.yaml:8: training.router_aux_loss_coef\n  fix: set `router.balance_coef` instead",
        ),
        (
            "load_in_4bit: true",
            "`load_in_4bit` is decided by `quantization.experts`, not under `training`\n"
            "  where: r.yaml:8: training.load_in_4bit\n  fix: set `quantization.experts` instead",
        ),
        (
            "hub_token: secret",
            "`training.hub_token` cannot be set in a recipe: a run writes to `output.dir` only; upload what you keep "
            "afterwards\n  where: r.yaml:8: training.hub_token\n  fix: remove it",
        ),
        (
            "assistant_only_loss: true",
            "`training.assistant_only_loss` cannot be set in a recipe: `data` supervises the assistant's turns and "
            "nothing else\n  where: r.yaml:8: training.assistant_only_loss\n  fix: remove it",
        ),
        (
            "max_seq_length: 3",
            "unknown key `max_seq_length` in `training`\n  where: r.yaml:8: training.max_seq_length\n"
            "  allowed: fields of TRL's SFTConfig (`finetune recipe schema` lists them)\n  fix: write `max_length`",
        ),
        (
            "zzzzzz: 3",
            "unknown key `zzzzzz` in `training`\n  where: r.yaml:8: training.zzzzzz\n"
            "  allowed: fields of TRL's SFTConfig (`finetune recipe schema` lists them)\n  fix: remove it",
        ),
        (
            "max_steps: 1e3",
            "`training.max_steps` cannot be 1000.0\n  where: r.yaml:8: training.max_steps\n"
            "  allowed: a whole number\n  fix: write `1000`",
        ),
        (
            "save_strategy: epochs",
            "`training.save_strategy` cannot be 'epochs'\n  where: r.yaml:8: training.save_strategy\n"
            "  allowed: no | steps | epoch | best\n  fix: write `epoch`",
        ),
        (
            "accelerator_config: x",
            "`training.accelerator_config` cannot be 'x'\n  where: r.yaml:8: training.accelerator_config\n"
            "  allowed: a mapping | null",
        ),
        (
            "bf16: yes",
            "`training.bf16` cannot be 'yes'\n  where: r.yaml:8: training.bf16\n"
            "  allowed: true or false | null\n  fix: write `true`",
        ),
        (
            "gradient_checkpointing: ful",
            "`training.gradient_checkpointing` cannot be 'ful'\n  where: r.yaml:8: training.gradient_checkpointing\n"
            "  allowed: auto | full | none | true or false\n  fix: write `full`",
        ),
        (
            "gradient_checkpointing: null",
            "`training.gradient_checkpointing` cannot be null\n  where: r.yaml:8: training.gradient_checkpointing\n"
            "  allowed: auto | full | none | true or false",
        ),
        (
            "gradient_checkpointing_kwargs: {use_reentrant: true}",
            "`training.gradient_checkpointing_kwargs` cannot be set in a recipe: `training.gradient_checkpointing` and "
            "`memory.budget_gib` decide which layers are recomputed, and it is never reentrant\n"
            "  where: r.yaml:8: training.gradient_checkpointing_kwargs\n  fix: remove it",
        ),
        (
            "activation_checkpointing: true",
            "`training.activation_checkpointing` cannot be set in a recipe: it is `training.gradient_checkpointing`: "
            "auto, full or none\n  where: r.yaml:8: training.activation_checkpointing\n  fix: remove it",
        ),
        (
            "label_names: [a, 3]",
            "`training.label_names` cannot be a list\n  where: r.yaml:8: training.label_names\n"
            "  allowed: a list of text | null",
        ),
        (
            "per_device_train_batch_size: 0",
            "`training.per_device_train_batch_size` cannot be 0\n"
            "  where: r.yaml:8: training.per_device_train_batch_size\n  allowed: 1 or more",
        ),
        (
            "{bf16: true, fp16: true}",
            "`bf16` and `fp16` are both true\n  where: r.yaml:8: training.fp16\n"
            "  fix: keep one; bf16 needs no loss scaling",
        ),
    ],
)
def test_messages(tmp_path: Path, line: str, expected: str) -> None:
    assert message(tmp_path, with_training(line)) == expected


def test_optimizers_lead_to_a_usable_name(tmp_path: Path) -> None:
    (only,) = faults_of(tmp_path, with_training("optim: adamw"))
    assert only.fix == "write `adamw_torch`"


def test_every_owner_is_a_key_of_the_recipe() -> None:
    for owner in OWNERS.values():
        keys = Recipe
        for name in owner.split("."):
            keys = keys.model_fields[name].annotation  # type: ignore[assignment]


def test_nothing_that_another_section_decides_is_open() -> None:
    closed = set(training_fields()) - set(open_fields())
    assert closed == {name for name in training_fields() if name.startswith(("hub_", "trackio_", "push_to_hub"))} | {
        "use_liger_kernel",
        "liger_kernel_config",
        "output_dir",
        "report_to",
        "run_name",
        "project",
        "router_aux_loss_coef",
        "use_cpu",
        "model_init_kwargs",
        "eos_token",
        "pad_token",
        "chat_template_path",
        "assistant_only_loss",
        "completion_only_loss",
        "dataset_text_field",
        "dataset_kwargs",
        "trust_remote_code",
        "parallelism_config",
        "local_rank",
        "resume_from_checkpoint",
        "do_train",
        "do_eval",
        "do_predict",
        *CHECKPOINTING_ELSEWHERE,
    }
    assert set(training_schema()["properties"]) == set(open_fields())
