"""The served model, end to end: real `vllm serve` processes, one battery of questions, answers compared.

Each configuration is served once, asked everything, and stopped; the tests compare what was answered. Equality is
proved in float32, where there are no ties; bf16 may differ where the reference's own best tokens are a tie.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from checkpoints import make_llama31

from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint, write_demo_model
from vllm_flute.serve import Client, Server
from vllm_flute.serve.client import metric_total

pytestmark = pytest.mark.e2e

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "The three primary colors are",
    "To make a good cup of tea, first",
    "In 1969, the first humans",
    "The theory of evolution was proposed by",
    "My favourite recipe for bread needs",
    "A list of the planets in order:",
    "The best way to learn a language is",
    "import numpy as np\n",
    "Shakespeare wrote many plays, such as",
    "The difference between a cat and a dog is",
    "When the sun sets over the ocean,",
    "Q: What is 12 times 3?\nA:",
)
TOKENS = 32
CANDIDATES = 5  # best tokens that are told at each position: a tie may be of more than two
COUNTED_TOKENS = 8
CHAT = [{"role": "user", "content": "Name three fruits and say which is the sweetest."}]

# Traces the model as in production but skips Inductor: what most of these servers need, at a third of the start-up.
TRACED = {"VLLM_CPU_CI_ENV": "1"}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
ARGS = ["--max-model-len", "512", "--max-num-seqs", "32"]
FLUTE = ["--quantization", "flute"]

# Stated bounds on log-probabilities. In float32 kernels differ by the order of a sum only.
FLOAT32_LOGPROB = 1e-4
# In bf16 a logit of 16 to 32 is rounded by up to 1/16, and the hidden state before it costs about as much again. So the
# chosen tokens' log-probabilities differ by no more than that rounding on average.
BF16_MEAN_LOGPROB = 1 / 16


def bf16_tie(candidates: list[float]) -> float:
    """Up to what difference log-probabilities are a tie: the roundings of two of them, in two servers.

    A few of SmolLM2's logits are above 32, where bf16 numbers are 1/4 apart instead of 1/8 and roundings twice as
    large. ``candidates``: which are all logits less the same number, so that their distances tell.
    """
    distances = [max(candidates) - candidate for candidate in candidates]
    apart = 1 / 4 if all(abs(4 * d - round(4 * d)) < 1e-3 for d in distances) else 1 / 8
    return 4 * (apart / 2 + apart / 2)


class Answers(NamedTuple):
    texts: list[str]  # one request with all prompts
    tokens: list[list[str]]
    logprobs: list[list[float]]  # of the chosen tokens
    top: list[list[dict[str, float]]]  # the best at each position
    single: str  # the first prompt alone
    chat: str
    streamed_completion: str
    streamed_chat: str
    metrics: tuple[dict, dict]  # before and after one request of COUNTED_TOKENS
    usage: dict  # of that request


def ask(url: str) -> Answers:
    import openai

    client = Client(url)
    choices = client.complete(list(PROMPTS), TOKENS, logprobs=CANDIDATES, ignore_eos=True)
    choices.sort(key=lambda c: c["index"])
    logprobs = [c["logprobs"] for c in choices]
    single = client.complete(PROMPTS[0], TOKENS, ignore_eos=True)[0]["text"]

    official = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    options = {"model": "model", "max_tokens": TOKENS, "temperature": 0}
    chat = official.chat.completions.create(messages=CHAT, **options).choices[0].message.content
    endless = {"ignore_eos": True}
    stream = official.completions.create(prompt=PROMPTS[0], stream=True, extra_body=endless, **options)
    streamed_completion = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    stream = official.chat.completions.create(messages=CHAT, stream=True, **options)
    streamed_chat = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    time.sleep(1)  # vLLM counts a step just after it has answered
    before = client.metrics()
    body = {"model": "model", "prompt": PROMPTS[3], "max_tokens": COUNTED_TOKENS, "ignore_eos": True}
    usage = client.post("/v1/completions", body)["usage"]
    time.sleep(1)
    return Answers(
        texts=[c["text"] for c in choices],
        tokens=[lp["tokens"] for lp in logprobs],
        logprobs=[lp["token_logprobs"] for lp in logprobs],
        top=[lp["top_logprobs"] for lp in logprobs],
        single=single,
        chat=chat,
        streamed_completion=streamed_completion,
        streamed_chat=streamed_chat,
        metrics=(before, client.metrics()),
        usage=usage,
    )


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="session")
def models(work):
    """Checkpoints by name, made on first use: smol (real weights) and llama (LLaMA-3.1's features), quantized
    ("-flute") and the same dequantized ("-float32", "-bfloat16")."""

    def smol() -> Path:
        return write_demo_model(work / "smol")

    def llama() -> Path:
        make_llama31(work / "llama")
        return work / "llama"

    def smol_flute() -> Path:
        """As online quantization does by default."""
        quantize_checkpoint(get("smol"), work / "smol-flute")
        return work / "smol-flute"

    def llama_flute() -> Path:
        """3 bits, a quantized head, one layer at other bits, and a different codebook for one shard of a layer."""
        out = work / "llama-flute"
        other = {"model.layers.0.mlp.down_proj": (4, 128)}
        quantize_checkpoint(get("llama"), out, bits=3, group_size=64, codebook="nf", lm_head=True, overrides=other)
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        name = "model.layers.1.self_attn.k_proj.codebook"
        shard = out / index[name]
        tensors = safetensors.torch.load_file(shard)
        tensors[name] = torch.linspace(-1.2, 0.9, 8)
        safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
        return out

    def dequantized(source: str, dtype: str) -> Path:
        out = work / f"{source}-{dtype}"
        dequantize_checkpoint(get(source), out, dtype=dtype)
        return out

    makers = {"smol": smol, "llama": llama, "smol-flute": smol_flute, "llama-flute": llama_flute}

    @cache
    def get(name: str) -> Path:
        if name in makers:
            return makers[name]()
        return dequantized(*name.rsplit("-", 1))

    return get


@pytest.fixture(scope="session")
def answers(models, work):
    """answers(model, *args, **env): the battery's answers from that server, which runs once a session."""

    @cache
    def run(model: str, *args: str, env: tuple = ()) -> Answers:
        log = work / f"server-{model}-{abs(hash((args, env)))}.log"
        with Server(models(model), log, [*ARGS, *args], ENVIRONMENT | dict(env), start_seconds=300) as server:
            return ask(server.url)

    return run


F32 = ("--dtype", "float32")
EAGER = ("--enforce-eager",)


@pytest.fixture(scope="session")
def smol_plain(answers):
    return answers("smol-flute-float32", *F32, *EAGER)


@pytest.fixture(scope="session")
def smol_flute(answers):
    return answers("smol-flute", *F32, *FLUTE, env=tuple(TRACED.items()))


@pytest.fixture(scope="session")
def llama_plain(answers):
    return answers("llama-flute-float32", *F32, *EAGER)


def assert_same(actual: Answers, expected: Answers) -> None:
    """The same greedy text everywhere, and log-probabilities within the stated bound."""
    assert actual.tokens == expected.tokens
    assert (actual.texts, actual.single) == (expected.texts, expected.single)
    assert (actual.chat, actual.streamed_completion, actual.streamed_chat) == (
        expected.chat,
        expected.streamed_completion,
        expected.streamed_chat,
    )
    worst = (torch.tensor(actual.logprobs) - torch.tensor(expected.logprobs)).abs().max().item()
    print(f"largest difference of a log-probability: {worst:.2e}")
    assert worst < FLOAT32_LOGPROB


def test_float32_text_is_that_of_the_dequantized_model(smol_flute, smol_plain):
    assert all(len(tokens) == TOKENS for tokens in smol_plain.tokens)
    assert "Paris" in smol_plain.texts[0]
    assert_same(smol_flute, smol_plain)


def test_streams_and_single_requests_agree_with_the_batch(smol_flute):
    assert smol_flute.single == smol_flute.texts[0] == smol_flute.streamed_completion
    assert smol_flute.chat and smol_flute.chat == smol_flute.streamed_chat


def test_three_ranks_agree_in_float32(answers, smol_plain):
    """SmolLM2's 9 and 3 heads split in three; K of 192 a rank keeps whole groups of 64."""
    three = ("--tensor-parallel-size", "3")
    got = answers("smol-flute", *F32, *EAGER, *FLUTE, *three, env=(("VLLM_CPU_OMP_THREADS_BIND", "0|1|1"),))
    assert_same(got, smol_plain)


def test_bf16_compiled_text_up_to_ties(answers):
    """Compiled as in production. Where texts part, both tokens must be a tie of the plain model's; up to there
    the log-probabilities agree."""
    plain = answers("smol-flute-bfloat16", "--dtype", "bfloat16", *EAGER)
    flute = answers("smol-flute", "--dtype", "bfloat16", *FLUTE)
    gaps, differences = [], []
    for prompt in range(len(PROMPTS)):
        pairs = zip(flute.tokens[prompt], plain.tokens[prompt], strict=True)
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        before = zip(flute.logprobs[prompt][:parted], plain.logprobs[prompt][:parted], strict=True)
        differences += [abs(a - b) for a, b in before]
        if parted is None:
            continue
        best = plain.top[prompt][parted]
        chosen = flute.tokens[prompt][parted]
        assert chosen in best, f"{PROMPTS[prompt]!r} parts at {parted} for {chosen!r}, not among {best}"
        gaps.append(max(best.values()) - best[chosen])
        tie = bf16_tie([value for value in best.values() if value >= best[chosen]])
        assert gaps[-1] <= tie, (PROMPTS[prompt], parted, chosen, best)
    same = len(PROMPTS) - len(gaps)
    print(f"{same} of {len(PROMPTS)} texts are the same to the token; the others part at {sorted(gaps)}")
    mean = sum(differences) / len(differences)
    print(f"{len(differences)} tokens in common, log-probabilities differ by {mean:.3f} on average")
    assert len(differences) > len(PROMPTS) * TOKENS / 4
    assert mean <= BF16_MEAN_LOGPROB


def test_llama31_features_at_three_bits(answers, llama_plain):
    """rope_scaling llama3, GQA, untied quantized head, sharded checkpoint, another codebook for one fused shard."""
    assert_same(answers("llama-flute", *F32, *FLUTE, env=tuple(TRACED.items())), llama_plain)


def test_two_ranks_agree_in_float32(answers, llama_plain):
    two = ("--tensor-parallel-size", "2")
    got = answers("llama-flute", *F32, *EAGER, *FLUTE, *two, env=(("VLLM_CPU_OMP_THREADS_BIND", "0|1"),))
    assert_same(got, llama_plain)


@pytest.mark.parametrize("ranks", [1, 2])
def test_metrics_count_exactly(answers, ranks):
    """Every token of a request passes every quantized layer of every rank once, in one call a step."""
    if ranks == 1:
        got = answers("llama-flute", *F32, *FLUTE, env=tuple(TRACED.items()))
    else:
        two = ("--tensor-parallel-size", "2")
        got = answers("llama-flute", *F32, *EAGER, *FLUTE, *two, env=(("VLLM_CPU_OMP_THREADS_BIND", "0|1"),))
    before, after = got.metrics

    def new(name: str, **labels) -> float:
        return metric_total(after, name, **labels) - metric_total(before, name, **labels)

    layers = metric_total(after, "vllm_flute:layers", layout="tile16")
    blocks = metric_total(after, "vllm_flute:layers", layer_group="qkv_proj")
    assert layers == 4 * blocks + 1  # and the head
    steps = COUNTED_TOKENS
    assert new("vllm_flute:kernel_calls_total") == ranks * layers * steps
    # All prompt tokens in the first step, then one a step; the head sees one token a step.
    prompt = got.usage["prompt_tokens"]
    tokens = (layers - 1) * (prompt + steps - 1) + steps
    assert new("vllm_flute:kernel_tokens_total") == ranks * tokens
    assert new("vllm_flute:kernel_calls_total", m_bucket="1") == ranks * (layers * (steps - 1) + 1)
    resident = metric_total(after, "vllm_flute:quantized_weight_bytes")
    assert new("vllm_flute:weight_bytes_streamed_total", m_bucket="1") >= resident * (steps - 1)
    assert metric_total(after, "vllm_flute:build_info") == 1
    # Beside vLLM's own.
    assert new("vllm:generation_tokens_total") == steps


def test_metrics_describe_the_layers(smol_flute):
    _, after = smol_flute.metrics
    for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        labels = {"layer_group": group, "bits": "4", "group_size": "64", "codebook": "nf"}
        assert metric_total(after, "vllm_flute:layers", **labels) == 30
    # 106 million weights of 4 bits and a 16-bit scale for 64 of them.
    resident = metric_total(after, "vllm_flute:quantized_weight_bytes")
    assert resident == pytest.approx(106.2e6 * (4 + 16 / 64) / 8, rel=0.02)


def test_online_quantization_gives_the_text_of_the_offline_checkpoint(answers, smol_plain):
    """The plain model, quantized while the server loads it, beside the dequantized offline checkpoint."""
    got = answers("smol", *F32, *FLUTE, env=tuple(TRACED.items()))
    assert_same(got, smol_plain)
    _, metrics = got.metrics
    assert metric_total(metrics, "vllm_flute:build_info", quantized="online") == 1
    assert metric_total(metrics, "vllm_flute:layers", bits="4", group_size="64", codebook="nf") == 4 * 30


def test_a_broken_checkpoint_ends_the_server_with_one_clear_line(models, work):
    """The last shard loses its end: no engine is started, and no traceback is the message."""
    broken = work / "broken"
    shutil.copytree(models("llama-flute"), broken)
    shard = sorted(broken.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    command = [Path(sys.executable).with_name("vllm"), "serve", broken, *FLUTE, *ARGS]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"vllm-flute: error: {shard} is truncated" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout
