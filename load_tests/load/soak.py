"""A long run at 70% of the knee: nothing fails, memory does not grow, latency stays what it is."""

from .records import Request, percentiles

SHARE_OF_KNEE = 0.7
MAX_GROWTH = 0.01
MAX_DRIFT = 0.1  # of p95 inter-token latency, last third against first third
WINDOWS = 15


def windows(requests: list[Request], count: int = WINDOWS) -> list[dict]:
    """ITL percentiles (seconds) of equal parts of the run, by the time a request started."""
    begin = min(r.start for r in requests)
    length = (max(r.start for r in requests) - begin) / count or 1.0
    parts: list[list[Request]] = [[] for _ in range(count)]
    for r in requests:
        parts[min(count - 1, int((r.start - begin) / length))].append(r)
    return [
        {"minute": i * length / 60, "requests": len(part), "itl": percentiles(itl for r in part for itl in r.itls)}
        for i, part in enumerate(parts)
    ]


def verdict(requests: list[Request], figures: dict, growth: float | None) -> dict:
    """What was promised, what was measured, whether it holds: name to {"found", "wanted", "holds"}."""
    thirds = [w["itl"] for w in windows(requests, 3)]
    drift = thirds[2]["p95"] / thirds[0]["p95"] - 1 if thirds[0] and thirds[2] else None
    errors = figures["failed"] + figures["lost"]
    return {
        "errors and lost requests": {"found": errors, "wanted": "0", "holds": errors == 0},
        "growth of allocated memory": _within(growth, MAX_GROWTH),
        "drift of p95 ITL, last third to first": _within(drift, MAX_DRIFT),
    }


def _within(found: float | None, limit: float) -> dict:
    shown = "not known" if found is None else f"{found:+.2%}"
    return {"found": shown, "wanted": f"< {limit:.0%}", "holds": found is not None and found < limit}
