"""A `vllm serve` process: started, waited for, ended with everything it started."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from ..errors import FluteError


def free_port() -> int:
    """A port of this machine that nobody listens on now.

    Below those that systems give to connections by themselves (32768 and up on Linux): a server takes seconds until it
    listens, in which such a port may go to another process.
    """
    drawn = random.SystemRandom()  # not the generator that a test may have seeded in several processes alike
    while True:
        port = drawn.randrange(20000, 32768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def cpu_environment() -> dict[str, str]:
    """What vLLM's CPU worker needs to be told for a measurement; a variable that is set already wins.

    By itself it takes most of the memory for the KV cache and keeps one core back. Ignored on a GPU.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


class Server:
    """``with Server(model, log) as server:`` serves a model on a free local port; ``server.url`` answers.

    Args:
        model: a directory or hub id.
        log: the file that takes the server's output.
        args: further arguments of `vllm serve`.
        env: additions to the environment.
        launcher: a command that runs the server's command line, put before it.
        start_seconds: how long it may take until /health answers.

    Raises:
        FluteError: the server ended or did not answer in time; names the log and its last error line.
    """

    def __init__(self, model, log: Path, args=(), env=None, start_seconds: float = 600, launcher=()):
        self.model, self.log, self.args, self.env = str(model), Path(log), list(args), dict(env or {})
        self.launcher = list(map(str, launcher))
        self.start_seconds = start_seconds
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        vllm = Path(sys.executable).with_name("vllm")
        command = [*self.launcher, str(vllm), "serve", self.model, "--host", "127.0.0.1", "--port", str(port)]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                command + ["--served-model-name", "model", *self.args],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_NO_USAGE_STATS": "1"} | self.env,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while True:
            if self.process.poll() is not None:
                raise FluteError(f"vllm serve {self.model} ended at start (see {self.log}): {self._last_error()}")
            if time.monotonic() > deadline:
                raise FluteError(
                    f"vllm serve {self.model} did not answer in {self.start_seconds:.0f} s: see {self.log}"
                )
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            time.sleep(0.25)

    def _last_error(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "rror" in line]
        return lines[-1].strip() if lines else "no error line"

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def pause(self) -> None:
        """Stop every process of the server where it is, so that an idle server costs its neighbours nothing."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server and its workers (they share one process group)."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        for sig, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                break
        # The API server may be gone before its engine.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
