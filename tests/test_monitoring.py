"""Prometheus' rules, Grafana's dashboards and the documented metrics, against a real server under load.

What Debian's package `prometheus` is needed for (promtool, prometheus) is skipped where it is missing.
"""

import concurrent.futures
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from checkpoints import make_llama31
from prometheus_client.parser import text_string_to_metric_families

from vllm_flute.checkpoint import quantize_checkpoint
from vllm_flute.serve import Client, Server, cpu_environment

ROOT = Path(__file__).resolve().parent.parent
MONITORING = ROOT / "deploy" / "monitoring"
sys.path.insert(0, str(MONITORING))

import dashboards  # noqa: E402
from local_prometheus import Prometheus  # noqa: E402


def needs(tool: str):
    return pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is missing (Debian's package: prometheus)")


needs_promtool, needs_prometheus = needs("promtool"), needs("prometheus")

PANELS = [
    pytest.param(panel, id=f"{board.uid}/{row}/{panel.title}".replace(" ", "-"))
    for board in dashboards.DASHBOARDS
    for row, row_panels in board.rows.items()
    for panel in row_panels
]
RULES = [
    rule
    for name in ("recording.yml", "alerts.yml")
    for group in yaml.safe_load((MONITORING / name).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def promtool(*args) -> str:
    done = subprocess.run(["promtool", *map(str, args)], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def substituted(expr: str) -> str:
    """As Grafana sends it with everything chosen."""
    return expr.replace("$__rate_interval", "15s").replace("$instance", ".*").replace("$model", ".*")


def numbers(series: list[tuple[dict, list]]) -> list[float]:
    """The values of a range query; without the NaN that a ratio of two rates is where nothing happened yet."""
    return [value for _, points in series for _, value in points if not math.isnan(value)]


def metric_names(expr: str) -> set[str]:
    """The metrics that an expression reads: its words that are no function, keyword, label or number."""
    expr = re.sub(r'"[^"]*"', "", expr)
    expr = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|ignoring)\s*\([^)]*\)", " ", expr)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()\b(?!\s*\()", expr)
    return set(words) - {"and", "or", "unless", "by", "on", "offset", "bool"}


def test_metric_names_are_found():
    expr = (
        'sum by (instance, le) (rate(vllm:a_total{x="vllm:no", y=~"b"}[5m])) / on (instance) c:d or 0 * avg(up) > 0.5'
    )
    assert metric_names(expr) == {"vllm:a_total", "c:d", "up"}


# ---- rules ----


@needs_promtool
def test_configuration_and_rules_are_valid():
    found = re.findall(r"(\d+) rules found", promtool("check", "config", "prometheus.yml"))
    assert sum(map(int, found)) == len(RULES)


@needs_promtool
def test_rules_pass_their_unit_tests():
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_each_alert_has_a_unit_test_in_which_it_fires():
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)


def test_alerts_are_documented_and_say_what_to_do():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `((?:Vllm|Flute)\w+)` \|", text, re.M)) == set(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert rule["annotations"].keys() == {"summary", "description"}, name
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"] or name == "VllmAbsent"


# ---- dashboards ----


def test_committed_dashboards_are_what_the_generator_writes(tmp_path):
    dashboards.main(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (MONITORING / "dashboards").iterdir()}
    assert written.keys() == committed.keys()
    stale = [name for name in written if written[name] != committed[name]]
    assert not stale, f"run `python deploy/monitoring/dashboards.py`: {stale} are not what it writes"


@pytest.mark.parametrize("board", dashboards.DASHBOARDS, ids=lambda board: board.uid)
def test_dashboard_fills_its_grid_and_keeps_its_variables(board):
    written = json.loads((MONITORING / "dashboards" / f"{board.uid}.json").read_text())
    assert [v["name"] for v in written["templating"]["list"]] == ["datasource", "model", "instance"]
    shown = [panel for panel in written["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in written["panels"]}) == len(written["panels"])
    cells = [
        (x, y)
        for p in (panel["gridPos"] for panel in shown)
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) == 23
    for panel in shown:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@needs_promtool
def test_every_query_of_the_dashboards_parses(tmp_path):
    queries = [expr for param in PANELS for expr in param.values[0].queries.values()]
    rules = [{"record": f"q{i}", "expr": substituted(expr)} for i, expr in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", tmp_path / "queries.yml")


# ---- a real server under load, scraped by a real Prometheus ----


STREAMS, TOKENS, LOAD_SECONDS = 5, 24, 10
PREFIX = "once upon a time there was a table " * 20  # over the KV cache's blocks of 128 tokens, so that it is found


class Run:
    """The server, its Prometheus, and when the load was on."""

    def __init__(self, server: Server, prometheus: Prometheus):
        self.server, self.prometheus = server, prometheus
        self.requests, self.begin, self.end = 0, 0.0, 0.0

    def load(self) -> None:
        client, deadline = Client(self.server.url), time.time() + LOAD_SECONDS

        def stream(i: int) -> int:
            done = 0
            while time.time() < deadline:
                client.complete(f"{PREFIX}{i} {done}", TOKENS, ignore_eos=True)
                done += 1
            return done

        client.complete(PREFIX, 1)
        self.begin = time.time()
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            self.requests = sum(pool.map(stream, range(STREAMS)))
        answer = requests.post(f"{self.server.url}/v1/completions", json={"model": "model"}, timeout=60)
        assert answer.status_code == 400
        self.end = time.time()
        time.sleep(2.5)  # two scrapes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("monitoring")
    make_llama31(work / "llama")
    quantize_checkpoint(work / "llama", work / "quantized", bits=4, group_size=64)
    args = ["--quantization", "flute", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "2"]
    env = cpu_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        Server(work / "quantized", work / "server.log", args, env, start_seconds=300) as server,
        Prometheus(server.url, work / "prometheus") as prometheus,
    ):
        run = Run(server, prometheus)
        run.load()
        yield run


def exposed(run: Run) -> dict:
    """Metric families of the server's /metrics by the name of their samples (counters with _total)."""
    text = requests.get(f"{run.server.url}/metrics", timeout=60).text
    families = [f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")]
    return {f.name + "_total" * (f.type == "counter"): f for f in families}


e2e = pytest.mark.e2e


@e2e
@needs_prometheus
def test_documented_metrics_are_those_exposed(run):
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(vllm_flute:\w+)` \| (\w+) \| ([^|]+) \| ([^|]*) \|", text, re.M)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, _, labels in rows}
    assert all(unit.strip() for _, _, unit, _ in rows)
    real = {
        name: (family.type, {label for s in family.samples for label in s.labels if not s.name.endswith("_created")})
        for name, family in exposed(run).items()
        if name.startswith("vllm_flute:")
    }
    assert documented == real


@e2e
@needs_prometheus
def test_counters_are_what_was_asked_for(run):
    """Prometheus' own data: tokens as requested, and each step reads the resident weights once."""

    def total(expr: str) -> float:
        return sum(value for _, value in run.prometheus.query(f"sum({expr})"))

    assert run.requests >= 2 * STREAMS
    assert total("vllm:generation_tokens_total") == run.requests * TOKENS + 1
    assert total("vllm:request_success_total") == run.requests + 1
    steps = total("vllm:iteration_tokens_total_count")
    resident = total("vllm_flute:quantized_weight_bytes")
    calls, layers = total("vllm_flute:kernel_calls_total"), total("vllm_flute:layers")
    # Start-up runs some steps of its own.
    assert 0 <= calls / layers - steps <= 20
    assert total("vllm_flute:weight_bytes_streamed_total") == pytest.approx(calls / layers * resident)
    resident_now = [p.memory_info().rss for p in psutil.Process(run.server.process.pid).children(recursive=True)]
    worker = total("vllm_flute:worker_resident_memory_bytes")
    assert any(worker == pytest.approx(process, rel=0.05) for process in resident_now)


@e2e
@needs_prometheus
@pytest.mark.parametrize("panel", PANELS)
def test_panel_names_exposed_metrics_and_has_data(run, panel):
    stored = set(run.prometheus.get("label/__name__/values"))
    for legend, expr in panel.queries.items():
        assert metric_names(expr) <= stored
        series = run.prometheus.query_range(substituted(expr), run.begin + 3, run.end, step=1)
        values = numbers(series)
        assert values, f"no data for {legend}: {expr}"
        labels = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert all(labels <= found.keys() for found, _ in series), f"{legend} names a label that {expr} has not"
        assert min(values) >= 0
        if panel.unit == "percentunit":
            assert max(values) <= 1


@e2e
@needs_prometheus
@pytest.mark.parametrize(
    "title",
    ["Generated tokens", "First token, p95", "Between tokens, p95", "Waiting requests", "KV cache in use", "Tokens"]
    + ["Prefix cache hits", "Weight bandwidth", "Weight bandwidth, from steps", "Tokens in a call", "Packed weights"],
)
def test_panel_shows_the_load(run, title):
    panel = next(param.values[0] for param in PANELS if param.values[0].title == title)
    for expr in panel.queries.values():
        series = run.prometheus.query_range(substituted(expr), run.begin, run.end, step=1)
        assert max(numbers(series)) > 0


@e2e
@needs_prometheus
def test_rules_read_exposed_metrics_and_record_values(run):
    stored = set(run.prometheus.get("label/__name__/values"))
    for rule in RULES:
        assert metric_names(rule["expr"]) <= stored | RECORDED, rule.get("alert", rule.get("record"))
    # A busy minute takes longer than this load.
    assert stored >= RECORDED - {"instance:vllm_flute_weight_bandwidth_bytes:busy_rate1m"}
    loaded = [rule for group in run.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == set(ALERTS) | RECORDED
    assert all(rule["health"] == "ok" for rule in loaded)
    # A short load on native kernels is no reason to call anybody.
    assert [rule["name"] for rule in loaded if rule.get("state") == "firing"] == []
    assert run.prometheus.query("instance:vllm_flute_layers_on_fallback:ratio")[0][1] == 0


@e2e
@needs_prometheus
def test_a_dead_engine_is_seen(run):
    """The last one: kill -9 of the engine's process ends the server, and VllmDown waits for its minute."""
    children = psutil.Process(run.server.process.pid).children(recursive=True)
    next(p for p in children if "EngineCore" in " ".join(p.cmdline())).kill()
    run.server.process.wait(60)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alerts = run.prometheus.get("alerts")["alerts"]
        if any(a["labels"]["alertname"] == "VllmDown" and a["state"] == "pending" for a in alerts):
            return
        time.sleep(0.5)
    raise AssertionError(f"VllmDown is not pending: {alerts}")
