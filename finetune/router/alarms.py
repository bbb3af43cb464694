"""When a router needs a look: an expert dies, the entropy collapses, the load leaves the base's.

Why: a ruined router shows in no loss curve until late, and a threshold on imbalance alone cries wolf on narrow data. So
every rule compares with the base: on the probe where there is one, else with the first window of training.

    dead_expert        an expert gets less than a tenth of an even share of a window, where the base gave it at least
                       twice that
    entropy_collapse   the entropy of a token's router probabilities, or the number of experts that the load is
                       effectively spread over (exp of its entropy), falls below a share of the base's
    load_change        on the probe's tokens, the largest change of an expert's load, in units of an even share, is more
                       than a multiple of the noise floor: the MaxVio that so many tokens show by chance

Windows are added up until an even share is 128 assignments: with an eighth of them, chance alone could kill an expert.
An alarm of one kind and place is raised once, and again only after it was quiet for a window.

Leaves out: what happens then (callback.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.router.drift import Drift
from finetune.router.metrics import DEAD_UTILIZATION, LayerMetrics, RouterSums, layer_metrics, noise_floor

Kind = Literal["dead_expert", "entropy_collapse", "load_change"]
# Assignments of an even share that a window needs before it is judged.
_ENOUGH = 128


@dataclass(frozen=True)
class AlarmRules:
    """What is too far.

    Attributes:
        load_change: multiple of the noise floor; None never alarms.
        dead_experts: whether to look for them.
        entropy: share of the base's entropy; 0 never alarms.
    """

    load_change: float | None = 40.0
    dead_experts: bool = True
    entropy: float = 0.5


@dataclass(frozen=True)
class Alarm:
    """One rule that was broken at one place: `value` against `threshold`, and the base's value beside them."""

    step: int
    alarm: Kind
    layer: int
    expert: int | None
    value: float
    base: float
    threshold: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RouterAlarms:
    """Judges windows of training tokens and drifts from the base.

    Args:
        rules: what is too far.
        experts: experts per layer.
        top_k: experts per token.
    """

    def __init__(self, rules: AlarmRules, *, experts: int, top_k: int):
        self.rules, self.experts, self.top_k = rules, experts, top_k
        self.base: Sequence[LayerMetrics] | None = None
        self._pending: RouterSums | None = None
        self._raised: set[tuple[str, int, int | None]] = set()

    def window(self, step: int, sums: RouterSums) -> list[Alarm]:
        """New alarms of the training tokens since the last judged window."""
        pending = sums if self._pending is None else self._pending + sums
        if pending.tokens * self.top_k < _ENOUGH * self.experts:
            self._pending = pending
            return []
        self._pending = None
        layers = layer_metrics(pending)
        if self.base is None:
            self.base = layers
            return []
        found = [*self._dead(step, layers, self.base), *self._collapsed(step, layers, self.base)]
        return self._new(found, ("dead_expert", "entropy_collapse"))

    def drifted(self, step: int, drift: Drift) -> list[Alarm]:
        """New alarms of the probe."""
        if self.rules.load_change is None:
            return []
        floor = noise_floor(drift.tokens, self.experts, self.top_k)
        threshold = self.rules.load_change * floor
        found = [
            Alarm(
                step,
                "load_change",
                layer,
                None,
                change,
                0.0,
                threshold,
                f"layer {layer}: the load of an expert changed by {change:.2f} of an even share against the base on "
                f"the same {drift.tokens:,} tokens, {change / floor:.1f} times what chance shows (limit "
                f"{self.rules.load_change:g})",
            )
            for layer, change in enumerate(drift.load_change)
            if change > threshold
        ]
        return self._new(found, ("load_change",))

    def _dead(self, step: int, layers: Sequence[LayerMetrics], base: Sequence[LayerMetrics]) -> Iterable[Alarm]:
        if not self.rules.dead_experts:
            return
        for layer, (now, before) in enumerate(zip(layers, base, strict=True)):
            for expert, (f, f_base) in enumerate(zip(now.load, before.load, strict=True)):
                share, share_base = f * self.experts, f_base * self.experts
                if share < DEAD_UTILIZATION and share_base >= 2 * DEAD_UTILIZATION:
                    message = (
                        f"layer {layer}: expert {expert} is dying: {share:.2f} of an even share of the tokens, "
                        f"{share_base:.2f} in the base"
                    )
                    yield Alarm(step, "dead_expert", layer, expert, share, share_base, DEAD_UTILIZATION, message)

    def _collapsed(self, step: int, layers: Sequence[LayerMetrics], base: Sequence[LayerMetrics]) -> Iterable[Alarm]:
        if self.rules.entropy <= 0:
            return
        for layer, (now, before) in enumerate(zip(layers, base, strict=True)):
            pairs = (
                (
                    "the entropy of a token's router probabilities is {:.3f} nats",
                    now.token_entropy,
                    before.token_entropy,
                ),
                (
                    "the load is spread over effectively {:.1f} experts",
                    self.experts**now.load_entropy,
                    self.experts**before.load_entropy,
                ),
            )
            for text, value, value_base in pairs:
                share = self.rules.entropy
                if value < share * value_base:
                    message = f"layer {layer}: {text.format(value)}, less than {share:g} of the base's {value_base:.3g}"
                    yield Alarm(step, "entropy_collapse", layer, None, value, value_base, share * value_base, message)

    def _new(self, found: Iterable[Alarm], kinds: tuple[Kind, ...]) -> list[Alarm]:
        found = list(found)
        places = {(alarm.alarm, alarm.layer, alarm.expert) for alarm in found}
        new = [alarm for alarm in found if (alarm.alarm, alarm.layer, alarm.expert) not in self._raised]
        self._raised = {place for place in self._raised if place[0] not in kinds} | places
        return new
