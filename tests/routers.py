"""The routers that this machine has, before two replicas: nginx with the project's configuration, and vllm-router."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_flute.errors import FluteError
from vllm_flute.serve.process import free_port

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_tests.load.router import nginx, running  # noqa: E402


@contextlib.contextmanager
def vllm_router(first: str, second: str, work: Path) -> Iterator[str]:
    """vllm-router before two servers' URLs; gives its URL."""
    binary = Path(sys.executable).with_name("vllm-router")
    if not binary.exists():
        raise FluteError("vllm-router is not installed (it has wheels for x86-64 only)")
    port = free_port()
    command = [binary, "--worker-urls", first, second, "--policy", "round_robin", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(free_port())]
    with running(command, f"http://127.0.0.1:{port}", work / "vllm-router.log") as url:
        yield url


@contextlib.contextmanager
def all_routers(first: str, second: str, work: Path) -> Iterator[dict[str, str]]:
    """Name to URL of each router that starts; one that is not installed is left out, and said."""
    with contextlib.ExitStack() as stack:
        urls = {}
        for make in (nginx, vllm_router):
            try:
                urls[make.__name__] = stack.enter_context(make(first, second, work))
            except FluteError as e:
                print(f"without {make.__name__}: {e}")
        yield urls
