"""Draw key panels of the dashboards from a run of its own: a server, its Prometheus, three minutes of varied load.

    python deploy/monitoring/picture.py MODEL docs/dashboard.png

Needs Prometheus (Debian's package `prometheus`) and matplotlib. The server gets the cores that this process may use.
"""

import argparse
import concurrent.futures
import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from kernel_panels import KERNELS
from local_prometheus import Prometheus
from panels import Panel
from serving_panels import SERVING

from vllm_flute.errors import FluteError
from vllm_flute.serve import Client, Server, cpu_environment

SHOWN = ["Tokens", "Time to the first token", "Time between tokens"]
SHOWN += ["Requests running and waiting", "Tokens in a step", "KV cache in use"]
SHOWN += ["Weight bandwidth, by kernel", "Calls, by tokens in a call", "Prefix cache hits"]
UNITS = {"s": ("seconds", 1), "percentunit": ("%", 0.01), "binBps": ("GiB/s", 2**30), "cps": ("calls/s", 1)}
RATE_INTERVAL = "10s"
WORDS = [
    "a",
    "table",
    "holds",
    "what",
    "a",
    "row",
    "of",
    "codes",
    "adds",
    "up",
    "to",
    "every",
    "lookup",
    "serves",
    "many",
]
# Name, seconds, streams, words of a prompt, tokens of an answer, whether all prompts begin alike.
PHASES = [
    ("1 stream", 30, 1, 20, 64, False),
    ("4 streams", 35, 4, 20, 64, False),
    ("16 streams on 8 places", 45, 16, 20, 64, False),
    ("long prompts", 35, 4, 700, 16, False),
    ("shared prefix", 35, 4, 700, 16, True),
]


def load(client: Client, seconds: float, streams: int, words: int, tokens: int, shared: bool) -> None:
    """Closed-loop streams: each asks again when it has its answer, until the time is over."""
    deadline = time.time() + seconds
    prefix = " ".join(random.Random(0).choices(WORDS, k=words))

    def stream(i: int) -> None:
        chooser = random.Random(f"{words} {i}")
        while time.time() < deadline:
            own = " ".join(chooser.choices(WORDS, k=20 if shared else words))
            client.complete(f"{prefix} {own}" if shared else own, tokens, ignore_eos=True)

    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        list(pool.map(stream, range(streams)))


def draw(axes, panel: Panel, prometheus: Prometheus, begin: float, end: float) -> None:
    unit, scale = UNITS.get(panel.unit, (panel.unit.removeprefix("suffix:").strip().replace("short", ""), 1))
    times = [begin + i for i in range(int(end - begin) + 1)]
    drawn = []
    for legend, expr in panel.queries.items():
        expr = expr.replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*").replace("$model", ".*")
        for labels, points in prometheus.query_range(expr, begin, end, 1):
            name = re.sub(r"\{\{(\w+)\}\}", lambda m, found=labels: found.get(m[1], ""), legend)
            name = name.replace(labels.get("instance", ""), "").strip()
            values = {round(t - begin): v / scale for t, v in points}
            drawn.append((name, [values.get(i, math.nan) for i in range(len(times))]))
    seconds = range(len(times))
    if panel.kind == "stacked":
        drawn.sort(key=lambda series: [int(n) for n in re.findall(r"\d+", series[0])])
        rows = [[0 if math.isnan(v) else v for v in values] for _, values in drawn]
        axes.stackplot(seconds, rows, labels=[name for name, _ in drawn], alpha=0.8)
    else:
        for name, values in drawn:
            axes.plot(seconds, values, label=name, linewidth=1.2)
    axes.set_title(f"{panel.title} ({unit})" if unit else panel.title, fontsize=9)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # the legend's place is above the lines
    if len(drawn) > 1:
        axes.legend(fontsize=6, loc="upper left", ncols=(len(drawn) + 2) // 3)
    axes.set_xlim(0, end - begin)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a server under load and draw its dashboard from Prometheus.")
    parser.add_argument("model", help="directory or hub id of a quantized model")
    parser.add_argument("out", type=Path, help="the picture to write")
    args = parser.parse_args()
    options = ["--quantization", "flute", "--max-model-len", "2048", "--max-num-seqs", "8"]
    with (
        tempfile.TemporaryDirectory() as work,
        Server(args.model, Path(work) / "server.log", options, cpu_environment()) as server,
        Prometheus(server.url, Path(work) / "prometheus") as prometheus,
    ):
        client = Client(server.url)
        client.complete("warm up", 8, ignore_eos=True)
        begin, starts = time.time(), []
        for name, *phase in PHASES:
            print(name, flush=True)
            starts.append((time.time() - begin, name))
            load(client, *phase)
        time.sleep(3)
        end = time.time()
        every = {p.title: p for board in (SERVING, KERNELS) for row in board.rows.values() for p in row}
        figure, grid = plt.subplots(3, 3, figsize=(14, 8), sharex=True)
        for axes, title in zip(grid.flat, SHOWN, strict=True):
            draw(axes, every[title], prometheus, begin, end)
            for start, _ in starts[1:]:
                axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
        for axes in grid[-1]:
            axes.set_xlabel("seconds", fontsize=8)
    steps = ", ".join(f"from {start:.0f} s {name}" for start, name in starts)
    figure.suptitle(f"{Path(args.model).name}: {steps}", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except FluteError as e:
        sys.exit(f"picture: {e}")
