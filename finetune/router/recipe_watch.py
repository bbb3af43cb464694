"""The router watch of a run, by its recipe: which tokens it is compared with its base on, and what raises an alarm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from finetune.data import token_pieces
from finetune.moe import MoeArch
from finetune.recipe import Recipe
from finetune.router.alarms import AlarmRules, RouterAlarms
from finetune.router.callback import RouterCallback
from finetune.router.capture import RouterCapture
from finetune.router.reference import RouterReference, probe_rows
from finetune.router.watch import RouterWatch
from finetune.runfolder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def watch_router(
    model: nn.Module,
    arch: MoeArch,
    recipe: Recipe,
    data: tuple[Dataset, Dataset | None],
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tell: Callable[[str], None],
    main: bool,
) -> RouterCallback:
    """The callback that watches the routers of `model`.

    Args:
        data: rows that train, and held-out ones.
        tell: shows one line to the user; called in the main process only.
        main: whether this is it.
    """
    section = recipe.router
    capture = RouterCapture(model, num_experts=arch.experts, top_k=arch.top_k)
    train, held_out = data
    name, source = ("training data", train) if held_out is None else ("held-out data", held_out)
    probe = probe_rows(source, section.probe_tokens, layers=arch.layers, experts=arch.experts)
    rules = section.alarms
    alarms = None
    if rules.action != "off":
        alarms = RouterAlarms(
            AlarmRules(rules.load_change, rules.dead_experts, rules.entropy), experts=arch.experts, top_k=arch.top_k
        )
    watch = RouterWatch(
        run.router,
        RouterReference(capture, probe, name=name) if probe else None,
        alarms,
        action="stop" if rules.action == "stop" else "warn",
        tell=tell,
        pieces=lambda ids: token_pieces(tokenizer, ids),
        main=main,
        every=section.probe_every,
    )
    return RouterCallback(capture, detailed=section.metrics == "detailed", watch=watch)
