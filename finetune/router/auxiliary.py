"""The auxiliary losses of a router, per layer and exact: load balance and z-loss, with live gradients.

Why: transformers pools all layers before it takes the product of load and probability, so eight layers that each
collapsed on a different pair of experts cost nothing; and it takes the load of one micro-batch, so the same step costs
something else with another accumulation or on another number of processes. Here the loss of an optimizer step is

    balance_coef * mean over layers of E * sum_i f_i P_i
        + z_coef * mean over layers and tokens of logsumexp(logits)^2

where f_i (the share of all assignments, a constant for the gradient) and P_i (the mean probability) are over all real
tokens of the step: every micro-batch of every process. Switch Transformer, arXiv 2101.03961, equations 4 to 6, for
top-k routing as `metrics.balance_loss`; z-loss as in ST-MoE, arXiv 2202.08906, equation 5.

How: hooks on the routers add up, while the decoder runs forward in training, the live probabilities and squared
logsumexps of the real tokens. The loss is linear in those sums once f and the number of tokens N of the step are known:
each micro-batch's part of it is `part()`, and parts simply add up. f and N are known from the forward pass itself where
it is the whole step of this process (added up over processes). With accumulation they have to be known before the first
backward pass: `count_ahead` runs all micro-batches forward without gradients.

What the sums save for backward, some numbers a token and layer, is saved as it is, whatever checkpoint surrounds the
router; so a recomputation, which runs while no pass does, adds nothing and need not repeat it.

Leaves out: logging (`metrics.py` has both losses in every log), compiled decoders, the scaling of the training loss
that parts are added to (`trainer.py`).

Shape suffixes: L layers, E experts, N = B * T tokens of a micro-batch, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finetune.router.capture import real_tokens
from finetune.router.hook import RouterListener


@dataclass
class _Pass:
    """One forward pass of the decoder, while it runs and until its part of the loss is taken."""

    real_N: Tensor
    counts: list[Tensor] = field(default_factory=list)  # int64 [E] a layer
    prob_sum: list[Tensor] = field(default_factory=list)  # live [E] a layer
    z_sum: list[Tensor] = field(default_factory=list)  # live, one number a layer


class AuxiliaryLoss(RouterListener):
    """Balance and z-loss of a Mixtral, Qwen3-MoE or OLMoE causal LM, micro-batch by micro-batch.

    For every optimizer step: `begin_step`; with
    accumulation `count_ahead`; then `part` after each forward pass.

    Args:
        model: the causal LM, bare or inside PEFT, DDP or FSDP.
        num_experts: experts per layer.
        top_k: experts per token.
        balance_coef: weight of the balance loss; 1 is its value when even.
        z_coef: weight of the z-loss.
    """

    def __init__(self, model: nn.Module, *, num_experts: int, top_k: int, balance_coef: float, z_coef: float):
        super().__init__(model)
        self.num_experts, self.top_k = num_experts, top_k
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self._counting = False
        self._passed: _Pass | None = None
        self._totals: tuple[Tensor, Tensor] | None = None  # counts [L, E] and tokens [] of the whole step
        self._steps, self._values = 0, torch.zeros(2)  # of balance and z-loss, since the last `logs`

    # ---- a pass -----------------------------------------------------------------------------------------

    def begin(self, call: Mapping[str, Any], labels: Tensor | None, *, training: bool) -> bool:
        if not training or not (torch.is_grad_enabled() or self._counting):
            return False
        self._running = _Pass(real_tokens(call).reshape(-1))
        return True

    def hear(self, layer: int, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        running = self._running
        # A layer may sit on another device than the decoder's input (a model split by device_map).
        real_N = running.real_N.to(logits_NE.device, non_blocking=True)
        if self._totals is None:
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=logits_NE.device)
            choices = real_N.long().repeat_interleave(self.top_k)
            running.counts.append(counts_E.scatter_add_(0, chosen_NK.reshape(-1), choices))
        if self._counting:
            return
        with saved_tensors_hooks(torch.Tensor.detach, _as_it_is), torch.autocast(logits_NE.device.type, enabled=False):
            # float32 or more. Filled, not multiplied: the logits of padding may be NaN, and so would be gradients.
            logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
            logits_NE = logits_NE.masked_fill(~real_N.unsqueeze(1), 0.0)
            lse_N = logits_NE.logsumexp(dim=1)
            real_as_number_N = real_N.to(logits_NE.dtype)
            probs_NE = logits_NE.softmax(dim=1)
            running.prob_sum.append((probs_NE * real_as_number_N.unsqueeze(1)).sum(dim=0))
            running.z_sum.append((lse_N.square() * real_as_number_N).sum())

    def end(self) -> None:
        if self._counting:
            self._ahead[0] += torch.stack(
                [counts_E.to(self._running.real_N.device) for counts_E in self._running.counts]
            )
            self._ahead[1] += self._running.real_N.sum()
        else:
            self._passed = self._running
        del self._running

    # ---- a step -----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forgets the totals of the step before."""
        self._totals, self._passed = None, None
        self._steps += 1

    def count_ahead(
        self, batches: Sequence[Mapping[str, Any]], forward: Callable[[Mapping[str, Any]], Any], device: torch.device
    ) -> None:
        """Counts the micro-batches of this process's whole step, added up over processes: every process must call it.

        Args:
            batches: the arguments of the model for each.
            forward: runs the model on one. Without a balance loss it is not needed: the number of tokens is enough.
        """
        counts_LE = torch.zeros(self.layers, self.num_experts, dtype=torch.int64, device=device)
        self._ahead = [counts_LE, torch.zeros((), dtype=torch.int64, device=device)]
        if self.balance_coef == 0:
            self._ahead[1] += sum(real_tokens(batch).sum() for batch in batches)
        else:
            self._counting = True
            try:
                with torch.no_grad():
                    for batch in batches:
                        forward(batch)
            finally:
                self._counting = False
        self._totals = _over_processes(*self._ahead)

    def part(self) -> Tensor:
        """The last forward pass's part of the step's loss, live, weighted with the coefficients, unscaled.

        The sum over the micro-batches of all processes is the loss. Where nothing was counted ahead every process must
        call it.
        """
        passed, self._passed = self._passed, None
        assert passed is not None, "no forward pass of the decoder in training went before"
        device = passed.real_N.device
        if self._totals is None:
            counts_LE = torch.stack([counts_E.to(device) for counts_E in passed.counts])
            self._totals = _over_processes(counts_LE, passed.real_N.sum())
        counts_LE, tokens = self._totals
        prob_sum_LE = torch.stack([prob_sum_E.to(device) for prob_sum_E in passed.prob_sum])
        z_sum_L = torch.stack([z_sum.to(device) for z_sum in passed.z_sum])
        tokens = tokens.clamp(min=1).to(prob_sum_LE.dtype)
        load_LE = counts_LE / (self.top_k * tokens)
        balance = self.num_experts * (load_LE * prob_sum_LE / tokens).sum(dim=1).mean()
        z = (z_sum_L / tokens).mean()
        self._values = self._values.to(device) + torch.stack([balance, z]).detach()
        return self.balance_coef * balance + self.z_coef * z

    def logs(self) -> dict[str, float]:
        """Means over the steps since the last call, by their logged names; every process must call it."""
        steps, values = self._steps, self._values
        self._steps, self._values = 0, torch.zeros(2)
        if steps == 0:
            return {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
        balance, z = (values / steps).tolist()
        logs = {"router/aux/weighted": self.balance_coef * balance + self.z_coef * z}
        # What weighs nothing is not always counted.
        if self.balance_coef > 0:
            logs["router/aux/balance"] = balance
        if self.z_coef > 0:
            logs["router/aux/z"] = z
        return logs


def _over_processes(counts_LE: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    integers = torch.cat([tokens.reshape(1), counts_LE.reshape(-1)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(integers)
    return integers[1:].view_as(counts_LE), integers[0]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
