"""Figures of a server from two readings of its metrics: rates, percentiles, the mix of kernels. Pure functions."""

from dataclasses import dataclass, field

GENERATED = "vllm:generation_tokens_total"
_HISTOGRAMS = {
    "time_to_first_token": "vllm:time_to_first_token_seconds",
    "inter_token_latency": "vllm:inter_token_latency_seconds",
    "request_latency": "vllm:e2e_request_latency_seconds",
    "queue_time": "vllm:request_queue_time_seconds",
}
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
# On GPUs Triton's kernels stand in for native ones that were not built; `portable` does everywhere.
_FALLBACKS = {"portable", "triton"}


@dataclass(frozen=True)
class Sample:
    """One reading of /metrics: ``at`` in seconds (monotonic), values by (name, label pairs), and the text itself."""

    at: float
    values: dict[tuple[str, frozenset], float]
    text: str = ""
    # Names to their label sets, so that a page with thousands of series is searched once.
    index: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def series(self, name: str) -> dict[frozenset, float]:
        if not self.index:
            for (key, labels), value in self.values.items():
                self.index.setdefault(key, {})[labels] = value
        return self.index.get(name, {})

    def total(self, name: str) -> float:
        return sum(self.series(name).values())

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for labels in self.series(name)]


def restarted(before: Sample, after: Sample) -> bool:
    """Whether the server counted from zero again in between."""
    return after.total(GENERATED) < before.total(GENERATED)


def quantile(buckets: dict[float, float], q: float) -> float | None:
    """A quantile of a histogram as Prometheus' ``histogram_quantile`` estimates it: linear within a bucket.

    Args:
        buckets: cumulative counts by upper bound, ``inf`` included.
        q: 0 to 1.

    Returns None for an empty histogram; the last finite bound where the quantile lies beyond it.
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = q * buckets[bounds[-1]]
    low = below = 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= rank and count > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low


def _increase(before: Sample, after: Sample, name: str) -> dict[frozenset, float]:
    old = before.series(name)
    return {labels: value - old.get(labels, 0) for labels, value in after.series(name).items()}


def _buckets(before: Sample, after: Sample, name: str) -> dict[float, float]:
    found: dict[float, float] = {}
    for labels, value in _increase(before, after, f"{name}_bucket").items():
        bound = float(dict(labels)["le"])
        found[bound] = found.get(bound, 0) + value
    return found


def _kernels(before: Sample, after: Sample, seconds: float) -> list[dict]:
    """Every kernel that ran in the window, by its share of the weight bytes that were read."""
    read = _increase(before, after, "vllm_flute:weight_bytes_streamed_total")
    calls, tokens = (_increase(before, after, f"vllm_flute:kernel_{what}_total") for what in ("calls", "tokens"))
    total = sum(read.values())
    rows = [
        {key: value for key, value in labels if key in ("kernel", "isa", "m_bucket")}
        | {"share": read[labels] / total, "bytes_per_second": read[labels] / seconds}
        | {"calls_per_second": calls.get(labels, 0) / seconds, "tokens_per_second": tokens.get(labels, 0) / seconds}
        for labels in read
        if read[labels] > 0
    ]
    return sorted(rows, key=lambda row: -row["share"])


def figures(before: Sample, after: Sample) -> dict:
    """JSON of what a server did between two readings, times in seconds, sizes in bytes; None where nothing was done.

    ``before`` may be ``after`` itself, right after the start: then only the gauges are known.
    """
    seconds = after.at - before.at

    def rate(name: str) -> float | None:
        return sum(_increase(before, after, name).values()) / seconds if seconds else None

    latency = {}
    for key, name in _HISTOGRAMS.items():
        buckets = _buckets(before, after, name)
        latency[key] = {q: quantile(buckets, value) for q, value in _QUANTILES.items()}
    queries, hits = (
        sum(_increase(before, after, f"vllm:prefix_cache_{w}_total").values()) for w in ("queries", "hits")
    )
    finished = {
        dict(labels).get("finished_reason", "unknown"): value
        for labels, value in _increase(before, after, "vllm:request_success_total").items()
        if value
    }
    kernels = _kernels(before, after, seconds) if seconds else []
    usage = after.series("vllm:kv_cache_usage_perc").values()
    return {
        "window_seconds": seconds,
        "throughput": {
            "generation_tokens_per_second": rate(GENERATED),
            "prompt_tokens_per_second": rate("vllm:prompt_tokens_total"),
            "requests_per_second": rate("vllm:request_success_total"),
        },
        "requests": {
            "running": after.total("vllm:num_requests_running"),
            "waiting": after.total("vllm:num_requests_waiting"),
            "finished": finished,
        },
        "latency_seconds": latency,
        "kv_cache_usage": max(usage, default=None),
        "prefix_cache_hit_rate": hits / queries if queries else None,
        "kernels": kernels,
        "fallback_share": sum(row["share"] for row in kernels if row["kernel"] in _FALLBACKS) if kernels else None,
        "weight_bytes_per_second": sum(row["bytes_per_second"] for row in kernels) if seconds else None,
        "memory_bytes": {
            "quantized_weights": after.total("vllm_flute:quantized_weight_bytes"),
            "workers": after.total("vllm_flute:worker_resident_memory_bytes"),
            "api_server": after.total("process_resident_memory_bytes"),
        },
    }


def layers(sample: Sample) -> list[dict]:
    """The quantized layers by format and kernel, with how many there are of each kind."""
    found = sample.series("vllm_flute:layers")
    rows = [dict(labels) | {"layers": int(value)} for labels, value in found.items()]
    return sorted(rows, key=lambda row: sorted(row.items(), key=str))


def plugin_metrics(text: str) -> str:
    """The lines of a metrics page that are the plugin's, as they are."""
    keep = [
        line
        for line in text.splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("vllm_flute:")
    ]
    return "".join(f"{line}\n" for line in keep)
