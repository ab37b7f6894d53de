"""The operator's service: against a server that the test plays, then against a real one, and its page in a browser."""

import base64
import contextlib
import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
from checkpoints import make_llama31
from fastapi.testclient import TestClient

from vllm_flute.checkpoint import quantize_checkpoint
from vllm_flute.serve import Client, Server
from vllm_flute.serve.admin import Upstream, create_app
from vllm_flute.serve.admin import upstream as upstream_module
from vllm_flute.serve.admin.status import Sample, figures, plugin_metrics, quantile
from vllm_flute.serve.client import parse_metrics
from vllm_flute.serve.process import free_port

KEY = "s3cret key"
KERNEL = 'kernel="gemv-avx512",isa="avx512",m_bucket="1"'
OTHER = 'kernel="portable",isa="any",m_bucket="33+"'


def page(tokens: int, fast: int = 900, slow: int = 100) -> str:
    """/metrics of a server that has generated so many tokens and read so many bytes of weights."""
    return f"""# HELP vllm:generation_tokens_total Tokens
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0"}} {tokens}
vllm:prompt_tokens_total{{engine="0"}} {tokens * 2}
vllm:num_requests_running{{engine="0"}} 3
vllm:num_requests_waiting{{engine="0"}} 1
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
vllm:prefix_cache_queries_total{{engine="0"}} {tokens * 4}
vllm:prefix_cache_hits_total{{engine="0"}} {tokens}
vllm:time_to_first_token_seconds_bucket{{le="0.1"}} {tokens // 10}
vllm:time_to_first_token_seconds_bucket{{le="0.2"}} {tokens // 5}
vllm:time_to_first_token_seconds_bucket{{le="+Inf"}} {tokens // 5}
# HELP vllm_flute:build_info Build
# TYPE vllm_flute:build_info gauge
vllm_flute:build_info{{version="1",isa="avx512"}} 1
vllm_flute:layers{{layer_group="qkv_proj",bits="4",decode_kernel="gemv-avx512"}} 30
vllm_flute:quantized_weight_bytes{{layer_group="qkv_proj"}} 1048576
vllm_flute:weight_bytes_streamed_total{{{KERNEL}}} {fast}
vllm_flute:weight_bytes_streamed_total{{{OTHER}}} {slow}
vllm_flute:kernel_calls_total{{{KERNEL}}} {fast // 10}
"""


class FakeServer:
    """Answers as vLLM does; ``tokens`` grow with each completion, ``status`` is what every path answers with."""

    def __init__(self, key: str = ""):
        self.tokens, self.status, self.delay, self.body, self.probes = 100, 200, 0.0, None, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, body: str, status: int = 200) -> None:
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # the caller went away
                    self.wfile.write(body.encode())

            def do_GET(self):
                time.sleep(outer.delay)
                if outer.status != 200:
                    return self.reply("secret of the server", outer.status)
                if key and self.path.startswith("/v1/") and self.headers["Authorization"] != f"Bearer {key}":
                    return self.reply("{}", 401)
                bodies = {"/metrics": page(outer.tokens), "/v1/models": '{"data": [{"id": "tiny"}]}'}
                bodies |= {"/version": '{"version": "0.32.0"}', "/health": ""}
                self.reply(bodies[self.path] if outer.body is None else outer.body)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["max_tokens"] == 1 and body["model"] == "tiny"
                outer.probes += 1
                outer.tokens += 1
                self.reply('{"choices": [{"text": "x"}]}')

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FakeServer":
        self.thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake():
    with FakeServer() as server:
        yield server


def service(upstream: Upstream, key: str = "") -> TestClient:
    return TestClient(create_app(upstream, key, {"machine": "here"}), raise_server_exceptions=False)


# ---- figures ----


def sample(text: str, at: float) -> Sample:
    return Sample(at, parse_metrics(text), text)


def test_figures_are_rates_percentiles_and_shares_of_the_window():
    got = figures(sample(page(100, 1000, 200), 10.0), sample(page(300, 4000, 1200), 30.0))
    assert got["window_seconds"] == 20
    assert got["throughput"]["generation_tokens_per_second"] == 10
    assert got["throughput"]["prompt_tokens_per_second"] == 20
    assert got["requests"]["running"] == 3 and got["requests"]["waiting"] == 1
    assert got["kv_cache_usage"] == 0.25 and got["prefix_cache_hit_rate"] == 0.25
    # 20 of 40 first tokens came within 0.1 s, all within 0.2 s.
    ttft = got["latency_seconds"]["time_to_first_token"]
    assert (ttft["p50"], ttft["p95"]) == (pytest.approx(0.1), pytest.approx(0.19))
    assert got["latency_seconds"]["inter_token_latency"] == {"p50": None, "p95": None, "p99": None}
    first, second = got["kernels"]
    assert (first["kernel"], first["m_bucket"], first["share"]) == ("gemv-avx512", "1", 0.75)
    assert first["bytes_per_second"] == 150 and first["calls_per_second"] == 15
    assert (second["kernel"], got["fallback_share"]) == ("portable", 0.25)
    assert got["weight_bytes_per_second"] == 200
    assert got["memory_bytes"]["quantized_weights"] == 1048576


def test_figures_of_one_reading_are_its_gauges():
    only = sample(page(100), 10.0)
    got = figures(only, only)
    assert got["throughput"]["generation_tokens_per_second"] is None and got["kernels"] == []
    assert got["requests"]["running"] == 3 and got["fallback_share"] is None


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 2.0), (0.9, 2.0)], ids=lambda v: str(v)
)
def test_quantile_is_linear_in_its_bucket_and_ends_at_the_last_bound(q, expected):
    assert quantile({1.0: 5, 2.0: 7.5, math.inf: 10}, q) == pytest.approx(expected)


def test_quantile_of_nothing_is_none():
    assert quantile({}, 0.5) is None and quantile({1.0: 0, math.inf: 0}, 0.5) is None


def test_plugin_metrics_are_the_plugins_lines():
    kept = plugin_metrics(page(1)).splitlines()
    assert kept[0] == "# HELP vllm_flute:build_info Build" and len(kept) == 8
    assert all("vllm_flute:" in line for line in kept)


# ---- endpoints ----


def test_everything_answers_while_the_server_does(fake):
    upstream = Upstream(fake.url)
    upstream.read()
    with service(upstream) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"ready": True, "reason": "the model answers"}
        info = client.get("/v1/flute/info").json()
        assert info["models"] == ["tiny"] and info["versions"]["vllm"] == "0.32.0"
        assert info["layers"] == [
            {"layer_group": "qkv_proj", "bits": "4", "decode_kernel": "gemv-avx512", "layers": 30}
        ]
        assert info["this_machine"] == {"machine": "here"} and info["build"][0]["isa"] == "avx512"
        status = client.get("/v1/flute/status").json()
        assert status["server"]["up"] and status["figures"]["requests"]["running"] == 3
        metrics = client.get("/metrics").text
        assert "vllm_flute_admin:upstream_up 1.0" in metrics and "vllm_flute:quantized_weight_bytes" in metrics
        assert "vllm:generation_tokens" not in metrics
        html = client.get("/")
        assert (
            "<title>vllm-flute</title>" in html.text and "default-src 'none'" in html.headers["content-security-policy"]
        )
        assert client.get("/assets/status.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/assets/app.py").status_code == client.get("/nothing").status_code == 404


def test_a_probe_is_sent_only_where_no_traffic_proves_the_model(fake):
    upstream = Upstream(fake.url)
    upstream.read()
    assert upstream.readiness().ready and fake.probes == 1
    assert upstream.readiness().ready and fake.probes == 1  # that answer is fresh
    upstream._answered = float("-inf")
    fake.tokens += 5
    upstream.read()
    assert upstream.readiness().ready and fake.probes == 1  # others' tokens prove it


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"status": 500}, "/metrics answered 500"),
        ({"status": 401}, "/metrics answered 401: give its API key"),
        ({"delay": 0.5}, "it does not answer in time"),
        ({"body": "<html>"}, "its answer is not vLLM's"),
        ({"body": "x" * 4096}, "its answer is not vLLM's"),
    ],
    ids=["error", "key", "slow", "foreign", "long"],
)
def test_a_server_in_trouble_is_503_with_the_reason_and_nothing_of_its_answer(fake, monkeypatch, trouble, reason):
    monkeypatch.setattr(upstream_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(upstream_module, "_LIMIT", 2048)
    for name, value in trouble.items():
        setattr(fake, name, value)
    upstream = Upstream(fake.url)
    upstream.read()
    with service(upstream) as client:
        assert client.get("/healthz").status_code == 200
        ready, info, status = (client.get(path) for path in ("/readyz", "/v1/flute/info", "/v1/flute/status"))
        assert (ready.status_code, info.status_code, status.status_code) == (503, 503, 200)
        assert reason in info.json()["error"]["message"] and reason in status.json()["server"]["reason"]
        assert status.json()["figures"] is None and "secret" not in ready.text + info.text + status.text
        assert "vllm_flute_admin:upstream_up 0.0" in client.get("/metrics").text


def test_nothing_listening_is_503_and_comes_back(fake):
    upstream = Upstream(f"http://127.0.0.1:{free_port()}")
    upstream.read()
    assert upstream.error == "nothing answers there" and not upstream.readiness().ready
    upstream.url = fake.url
    upstream.read()
    assert not upstream.error and upstream.readiness().ready


def test_a_restarted_server_starts_its_window_again(fake):
    upstream = Upstream(fake.url)
    upstream.read()
    fake.tokens = 7
    upstream.read()
    before, after = upstream.window()
    assert before is after and after.total("vllm:generation_tokens_total") == 7


def test_the_window_is_a_minute(fake, monkeypatch):
    clock = iter(range(0, 400, 10))
    monkeypatch.setattr(upstream_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    upstream = Upstream(fake.url, period=10)
    for _ in range(12):
        upstream.read()
    before, after = upstream.window()
    assert after.at - before.at == 70  # a minute and the period


def test_the_reading_thread_reads_and_ends(fake):
    with Upstream(fake.url, period=0.01) as upstream:
        deadline = time.monotonic() + 10
        while upstream.readings < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert upstream.readings >= 3 and not upstream._thread.is_alive()


# ---- keys ----


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"operator:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/flute/info", "/v1/flute/status", "/assets/status.js"])
def test_the_servers_key_is_asked_for(path):
    with FakeServer(KEY) as fake:
        upstream = Upstream(fake.url, KEY)
        upstream.read()
        assert not upstream.error
        with service(upstream, KEY) as client:
            for given in (None, "Bearer wrong", basic("wrong"), "Basic !", f"Digest {KEY}", "Bearer", ""):
                refused = client.get(path, headers={"Authorization": given} if given is not None else {})
                assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
                assert KEY not in refused.text
            for given in (f"Bearer {KEY}", basic(KEY)):
                answer = client.get(path, headers={"Authorization": given})
                assert answer.status_code == 200 and KEY not in answer.text
            assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://a/v1", "http://user:pw@a"])
def test_a_wrong_url_is_one_line(url):
    command = [sys.executable, "-m", "vllm_flute.cli", "serve-admin", "--url", url]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("vllm-flute: error: --url")
    assert len(ended.stderr.splitlines()) == 1


# ---- a real server, a real browser ----


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(server, service's url) of the command itself beside a tiny quantized model with an API key."""
    directory = tmp_path_factory.mktemp("admin")
    quantize_checkpoint(make_llama31(directory / "plain"), directory / "lut")
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    args = ["--quantization", "flute", "--enforce-eager", "--max-model-len", "512", "--api-key", KEY]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm_flute.cli", "serve-admin", "--port", str(port)]
    with Server(directory / "lut", directory / "server.log", args, env) as server:
        process = subprocess.Popen([*command, "--url", server.url, "--api-key", KEY])
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if requests.get(f"{url}/readyz", timeout=30).ok:
                        break
                except requests.ConnectionError:
                    time.sleep(0.2)
            yield server, url
        finally:
            process.terminate()
            assert process.wait(30) in (0, -15)


@pytest.mark.e2e
def test_beside_a_real_server(served):
    server, url = served
    headers = {"Authorization": f"Bearer {KEY}"}
    assert requests.get(f"{url}/v1/flute/info").status_code == 401
    Client(server.url, key=KEY).complete(["the marker of a prompt"] * 4, max_tokens=48, ignore_eos=True)
    time.sleep(5)  # two readings
    info = requests.get(f"{url}/v1/flute/info", headers=headers).json()
    status = requests.get(f"{url}/v1/flute/status", headers=headers).json()
    metrics = requests.get(f"{url}/metrics", headers=headers).text
    assert info["models"] == ["model"] and info["versions"]["vllm"] and info["build"][0]["device"] == "cpu"
    assert {row["layer_group"] for row in info["layers"]} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert info["this_machine"]["devices"]["cpu"]["kernels"] and info["memory_bytes"]["workers"] > 0
    got = status["figures"]
    assert got["throughput"]["generation_tokens_per_second"] * got["window_seconds"] >= 4 * 48
    assert sum(row["share"] for row in got["kernels"]) == pytest.approx(1) and got["fallback_share"] == 0
    assert got["latency_seconds"]["inter_token_latency"]["p95"] > 0
    assert "vllm_flute:kernel_calls_total" in metrics
    # What users send and get stays between them and the server.
    assert "marker" not in json.dumps([info, status]) + metrics
    assert KEY not in json.dumps([info, status]) + metrics


@pytest.mark.e2e
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is missing (Debian: chromium)")
def test_the_page_in_a_browser_shows_the_figures(served, tmp_path):
    server, url = served
    Client(server.url, key=KEY).complete("x", max_tokens=32, ignore_eos=True)
    flags = ["--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    address = url.replace("http://", f"http://operator:{KEY.replace(' ', '%20')}@") + "/"
    ended = subprocess.run(
        ["chromium", *flags, "--virtual-time-budget=6000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = ended.stdout
    assert "CONSOLE" not in ended.stderr, ended.stderr
    status = requests.get(f"{url}/v1/flute/status", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert re.search(r'id="server"[^>]*>model · vLLM ', dom), dom
    assert '<main id="figures">' in dom  # shown
    weights = f"{status['figures']['memory_bytes']['quantized_weights'] / 2**20:.0f} MiB"
    assert f'<b id="weights">{weights}</b>' in dom
    for kernel in {row["kernel"] for row in status["figures"]["kernels"]}:
        assert f'<th scope="row">{kernel}</th>' in dom
    assert re.search(r'<b id="running">\d+</b>', dom)


def test_a_free_port_stays_free(monkeypatch):
    """No taken one, none that the system gives to a connection while a server starts, another one each time."""
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and max(ports) < 32768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", min(ports)))
        taken.listen()
        drawn = iter([min(ports), min(ports), max(ports)])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *range: next(drawn))
        assert free_port() == max(ports)
