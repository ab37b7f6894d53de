"""report.json and report.html of a run: figures, plots, the machine and the command."""

import base64
import io
import json
import platform
from pathlib import Path

import jinja2
import matplotlib

from .records import Request
from .target import Sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TEMPLATE = Path(__file__).with_name("report.html.j2")


def machine() -> str:
    """The CPU's name, its cores and memory, as a line."""
    import psutil

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def image(figure) -> str:
    """A figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sweep_plot(points: list[dict], slo: dict) -> str:
    """Throughput within the SLO, and p95 latencies, over the arrival rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    rates = [p["rate"] for p in points]
    left.plot(rates, [p["requests_per_second"] for p in points], "o-", label="answered")
    left.plot(rates, [p["goodput"] for p in points], "s-", label="within the SLO")
    left.plot(rates, rates, ":", color="grey", label="sent")
    left.set(xlabel="arrivals, requests/s", ylabel="requests/s", ylim=(0, None))
    for key, limit, color in (("ttft", slo["ttft"], "C2"), ("itl", slo["itl"], "C3")):
        right.plot(
            rates, [(p[key] or {}).get("p95", float("nan")) for p in points], "o-", color=color, label=f"p95 {key}"
        )
        right.axhline(limit, linestyle=":", color=color)
    right.set(xlabel="arrivals, requests/s", ylabel="seconds (dotted: SLO)", yscale="log")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    return image(figure)


def time_plot(requests: list[Request], samples: list[Sample]) -> str:
    """Latencies of requests by their start; requests in the server; resident memory."""
    known = [s for s in samples if s.memory]
    figure, (one, two, *three) = plt.subplots(1, 3 if known else 2, figsize=(14, 3), layout="constrained")
    begin = min(r.start for r in requests)
    with_first = [r for r in requests if r.ttft is not None]
    one.plot([r.start - begin for r in with_first], [r.ttft * 1000 for r in with_first], ".", label="TTFT")
    paced = [r for r in requests if r.itls and not r.paced]
    one.plot([r.start - begin for r in paced], [max(r.itls) * 1000 for r in paced], ".", label="longest ITL")
    one.set(xlabel="seconds", ylabel="ms", yscale="log")
    two.plot([s.seconds for s in samples], [s.running for s in samples], label="running")
    two.plot([s.seconds for s in samples], [s.waiting for s in samples], label="waiting")
    two.set(xlabel="seconds", ylabel="requests", ylim=(0, None))
    for axes in three:
        for kind, label in enumerate(("allocated", "files, such as libraries")):
            change = [(s.memory[kind] - known[0].memory[kind]) / 2**20 for s in known]
            axes.plot([s.seconds for s in known], change, label=f"{label}: {known[0].memory[kind] / 2**20:.0f} MiB")
        axes.set(xlabel="seconds", ylabel="resident MiB since the beginning")
    for axes in (one, two, *three):
        axes.grid(alpha=0.3)
        axes.legend()
    return image(figure)


def soak_plot(windows: list[dict]) -> str:
    """Inter-token latency by window."""
    figure, axes = plt.subplots(figsize=(10, 3))
    for p in ("p50", "p95", "p99"):
        points = [(w["minute"], w["itl"][p] * 1000) for w in windows if w["itl"]]
        axes.plot(*zip(*points, strict=True), "o-", label=p)
    axes.set(xlabel="minutes", ylabel="ITL, ms", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    return image(figure)


def milliseconds(figures: dict | None, *names: str) -> str:
    """p50 / p95 / p99 of a percentile table in milliseconds."""
    return " / ".join(f"{figures[name] * 1000:.0f}" for name in names) if figures else "-"


def write(out: Path, data: dict, plots: dict[str, str]) -> None:
    """report.json (data) and report.html (data and plots: name to data URL)."""
    (out / "report.json").write_text(json.dumps(data, indent=2) + "\n")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ms": lambda f: milliseconds(f, "p50", "p95", "p99")}
    page = environment.from_string(TEMPLATE.read_text()).render(**data, plots=plots)
    (out / "report.html").write_text(page)
