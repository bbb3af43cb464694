"""The base's routing on fixed rows, and how far the model in training has moved from it.

Why: imbalance on narrow data is normal, so a run is compared with its own base on the same tokens, not with an even
load; and routing moves even where the routers are frozen, because their input moves.

How: before the first step the probe rows go through the base (a LoRA model with its adapter off; a model that trains in
full is its own base then) and its router log-probabilities are kept on the host, and in a file for a resumed run. Each
`drift` reads the same rows again with the model as it is. Rows go one by one, so nothing is padded; every process reads
all of them, because a sharded model needs every process.

Leaves out: which rows (the caller's), when (callback.py), what is too far (alarms.py).

Shape suffixes: L layers, N tokens of all rows, E experts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.checkpoint import check_safetensors, read_json
from finetune.errors import OutputError
from finetune.router.capture import RouterCapture
from finetune.router.drift import Drift, drift
from finetune.router.hook import Recording
from finetune.router.metrics import LAYER_METRICS, LayerMetrics, RouterSums, layer_metrics, noise_floor
from finetune.values import check_object

# Windows of the probe whose spread makes the band around the base's values.
_WINDOWS = 8
# Log-probabilities of the probe, L * N * E float32: 4 MiB for Mixtral 8x7B and 4096 tokens.
_MOST_BYTES = 64 * 2**20


def _with_nan(value: Any) -> Any:
    """What JSON wrote as null was NaN, as the repetition of a text without neighbours is."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


@dataclass(frozen=True)
class BaseRouting:
    """The base on the probe, as a run's report shows it.

    Attributes:
        probe: name, number of rows and of tokens.
        top_k: experts per token.
        noise_floor: MaxVio that so many tokens show by chance.
        layers: the metrics of each layer.
        spread: standard deviation of each metric between windows of `window_tokens` tokens, per layer.
        window_tokens: mean number of tokens of those windows.
    """

    probe: dict[str, Any]
    top_k: int
    noise_floor: float
    layers: list[LayerMetrics]
    spread: dict[str, list[float]]
    window_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> BaseRouting:
        """Reads what was written of `to_dict`.

        Raises:
            OutputError: the file is missing or damaged, or holds something else.
        """
        return check_object(
            _with_nan(read_json(path, kind=OutputError)),
            cls,
            kind=OutputError,
            name=path.name,
            where=str(path),
            fix="restore the file as `finetune train` wrote it",
        )


def probe_rows(rows: Iterable[Mapping[str, Any]], tokens: int, *, layers: int, experts: int) -> list[list[int]]:
    """The first documents of `rows`, packed ones taken apart, of `tokens` tokens in all; the last one is cut.

    Fewer where the log-probabilities of so many tokens would take more than 64 MiB.
    """
    left = min(tokens, _MOST_BYTES // (4 * layers * experts))
    chosen: list[list[int]] = []
    for row in rows:
        ids, first = list(row["input_ids"]), 0
        for length in row.get("seq_lengths") or [len(ids)]:
            document = ids[first : first + min(length, left)]
            first += length
            if not document:
                return chosen
            chosen.append(document)
            left -= len(document)
    return chosen


class RouterReference:
    """Compares a model in training with its base on probe rows.

    Args:
        capture: of the model, bare or inside PEFT; not disturbed.
        rows: token ids of each probe row.
        name: what the rows are called, e.g. "held-out data".
    """

    def __init__(self, capture: RouterCapture, rows: Sequence[Sequence[int]], *, name: str):
        assert rows, "a probe has rows"
        self.capture, self.rows, self.name = capture, rows, name
        self.base: BaseRouting | None = None
        self.base_logprobs_LNE: list[Tensor] = []
        self.tuned_logprobs_LNE: list[Tensor] = []

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def measure_base(self) -> BaseRouting:
        """Reads the probe with the base, and keeps what its routers say. Every process must call it."""
        model = self.capture.model
        windows: list[RouterSums] = []
        own = RouterCapture(model, num_experts=self.capture.num_experts, top_k=self.capture.top_k)
        with _adapter_off(model), own:
            self.base_logprobs_LNE = self._read(window=lambda: windows.append(_taken(own)))
        self.base = _described(windows, self.name, len(self.rows))
        return self.base

    def drift(self) -> Drift:
        """Reads the probe with the model as it is and compares. Every process must call it."""
        assert self.base_logprobs_LNE, "measure or load the base first"
        self.tuned_logprobs_LNE = self._read()
        return drift(self.base_logprobs_LNE, self.tuned_logprobs_LNE, self.capture.top_k)

    def first_experts(self, which: Sequence[Tensor], layers: Sequence[int], tokens: slice) -> list[list[int]]:
        """The most probable expert of some tokens of the probe, layer by layer."""
        return [which[layer][tokens].argmax(1).tolist() for layer in layers]

    def save(self, path: Path) -> None:
        """Writes the base's log-probabilities, for a resumed run."""
        partial = path.with_name(path.name + ".partial")
        tensors = {f"layer_{index:02d}": layer for index, layer in enumerate(self.base_logprobs_LNE)}
        save_file({**tensors, "ids": self._ids()}, partial)
        os.replace(partial, path)

    def load(self, path: Path, base: BaseRouting) -> bool:
        """Takes what `save` wrote; False, and nothing is taken, where it is of other rows.

        Raises:
            OutputError: the file is damaged, or of another model than `base`.
        """
        check_safetensors(path, kind=OutputError)
        saved = load_file(path)
        if "ids" not in saved or not torch.equal(saved.pop("ids"), self._ids()):
            return False
        if [layer.shape for layer in saved.values()] != [(self.tokens, len(layer.load)) for layer in base.layers]:
            raise OutputError(f"{path.name} is of another model", where=str(path), fix="restore the file")
        self.base, self.base_logprobs_LNE = base, [saved[name] for name in sorted(saved)]
        return True

    def _ids(self) -> Tensor:
        return torch.tensor([token for row in self.rows for token in row], dtype=torch.int32)

    @torch.no_grad()
    def _read(self, window: Callable[[], None] | None = None) -> list[Tensor]:
        """Router log-probabilities [N, E] of each layer in float32 on the host; `window` is called at each eighth."""
        model = self.capture.model
        device = next(model.parameters()).device
        logprobs: list[list[Tensor]] = []
        read, due = 0, self.tokens / _WINDOWS
        with self.capture.paused(), _evaluating(model), Recording(model) as recording:
            for row in self.rows:
                # The head's logits are not wanted: those of one token are the fewest there can be.
                model(input_ids=torch.tensor([row], device=device), use_cache=False, logits_to_keep=1)
                logprobs.append([logits.float().log_softmax(-1).cpu() for logits in recording.logits])
                read += len(row)
                if window is not None and (read >= due or row is self.rows[-1]):
                    window()
                    due = read + self.tokens / _WINDOWS
        return [torch.cat(layer) for layer in zip(*logprobs, strict=True)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone, where the model is an adapter on one; what trains is still marked as training.

    PEFT would freeze it meanwhile, and this may be the first forward pass: FSDP2 decides there, once, what trains.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trains:
            parameter.requires_grad_(True)
        yield


def _taken(capture: RouterCapture) -> RouterSums:
    """What was counted since the last call, in this process: all of them read the same rows."""
    sums = capture.snapshot("eval", across_processes=False)
    capture.reset("eval")
    return sums


def _described(windows: Sequence[RouterSums], name: str, rows: int) -> BaseRouting:
    windows = [window for window in windows if window.tokens]
    total = windows[0]
    for window in windows[1:]:
        total = total + window
    by_window = [layer_metrics(window) for window in windows]
    spread = {
        metric: [_deviation([getattr(window[layer], metric) for window in by_window]) for layer in range(total.layers)]
        for metric in LAYER_METRICS
    }
    return BaseRouting(
        probe={"name": name, "rows": rows, "tokens": total.tokens},
        top_k=total.top_k,
        noise_floor=noise_floor(total.tokens, total.experts, total.top_k),
        layers=layer_metrics(total),
        spread=spread,
        window_tokens=total.tokens // len(windows),
    )


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0
