"""Pictures of the load for loggers: a histogram of utilization and the layer x expert heat map, at some of the logs.

Why: scalars say that a layer is uneven, a picture says which expert took the tokens; but one for each of thousands of
logs would cost more than it shows.

How: at every evaluation log, and at the training logs 1, 2, 4, 8 ... 64 and then every 64th of this process, the load
vectors of the log (`RouterCallback.vectors`) become one `RouterMedia`, which each sender passes to its logger. Pictures
are dense where routing moves most, and at most a few dozen in a long run. A 32 x 8 heat map takes 0.7 s on one core.

Leaves out: the drawing (plots.py) and the loggers themselves (train/loggers.py), which are handed in; histograms per
layer, because the heat map shows every layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EVERY = 64
_LOAD = re.compile(r"(?P<prefix>.*)router/layer_(?P<layer>\d+)/load")


@dataclass(frozen=True)
class RouterMedia:
    """What one log shows.

    Attributes:
        step: optimizer steps taken.
        prefix: of the log's names: "" for training, "eval_" or "eval_<dataset>_" for evaluation.
        utilization: float64 [L, E], load of every expert in units of an even share (f * E).
        image: heat map, uint8 RGB [height, width, 3]; None when no figures are wanted.
    """

    step: int
    prefix: str
    utilization: np.ndarray
    image: np.ndarray | None

    def named(self, histogram: Callable[[np.ndarray], Any], image: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """Both by their logged names, in a logger's own types: `histogram` gets [L * E], `image` the pixels."""
        shown = {f"{self.prefix}router/utilization": histogram(self.utilization.reshape(-1))}
        if self.image is not None:
            shown[f"{self.prefix}router/load_map"] = image(self.image)
        return shown


class RouterMediaCallback(TrainerCallback):
    """Sends a `RouterMedia` to every sender, from the main process.

    It comes after the callback whose `vectors` it reads, and after the loggers that it sends to.

    Args:
        vectors: the vectors of the log being written, by name; those called `router/layer_07/load` are read.
        senders: each passes the media on to one logger.
        draw: pixels, uint8 RGB [height, width, 3], from a load [L, E] and a title; None leaves the image out.
    """

    def __init__(
        self,
        vectors: Callable[[], Mapping[str, Sequence[float]]],
        senders: Sequence[Callable[[RouterMedia], None]],
        *,
        draw: Callable[[Tensor, str], np.ndarray] | None,
    ):
        self.vectors, self.senders, self.draw = vectors, tuple(senders), draw
        self._training_logs = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        prefix, load_LE = _load(self.vectors())
        if load_LE is None:
            return
        if prefix == "":
            self._training_logs += 1
            if not is_shown(self._training_logs):
                return
        title = f"Expert load, {'training' if prefix == '' else 'held-out'}, step {state.global_step}"
        image = None if self.draw is None else self.draw(load_LE, title)
        media = RouterMedia(state.global_step, prefix, (load_LE * load_LE.shape[1]).numpy(), image)
        for send in self.senders:
            send(media)


def is_shown(log: int) -> bool:
    """Whether the so-manyth training log, counted from 1, comes with media: powers of two, later every 64th."""
    return log & (log - 1) == 0 if log < EVERY else log % EVERY == 0


def _load(vectors: Mapping[str, Sequence[float]]) -> tuple[str, Tensor | None]:
    """Prefix of the log and its load, float64 [L, E]; None when the log has none."""
    found = {match: values for name, values in vectors.items() if (match := _LOAD.fullmatch(name))}
    if not found:
        return "", None
    prefixes = {match["prefix"] for match in found}
    assert len(prefixes) == 1, f"loads of several logs at once: {sorted(prefixes)}"
    rows = sorted((int(match["layer"]), values) for match, values in found.items())
    return prefixes.pop(), torch.tensor([values for _, values in rows], dtype=torch.float64)
