"""When things go wrong: a server answers with proper errors, recovers or ends with a status, and leaks nothing.

Two supervised replicas are served for the whole file, asked whatever is bad, and ended one after the other: the first
loses its engine behind two routers, the second is told to end while it is busy. A third, of two ranks, loses a worker.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
import routers
import streams
from checkpoints import make_llama31

from vllm_flute.checkpoint import check_checkpoint, quantize_checkpoint
from vllm_flute.serve import Client, Server
from vllm_flute.serve.client import metric_total

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent
SUPERVISE = ROOT / "deploy" / "supervise.py"
KEY = "secret-of-these-tests"
CORES = sorted(os.sched_getaffinity(0))
CONTEXT = 2048
ARGS = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32", "--quantization", "flute", "--enforce-eager"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
LONG = 1500  # tokens of an answer that is not over when something happens to it


def load_supervise():
    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


supervise = load_supervise()


def serve(model: Path, log: Path, *args: str, cores: str) -> Server:
    """A server under deploy/supervise.py; its process is the supervisor."""
    env = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": cores}
    return Server(model, log, [*ARGS, *args], env, start_seconds=300, launcher=[sys.executable, SUPERVISE])


class Traces:
    """The processes and the shared memory of a running server, to be looked for when it has ended."""

    def __init__(self, server: Server):
        self.processes = psutil.Process(server.process.pid).children(recursive=True)
        self.shared = supervise.mapped(p.pid for p in self.processes)

    def named(self, name: str) -> list[psutil.Process]:
        return [p for p in self.processes if name in " ".join(p.cmdline())]

    def left(self) -> list:
        running = [p for p in self.processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return running + [path for path in self.shared if os.path.exists(path)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def plain(work) -> Path:
    return make_llama31(work / "llama", hidden=256, layers=2)


@pytest.fixture(scope="module")
def model(work, plain) -> Path:
    quantize_checkpoint(plain, work / "model", codebook="nf", method="absmax")
    return work / "model"


@pytest.fixture(scope="module")
def replicas(model, work):
    """Two servers with a key that drain before they end."""
    options = ("--api-key", KEY, "--shutdown-timeout", "300")
    servers = [serve(model, work / f"replica{i}.log", *options, cores=str(CORES[-i])) for i in range(2)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(pool.map(stack.enter_context, servers))


@pytest.fixture(scope="module")
def url(replicas) -> str:
    return replicas[0].url


def running(url: str) -> tuple[float, float, float]:
    """(running, waiting, used share of the KV cache)."""
    samples = Client(url).metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return tuple(metric_total(samples, name) for name in names)


def wait_for(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(held)


async def busy(url: str, requests: int, start, worker: psutil.Process) -> asyncio.Future:
    """The load that ``start()`` begins, held where so many requests run: until the worker is resumed none of them ends.

    A worker that ran on would be done before a busy machine lets anybody look: it may keep the API server or its client
    waiting for longer than the whole load takes. So it stands still before the load begins, and runs for moments only.
    Such a moment may still last as long as the load, where nobody wakes this process: then another load is begun.
    """

    def some_steps() -> None:
        worker.resume()
        time.sleep(0.03)
        worker.suspend()

    for _ in range(3):
        worker.suspend()
        load = start()
        while not load.done():
            if (await asyncio.to_thread(running, url))[0] >= requests:
                return load
            # In a thread: the loop of this process may be busy with what the streams bring.
            await asyncio.to_thread(some_steps)
        await load
    worker.resume()
    raise AssertionError(f"3 loads were over before {requests} ran at once")


# ---- before a server: memory and disk ----


def test_a_kv_cache_larger_than_the_memory_is_one_line(model):
    command = [Path(sys.executable).with_name("vllm"), "serve", model, *ARGS]
    env = os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "100000"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "vllm-flute: error: VLLM_CPU_KVCACHE_SPACE=100000: so many GiB" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own of 1 MiB, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def quantize(plain: Path, out: Path, **options) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("vllm-flute"), "quantize", plain, "-o", out]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def assert_one_line_and_no_half_file(done: subprocess.CompletedProcess, out: Path, reason: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot write" in done.stderr and reason in done.stderr, last
    assert not (out / "config.json").exists()  # nothing loads it
    assert not list(out.glob(".*.tmp"))
    for file in out.glob("*.safetensors"):
        from safetensors import safe_open

        with safe_open(file, "pt") as whole:  # refuses a file that ends early
            assert list(whole.keys())


def test_a_full_disk_while_quantizing(plain, small_disk):
    """One line and no half file; with more room the same command completes."""
    disk, enlarge = small_disk
    out = disk / "out"
    assert_one_line_and_no_half_file(quantize(plain, out), out, "No space left on device")
    enlarge()
    done = quantize(plain, out)
    assert done.returncode == 0, done.stderr
    check_checkpoint(out)


def test_a_file_size_limit_while_quantizing(plain, tmp_path):
    """The same without root: files may not grow beyond 300 KiB."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))  # noqa: E731
    done = quantize(plain, tmp_path / "out", preexec_fn=limit)
    assert_one_line_and_no_half_file(done, tmp_path / "out", "File too large")


# ---- bad requests ----

TEXT = {"model": "model", "prompt": "tell me"}
OK = TEXT | {"max_tokens": 4, "temperature": 0}
JSON = {"Content-Type": "application/json"}
BAD = {
    "malformed JSON": (b'{"model": ', 400),
    "no JSON at all": (b"\xff\xfe\x00", 400),
    "nested a hundred thousand deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "a list": (b"[1]", 400),
    "another model": (json.dumps(OK | {"model": "other"}).encode(), 404),
    "a negative number of tokens": (json.dumps(OK | {"max_tokens": -1}).encode(), 400),
    "more tokens than the context": (json.dumps(OK | {"max_tokens": 10**9}).encode(), 400),
    "a text as temperature": (json.dumps(OK | {"temperature": "hot"}).encode(), 400),
    "an empty prompt": (json.dumps(OK | {"prompt": ""}).encode(), 400),
    "a token that does not exist": (json.dumps(OK | {"prompt": [10**8]}).encode(), 400),
    "a prompt longer than the context": (json.dumps(OK | {"prompt": "a " * 2 * CONTEXT}).encode(), 400),
    "a prompt of 16 MiB": (json.dumps(OK | {"prompt": "a " * (8 << 20)}).encode(), 400),
    "a body of 32 MiB": (b'{"model": "' + b"x" * (32 << 20) + b'"}', 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_its_status(url, name):
    body, status = BAD[name]
    answer = requests.post(f"{url}/v1/completions", data=body, headers=JSON | {"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == status, answer.text[:300]
    assert answer.json() and "Traceback" not in answer.text


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}, {"Authorization": KEY}])
def test_a_wrong_key_gets_401(url, headers):
    assert requests.post(f"{url}/v1/completions", json=OK, headers=headers).status_code == 401
    assert requests.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_broken_connections_leave_the_server_as_it_was(url):
    """Bytes that are no HTTP, headers without an end, and a body shorter than it said."""
    host, port = url.removeprefix("http://").split(":")
    post = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        post + b"A: " + b"b" * (1 << 20),
        post + b"Content-Length: 99\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as s, contextlib.suppress(OSError):
            s.sendall(sent)
            s.shutdown(socket.SHUT_WR)
            assert s.recv(64).startswith((b"HTTP/1.1 4", b""))
    assert streams.figures(streams.send(url, 1, 4, key=KEY))["answered"] == 1


# ---- many, and those who leave ----


def test_a_thousand_connections_are_all_answered(url):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    outcomes = streams.send(url, 1000, 2, streams=0.5, key=KEY)
    print(streams.figures(outcomes))
    assert streams.figures(outcomes) == {"sent": 1000, "answered": 1000, "failed": 0, "left": 0, "lost": 0}
    assert wait_for(lambda: running(url) == (0, 0, 0)), running(url)


def test_streams_that_are_left_free_the_cache(url):
    outcomes = streams.send(url, 40, LONG, streams=1, leave_after=3, key=KEY)
    assert streams.figures(outcomes)["left"] == 40
    assert wait_for(lambda: running(url) == (0, 0, 0)), running(url)


def test_load_scenarios_account_for_every_request(replicas, model, tmp_path):
    """The command on a server with a key: both drivers, the report, memory, and what the server itself counted."""
    server = replicas[0]
    command = [sys.executable, "-m", "load_tests.load", "--url", server.url, "--model", model, "--out", tmp_path]
    command += ["--scenario", "steady", "--scenario", "cancelled", "--rate", "4", "--seconds", "4", "--no-warm"]
    command += ["--pid", server.process.pid, "--ttft", "60", "--itl", "10"]
    env = os.environ | {"OPENAI_API_KEY": KEY}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    steady, cancelled = json.loads((tmp_path / "report.json").read_text())["scenarios"]
    assert steady["sent"] == steady["answered"] == steady["server_finished"] == 11
    assert steady["good_share"] == 1 and steady["itl"]["p50"] > 0 and steady["memory_growth"] is not None
    # A busy server sends many tokens in one piece: a stream may be whole before its client has counted enough to leave.
    assert cancelled["sent"] == cancelled["cancelled"] + cancelled["answered"] >= 8 and cancelled["cancelled"]
    assert all(s["failed"] == s["lost"] == s["left_running"] == 0 for s in (steady, cancelled))
    assert (tmp_path / "report.html").stat().st_size > 10_000


# ---- processes that end ----


def test_a_replica_lost_behind_routers(replicas, work):
    """kill -9 of one engine under load: clients behind both routers see answers or errors, and the service goes on."""
    staying, lost = replicas
    traces = Traces(lost)
    (engine,), (worker,) = traces.named("EngineCore"), traces.named("Worker")
    begin = []

    async def run(urls):
        def start():
            return asyncio.gather(*(streams.start(url, 16, LONG, streams=0.5, key=KEY) for url in urls))

        load = await busy(lost.url, 8, start, worker)
        engine.kill()
        worker.resume()
        begin.append(time.monotonic())
        return await load

    with routers.all_routers(staying.url, lost.url, work) as urls:
        if not urls:
            pytest.skip("neither nginx nor vllm-router is installed")
        for name, outcomes in zip(urls, asyncio.run(run(urls.values())), strict=True):
            print(f"{name}: {streams.figures(outcomes)}", {o.detail for o in outcomes if o.kind != "answered"})
            assert streams.figures(outcomes)["lost"] == 0
            # A stream that has begun cannot be moved to the other replica; a request without a stream can.
            assert all(o.kind == "answered" for o in outcomes[8:]), outcomes
            assert streams.figures(outcomes)["answered"] > 8
        assert lost.process.wait(60) == 1
        print(f"the replica without an engine ended {time.monotonic() - begin[0]:.1f} s later")
        assert not traces.left()
        for url in urls.values():
            after = streams.figures(streams.send(url, 20, 4, streams=0.5, key=KEY))
            assert after == {"sent": 20, "answered": 20, "failed": 0, "left": 0, "lost": 0}


def test_sigterm_drains(replicas):
    """What has begun is finished, what comes then is refused, and the server ends with 0."""
    server = replicas[0]
    traces = Traces(server)
    (worker,) = traces.named("Worker")

    async def run():
        load = await busy(server.url, 16, lambda: streams.start(server.url, 16, LONG, streams=0.5, key=KEY), worker)
        server.process.send_signal(signal.SIGTERM)
        # The signal has arrived when not even a text is tokenized, which takes no worker.
        assert await asyncio.to_thread(wait_for, lambda: not requests.post(f"{server.url}/tokenize", json=TEXT).ok)
        late = await streams.start(server.url, 4, 4, key=KEY)
        worker.resume()
        return await load, late

    outcomes, late = asyncio.run(run())
    print(f"in flight: {streams.figures(outcomes)}, later: {[o.detail for o in late]}")
    assert streams.figures(outcomes) == {"sent": 16, "answered": 16, "failed": 0, "left": 0, "lost": 0}
    assert streams.figures(late)["failed"] == 4
    assert server.process.wait(60) == 0
    assert not traces.left()


def test_a_worker_killed_under_load(model, work):
    """One of two ranks ends: nothing hangs, nothing is left, the status tells."""
    cores = f"{CORES[0]}|{CORES[-1]}"
    with serve(model, work / "ranks.log", "--tensor-parallel-size", "2", cores=cores) as server:
        traces = Traces(server)
        workers = traces.named("Worker")
        assert len(workers) == 2 and traces.shared

        async def run():
            load = await busy(server.url, 8, lambda: streams.start(server.url, 8, LONG, streams=0.5), workers[1])
            workers[1].kill()
            return await load

        outcomes = asyncio.run(run())
        print(streams.figures(outcomes), {o.detail for o in outcomes})
        assert streams.figures(outcomes) == {"sent": 8, "answered": 0, "failed": 8, "left": 0, "lost": 0}
        assert server.process.wait(60) == 1
        assert not traces.left()
