"""The machine's roofs, measured in the same run, and the roofline of what was measured under them.

S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

import functools
import itertools
import time
from pathlib import Path

import torch

from ..errors import FluteError

_PIECE = 16 << 20  # bytes
_KIND_NAMES = {"ternary": "ternary", "2": "2 bits", "3": "3 bits", "4": "4 bits"}
_COLORS = {"ternary": "tab:red", "2": "tab:orange", "3": "tab:green", "4": "tab:blue"}
_PEERS = ("s", "^", "v", "D", "P", "X", "*", "<", ">", "h", "p", "d")


def _fastest(run, seconds: float, wait=lambda: None) -> float:
    """The least time of a call and what it waits for, from at least three."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return min(times)


def roofs(
    device: str, nbytes: int = 1 << 30, sizes: tuple[int, ...] = (1024, 2048, 8192), seconds: float = 0.5
) -> dict[str, float]:
    """{"read_gbs": GB/s from memory, "bf16_gops": GOP/s of torch's fastest bf16 matmul of size^3}.

    A CPU sums float32 in pieces of a layer's size that rotate over ``nbytes``, far more than a cache holds: on a busy
    machine a piece may be undisturbed where all of it never is. A GPU copies ``nbytes``, read and written.
    """
    if device == "cuda":
        source, target = (torch.ones(nbytes // 4, device=device) for _ in range(2))
        reads = 2 * nbytes / _fastest(lambda: target.copy_(source), seconds, torch.cuda.synchronize)
        wait = torch.cuda.synchronize
    else:
        pieces = itertools.cycle(torch.ones(nbytes // 4).split(_PIECE // 4))
        reads = _PIECE / _fastest(lambda: next(pieces).sum(), seconds)
        sizes, wait = [size for size in sizes if size < 4096], lambda: None  # a larger one takes seconds
    gops = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        gops.append(2 * size**3 / _fastest(functools.partial(torch.nn.functional.linear, a, b), seconds, wait))
    return {"read_gbs": reads / 1e9, "bf16_gops": max(gops) / 1e9}


def check() -> None:
    """Raise FluteError, before anything is measured, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise FluteError(f"--plot needs matplotlib: pip install 'vllm-flute[dev]' ({e})") from e


def plot(path: Path, rows: list, limits: dict[str, float], title: str) -> None:
    """Write a PNG: GOP/s over operations per packed byte; ours filled and by kind, the peers hollow.

    Ours are the fastest kernel of each shape, kind and M; those that round x to int8, as most peers do, apart. Raises
    FluteError where matplotlib is not installed.
    """
    check()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best: dict[tuple, tuple] = {}
    for row in rows:
        label = ("flute", row.kind, row.detail == "int8") if row.source == "flute" else ("peer", row.name, False)
        key = (row.n, row.k, row.kind, row.m, label)
        if key not in best or row.us < best[key][1].us:
            best[key] = label, row
    points: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for label, row in best.values():
        points.setdefault(label, []).append((2 * row.m * row.n * row.k / row.nbytes, row.gops))
    figure, axes = pyplot.subplots(figsize=(9, 5.4), dpi=100)
    x = [at for values in points.values() for at, _ in values] or [1.0]
    low, high = min(x) / 2, max(x) * 2
    peak, read = limits["bf16_gops"], limits["read_gbs"]
    knee = peak / read
    low = min(low, knee / 2)
    high = max(high, knee * 2)
    axes.plot([low, knee], [low * read, peak], "k-", lw=1.2, label=f"memory reads, measured: {read:.1f} GB/s")
    axes.plot([knee, high], [peak, peak], "k--", lw=1.2, label=f"torch's fastest bf16 matmul: {peak:.0f} GOP/s")
    peers = [label for label in points if label[0] == "peer"]
    for i, label in enumerate(peers):
        style = {"facecolors": "none", "edgecolors": f"C{i % 10}", "marker": _PEERS[i % len(_PEERS)]}
        axes.scatter(*zip(*points[label], strict=True), s=26, linewidths=0.9, label=label[1], **style)
    for label in (label for label in points if label[0] == "flute"):
        kind, int8 = label[1:]
        style = {"marker": "d" if int8 else "o", "color": _COLORS[kind], "zorder": 3}
        name = f"vllm-flute, {_KIND_NAMES[kind]}{', int8' if int8 else ''}"
        axes.scatter(*zip(*points[label], strict=True), s=42, label=name, **style)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte of packed weights", ylabel="GOP/s (2 M N K operations)", title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, format="png", bbox_inches="tight")
    pyplot.close(figure)
