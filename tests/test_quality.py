"""The measuring command for quality: rows, what a second run does, its page, and what it gives llama.cpp."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_llama31

from vllm_flute.checkpoint import Checkpoint
from vllm_flute.checkpoint.rewrite import units

LOAD_TESTS = Path(__file__).resolve().parent.parent / "load_tests"
sys.path.insert(0, str(LOAD_TESTS))
import quality  # noqa: E402
import quality_gaussian  # noqa: E402
import quality_layer  # noqa: E402
from quality_llama_cpp import linear_bits, write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_llama31(tmp_path_factory.mktemp("quality") / "plain", hidden=128, layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("quality") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 60)
    return path


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, args)])
    quality.main()


def test_rows_are_made_once_and_reported(plain, text, tmp_path, monkeypatch, one_thread, capsys):
    options = ["--text", text, "--work", tmp_path, "--window", "64", "--windows", "2", "--methods", "nf, absmax"]
    options += ["--bits", "2", "--targets", "", "--groups", "32"]
    run(monkeypatch, plain, *options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["twin"], r["method"]) for r in results] == [
        ("plain", "bf16"),
        ("rotated", "bf16"),
        ("plain", "nf, absmax"),
        ("rotated", "nf, absmax"),
    ]
    assert all(r["tokens"] == 126 for r in results)  # two windows of 64, each with one token of context
    for bf16, quantized in zip(results[:2], results[2:], strict=True):
        assert bf16["kl"] == 0 and bf16["top1"] == 1 and bf16["bits_per_weight"] == 16
        assert quantized["kl"] > 0.05 and quantized["top1"] < 1
        # Codes, a bf16 scale for 32 and a table of 16 bytes for each of 7 matrices of 16384 weights on average.
        assert 2.5 < quantized["bits_per_weight"] < 2.52
        assert quantized["peak_bytes"] > 50 << 20
        # Seconds are worth something only where nothing else ran.
        assert "seconds" not in quantized and "machine" not in quantized
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=0.02)  # the same function

    run(monkeypatch, plain, *options, "--groups", "64", "--twins", "plain", "--alone", "--name", "m")
    alone = json.loads((tmp_path / "results.json").read_text())[-1]
    assert alone["seconds"] > 0 and "thread" in alone["machine"] and alone["model"] == "m"

    written = (tmp_path / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(quality, "Twin", None)  # nothing is to be made
    run(monkeypatch, plain, *options)
    assert (tmp_path / "results.json").stat().st_mtime_ns == written

    run(monkeypatch, plain, "--work", tmp_path, "--report", tmp_path / "quality.md")
    page = (tmp_path / "quality.md").read_text()
    assert page.count("| nf, absmax | 32 | 2.5") == 2 and "## Its rotated twin" in page and "126 tokens" in page


def test_out_of_time_starts_nothing(plain, text, tmp_path, monkeypatch, capsys):
    run(monkeypatch, plain, "--text", text, "--work", tmp_path, "--minutes", "-1")
    assert not (tmp_path / "results.json").exists() and "out of time" in capsys.readouterr().err


def test_ggufs_hold_the_checkpoint(plain, tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(Checkpoint(plain), tmp_path / "model.gguf")
    reader, source = gguf.GGUFReader(tmp_path / "model.gguf"), Checkpoint(plain)
    found = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    assert len(found) == len(source.headers)
    for stored, name in (("blk.0.ffn_down", "model.layers.0.mlp.down_proj"), ("output", "lm_head")):
        assert torch.equal(found[f"{stored}.weight"], source.tensor(f"{name}.weight").float())
    query = found["blk.0.attn_q.weight"]
    # GGUF's rotary order has the pairs side by side, Hugging Face's has two halves of each head.
    pairs = query.view(8, 8, 2, 128).transpose(1, 2).reshape(128, 128)
    assert torch.equal(pairs, source.tensor("model.layers.0.self_attn.q_proj.weight").float())
    assert linear_bits(tmp_path / "model.gguf") == (16.0, "100% BF16")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 4


def test_pairs_beat_single_values():
    """Known distortions: Lloyd-Max .1175 at 2 bits (Max 1960); pairs stay above the rate-distortion bound 2**-4."""
    single, pair = quality_gaussian.single_grid_error(2), quality_gaussian.pair_grid_error(2)
    assert single == pytest.approx(0.1175, rel=0.01)
    assert 2**-4 < pair < 0.95 * single


def test_a_model_from_its_layers():
    """The marks of a quantizer's run are named as it names its shards."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)), "lm_head.weight"]
    marks = [[label, when] for (label, _), when in zip(units(names), (10, 30, 55, 100), strict=True)]
    assert quality_layer._whole_model({"seconds": 100.0, "marks": marks}, 32) == 100 + 30 * 25


def test_what_a_large_model_costs(plain, text, tmp_path, monkeypatch, one_thread):
    """Every kind of method, of a model of the same layout: the costs of five layers are more than those of two."""
    config = json.loads((plain / "config.json").read_text())
    monkeypatch.setitem(quality_layer.MODELS, "small", (128, 256, 5, 4, 2, 32, config["vocab_size"]))
    names = ("nf, absmax", "nf, gptq", "fitted, learned")
    methods = {name: quality.METHODS[name] for name in names}
    found = quality_layer.measure_layer("small", plain, tmp_path, methods, 256, text)
    assert [row["method"] for row in found["rows"]] == list(names) and found["threads"] == 1
    assert all(row["peak_bytes"] > 100 << 20 for row in found["rows"])
    *others, learned = found["rows"]
    assert all(row["seconds"] > 0 for row in others)
    # A difference of two runs, which for layers this small is of either sign on a busy machine.
    assert math.isfinite(learned["seconds"])
    assert learned["calibration_tokens"] == 256 and learned["after"] == "gptq"

    costs = {
        1: {"before": 10.0, "update": 1.0, "peak_bytes": 200},
        2: {"before": 13.0, "update": 1.5, "peak_bytes": 250},
    }
    counts = iter(costs)
    monkeypatch.setattr(quality_layer, "learn_in_child", lambda options, updates: costs[next(counts)])
    methods = {"fitted, learned": methods["fitted, learned"]}
    (learned,) = quality_layer.measure_layer("small", plain, tmp_path, methods, 256, text)["rows"]
    assert learned["seconds"] == 10 + 4 * 3 + quality_layer.UPDATES * (1 + 4 * 0.5) and learned["peak_bytes"] == 400
