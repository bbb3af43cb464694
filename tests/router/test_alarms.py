"""Alarms on routing made by hand: what trips them, what does not, and that one place is named once."""

from __future__ import annotations

import random

import pytest

from finetune.router.alarms import AlarmRules, RouterAlarms
from finetune.router.drift import Drift
from finetune.router.metrics import RouterSums, layer_metrics, noise_floor
from tests.router.routing_models import sums_of

EXPERTS, TOP_K = 8, 2


def window(tokens: int, *, seed: int = 0, scale: float = 1.0, without: int | None = None) -> RouterSums:
    """Two layers; in the second one expert may get nothing, and `scale` sharpens the router."""
    rng = random.Random(seed)
    routing = [[[rng.gauss(0, 1) * scale for _ in range(EXPERTS)] for _ in range(tokens)] for _ in range(2)]
    if without is not None:
        for token in routing[1]:
            token[without] = -20.0
    return sums_of(routing, TOP_K)


def alarms(**rules: object) -> RouterAlarms:
    made = RouterAlarms(AlarmRules(**rules), experts=EXPERTS, top_k=TOP_K)  # type: ignore[arg-type]
    made.base = layer_metrics(window(2000))
    return made


def drift(*load_change: float, tokens: int = 4096) -> Drift:
    layers = len(load_change)
    return Drift([1.0] * layers, [1.0] * layers, [0.0] * layers, [0.0] * layers, list(load_change), tokens)


def test_routing_like_the_bases_is_quiet() -> None:
    watched = alarms()
    for seed in range(20):
        assert watched.window(seed, window(600, seed=seed)) == []
    assert watched.drifted(1, drift(0.1, 0.2)) == []


def test_a_dying_expert_is_named() -> None:
    watched = alarms()
    (alarm,) = watched.window(7, window(600, without=3))
    assert (alarm.step, alarm.alarm, alarm.layer, alarm.expert) == (7, "dead_expert", 1, 3)
    assert (alarm.value, alarm.threshold) == (0.0, 0.1)
    assert alarm.base == pytest.approx(1.0, abs=0.1)
    assert alarm.message == "layer 1: expert 3 is dying: 0.00 of an even share of the tokens, " + (
        f"{alarm.base:.2f} in the base"
    )


def test_an_expert_that_the_base_hardly_used_does_not_die() -> None:
    watched = alarms()
    watched.base = layer_metrics(window(2000, without=3))
    assert watched.window(1, window(600, without=3)) == []


def test_windows_add_up_until_there_are_enough_tokens() -> None:
    watched = alarms()
    # 2 of 8: an even share is 128 assignments from 512 tokens on.
    for step in range(1, 6):
        assert watched.window(step, window(100, seed=step, without=3)) == []
    assert [alarm.step for alarm in watched.window(6, window(100, without=3))] == [6]


def test_one_place_alarms_again_only_after_it_was_quiet() -> None:
    watched = alarms()
    assert len(watched.window(1, window(600, without=3))) == 1
    assert watched.window(2, window(600, without=3)) == []
    assert watched.window(3, window(600)) == []
    assert len(watched.window(4, window(600, without=3))) == 1


def test_a_router_that_becomes_certain_has_collapsed() -> None:
    found = alarms().window(1, window(600, scale=30.0))
    assert {(alarm.alarm, alarm.layer) for alarm in found} == {("entropy_collapse", 0), ("entropy_collapse", 1)}
    assert "the entropy of a token's router probabilities is" in found[0].message
    assert "less than 0.5 of the base's" in found[0].message


def test_a_load_on_one_pair_has_collapsed() -> None:
    tokens = [[3.0, 3.0, *[0.0] * 6]] * 600
    found = alarms(dead_experts=False).window(1, sums_of([tokens, tokens], TOP_K))
    assert "the load is spread over effectively 2.0 experts, less than 0.5 of the base's 8" in found[0].message


def test_the_first_window_stands_in_for_a_base() -> None:
    watched = RouterAlarms(AlarmRules(), experts=EXPERTS, top_k=TOP_K)
    assert watched.window(1, window(600)) == []
    assert [alarm.expert for alarm in watched.window(2, window(600, without=3))] == [3]


def test_a_changed_load_is_told_in_multiples_of_chance() -> None:
    floor = noise_floor(4096, EXPERTS, TOP_K)
    watched = alarms(load_change=10.0)
    (alarm,) = watched.drifted(50, drift(9.9 * floor, 12 * floor))
    assert (alarm.alarm, alarm.layer, alarm.expert, alarm.threshold) == ("load_change", 1, None, 10 * floor)
    assert "12.0 times what chance shows (limit 10)" in alarm.message
    assert watched.drifted(60, drift(0.0, 12 * floor)) == []


def test_rules_can_be_switched_off() -> None:
    quiet = alarms(load_change=None, dead_experts=False, entropy=0.0)
    assert quiet.window(1, window(600, scale=30.0, without=3)) == []
    assert quiet.drifted(1, drift(3.0)) == []
