"""TRL's trainer, where a 4-bit mixture of experts needs it to differ.

Leaves out: the training loop, packing, padding, the fused head and the optimizer, which are TRL's and transformers'.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from finetune.activations import ActivationPlan
from finetune.data.batching import TokenBudgetBatches, row_lengths
from finetune.model import BaseSpec
from finetune.runfolder import full_disk_explained
from finetune.trainable import load_non_moe, save_adapter, save_non_moe, trained_tensors


class MoeTrainer(SFTTrainer):
    """TRL's trainer, with a loss that is only the loss, and checkpoints that hold only what trains."""

    base: BaseSpec
    plan: ActivationPlan
    tokens_per_batch: int | None = None
    model: Any  # upstream allows None, which ends with __init__
    processing_class: Any
    args: Any  # TRL's configuration, where upstream says transformers'
    _stepped = False
    _operations_per_token: float | None = None
    _held_out: torch.Tensor  # sum of negative log-likelihoods, number of supervised tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Upstream's, and in evaluation also the sums of which `eval_loss` is the ratio."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            loss = (result[0] if return_outputs else result).detach().double()
            for auxiliary in self._metrics["eval"]["aux_loss"][-1:] if self.aux_loss_enabled else ():
                loss = loss - self.router_aux_loss_coef * auxiliary
            tokens = (inputs["labels"][:, 1:] != -100).sum()
            self._held_out = self._held_out + torch.stack([loss * tokens, tokens]).cpu()
        return result

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream's, which before every step puts every module into training mode: 1,641 modules of Mixtral 8x7B, for
        nothing where the step before has done it and no evaluation came between."""
        # A fresh PEFT wrapper says that it trains, whatever it wraps: the first step always goes through.
        if not (self._stepped and model.training):
            self._stepped = True
            return super().training_step(model, *args, **kwargs)
        model.train = lambda mode=True: model
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del model.train

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Upstream's number, for which it counts all parameters anew every step; here once."""
        tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) / tokens
        return round(self._operations_per_token * tokens)

    def get_train_dataloader(self) -> DataLoader:
        """Upstream's, or one of batches of `tokens_per_batch` tokens."""
        if self.tokens_per_batch is None:
            return super().get_train_dataloader()
        return token_budget_loader(self, self.tokens_per_batch, pad_to_multiple_of=self.args.pad_to_multiple_of or 1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._held_out = torch.zeros(2, dtype=torch.float64)
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Makes `loss` the loss alone and `eval_loss` the mean over tokens.

        TRL adds the auxiliary loss to `loss`; it is taken out again and stands beside it as `aux_loss`. transformers
        averages the means of evaluation batches, which gives the tokens of short answers more weight than those of long
        ones.
        """
        auxiliary = self._metrics["train"].get("aux_loss")
        if "loss" in logs and auxiliary:
            logs["loss"] -= self.router_aux_loss_coef * sum(auxiliary) / len(auxiliary)
        if "eval_loss" in logs:
            device = self.accelerator.device
            nll, tokens = self.accelerator.reduce(self._held_out.to(device), reduction="sum").tolist()
            logs["eval_loss"] = nll / max(tokens, 1.0)
        super().log(logs, start_time)

    def tuned_tensors(self) -> dict[str, torch.Tensor]:
        """What trains, whole, by name; every process must call it."""
        return trained_tensors(self.accelerator.unwrap_model(self.model))

    def save_tuned(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Writes adapter or non-MoE tensors, tokenizer and `base.json`: all that loading needs besides the base."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_adapter(model, folder, tensors)
        else:
            base = {"path": self.base.path, "fingerprint": self.base.fingerprint}
            save_non_moe(model, folder, base=base, tensors=tensors)
        self.processing_class.save_pretrained(folder)
        self.base.save(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Upstream writes (and under FSDP gathers) the whole model, 23 GB of frozen experts a checkpoint, and asks the
        # hub for the base's config.
        assert output_dir is not None
        tensors = self.tuned_tensors()
        if self.args.should_save:
            self.save_tuned(Path(output_dir), tensors)
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint to its end, or removes it, so that it does not hold the space that going on needs."""
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with full_disk_explained(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model)
        if isinstance(unwrapped, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_non_moe(unwrapped, Path(resume_from_checkpoint))


def token_budget_loader(trainer: Any, budget: int, *, pad_to_multiple_of: int = 1) -> DataLoader:
    """A trainer's training data in batches of at most `budget` tokens, padding included.

    The batches are this process's own, so accelerate does not deal them out again: behind its shard of a batch sampler
    a resumed run would not be told the epoch.
    """
    batches = TokenBudgetBatches(
        row_lengths(trainer.train_dataset),
        budget,
        seed=trainer.args.seed,
        process=trainer.accelerator.process_index,
        processes=trainer.accelerator.num_processes,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    loader = DataLoader(
        trainer._remove_unused_columns(trainer.train_dataset, description="training"),
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    return prepare_data_loader(loader, trainer.accelerator.device, num_processes=1, process_index=0, put_on_device=True)


class SpeedCallback(TrainerCallback):
    """Tokens per second of training steps alone: the first logged window is warm-up, evaluation and saving are out."""

    def __init__(self) -> None:
        self._seconds, self._begun = 0.0, 0.0
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._begun

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "num_tokens" in logs and "loss" in logs:
            self._last = (logs["num_tokens"], self._seconds)
            self._first = self._first or self._last

    @property
    def tokens_per_second(self) -> float | None:
        """None until two windows were logged."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
