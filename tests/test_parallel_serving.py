"""More than one process and machine: the text of a model that is served in parts is that of the whole.

The oracle is another implementation: transformers, in float32, on the dequantized checkpoint. One rank and two ranks of
tensor parallelism on one machine are compared in test_serve.py. Here: two stages of a pipeline, and two ranks on two
"machines", network namespaces that share neither an interface nor shared memory.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, make_llama31

from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint
from vllm_flute.serve import Client, Server
from vllm_flute.serve.client import metric_total, parse_metrics

pytestmark = pytest.mark.e2e

PROMPTS = [
    "tell me more",
    "a river and a bridge",
    "0123456789",
    "what is it that you want to say about the winter garden",
]
TOKENS = 24
START_SECONDS = 600  # each process imports vLLM in turn: a minute and a half together, several on a busy machine
CORES = sorted(os.sched_getaffinity(0))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ARGS = ["--max-model-len", "512", "--max-num-seqs", "8", "--quantization", "flute", "--dtype", "float32"]
ASK = {"model": "model", "prompt": PROMPTS, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
ASK |= {"return_token_ids": True}
HIDDEN, LAYERS = 256, 2
WEIGHTS = LAYERS * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN) + VOCABULARY * HIDDEN


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("parallel")
    make_llama31(work / "llama", hidden=HIDDEN, layers=LAYERS)
    quantize_checkpoint(work / "llama", work / "flute", codebook="nf", method="absmax", lm_head=True)
    return work / "flute"


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """Greedy token ids of each prompt by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = model.with_name("float32")
    dequantize_checkpoint(model, plain, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(TOKENS):
                ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[start:])
    return answers


def token_ids(choices: list[dict]) -> list[list[int]]:
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]


def share_of_weights(samples: dict) -> float:
    """What the workers of one machine hold together, of the model's quantized weights; padding adds some percent."""
    whole = WEIGHTS * (4 + 16 / 64) / 8
    return metric_total(samples, "vllm_flute:quantized_weight_bytes") / whole


def test_two_pipeline_stages(model, expected):
    """vLLM 0.32's later stages make their buffers in the warm-up of a compiled model: traced, but not by Inductor."""
    env = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}
    args = [*ARGS, "--pipeline-parallel-size", "2", "-cc.mode=2", "-cc.backend=eager"]
    with Server(model, model.with_name("pipeline.log"), args, env, start_seconds=START_SECONDS) as server:
        client = Client(server.url)
        assert token_ids(client.post("/v1/completions", ASK)["choices"]) == expected
        assert 1 <= share_of_weights(client.metrics()) < 1.1  # each layer is in one of the stages


# ---- two machines ----


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them: [(name, address, interface)]."""
    ends = [(f"flute{i}-{os.getpid()}", f"198.18.77.{i + 1}", f"fl{i}-{os.getpid() % 10**8}") for i in range(2)]
    with contextlib.ExitStack() as stack:
        try:
            for name, _, _ in ends:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            (one, _, first), (two, _, second) = ends
            ip("link", "add", first, "netns", one, "type", "veth", "peer", "name", second, "netns", two)
            for name, address, interface in ends:
                ip("-n", name, "addr", "add", f"{address}/30", "dev", interface)
                for device in ("lo", interface):
                    ip("-n", name, "link", "set", device, "up")
            subprocess.run([*inside(ends[0][0]), "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"network namespaces take root and iproute2: {e}")
        yield ends


def inside(name: str) -> list[str]:
    """Run what follows in a namespace, with shared memory of its own."""
    return ["ip", "netns", "exec", name, "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]


CLIENT = """
import sys, urllib.request
try:
    body = sys.argv[2].encode() if len(sys.argv) > 2 else None
    ask = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
    print(urllib.request.urlopen(ask, timeout=300).read().decode())
except OSError as e:
    sys.exit(str(e))
"""


def ask_inside(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["ip", "netns", "exec", name, sys.executable, "-S", "-c", CLIENT, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def sent_bytes(name: str, interface: str) -> int:
    show = ["ip", "netns", "exec", name, "cat", f"/sys/class/net/{interface}/statistics/tx_bytes"]
    return int(subprocess.run(show, capture_output=True, text=True, check=True).stdout)


def test_two_ranks_on_two_machines(machines, model, expected):
    """The commands of docs/scaling.md: --nnodes 2, the second machine --headless."""
    (one, address, interface), _ = machines
    vllm = str(Path(sys.executable).with_name("vllm"))
    args = [*ARGS, "--enforce-eager", "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", address]
    url, logs, processes = f"http://{address}:8000", [], []
    with contextlib.ExitStack() as stack:
        for rank, (name, own, device) in enumerate(machines):
            command = [*inside(name), vllm, "serve", str(model), "--served-model-name", "model", *args]
            command += ["--node-rank", str(rank), *(["--headless"] if rank else ["--host", own])]
            env = os.environ | ENVIRONMENT | {"VLLM_HOST_IP": own, "GLOO_SOCKET_IFNAME": device}
            env |= {"VLLM_CPU_OMP_THREADS_BIND": str(CORES[-rank])}
            logs.append(model.with_name(f"machine{rank}.log"))
            log = stack.enter_context(open(logs[-1], "w"))
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            processes.append(process)
            stack.callback(end, process)
        deadline = time.monotonic() + START_SECONDS
        while ask_inside(one, f"{url}/health").returncode:
            assert all(p.poll() is None for p in processes), "".join(log.read_text()[-2000:] for log in logs)
            assert time.monotonic() < deadline
            time.sleep(1)
        before = sent_bytes(one, interface)
        answer = ask_inside(one, f"{url}/v1/completions", json.dumps(ASK))
        assert answer.returncode == 0, answer.stderr
        assert token_ids(json.loads(answer.stdout)["choices"]) == expected
        # Two sums a layer of fp32 values went over the cable for every token, at least half of each from here.
        assert sent_bytes(one, interface) - before > len(PROMPTS) * TOKENS * LAYERS * 2 * HIDDEN * 4 / 2
        metrics = parse_metrics(ask_inside(one, f"{url}/metrics").stdout)
        assert 1 / 2 <= share_of_weights(metrics) < 1.1 / 2  # this machine's rank alone


def end(process: subprocess.Popen) -> None:
    """End a rank and what it started."""
    for number in (15, 9):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
