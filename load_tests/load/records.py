"""What became of each request, and the figures of many."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclass
class Request:
    """One request as its client saw it; times in seconds.

    outcome: "answered" (every token that was asked for arrived), "cancelled" (by the client, on purpose) or "failed".
    """

    start: float  # on a clock of the run's own
    outcome: str
    ttft: float | None = None
    itls: list[float] = field(default_factory=list)
    tokens: int = 0  # received
    prompt_tokens: int = 0
    error: str = ""
    paced: bool = False  # the client read slowly, so that its inter-token times are its own


@dataclass(frozen=True)
class Slo:
    """Service level objective of a request, in seconds: its first token, and the 95th percentile of the later ones."""

    ttft: float = 1.0
    itl: float = 0.2

    def met(self, request: Request) -> bool:
        if request.outcome != "answered" or request.ttft is None or request.ttft > self.ttft:
            return False
        return request.paced or not request.itls or float(np.percentile(request.itls, 95)) <= self.itl


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """{"p50": ...}; None where there are no values."""
    values = list(values)
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if values else None


def summary(requests: list[Request], sent: int, seconds: float, slo: Slo) -> dict:
    """The figures of a run.

    Args:
        sent: requests that left the client, counted before the answer.
        seconds: from the first request to the last token.

    Returns sent, answered, cancelled, failed, lost (sent without any outcome: silently), rates per second (requests,
    prompt_tokens, tokens, goodput: requests within the SLO), good_share (of those not cancelled), ttft and itl
    percentiles in seconds, errors (message to count).
    """
    count = Counter(r.outcome for r in requests)
    good, judged = sum(map(slo.met, requests)), len(requests) - count["cancelled"]
    errors = Counter(r.error.strip().splitlines()[-1][:200] if r.error.strip() else "" for r in requests)
    del errors[""]
    return {
        "sent": sent,
        "answered": count["answered"],
        "cancelled": count["cancelled"],
        "failed": count["failed"],
        "lost": sent - len(requests),
        "seconds": seconds,
        "requests_per_second": len(requests) / seconds,
        "prompt_tokens_per_second": sum(r.prompt_tokens for r in requests) / seconds,
        "tokens_per_second": sum(r.tokens for r in requests) / seconds,
        "goodput": good / seconds,
        "good_share": good / judged if judged else None,
        "ttft": percentiles(r.ttft for r in requests if r.ttft is not None),
        "itl": percentiles(itl for r in requests if not r.paced for itl in r.itls),
        "errors": dict(errors),
    }


def elapsed(requests: list[Request]) -> float:
    """Seconds from the first request to the last token."""
    if not requests:
        return 0.0
    return max(r.start + (r.ttft or 0) + sum(r.itls) for r in requests) - min(r.start for r in requests)


def append(path: Path, line: Request | str) -> None:
    """Add a request, or "sent" for one that leaves now, to a file of JSON lines."""
    with open(path, "a") as f:
        f.write(json.dumps(line if isinstance(line, str) else asdict(line)) + "\n")


def read(path: Path) -> tuple[list[Request], int]:
    """(requests, how many were sent) of such a file."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [Request(**line) for line in lines if line != "sent"], lines.count("sent")
