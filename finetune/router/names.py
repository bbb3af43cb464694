"""What router metrics are called in a log: a few scalars, one of each a layer, and vectors for the file.

The names are stable; docs/router_metrics.md documents them. `brief` is what one looks at first; `detailed` adds
`router/layer_07/max_vio` and the like for every layer. Vectors, which scalar loggers cannot take, go to the run's
metrics file whatever is chosen, and are what its report is drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from finetune.router.capture import Part
from finetune.router.metrics import LAYER_METRICS, LayerMetrics, RouterSums, layer_metrics


def brief_scalars(layers: Sequence[LayerMetrics], *, tokens: int) -> dict[str, float]:
    """The few scalars to look at first, over all layers: means, and the worst layer where a mean would hide it."""
    count = len(layers)

    def mean(name: str) -> float:
        return sum(getattr(layer, name) for layer in layers) / count

    scalars = {
        "router/max_vio_mean": mean("max_vio"),
        "router/max_vio_worst": max(layer.max_vio for layer in layers),
        "router/min_utilization_worst": min(layer.min_utilization for layer in layers),
        "router/load_entropy_mean": mean("load_entropy"),
        "router/load_entropy_worst": min(layer.load_entropy for layer in layers),
        "router/token_entropy_mean": mean("token_entropy"),
        "router/top1_prob_mean": mean("top1_prob"),
        "router/z_loss_mean": mean("z_loss"),
        "router/balance_loss_mean": mean("balance_loss"),
        "router/balance_loss_worst": max(layer.balance_loss for layer in layers),
        "router/dead_experts": sum(layer.dead_experts for layer in layers),
        "router/repeat_first_mean": mean("repeat_first"),
        "router/tokens": tokens,
    }
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def part_scalars(parts: Mapping[Part, RouterSums]) -> dict[str, float]:
    """Prompt and completion apart; nothing unless both have tokens (without labels it is not known which is which)."""
    if any(sums.tokens == 0 for sums in parts.values()):
        return {}
    scalars: dict[str, float] = {}
    for part, sums in parts.items():
        scalars[f"router/{part}/max_vio_worst"] = max(layer.max_vio for layer in layer_metrics(sums))
        scalars[f"router/{part}/tokens"] = sums.tokens
    return scalars


def layer_scalars(layers: Sequence[LayerMetrics]) -> dict[str, float]:
    """Per-layer scalars, `router/layer_07/max_vio`."""
    return {
        f"router/layer_{index:02d}/{name}": value
        for index, layer in enumerate(layers)
        for name in LAYER_METRICS
        if math.isfinite(value := getattr(layer, name))
    }


def layer_vectors(layers: Sequence[LayerMetrics]) -> dict[str, list[float]]:
    """The load of every layer, `router/layer_07/load`, and a vector over layers of each metric,
    `router/by_layer/max_vio`; rounded to a millionth."""
    vectors = {
        f"router/layer_{index:02d}/load": [round(f, 6) for f in layer.load] for index, layer in enumerate(layers)
    }
    for name in LAYER_METRICS:
        vectors[f"router/by_layer/{name}"] = [round(getattr(layer, name), 6) for layer in layers]
    return vectors
