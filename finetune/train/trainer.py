"""TRL's trainer, where a 4-bit mixture of experts needs it to differ.

Leaves out: the training loop, packing, padding, the fused head and the optimizer, which are TRL's and transformers'.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from finetune.adapter import Adapter, load_non_moe, trained_tensors
from finetune.data import held_out_batches, own_loader, training_batches
from finetune.disk import full_disk_explained
from finetune.errors import FinetuneError
from finetune.memory import ActivationPlan
from finetune.moe import BaseSpec, is_router
from finetune.router import AuxiliaryLoss
from finetune.train.stopping import EvaluationCut, Stopping

# What TRL averages over the batches of an evaluation.
_TOKEN_MEANS = ("entropy", "mean_token_accuracy")
# In a checkpoint's state: the sum of losses since the last log.
_LOSSES = "MoeTrainer"


class MoeTrainer(SFTTrainer):
    """TRL's trainer, with a loss that is only the loss, and checkpoints that hold only what trains."""

    base: BaseSpec
    plan: ActivationPlan
    tokens_per_batch: int | None = None
    model: Any  # upstream allows None, which ends with __init__
    processing_class: Any
    state: Any  # upstream's type of `stateful_callbacks` is that of its argument
    args: Any  # TRL's configuration, where upstream says transformers'
    optimizer: Any  # accelerate's around torch's
    _stepped = False
    _operations_per_token: float | None = None
    _held_out: torch.Tensor  # of all processes: sum of negative log-likelihoods, number of supervised tokens
    _batches_left = 0  # of an evaluation, those that are this process's own
    uncounted: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # no router is watched
    tell: Callable[[str], None] = staticmethod(warnings.warn)  # what the user should know, from the main process
    router_learning_rate: float | None = None  # None: the run's
    auxiliary: AuxiliaryLoss | None = None
    stopping: Stopping | None = None
    _ahead: list[Any] | None = None  # all micro-batches of a step whose first has not run yet

    def create_accelerator_and_postprocess(self) -> None:
        """Upstream's; under FSDP2 with the arithmetic of every other run: autocast over parameters as they are.

        accelerate's FSDP2 knows no autocast. It casts parameters, their gradients before they are summed, and what the
        model returns, the loss among it, to bf16.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # that was before the first step
        if self.is_fsdp_enabled:
            self.accelerator.prepare_model(
                self.model, evaluation_mode=True
            )  # autocast around TRL's forward, no wrapper
        with self.auxiliary or contextlib.nullcontext():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            # Around TRL's forward, which it puts there last, and around every call, also those of the probe.
            self.model.forward = self.accelerator.autocast()(self.model.forward)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's; none where the checkpoint is that of the last step, which upstream asks only after a step."""
        if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            self._take_up_losses()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _take_up_losses(self) -> None:
        """After a resume: the sums of which `loss` and `train_loss` are means, as they were at the checkpoint."""
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        steps = [0, *(entry["step"] for entry in logged)]
        self._globalstep_last_logged = steps[-1]
        counted = zip(logged, steps, steps[1:], strict=False)
        self._total_loss_scalar = float(sum(entry["loss"] * (step - before) for entry, before, step in counted))
        saved = self.state.stateful_callbacks.get(_LOSSES, {"attributes": {"not_logged": 0.0}})
        self._tr_loss += saved["attributes"]["not_logged"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Upstream's; in training with the gradient of the routers' auxiliary loss, in evaluation also the sums of
        which `eval_loss` is the ratio."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not self.model.training:
            own = (inputs["labels"][:, 1:] != -100).sum()
            # A batch of another process's rows has none, and its mean may be 0 / 0.
            nll = torch.where(own > 0, loss.detach().double() * own, 0.0)
            sums = self.accelerator.reduce(torch.stack([nll, own.double()]), reduction="sum")
            self._held_out = self._held_out + sums.cpu()
            for name in _TOKEN_MEANS:  # of the batches of all processes
                self._metrics["eval"][name][-1] *= sums[1].item()
            return result
        if self.stopping is not None:
            self.stopping.loss(loss)
        if self.auxiliary is not None:
            # Parts add up to the loss; data parallelism takes the mean of gradients, and upstream divides a loss by the
            # number of micro-batches unless it was normalized over all of them.
            normalized = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            scale = self.accelerator.num_processes * (1 if normalized else self.current_gradient_accumulation_steps)
            part = scale * self.auxiliary.part()
            loss = loss + (part - part.detach())  # the gradient of both, the value of one
            result = (loss, result[1]) if return_outputs else loss
        return result

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._ahead = None if self.auxiliary is None else batches
        if self.stopping is not None:
            self.stopping.begin(batches)
        return batches, items

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Upstream's, which comes between clipping and the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.stopping is not None and self.accelerator.scaler is None:
            self.stopping.gradient(norm, self.optimizer.optimizer, model.parameters())
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        """Upstream's; routers with a learning rate of their own in groups of their own, behind the others."""
        made = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        if made or self.router_learning_rate is None:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        routers = {id(p) for name, p in named if p.requires_grad and is_router(name)}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            own = [p for p in group["params"] if id(p) in routers]
            if own:
                groups.append({**group, "params": own, "lr": self.router_learning_rate})
                group["params"] = [p for p in group["params"] if id(p) not in routers]
        if sum(len(group["params"]) for group in groups) != len(routers):
            raise FinetuneError(
                f"{type(optimizer).__name__} takes no groups of parameters, so no learning rate for the routers alone",
                where="trainable.router_learning_rate",
                allowed=f"null with training.optim: {self.args.optim.value}",
                fix="remove it, or set training.optim: adamw_torch_fused",
            )
        optimizer.param_groups.extend(groups)
        return optimizer

    def _begin_auxiliary(self, model: Any, batches: list[Any]) -> None:
        """Before a step's first micro-batch; with accumulation runs them all forward without gradients.

        Not in `get_batch_samples`: the first one after a resume comes before the random state is restored.
        """
        assert self.auxiliary is not None
        self.auxiliary.begin_step()
        if self.args.gradient_accumulation_steps == 1:
            return
        if not (self._stepped and self.model.training):  # as in `training_step`
            model.train()
            self.optimizer.train()

        def forward(batch: Mapping[str, Any]) -> None:
            inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
            model(**inputs, use_cache=False, logits_to_keep=1)

        device = self.accelerator.device
        # Restores the random state, so that dropout repeats.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.auxiliary.count_ahead(batches, forward, device)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream's, which before every step puts every module into training mode: 1,641 modules of Mixtral 8x7B, for
        nothing where the step before has done it and no evaluation came between."""
        batches, self._ahead = self._ahead, None
        if batches is not None:
            self._begin_auxiliary(model, batches)
        # A fresh PEFT wrapper says that it trains, whatever it wraps: the first step always goes through. So does one
        # after an evaluation, which is of the model inside DDP.
        if not (self._stepped and self.model.training):
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
        """Loads this process's share of the rows, so that a resumed run takes those that are left of the epoch."""
        batches = training_batches(
            self, budget=self.tokens_per_batch, pad_to_multiple_of=self.args.pad_to_multiple_of or 1
        )
        if batches is None:
            return super().get_train_dataloader()
        if self.accelerator.is_main_process and batches.repeated:
            self.tell(
                f"{batches.repeated} rows are trained on a second time at the end of each epoch, so that each of "
                f"{self.accelerator.num_processes} processes has a batch"
            )
        return own_loader(self, self.train_dataset, batches, "training")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loads this process's share of the held-out rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = held_out_batches(self, rows)
        self._batches_left = batches.own
        return own_loader(self, rows, batches, "evaluation")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._held_out = torch.zeros(2, dtype=torch.float64)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Upstream's; a batch that only keeps this process in step with the others counts for nothing."""
        self._batches_left -= 1
        if self._batches_left >= 0:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self.uncounted():
            nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
            return super().prediction_step(model, nothing, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Puts the auxiliary losses beside `loss`, and makes means over tokens of what an evaluation logs, and over
        the run's steps of `train_loss`.

        Upstream averages the means of evaluation batches, which gives the tokens of short answers more weight than
        those of long ones, and depends on how rows fall into batches; and its `train_loss` knows only the steps since a
        resume.
        """
        if "loss" in logs and self.auxiliary is not None:
            logs |= self.auxiliary.logs()
        if "eval_loss" in logs:
            nll, tokens = self._held_out.tolist()
            logs["eval_loss"] = nll / max(tokens, 1.0)
            for name in _TOKEN_MEANS:
                self._metrics["eval"][name] = [sum(self._metrics["eval"][name]) / max(tokens, 1.0)]
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        """Upstream's; the last step is always logged, and a signal that cuts off the evaluation stops the run, with a
        checkpoint."""
        self.control.should_log |= self.state.global_step >= self.state.max_steps
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
        except EvaluationCut:
            self.control.should_training_stop = True
            self._save_checkpoint(model, trial)

    def tuned_tensors(self) -> dict[str, torch.Tensor]:
        """What trains, whole, by name; every process must call it."""
        return trained_tensors(self.accelerator.unwrap_model(self.model))

    def save_tuned(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Writes adapter or non-MoE tensors, tokenizer and `base.json`: all that loading needs besides the base.

        Raises:
            FinetuneError: a tensor holds NaN or infinity.
        """
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise FinetuneError(
                f"{len(broken)} of {len(tensors)} trained tensors hold NaN or infinity after step "
                f"{self.state.global_step}: nothing is written",
                where=", ".join(broken[:3]) + (" and more" if len(broken) > 3 else ""),
                fix="lower training.learning_rate and start again; a checkpoint from before is not touched",
            )
        model = self.accelerator.unwrap_model(self.model)
        Adapter.save(model, folder, base=self.base, tokenizer=self.processing_class, tensors=tensors)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Upstream writes (and under FSDP gathers) the whole model, 23 GB of frozen experts a checkpoint, and asks the
        # hub for the base's config.
        assert output_dir is not None
        tensors = self.tuned_tensors()
        if self.args.should_save:
            self.save_tuned(Path(output_dir), tensors)
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None beside the checkpoints; a run that ends writes one into its adapter's folder."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint to its end, or removes it, so that it does not hold the space that going on needs."""
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        not_logged = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        # The one part of upstream's state that takes entries of others.
        self.state.stateful_callbacks[_LOSSES] = {"args": {}, "attributes": {"not_logged": not_logged}}
        try:
            with full_disk_explained(folder, then="the run then continues with --resume"):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Upstream's; under FSDP without a second copy of the model, which would have the experts in it."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # What is gathered for an evaluation stays so until the next backward pass; the optimizer knows the shards.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped = self.accelerator.unwrap_model(self.model)
        if isinstance(unwrapped, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_non_moe(unwrapped, Path(resume_from_checkpoint))
