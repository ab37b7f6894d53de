"""What the operator's service knows of a vLLM server: its metrics of the last minute, and whether its model answers."""

import json
import threading
import time
from collections import deque
from typing import NamedTuple

import requests

from ..client import parse_metrics
from .status import GENERATED, Sample, restarted

PERIOD = 2.0  # seconds between two readings of /metrics
WINDOW = 60.0  # seconds that rates and percentiles cover
TIMEOUT = 3.0  # seconds that a reading may take
# A completion waits behind whatever the server has to do; one that takes longer is no service.
PROBE_TIMEOUT = 20.0
# An answer this recent counts: under load the server's own traffic proves it, and no probe is sent.
FRESH = 10.0
_LIMIT = 16 << 20  # bytes of an answer that are read


class Readiness(NamedTuple):
    ready: bool
    reason: str


class Upstream:
    """``with Upstream(url, key) as upstream:`` reads a server's metrics in a thread of its own until the end.

    Args:
        url: of a vLLM server, without a path.
        key: its API key, or "".
        period: seconds between readings.
    """

    def __init__(self, url: str, key: str = "", period: float = PERIOD):
        self.url, self.period = url.rstrip("/"), period
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.samples: deque[Sample] = deque()
        self.error = "not asked yet"
        self.models: list[str] = []
        self.version: str | None = None
        self.readings = self.failures = 0
        self._answered = float("-inf")
        self._readiness = Readiness(False, "not asked yet")
        self._lock, self._probing, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)

    def __enter__(self) -> "Upstream":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.read()
            if self._stop.wait(self.period):
                return

    def read(self) -> None:
        """Read /metrics once, and the models and version where they are not known; failures are kept as `error`."""
        self.readings += 1
        try:
            text = self._get("/metrics").decode()
            sample = Sample(time.monotonic(), parse_metrics(text), text)
            if not self.models:
                self.models = [card["id"] for card in self._json("/v1/models")["data"]]
                self.version = self._json("/version").get("version")
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as e:
            self.failures += 1
            self.models = []  # a server that comes back may serve something else
            with self._lock:
                self.error = _reason(e)
            return
        with self._lock:
            self.error = ""
            if self.samples and restarted(self.samples[-1], sample):
                self.samples.clear()
            if self.samples and sample.total(GENERATED) > self.samples[-1].total(GENERATED):
                self._answered = sample.at
            self.samples.append(sample)
            while self.samples[0].at < sample.at - WINDOW - self.period:
                self.samples.popleft()

    def _get(self, path: str) -> bytes:
        with requests.get(self.url + path, headers=self.headers, timeout=TIMEOUT, stream=True) as answer:
            answer.raise_for_status()
            body = answer.raw.read(_LIMIT + 1, decode_content=True)
        if len(body) > _LIMIT:
            raise ValueError(f"{path} is longer than {_LIMIT >> 20} MiB")
        return body

    def _json(self, path: str):
        return json.loads(self._get(path))

    def window(self) -> tuple[Sample | None, Sample | None]:
        """The oldest and the newest sample that are kept; (None, None) before the first and while it is down."""
        with self._lock:
            if self.error or not self.samples:
                return None, None
            return self.samples[0], self.samples[-1]

    def readiness(self) -> Readiness:
        """Whether the model answers: tokens that the server generated lately, or a completion of one token.

        One caller asks at a time; the others get what is known.
        """
        if not self._probing.acquire(blocking=self._readiness.reason == "not asked yet"):
            return self._readiness
        try:
            if time.monotonic() - self._answered > FRESH or self.error:
                self._readiness = self._probe()
            else:
                self._readiness = Readiness(True, "the model answers")
            return self._readiness
        finally:
            self._probing.release()

    def _probe(self) -> Readiness:
        try:
            self._get("/health")
            if not self.models:
                self.read()
            if not self.models:
                return Readiness(False, f"no model: {self.error}")
            body = {"model": self.models[0], "prompt": "1", "max_tokens": 1, "temperature": 0}
            answer = requests.post(
                f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=(TIMEOUT, PROBE_TIMEOUT)
            )
            answer.raise_for_status()
            answer.json()["choices"][0]["text"]
        except (requests.RequestException, ValueError, LookupError, TypeError) as e:
            return Readiness(False, _reason(e))
        self._answered = time.monotonic()
        return Readiness(True, "the model answers")


def _reason(e: Exception) -> str:
    """One line for a person, without what a server may have put into its answer."""
    if isinstance(e, requests.HTTPError):
        path = e.request.path_url if e.request is not None else "it"
        hint = ": give its API key" if e.response.status_code in (401, 403) else ""
        return f"{path} answered {e.response.status_code}{hint}"
    if isinstance(e, requests.Timeout):
        return "it does not answer in time"
    if isinstance(e, requests.ConnectionError):
        return "nothing answers there"
    return f"its answer is not vLLM's ({type(e).__name__})"
