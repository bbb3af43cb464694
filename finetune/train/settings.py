"""The recipe's `training` section as TRL's configuration; what TRL refuses is refused before the weights are read.

What the recipe may not set (dtype by the device, checkpointing by the activation plan, where files go) is set here.
Leaves out: what the section may hold, which recipe/training_fields.py knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import get_scheduler
from trl import SFTConfig

from finetune.errors import FinetuneError, RecipeError
from finetune.moe import resolve_dtype
from finetune.private_api import set_device
from finetune.recipe import Recipe
from finetune.runfolder import RunFolder
from finetune.train.trainer import MoeTrainer


def training_arguments(recipe: Recipe, device: torch.device) -> SFTConfig:
    """The recipe's `training` section as TRL's config, with what other sections decide.

    Raises:
        RecipeError: TRL refuses a value or combination.
    """
    given = dict(recipe.training)
    dtype = resolve_dtype(recipe.model.dtype, device)
    if "bf16" not in given and "fp16" not in given:
        given |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    given["gradient_checkpointing"] = False  # the activation plan does it, layer by layer
    # Every parameter that trains is used in every step; looking for others walks the graph once more, and warns.
    given.setdefault("ddp_find_unused_parameters", False)
    # Otherwise every batch waits for the step before it to end, and the device then for the host.
    given["accelerator_config"] = {"non_blocking": True, **(given.get("accelerator_config") or {})}
    with refusals_explained():
        args = SFTConfig(
            **given,
            output_dir=str(RunFolder(Path(recipe.output.dir)).checkpoints),
            use_cpu=device.type == "cpu",
            # The rows come labelled, of the right length and packed; TRL only pads them.
            dataset_kwargs={"skip_prepare_dataset": True},
            router_aux_loss_coef=0.0,  # pooled over layers; `router/auxiliary.py` instead
            report_to="none",
            disable_tqdm=True,
        )
        _require_usable(args)
    if args.device.type == "cpu":
        set_device(args, torch.device("cpu"))
    return args


def _require_usable(args: SFTConfig) -> None:
    """Asks now what the trainer would ask with the weights in memory: packages, and the scheduler's settings."""
    # Some optimizers go on to ask for the model.
    with contextlib.suppress(ValueError):
        MoeTrainer.get_optimizer_cls_and_kwargs(args)
    steps = 1000
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
    )


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """Turns what TRL refuses into one message about the recipe's `training` section."""
    try:
        yield
    except FinetuneError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        fault = FinetuneError(
            f"TRL refuses these settings: {error}",
            where="training",
            allowed="what trl.SFTConfig accepts together",
            fix="change the setting that the message names",
        )
        raise RecipeError([fault]) from error
