"""The server under load: one that is started here, or one that runs elsewhere; its memory and its own counters."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import requests

from vllm_flute.errors import FluteError
from vllm_flute.serve import Client
from vllm_flute.serve.benchmark import resident_bytes
from vllm_flute.serve.client import metric_total


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

    def resident(self) -> int | None:
        return sum(map(resident_bytes, self.pids)) if self.pids else None

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
    """``with Watch(target) as watch:`` samples (seconds, resident bytes, running, waiting) while a scenario runs."""

    def __init__(self, target: Target, every: float = 2.0):
        self.target, self.every = target, every
        self.samples: list[tuple[float, int | None, float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        begin = time.monotonic()
        while True:
            # A server that is busy or ends is what a run may be about: that sample is missing.
            with suppress(psutil.Error, requests.RequestException, FluteError):
                queue = self.target.totals("vllm:num_requests_running", "vllm:num_requests_waiting")
                self.samples.append((time.monotonic() - begin, self.target.resident(), *queue))
            if self._end.wait(self.every):
                return

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._end.set()
        self._thread.join()

    def growth(self) -> float | None:
        """Growth of resident memory from the first tenth of the samples to the last, as a share; None: not known."""
        memory = [sample[1] for sample in self.samples if sample[1]]
        if len(memory) < 2:
            return None
        tenth = max(1, len(memory) // 10)
        first, last = (sorted(part)[len(part) // 2] for part in (memory[:tenth], memory[-tenth:]))
        return last / first - 1
