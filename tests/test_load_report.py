"""The figures of a load test: what counts as answered, the SLO, the knee, the soak's verdict, and the report."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_tests.load import report, soak  # noqa: E402
from load_tests.load.bench import requests_of  # noqa: E402
from load_tests.load.records import Request, Slo, append, elapsed, read, summary  # noqa: E402
from load_tests.load.sweep import find_knee  # noqa: E402
from load_tests.load.target import Memory, Sample  # noqa: E402

SLO = Slo(ttft=1.0, itl=0.1)


def answered(start=0.0, ttft=0.5, itls=(0.05, 0.05), **more) -> Request:
    return Request(start, "answered", ttft, list(itls), tokens=len(itls) + 1, prompt_tokens=10, **more)


def test_every_request_has_one_outcome_and_silence_is_a_loss():
    requests = [answered(), Request(0, "failed", error="Traceback\nConnectionError: gone"), Request(0, "cancelled")]
    figures = summary(requests, sent=5, seconds=2.0, slo=SLO)
    counts = ("sent", "answered", "cancelled", "failed", "lost")
    assert {key: figures[key] for key in counts} == dict(zip(counts, (5, 1, 1, 1, 2), strict=True))
    assert figures["errors"] == {"ConnectionError: gone": 1}
    assert (figures["goodput"], figures["good_share"], figures["tokens_per_second"]) == (0.5, 0.5, 1.5)


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        (answered(), True),
        (answered(ttft=1.1), False),
        (answered(itls=[0.05] * 90 + [0.5] * 10), False),
        (answered(itls=[0.05] * 99 + [0.5]), True),
        (answered(itls=[0.5] * 9, paced=True), True),
        (answered(itls=[]), True),
        (Request(0, "failed", 0.1), False),
    ],
)
def test_slo(request_, met):
    assert SLO.met(request_) is met


def test_percentiles_are_of_all_tokens_and_leave_slow_readers_out():
    requests = [answered(ttft=float(i), itls=[i / 100] * 2) for i in range(1, 101)] + [answered(itls=[9.0], paced=True)]
    figures = summary(requests, len(requests), 1.0, SLO)
    assert figures["itl"]["p50"] == pytest.approx(0.505)
    assert figures["itl"]["p99"] < 1.01
    assert figures["ttft"]["p95"] == pytest.approx(95, abs=1)
    assert elapsed([answered(start=3.0), answered(start=5.0, ttft=1.0, itls=[0.5])]) == pytest.approx(3.5)


def test_a_stream_that_ends_early_failed_although_the_bench_calls_it_a_success():
    result = {"start_times": [1.0, 2.0, 3.0], "errors": ["", "", "ServerDisconnectedError"], "output_lens": [4, 3, 0]}
    result |= {"ttfts": [0.1, 0.1, 0.0], "itls": [[0.1] * 3, [0.1] * 2, []], "input_lens": [8, 8, 8]}
    requests = requests_of(result, tokens=4)
    assert [r.outcome for r in requests] == ["answered", "failed", "failed"]
    assert requests[1].error == "the stream ended after 3 of 4 tokens"
    assert requests[2].ttft is None


def test_records_of_users_count_what_was_sent(tmp_path):
    path = tmp_path / "users.jsonl"
    for line in ("sent", "sent", answered()):
        append(path, line)
    requests, sent = read(path)
    assert (sent, requests) == (2, [answered()])


@pytest.mark.parametrize("capacity", [0.3, 2.9, 3.1, 40.0])
@pytest.mark.parametrize("start", [0.5, 4.0])
def test_the_knee_is_found_from_below_and_from_above(capacity, start):
    asked = []

    def measure(rate):
        asked.append(rate)
        return {"failed": 0, "lost": 0, "good_share": 1.0 if rate <= capacity else 0.5}

    knee, points = find_knee(measure, start, refine=4)
    assert knee <= capacity < knee * 2 ** (1 / 16) * 1.001
    assert len(asked) == len(set(asked)) and [p["rate"] for p in points] == sorted(asked)


@pytest.mark.parametrize("broken", [{"failed": 1}, {"lost": 1}, {"good_share": 0.94}])
def test_a_server_that_bears_nothing_has_no_knee(broken):
    good = {"failed": 0, "lost": 0, "good_share": 1.0}
    knee, points = find_knee(lambda rate: good | broken, 1.0, doublings=3)
    assert knee == 0 and len(points) <= 5


def soaked(last_itl: float) -> list[Request]:
    return [answered(start=i, itls=[0.02 if i < 60 else last_itl] * 5) for i in range(90)]


@pytest.mark.parametrize(
    ("last_itl", "growth", "failed", "held"),
    [
        (0.02, 0.005, 0, [True, True, True]),
        (0.023, 0.005, 0, [True, True, False]),
        (0.02, 0.011, 0, [True, False, True]),
        (0.02, None, 1, [False, False, True]),
    ],
)
def test_soak_verdict(last_itl, growth, failed, held):
    verdict = soak.verdict(soaked(last_itl), {"failed": failed, "lost": 0}, growth)
    assert [v["holds"] for v in verdict.values()] == held
    assert sum(w["requests"] for w in soak.windows(soaked(last_itl))) == 90


def test_report_holds_the_figures_and_escapes_errors(tmp_path):
    requests = [answered(), Request(1.0, "failed", error="<b>no</b>")]
    figures = summary(requests, 2, 2.0, SLO)
    scenario = figures | {"name": "steady", "what": "w", "memory_growth": 0.01, "left_running": 0.0}
    scenario["verdict"] = soak.verdict(soaked(0.02), figures, 0.01)
    point = summary([answered()], 1, 1.0, SLO) | {"rate": 1.0}
    data = {"model": "m", "machine": report.machine(), "date": "d", "versions": "v", "local": True, "command": "c"}
    data |= {"slo": {"ttft": 1.0, "itl": 0.1}, "sweep": [point], "knee": 1.0, "seconds": 30, "request": "r"}
    data["scenarios"] = [scenario]
    samples = [Sample(0, None, 1, 0), Sample(2, Memory(2**20, 2**20), 1, 0)]
    plots = {"sweep": report.sweep_plot([point], data["slo"]), "steady": report.time_plot(requests, samples)}
    plots["steady-windows"] = report.soak_plot(soak.windows(soaked(0.02)))
    report.write(tmp_path, data, plots)
    assert json.loads((tmp_path / "report.json").read_text())["scenarios"][0]["failed"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "1 x &lt;b&gt;no&lt;/b&gt;" in page and page.count("data:image/png;base64,") == 3
    assert "<td>500 / 500 / 500<td>50 / 50 / 50" in page
