"""Prometheus metrics under vLLM's names, so that its dashboards and gateways read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from fusedkv_jax.serving import AsyncEngine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_FIRST += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_GAP += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_WHOLE += (120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Metrics:
    """What a server measures, and what its engine counts.

    Args:
        engine: asked for its counts at every scrape.
    """

    def __init__(self, engine: AsyncEngine):
        self.registry = prometheus_client.CollectorRegistry()
        labels = {"model_name": engine.model_name}
        self.registry.register(_EngineStats(engine, labels))

        def histogram(
            name: str, text: str, buckets: tuple[float, ...]
        ) -> prometheus_client.Histogram:
            found = prometheus_client.Histogram(
                f"vllm:{name}", text, [*labels], registry=self.registry, buckets=buckets
            )
            return found.labels(**labels)

        self.first = histogram("time_to_first_token_seconds", "Time to first token.", _FIRST)
        self.gap = histogram("inter_token_latency_seconds", "Time between tokens.", _GAP)
        self.rest = histogram(
            "request_time_per_output_token_seconds", "Mean time per further token.", _GAP
        )
        self.whole = histogram("e2e_request_latency_seconds", "Time to the last token.", _WHOLE)
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output = histogram("request_generation_tokens", "Tokens of an output.", _TOKENS)
        self._finished = prometheus_client.Counter(
            "vllm:request_success",
            "Outputs, by why they ended.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self._labels = labels
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(**labels, finished_reason=reason)

    def start(self, prompt_tokens: int) -> Stopwatch:
        """Of an output that is asked for now."""
        return Stopwatch(self, prompt_tokens)

    def finished(self, reason: str) -> None:
        """An output has ended."""
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


class Stopwatch:
    """Times of one output."""

    def __init__(self, metrics: Metrics, prompt_tokens: int):
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._start = self._first = self._last = time.monotonic()
        self._count = 0
        self._ended = False

    def tokens(self, count: int) -> None:
        """So many tokens have come."""
        if not count:
            return
        now = time.monotonic()
        if self._count:
            self._metrics.gap.observe(now - self._last)
        else:
            self._first = now
            self._metrics.first.observe(now - self._start)
        self._last = now
        self._count += count

    def finish(self, reason: str) -> None:
        """The output has ended; only the first reason counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.finished(reason)
        if reason in ("stop", "length"):
            self._metrics.whole.observe(time.monotonic() - self._start)
            self._metrics.prompt.observe(self._prompt_tokens)
            self._metrics.output.observe(self._count)
            if self._count > 1:
                self._metrics.rest.observe((self._last - self._first) / (self._count - 1))


class _EngineStats:
    """The engine's counts as metrics."""

    def __init__(self, engine: AsyncEngine, labels: dict[str, str]):
        self._engine = engine
        self._names, self._values = [*labels], [*labels.values()]

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.pages_used / max(1, stats.pages_total)
        gauges = (
            ("num_requests_running", "Requests in steps.", stats.running),
            ("num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("kv_cache_usage_perc", "Pages in use; 1 is all of them.", used),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits),
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("num_preemptions", "Requests that lost their pages.", stats.preemptions),
            ("spec_decode_num_drafts", "Drafts that were checked.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Their tokens.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Those in outputs.", stats.accepted_tokens),
            ("spec_decode_num_undrafted_steps", "Steps that left them out.", stats.undrafted_steps),
        )
        sizes = {"block_size": stats.page_size, "num_gpu_blocks": stats.pages_total}
        names = [*self._names, *sizes]
        metric = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the cache.", labels=names)
        metric.add_metric([*self._values, *map(str, sizes.values())], 1)
        yield metric
        for name, text, value in gauges:
            metric = GaugeMetricFamily(f"vllm:{name}", text, labels=self._names)
            metric.add_metric(self._values, value)
            yield metric
        for name, text, value in counters:
            metric = CounterMetricFamily(f"vllm:{name}", text, labels=self._names)
            metric.add_metric(self._values, value)
            yield metric
