"""A real `vllm serve` process for tests: started, asked, stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

START_SECONDS = 300
VLLM = str(Path(sys.executable).with_name("vllm"))

# Traces the model as in production, but skips Inductor: what a served test needs at a third of the start-up.
TRACED = {"VLLM_CPU_CI_ENV": "1"}


def server_environment(**extra: str) -> dict[str, str]:
    """The environment of an offline CPU server with a bounded KV cache on two cores."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    } | extra


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serve(model, log: Path, *args: str, **env: str):
    """Serve ``model`` and yield its base URL; the process group is ended on the way out."""
    port = _free_port()
    command = [VLLM, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "model"]
    command += ["--max-model-len", "512", "--max-num-seqs", "32", *args]
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=server_environment(**env), start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"server did not start; the end of {log}:\n{log.read_text()[-6000:]}")
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def metrics(url: str) -> dict[tuple[str, frozenset], float]:
    """Samples of /metrics by (name, labels)."""
    from prometheus_client.parser import text_string_to_metric_families

    text = requests.get(f"{url}/metrics", timeout=30).text
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def total(samples: dict, name: str, **labels: str) -> float:
    """Sum of the samples of a metric whose labels include the given ones."""
    return sum(v for (n, have), v in samples.items() if n == name and labels.items() <= dict(have).items())
