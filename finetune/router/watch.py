"""A run compared with its base while it trains: drift on the probe, alarms, and what its report is drawn from.

router/base.json                the untuned base on the probe
       reference.safetensors    its router log-probabilities there, for a resumed run
       texts.json               first experts of some tokens of the probe, base beside tuned
       alarms.jsonl             a line an alarm

Leaves out: what is logged and when (callback.py). Every process reads the probe; the main one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from peft import PeftModel

from finetune.disk import write_json
from finetune.errors import OutputError
from finetune.jsonl import append_line, keep_up_to
from finetune.router.alarms import Alarm, RouterAlarms
from finetune.router.drift import Drift
from finetune.router.metrics import RouterSums
from finetune.router.reference import BaseRouting, RouterReference

# Tokens of the probe whose experts a report shows in colour, and alarms of one step that are told one by one.
_SHOWN_TOKENS, _TOLD = 600, 3


@dataclass
class RouterWatch:
    """The probe, the rules and the files of one run.

    Attributes:
        folder: where the files go.
        reference: the base on the probe; None without a probe.
        alarms: the rules; None raises none.
        action: what an alarm does besides being written down and told.
        tell: shows one line to the user.
        pieces: the text of each token of a row.
        main: whether this process writes and tells.
        every: steps between two readings of the probe; None reads it with evaluations (callback.py).
    """

    folder: Path
    reference: RouterReference | None
    alarms: RouterAlarms | None
    action: Literal["warn", "stop"]
    tell: Callable[[str], None]
    pieces: Callable[[Sequence[int]], list[str]]
    main: bool
    every: int | None
    stopped_by: Alarm | None = None

    @property
    def alarms_file(self) -> Path:
        return self.folder / "alarms.jsonl"

    def begin(self, step: int) -> None:
        """Takes or measures the base; lines of steps that will be taken again are dropped. A collective."""
        if self.main:
            keep_up_to(self.alarms_file, step) if step else self.alarms_file.unlink(missing_ok=True)
        if self.reference is None:
            return
        if not self._taken_up(step):
            if step > 0 and not isinstance(self.reference.capture.model, PeftModel):
                # It has trained: its base is gone.
                self.tell("the routing of the base was not kept, so this run is no longer compared with it")
                self.reference = None
                return
            base = self.reference.measure_base()
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "base.json", base.to_dict())
                self.reference.save(self.folder / "reference.safetensors")
        if self.alarms is not None and self.reference.base is not None:
            self.alarms.base = self.reference.base.layers

    def _taken_up(self, step: int) -> bool:
        """Whether the files of an interrupted run held the base on these very rows; damaged ones are told and left."""
        described, kept = self.folder / "base.json", self.folder / "reference.safetensors"
        if self.reference is None or step == 0 or not (described.is_file() and kept.is_file()):
            return False
        try:
            return self.reference.load(kept, BaseRouting.read(described))
        except OutputError as error:
            if self.main:
                self.tell(f"{self.folder}: what was kept of the base's routing is damaged: {error.what}")
            return False

    def drift(self) -> Drift | None:
        """The probe read with the model as it is; None without one. A collective."""
        if self.reference is None:
            return None
        drift = self.reference.drift()
        if self.main:
            write_json(self.folder / "texts.json", self._texts(self.reference))
        return drift

    def judge(self, step: int, *, window: RouterSums | None = None, drift: Drift | None = None) -> bool:
        """Raises the alarms of training tokens or of a drift; whether the run shall stop. A collective."""
        if self.alarms is None:
            return False
        found = [] if window is None else self.alarms.window(step, window)
        found += [] if drift is None else self.alarms.drifted(step, drift)
        if self.main:
            self._raise(found)
        if self.action == "stop" and _anywhere(bool(found)):
            self.stopped_by = self.stopped_by or (found[0] if found else None)
            return True
        return False

    def _raise(self, found: Iterable[Alarm]) -> None:
        found = list(found)
        for alarm in found:
            append_line(self.alarms_file, {**alarm.to_dict(), "action": self.action})
        for alarm in found[:_TOLD]:
            self.tell(f"router, step {alarm.step}: {alarm.message}")
        if len(found) > _TOLD:
            self.tell(f"router: {len(found) - _TOLD} further alarms at this step, in {self.alarms_file}")

    def _texts(self, reference: RouterReference) -> dict[str, object]:
        count = len(reference.base_logprobs_LNE)
        layers = sorted({0, count // 2, count - 1})
        texts: list[dict[str, object]] = []
        first = 0
        for row in reference.rows:
            shown = slice(first, first + len(row))
            if texts and shown.stop > _SHOWN_TOKENS:
                break
            texts.append(
                {
                    "pieces": self.pieces(row),
                    "base": reference.first_experts(reference.base_logprobs_LNE, layers, shown),
                    "tuned": reference.first_experts(reference.tuned_logprobs_LNE, layers, shown),
                }
            )
            first += len(row)
        return {"layers": layers, "texts": texts}


def _anywhere(here: bool) -> bool:
    """Whether it holds in any process: one that stops alone leaves the others waiting for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return here
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
