"""The command: start a server or take one, load it, write the report."""

import datetime
import importlib.metadata
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from deploy.serve import prepare
from vllm_flute.errors import FluteError
from vllm_flute.serve import Client
from vllm_flute.serve.process import Server, cpu_environment

from . import bench, records, report, soak
from .records import Request, Slo
from .router import nginx
from .scenarios import ANSWER, PROMPT, SCENARIOS, Scenario, at_rate, random_prompts
from .sweep import find_knee
from .target import Target, Watch

# A context for the longest prompts and conversations here, and a cache that is small enough to be warmed up.
SERVER = ["--quantization", "flute", "--max-model-len", "2048", "--max-num-seqs", "64"]
NAMES = [s.name for s in SCENARIOS]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def warm_up(target: Target, out: Path) -> None:
    """Prompts that fill the KV cache once: memory is taken at first use, and first calls compile and allocate."""
    length = 1024
    count = target.cache_tokens() // length + 1
    say(f"warming up: {count} prompts of {length} tokens, as many as the KV cache holds")
    bench.run(target, [*random_prompts(length, 2), "--max-concurrency", "8"], count, 2, out / "warm-up")


def measure(target: Target, scenario: Scenario, rate: float, seconds: float, slo: Slo, out: Path) -> tuple:
    """(figures, requests, samples) of one run of a scenario."""
    say(scenario.name)
    (finished,) = target.totals("vllm:request_success_total")
    begin = time.monotonic()
    with Watch(target) as watch:
        requests, sent = scenario.run(target, rate, seconds, out / scenario.name)
    left = target.wait_idle()
    took = records.elapsed(requests) or time.monotonic() - begin
    figures = {"name": scenario.name, "what": scenario.what} | records.summary(requests, sent, took, slo)
    allocated, files = watch.growth() or (None, None)
    figures |= {"memory_growth": allocated, "file_growth": files, "left_running": left}
    figures["server_finished"] = target.totals("vllm:request_success_total")[0] - finished
    say("  " + ", ".join(f"{figures[key]} {key}" for key in ("sent", "answered", "cancelled", "failed", "lost")))
    return figures, requests, watch.samples


def start(stack: ExitStack, model: str, args: list[str], isas: list[str], out: Path) -> Target:
    """A server; or two behind nginx, each on half of the cores with the kernels of its ISA."""
    env = cpu_environment() | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    # vLLM closes an idle connection after 5 s, its own benchmark after 60: a request may meet one that is being closed.
    env |= {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")}
    cores = sorted(os.sched_getaffinity(0))
    halves = [cores[: max(1, len(cores) // 2)], cores[len(cores) // 2 :]]
    settings = [env]
    if isas:
        bound = (",".join(map(str, half)) for half in halves)
        settings = [
            env | {"VLLM_FLUTE_ISA": i, "VLLM_CPU_OMP_THREADS_BIND": b} for i, b in zip(isas, bound, strict=True)
        ]
    servers = []
    for i, setting in enumerate(settings):
        log = out / f"server{i}.log"
        say(f"starting vllm serve {model} {setting.get('VLLM_FLUTE_ISA', '')}; its log: {log}")
        servers.append(stack.enter_context(Server(model, log, [*SERVER, *args], setting)))
    urls, pids = [s.url for s in servers], [s.process.pid for s in servers]
    url = stack.enter_context(nginx(*urls, out)) if isas else urls[0]
    return Target(url, "model", model, urls, pids)


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="Directory or hub id; default: the demo model, quantized.")] = "",
    url: Annotated[
        str, typer.Option(help="A server or router that runs already (key: OPENAI_API_KEY); --model: its tokenizer.")
    ] = "",
    server: Annotated[list[str] | None, typer.Option(help="With a router: each server's own URL, for metrics.")] = None,
    pid: Annotated[list[int] | None, typer.Option(help="With --url: each server's process, for memory.")] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(NAMES)}, soak; repeat for more. Default: all but soak.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("bench-results/load"),
    seconds: Annotated[float, typer.Option(min=1, help="Of each scenario and each point of the sweep.")] = 30,
    rate: Annotated[
        float, typer.Option(min=0, help="Chat-sized requests a second that the server bears; 0: find the knee.")
    ] = 0,
    start_rate: Annotated[float, typer.Option(min=0.01, help="Where the sweep begins.")] = 0.5,
    soak_minutes: Annotated[float, typer.Option(min=0.1)] = 30,
    ttft: Annotated[float, typer.Option(help="SLO: seconds to the first token.")] = Slo.ttft,
    itl: Annotated[float, typer.Option(help="SLO: seconds to each of 95% of the later tokens.")] = Slo.itl,
    isa: Annotated[
        list[str] | None, typer.Option(help="Twice: start two replicas with kernels of these ISAs, behind nginx.")
    ] = None,
    warm: Annotated[bool, typer.Option(help="Fill the KV cache once before measuring.")] = True,
    vllm_args: Annotated[str, typer.Option(help="Further options of the server that is started.")] = "",
) -> None:
    wanted = scenario or NAMES
    if unknown := set(wanted) - {*NAMES, "soak"}:
        raise FluteError(f"no scenario {', '.join(unknown)}: expected of {', '.join(NAMES)}, soak")
    if isa and len(isa) != 2:
        raise FluteError(f"--isa was given {len(isa)} times, expected twice: --isa avx2 --isa avx512")
    out.mkdir(parents=True, exist_ok=True)
    slo = Slo(ttft, itl)
    with ExitStack() as stack:
        if url:
            key = os.environ.get("OPENAI_API_KEY", "")
            name = Client(url, key=key).model()
            target = Target(url.rstrip("/"), name, model or name, server or [], pid or [], key)
        else:
            model = model or prepare(Namespace(model="", out="", bits=4, group_size=64, codebook="nf"))
            target = start(stack, model, shlex.split(vllm_args), isa or [], out)
        if warm:
            warm_up(target, out)
        data, plots = run(target, wanted, out, seconds, rate, start_rate, soak_minutes, slo)
    data |= {"model": model or target.name, "command": shlex.join(["python", "-m", "load_tests.load", *sys.argv[1:]])}
    data |= {
        "local": bool(target.pids),
        "machine": report.machine(),
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    versions = (f"{p} {importlib.metadata.version(p)}" for p in ("vllm", "vllm-flute", "torch"))
    report.write(out, data | {"versions": ", ".join(versions)}, plots)
    say(f"written: {out / 'report.html'}")
    figures = data["scenarios"]
    broken = [f["name"] for f in figures if f["failed"] or f["lost"] or f["left_running"]]
    broken += [f["name"] for f in figures if not all(v["holds"] for v in f.get("verdict", {}).values())]
    if broken:
        raise FluteError(f"not as promised: {', '.join(dict.fromkeys(broken))} (see {out / 'report.html'})")


def run(target, wanted, out, seconds, rate, start_rate, soak_minutes, slo) -> tuple[dict, dict[str, str]]:
    """The sweep where a rate is not given, then the scenarios: (data of the report, plots)."""
    data: dict = {"seconds": seconds, "slo": {"ttft": slo.ttft, "itl": slo.itl}, "sweep": [], "scenarios": []}
    data["request"] = f"{PROMPT} tokens in, {ANSWER} out"
    plots: dict[str, str] = {}
    if not rate:

        def point(arrivals: float) -> dict:
            at = Scenario(f"sweep-{arrivals:.3f}", "", lambda t, r, s, o: at_rate(t, arrivals, s, o))
            return measure(target, at, arrivals, seconds, slo, out)[0]

        rate, data["sweep"] = find_knee(point, start_rate)
        say(f"the knee: {rate:.2f} requests/s")
        plots["sweep"] = report.sweep_plot(data["sweep"], data["slo"])
        if not rate:
            raise FluteError("no arrival rate was borne within the SLO: choose --ttft and --itl for this machine")
    data["knee"] = rate
    long = Scenario("soak", f"chat-sized requests, {soak_minutes:g} minutes at 70% of the rate", _soak)
    for scenario in [*(s for s in SCENARIOS if s.name in wanted), *([long] if "soak" in wanted else [])]:
        length = soak_minutes * 60 if scenario is long else seconds
        figures, requests, samples = measure(target, scenario, rate, length, slo, out)
        plots[scenario.name] = report.time_plot(requests, samples)
        if scenario is long:
            figures["windows"] = soak.windows(requests)
            figures["verdict"] = soak.verdict(requests, figures, figures["memory_growth"])
            plots["soak-windows"] = report.soak_plot(figures["windows"])
        data["scenarios"].append(figures)
    return data, plots


def _soak(target: Target, rate: float, seconds: float, out: Path) -> tuple[list[Request], int]:
    return at_rate(target, soak.SHARE_OF_KNEE * rate, seconds, out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server that was started ends too
    try:
        app()
    except FluteError as e:
        sys.exit(f"load: error: {e}")
