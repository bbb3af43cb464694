"""What Prometheus reads at /metrics.

The engine's counters are read on request, so a token costs nothing here; the times of an answer are observed once, at
its end. Names and units follow Prometheus' conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune.serve.answers import Answer

if TYPE_CHECKING:
    from finetune.infer import EngineStats

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class Metrics(Collector):
    """Counters and histograms of one server, in a registry of their own; itself it collects the engine's."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "finetune_requests", "HTTP requests answered.", ("endpoint", "status"), registry=self._registry
        )
        self._first_token = Histogram(
            "finetune_time_to_first_token_seconds",
            "From a request's headers to the first token of each answer.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._token = Histogram(
            "finetune_time_per_output_token_seconds",
            "Mean time between the tokens of an answer.",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )

    def count(self, endpoint: str, status: int) -> None:
        """Counts one HTTP request."""
        self._requests.labels(endpoint, str(status)).inc()

    def observe(self, answer: Answer, began: float) -> None:
        """Records the times of an answer that has ended; `began` is when its request arrived (monotonic seconds)."""
        if answer.first is not None:
            self._first_token.observe(answer.first - began)
            if answer.tokens > 1:
                self._token.observe((answer.last - answer.first) / (answer.tokens - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("finetune_running", "Answers that decode now.", stats.running)
        yield GaugeMetricFamily("finetune_waiting", "Answers that wait for a place.", stats.waiting)
        yield GaugeMetricFamily("finetune_kv_pages_used", "Pages of keys and values in use.", stats.kv_pages_used)
        yield GaugeMetricFamily("finetune_kv_pages", "Pages of keys and values.", stats.kv_pages)
        yield CounterMetricFamily("finetune_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield CounterMetricFamily("finetune_completion_tokens", "Tokens generated.", stats.completion_tokens)
        yield CounterMetricFamily("finetune_answers", "Answers begun by the engine.", stats.requests)
        yield CounterMetricFamily("finetune_answers_cancelled", "Answers cancelled.", stats.cancelled)
        yield CounterMetricFamily("finetune_answers_failed", "Answers that an error ended.", stats.failed)
        made_room = "Times that an answer made room for others and was computed anew."
        yield CounterMetricFamily("finetune_answers_preempted", made_room, stats.preempted)
        if stats.expert_hits is not None and stats.expert_misses is not None:
            yield CounterMetricFamily("finetune_expert_cache_hits", "Experts found resident.", stats.expert_hits)
            yield CounterMetricFamily("finetune_expert_cache_misses", "Experts fetched.", stats.expert_misses)
        if stats.expert_fetched_bytes is not None:
            yield CounterMetricFamily("finetune_expert_fetched_bytes", "Bytes fetched.", stats.expert_fetched_bytes)
