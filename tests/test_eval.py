"""Evaluation: the same perplexity from a server and offline, and divergence by its definition."""

import json

import pytest
import torch
from checkpoints import make_llama31
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_flute import FluteError
from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint
from vllm_flute.cli import app
from vllm_flute.serve import Server
from vllm_flute.serve.offline import OfflineModel, keep_logits, score
from vllm_flute.serve.perplexity import strided_windows, text_windows

TEXT = "the quick brown fox jumps over the lazy dog and runs away. " * 40
WINDOW, TOKENS = 256, 383  # two windows: 255 tokens after the first, 128 more


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_llama31(tmp_path_factory.mktemp("eval") / "plain", hidden=256, layers=2)


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """Of several widths, so that the served test covers mixed precision."""
    out = tmp_path_factory.mktemp("eval") / "mixed"
    report = quantize_checkpoint(plain, out, group_size=64, target_bits=3.25)
    assert len({layer.bits for layer in report.layers}) > 1
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(*args) -> list[dict]:
    command = ["eval", *map(str, args), "--window", str(WINDOW), "--max-tokens", str(TOKENS), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_offline_scores_are_those_of_transformers(plain, quantized, text, tmp_path, one_thread):
    """Perplexity, divergence and agreement beside their definitions, on the checkpoint that is written dequantized."""
    dense = dequantize_checkpoint(quantized, tmp_path / "dense", "float32")
    found = evaluate(quantized, plain, "--text", text, "--offline", "--reference", plain, "--dtype", "float32")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:TOKENS]
    windows = strided_windows(ids, [tokenizer.bos_token_id], WINDOW, WINDOW // 2)
    assert len(windows) == 2

    @torch.inference_mode()
    def distributions(path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        parts = [model(torch.tensor([w])).logits[0, -new - 1 : -1].log_softmax(-1) for w, new in windows]
        return torch.cat(parts)

    targets = torch.tensor([token for w, new in windows for token in w[-new:]])
    other = distributions(plain)
    for result, path in zip(found, (dense, plain), strict=True):
        own = distributions(path)
        nats = -own.gather(1, targets.unsqueeze(1)).mean()
        assert result["perplexity"] == pytest.approx(nats.exp().item(), rel=1e-4)
        assert result["tokens"] == len(targets) and result["windows"] == 2
        assert result["kl"] == pytest.approx((other.exp() * (other - own)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
        assert result["top1"] == pytest.approx((other.argmax(-1) == own.argmax(-1)).float().mean().item(), abs=5e-3)
    assert found[0]["kl"] > 0.05 and found[0]["top1"] < 0.98  # so few bits do lose


@pytest.mark.e2e
def test_a_served_model_has_the_offline_perplexity(quantized, text, tmp_path):
    [offline] = evaluate(quantized, "--text", text, "--offline")
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    args = ["--enforce-eager", "--max-model-len", "512"]
    with Server(quantized, tmp_path / "server.log", args, env) as server:
        [served] = evaluate("--url", server.url, "--text", text)
    assert served["tokens"] == offline["tokens"] and served["windows"] == offline["windows"]
    assert served["perplexity"] == pytest.approx(offline["perplexity"], rel=0.01)


def test_kept_logits_are_taken_again(plain, tmp_path, one_thread):
    model = OfflineModel(plain)
    windows = [([1, 2, 3, 4], 2), ([5, 6, 7, 8], 3)]
    kept = keep_logits(model, windows, tmp_path / "logits")
    exact = list(model.logits(windows))
    model.logits = None  # nothing is computed
    again = keep_logits(model, windows, tmp_path / "logits")
    for one, two, three in zip(kept, again, exact, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three) and one.dtype == torch.bfloat16
    found = score(iter(exact), windows, again)
    assert found.kl == 0 and found.top1 == 1 and found.tokens == 5
    with pytest.raises(FluteError, match="1024 tokens in its vocabulary, the model 12"):
        score(iter([torch.randn(2, 12), torch.randn(3, 12)]), windows, kept)


@pytest.mark.parametrize(("window", "stride", "tokens"), [(1, None, 50), (64, 64, 50), (300, None, 50), (64, None, 1)])
def test_sizes_that_cannot_be_scored(window, stride, tokens):
    with pytest.raises(FluteError, match="expected 1 <= stride < window|at least 2"):
        text_windows(list(range(tokens)), [0], window, stride, limit=256)


REFUSED = {
    "a reference needs distributions": (["MODEL", "--reference", "MODEL"], "--reference needs --offline"),
    "no server offline": (["--url", "http://localhost:1", "--offline"], "leave --url out"),
    "nothing to score": ([], "give either MODELS"),
    "an unknown dtype": (["MODEL", "--offline", "--dtype", "int8"], "expected bfloat16"),
    "an unknown half": (["MODEL", "--offline", "--half", "third"], "expected 'first' or 'second'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_one_line(plain, text, case):
    args, message = REFUSED[case]
    result = CliRunner().invoke(app, ["eval", *(str(plain) if a == "MODEL" else a for a in args), "--text", str(text)])
    assert isinstance(result.exception, FluteError) and message in str(result.exception)


def test_models_of_other_kinds(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    for file in plain.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError, match="gptq"):
        OfflineModel(tmp_path)
