"""The verdict on a run's routing: the last state of its routers against the base.

How: on the same tokens where the run has such a pair, the held-out rows before the first step and after the last.
Otherwise with the base on the probe, and it is said that the tokens differ. The verdict is

    broken     at the end an expert gets less than a tenth of an even share that the base gave at least twice that; or
               the entropy of the router's choice fell below `router.alarms.entropy` of the base's; or an alarm stopped
               the run
    moved      on the same tokens, an expert's load changed by more than half an even share, and by more than ten times
               what chance shows; or a layer keeps less than half of its choices beyond what chance would keep; or an
               alarm was raised
    intact     none of these
    unknown    there is no base to compare with

Every verdict comes with what to do about it. It is a warning only where an alarm says so: a routing that moved on
narrow data, and one that nobody measured, are facts to know.

Leaves out: reading the files (router/history.py), drawing (report_page.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data import counts, visible
from finetune.router.history import RouterHistory, Window, max_of

# The recipe's default, for a run that had no alarms.
_ENTROPY = 0.5
# Change of an expert's load that is more than a fine-tuning's usual: in even shares, and in what chance shows. Tighter
# than the alarm, which must not go off in a healthy run.
_MOVED, _MOVED_TIMES = 0.5, 10.0
# A share of an even share of tokens below which an expert is dead, and what the base must have given it.
_DEAD, _ALIVE = 0.1, 0.2
# Tokens of an even share that a window needs before an expert can be called dead, as for alarms.
_ENOUGH = 128


@dataclass(frozen=True)
class Comparison:
    """Two states of the routers, and what they are called."""

    before: Window
    after: Window
    before_name: str
    after_name: str
    same_tokens: bool
    with_base: bool


@dataclass(frozen=True)
class Missing:
    """What the run does not hold, and the recipe's setting that would give it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Verdict:
    """What became of the routing, why, and what to do about it (`advice`; commands and keys between backticks)."""

    level: Literal["fine", "notice", "warning", "error"]
    word: Literal["intact", "moved", "broken", "unknown"]
    headline: str
    sentence: str
    advice: str


def compare(history: RouterHistory) -> Comparison | None:
    """The base and the last state; None where there is only one state."""
    train = history.train[-1] if history.train else None
    held_out = history.held_out[-1] if history.held_out else None
    if held_out is not None and (train is None or held_out.step >= train.step):
        after, name = held_out, f"held-out, step {held_out.step:,}"
        first = history.held_out[0]
        if first.step == 0 < held_out.step:
            return Comparison(first, after, "base, held-out", name, same_tokens=True, with_base=True)
    elif train is not None:
        after, name = train, f"training, step {train.step:,}"
    else:
        return None
    if after.step == 0:
        return None
    if history.base is not None:
        before = f"base, {visible(history.base.name)}"
        return Comparison(history.base.window, after, before, name, same_tokens=False, with_base=True)
    windows = history.held_out if after is held_out else history.train
    if len(windows) < 2:
        return None
    before = f"{'held-out' if after is held_out else 'training'}, step {windows[0].step:,}"
    return Comparison(windows[0], after, before, name, same_tokens=after is held_out, with_base=False)


def judge(
    history: RouterHistory, compared: Comparison | None, recipe: Mapping[str, Any], stopped: str | None, run: str
) -> Verdict:
    """The answer to "did fine-tuning break the routing?".

    Args:
        stopped: the message of the alarm that stopped the run.
        run: the folder, as a command takes it.
    """
    adapter = shlex.quote(f"{run}/adapter")
    broken = [] if stopped is None else [f"an alarm stopped the run: {stopped.rstrip('.')}"]
    moved: list[str] = []
    with_base = compared is not None and compared.with_base
    if compared is not None and compared.with_base:
        broken += _died(compared) + _collapsed(compared, setting(recipe, "router.alarms.entropy", _ENTROPY) or _ENTROPY)
    if history.drift:
        moved += _drifted(history)
    if history.alarms and not broken and not moved:
        moved.append(f"{counts(len(history.alarms), 'alarm')} went off on the way, and the end is quiet again")
    if broken:
        sentence = _sentence("; ".join(broken)) + "."
        return Verdict("error", "broken", "Fine-tuning broke the routing", sentence, _cure(recipe))
    if moved:
        facts = _facts(history, compared)
        sentence = _sentence("; ".join(moved)) + "." + (f" {_sentence(facts)}." if facts else "")
        advice = (
            f"keep the run if other text still works (`finetune evaluate {adapter} --compare base --data FILE`); if "
            "not, halve `training.learning_rate`"
        )
        level: Literal["notice", "warning"] = "warning" if history.alarms else "notice"
        return Verdict(level, "moved", "Fine-tuning moved the routing", sentence, advice)
    step = max((window.step for window in (*history.train, *history.held_out)), default=0)
    if step == 0:
        sentence, advice = "The run has logged its base only.", "report again after the first log of training"
        return Verdict("notice", "unknown", "Nothing has trained yet", sentence, advice)
    if not with_base and not history.drift:
        sentence = "Without the base's routing nobody can say what fine-tuning changed."
        advice = f"measure it now: `finetune router drift {adapter}`"
        return Verdict("notice", "unknown", "There is no base to compare with", sentence, advice)
    sentence = f"After {counts(step, 'step')} {_facts(history, compared)}."
    advice = "nothing; judge the run by its held-out loss and its answers"
    return Verdict("fine", "intact", "The routing is intact", sentence, advice)


def _cure(recipe: Mapping[str, Any]) -> str:
    """What to change before training again; what moved the routing decides."""
    if not setting(recipe, "trainable.router", False):
        return "do not use this adapter; train again with a tenth of `training.learning_rate`"
    rate = setting(recipe, "trainable.router_learning_rate", None)
    return (
        "do not use this adapter; train again with `trainable.router: false`, or with a tenth of "
        + ("`training.learning_rate`" if rate is None else "`trainable.router_learning_rate`")
        + (
            ""
            if setting(recipe, "router.aux", "off") == "train"
            else " and `router.aux: train`, which balances the load"
        )
    )


def find_missing(history: RouterHistory, recipe: Mapping[str, Any]) -> list[Missing]:
    """What the page cannot show, each with the recipe's key that would give it."""
    found = []
    without_probe = setting(recipe, "router.probe_tokens", 4096) == 0
    early = "the run ended before it was read; `router.probe_every` reads it more often"
    probe = "`router.probe_tokens: 4096`" if without_probe else early
    if history.base is None:
        found.append(Missing("the base on a probe, so curves have no band and the routing no reference", probe))
    if not history.drift:
        found.append(Missing("drift from the base on the same tokens", probe))
    if not history.texts:
        found.append(Missing("text coloured by expert", probe))
    if not history.held_out:
        fix = "`training.eval_strategy: steps`, and `data.eval` or `data.eval_fraction`"
        found.append(Missing("the routing of held-out tokens", fix))
    elif history.held_out[0].step != 0:
        found.append(Missing("the base on the held-out tokens", "`training.eval_on_start: true`"))
    if not any("completion/max_vio_worst" in window.scalars for window in history.train):
        found.append(
            Missing(
                "prompt and completion tokens apart",
                "data with prompts of which only the completion is learnt",
            )
        )
    if setting(recipe, "router.alarms.action", "warn") == "off":
        found.append(Missing("alarms", "`router.alarms.action: warn`"))
    return found


def _died(compared: Comparison) -> list[str]:
    """Experts that the base used and the end does not."""
    before, after = compared.before, compared.after
    experts = len(after.load[0])
    if after.tokens < _ENOUGH * experts:
        return []
    died = [
        (layer, expert, share * experts, before.load[layer][expert] * experts)
        for layer, row in enumerate(after.load)
        for expert, share in enumerate(row)
        if share * experts < _DEAD and before.load[layer][expert] * experts >= _ALIVE
    ]
    if not died:
        return []
    layer, expert, now, base = min(died, key=lambda each: each[2])
    number = counts(len(died), "expert")
    where = f"expert {expert} of layer {layer} gets {now:.2f} of an even share, and got {base:.2f} in the base"
    return [f"{number} died: {where}"]


def _collapsed(compared: Comparison, limit: float) -> list[str]:
    """Layers whose choice, or whose load, has a fraction of the base's entropy."""
    found = []
    experts = len(compared.after.load[0])
    for name, text in (
        ("token_entropy", "the entropy of a token's choice"),
        ("load_entropy", "the spread of the load"),
    ):
        pairs = zip(compared.before.layers.get(name, []), compared.after.layers.get(name, []), strict=False)
        fallen = []
        for layer, (before, after) in enumerate(pairs):
            if before is None or after is None:
                continue
            if name == "load_entropy":  # as a number of experts
                before, after = experts**before, experts**after
            if after < limit * before:
                fallen.append((after / before, layer))
        if fallen:
            share, layer = min(fallen)
            found.append(
                f"{text} collapsed in {counts(len(fallen), 'layer')}, to {share:.0%} of the base's in layer {layer}"
            )
    return found


def far(change: float, history: RouterHistory) -> bool:
    """Whether a change of an expert's load on the probe, in even shares, is more than a fine-tuning's usual."""
    floor = 0.0 if history.base is None else history.base.noise_floor
    return change > max(_MOVED, _MOVED_TIMES * floor)


def _drifted(history: RouterHistory) -> list[str]:
    """How far the probe's routing is from the base's, where that is far."""
    found = []
    last, base = history.drift[-1].layers, history.base
    change = max_of(last.get("load_change", []))
    if change is not None and far(change[1], history):
        times = ""
        if base is not None and base.noise_floor > 0:
            times = f", {change[1] / base.noise_floor:.0f} times what chance shows"
        found.append(
            f"on the same tokens the load of an expert in layer {change[0]} changed by {change[1]:.2f} of an even "
            f"share{times}"
        )
    overlap = max_of([None if value is None else -value for value in last.get("overlap", [])])
    if base is not None and overlap is not None:
        chance = base.top_k / history.experts
        if chance < 1 and (-overlap[1] - chance) / (1 - chance) < 0.5:
            found.append(
                f"layer {overlap[0]} makes only {-overlap[1]:.0%} of the base's choices, {chance:.0%} by chance"
            )
    return found


def _facts(history: RouterHistory, compared: Comparison | None) -> str:
    """What can be said of a routing that is not broken."""
    said = []
    if compared is not None and compared.with_base:
        said.append("no expert died")
        before, after = value_of(compared.before.worst("max_vio")), value_of(compared.after.worst("max_vio"))
        if before is not None and after is not None:
            said.append(f"the worst layer's MaxVio is {after:.2f} ({before:.2f} in the base)")
    if history.drift:
        overlap = [value for value in history.drift[-1].layers.get("overlap", []) if value is not None]
        if overlap:
            said.append(f"{sum(overlap) / len(overlap):.1%} of the experts chosen are still the base's")
    return ", and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def setting(recipe: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key of a recipe that an older version may have written; null counts as given."""
    value: Any = recipe
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def value_of(found: tuple[int, float] | None) -> float | None:
    return None if found is None else found[1]


def _sentence(text: str) -> str:
    """With a capital, without a full stop."""
    return text[:1].upper() + text[1:].rstrip(".")
