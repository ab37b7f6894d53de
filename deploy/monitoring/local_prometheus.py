"""A Prometheus of this machine that scrapes one server every second, with the rules of this folder."""

import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests

from vllm_flute.errors import FluteError
from vllm_flute.serve.process import free_port

HERE = Path(__file__).resolve().parent
SCRAPE_SECONDS = 1


class Prometheus:
    """``with Prometheus(server_url, directory) as prometheus:`` has scraped the server once; data and log stay there.

    Raises:
        FluteError: Prometheus is not installed, or does not scrape the server within 30 s; names its log.
    """

    def __init__(self, server_url: str, directory: Path):
        self.target, self.directory = urlsplit(server_url).netloc, Path(directory)

    def __enter__(self) -> "Prometheus":
        binary = shutil.which("prometheus")
        if not binary:
            raise FluteError("prometheus was not found: install it (Debian's package: prometheus)")
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("recording.yml", "alerts.yml"):
            shutil.copy(HERE / name, self.directory)
        config = (HERE / "prometheus.yml").read_text().replace("_interval: 15s", f"_interval: {SCRAPE_SECONDS}s")
        (self.directory / "prometheus.yml").write_text(config)
        (self.directory / "targets.yml").write_text(f"- targets: ['{self.target}']\n")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        log = self.directory / "prometheus.log"
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [binary, "--config.file", self.directory / "prometheus.yml", "--storage.tsdb.path"]
                + [self.directory / "data", "--web.listen-address", f"127.0.0.1:{port}"],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 30
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise FluteError(f"prometheus does not scrape {self.target}: see {log}")
            time.sleep(0.2)
        return self

    def __exit__(self, *exc_info) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ready(self) -> bool:
        try:
            return any(value == 1 for _, value in self.query("up"))
        except (requests.RequestException, ValueError, FluteError):
            return False

    def get(self, path: str, **parameters):
        """The ``data`` of an answer of the HTTP API; FluteError with Prometheus' own message where it refuses."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60).json()
        if answer["status"] != "success":
            raise FluteError(f"prometheus refuses {parameters.get('query', path)!r}: {answer['error']}")
        return answer["data"]

    def query(self, expr: str, at: float | None = None) -> list[tuple[dict, float]]:
        """(labels, value) of every series of an expression now, or at a Unix time."""
        result = self.get("query", query=expr, **({"time": at} if at else {}))["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(self, expr: str, begin: float, end: float, step: float) -> list[tuple[dict, list]]:
        """(labels, [(Unix time, value), ...]) of every series between two Unix times, seconds apart."""
        result = self.get("query_range", query=expr, start=begin, end=end, step=step)["result"]
        return [(s["metric"], [(float(t), float(v)) for t, v in s["values"]]) for s in result]
