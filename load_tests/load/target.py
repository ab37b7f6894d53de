"""The server under load: one that is started here, or one that runs elsewhere; its memory and its own counters."""

import os
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import requests

from vllm_flute.errors import FluteError
from vllm_flute.serve import Client
from vllm_flute.serve.client import metric_total


class Memory(NamedTuple):
    """Proportional resident memory in bytes.

    allocated: what processes have for themselves or share as memory. files: pages of files that are mapped, such as
    libraries; a server's share of them changes with whoever else maps the same files, a load generator for one.
    """

    allocated: int
    files: int


class Sample(NamedTuple):
    """The server at a time: seconds since the beginning, memory where it is known, requests."""

    seconds: float
    memory: Memory | None
    running: float
    waiting: float


def tree_memory(pid: int) -> Memory:
    """Of a process and all that it started (Linux: proc(5), smaps_rollup)."""
    sums = {"Pss_Anon": 0, "Pss_Shmem": 0, "Pss_File": 0}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        # A process that ended since it was listed has no memory.
        with suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in sums:
                    sums[key] += int(value.removesuffix("kB")) * 1024
    return Memory(sums["Pss_Anon"] + sums["Pss_Shmem"], sums["Pss_File"])


@dataclass
class Target:
    """A server, or a router before several.

    name: of the served model. tokenizer: its directory or hub id. servers: the vLLM servers themselves, whose
    metrics are added up. pids: their processes; empty where they run on another machine, and then memory is unknown.
    """

    url: str
    name: str
    tokenizer: str
    servers: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    api_key: str = ""

    def environment(self) -> dict[str, str]:
        """For the processes that send requests."""
        key = {"OPENAI_API_KEY": self.api_key} if self.api_key else {}
        return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | key

    def totals(self, *names: str) -> list[float]:
        """Each metric, added up over labels and servers."""
        samples = [Client(server, timeout=10).metrics() for server in self.servers or [self.url]]
        return [sum(metric_total(s, name) for s in samples) for name in names]

    def memory(self) -> Memory | None:
        return Memory(*map(sum, zip(*map(tree_memory, self.pids), strict=True))) if self.pids else None

    def wait_idle(self, seconds: float = 30) -> float:
        """Requests that are still running or waiting after so long at most: 0 where every one has been let go."""
        deadline = time.monotonic() + seconds
        while True:
            left = sum(self.totals("vllm:num_requests_running", "vllm:num_requests_waiting"))
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)

    def cache_tokens(self) -> int:
        """Tokens that the KV caches hold, from vLLM's description of its cache."""
        total = 0
        for server in self.servers or [self.url]:
            for (name, labels), _ in Client(server).metrics().items():
                if name == "vllm:cache_config_info":
                    labels = dict(labels)
                    total += int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        if not total:
            raise FluteError(f"{self.url}/metrics does not describe the KV cache (vllm:cache_config_info)")
        return total


class Watch:
    """``with Watch(target) as watch:`` takes samples while a scenario runs."""

    def __init__(self, target: Target, every: float = 2.0):
        self.target, self.every = target, every
        self.samples: list[Sample] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        begin = time.monotonic()
        while True:
            # A server that is busy or ends is what a run may be about: that sample is missing.
            # So is one of processes that belong to somebody else.
            with suppress(psutil.Error, PermissionError, requests.RequestException, FluteError):
                queue = self.target.totals("vllm:num_requests_running", "vllm:num_requests_waiting")
                self.samples.append(Sample(time.monotonic() - begin, self.target.memory(), *queue))
            if self._end.wait(self.every):
                return

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._end.set()
        self._thread.join()

    def growth(self) -> tuple[float, float] | None:
        """Growth of allocated memory and of files, last tenth of the samples to first, as shares; None: not known."""
        known = [sample.memory for sample in self.samples if sample.memory]
        if len(known) < 2:
            return None
        tenth = max(1, len(known) // 10)

        def share(kind: int) -> float:
            first, last = (statistics.median(m[kind] for m in part) for part in (known[:tenth], known[-tenth:]))
            return last / first - 1

        return share(0), share(1)
