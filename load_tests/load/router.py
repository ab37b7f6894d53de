"""nginx before two replicas, with the project's own configuration."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from vllm_flute.errors import FluteError
from vllm_flute.serve.process import free_port

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "router" / "nginx.conf"


def nginx_binary(work: Path) -> str:
    """The system's nginx; else Debian's package, unpacked below ``work``: no root, no service.

    Raises:
        FluteError: neither is to be had.
    """
    unpacked = work / "root" / "usr" / "sbin" / "nginx"
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if not found and not unpacked.exists() and shutil.which("apt-get"):
        for step in (["apt-get", "download", "nginx"], ["sh", "-c", "dpkg -x nginx_*.deb root"]):
            subprocess.run(step, cwd=work, capture_output=True)
    found = found or (str(unpacked) if unpacked.exists() else None)
    if not found or subprocess.run([found, "-v"], capture_output=True).returncode:
        raise FluteError("there is no nginx, and Debian's package of it cannot be fetched: install nginx")
    return found


@contextlib.contextmanager
def running(command: list, url: str, log: Path, seconds: float = 60) -> Iterator[str]:
    """A router's process until its /health answers; ended after. FluteError where it does not start."""
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise FluteError(f"{command[0]} does not answer on {url}: see {log}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@contextlib.contextmanager
def nginx(first: str, second: str, work: Path) -> Iterator[str]:
    """nginx before two servers' URLs, its files in ``work``; gives its URL."""
    binary, port, work = nginx_binary(work), free_port(), work.resolve()
    text = CONFIGURATION.read_text()
    for written, actual in (("8000", str(port)), ("8001", first.split(":")[-1]), ("8002", second.split(":")[-1])):
        assert text.count(f"127.0.0.1:{written}") == 1
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{actual}")
    configuration = work / "nginx.conf"
    configuration.write_text(text)
    command = [binary, "-p", work, "-c", configuration]
    with running(command, f"http://127.0.0.1:{port}", work / "nginx.log") as url:
        yield url
