"""The quantizer: what it writes, what it keeps, how it continues, how it refuses; by API and by command line."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import llama_config, make_llama31, make_tiny, save_sharded
from safetensors.torch import save_file

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, output, quantize_checkpoint
from vllm_flute.checkpoint.quantize import dequantized
from vllm_flute.cli import main

DOWN = "model.layers.{}.mlp.down_proj"
STATE = ".vllm-flute-progress.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("quantize") / "plain")


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*args) runs the command in this process: (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-flute", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def check_against_source(made: Checkpoint, source: Checkpoint, **options) -> int:
    """Every tensor is the source's bit by bit, or what `quantize` makes of it; returns how many are quantized."""
    count = 0
    for name in source.headers:
        layer, weight = name.removesuffix(".weight"), source.tensor(name)
        if name in made.headers:
            kept = made.tensor(name)
            assert kept.dtype == weight.dtype and torch.equal(kept.view(torch.int16), weight.view(torch.int16)), name
            continue
        t = LutTensor(*(made.tensor(f"{layer}.{part}") for part in ("qweight", "scales", "codebook")))
        expected = quantize(weight, t.bits, t.group_size, **options)
        assert torch.equal(t.qweight, expected.qweight) and torch.equal(t.scales, expected.scales), name
        count += 1
    return count


@pytest.mark.parametrize(
    ("bits", "group_size", "codebook", "scale_dtype"),
    [
        (4, 64, "nf", torch.bfloat16),
        (3, 32, "int", torch.float16),
        (2, 16, "ternary", torch.bfloat16),
        (4, 16, "fp4", torch.float16),
    ],
)
def test_round_trip(plain, tmp_path, bits, group_size, codebook, scale_dtype):
    report = quantize_checkpoint(
        plain, tmp_path / "out", bits, group_size, codebook, scale_dtype=scale_dtype, ignore=["model.layers.1.mlp"]
    )
    made = Checkpoint(tmp_path / "out")
    assert check_against_source(made, Checkpoint(plain), codebook=codebook, scale_dtype=scale_dtype) == 11
    assert {(i.bits, i.group_size) for i in check_checkpoint(tmp_path / "out")} == {(bits, group_size)}
    assert len(report.layers) == 11 and not any(layer.adjusted for layer in report.layers)
    assert made.config["quantization_config"]["ignore"] == ["model.layers.1.mlp", "lm_head"]
    assert made.config["torch_dtype"] == "bfloat16"
    assert report.output_bytes == made.nbytes and report.source_bytes == Checkpoint(plain).nbytes


def test_one_shard_for_each_decoder_layer(plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    layers = {}
    for name, file in index["weight_map"].items():
        layers.setdefault(file, set()).add(".".join(name.split(".")[:3]))
    assert [layers[f"model-{i:05d}-of-00005.safetensors"] for i in range(1, 6)] == [
        {"model.embed_tokens.weight"},
        {"model.layers.0"},
        {"model.layers.1"},
        {"model.norm.weight"},
        {"lm_head.weight"},
    ]
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == set(layers)


def test_llama31_with_its_tokenizer_and_card(tmp_path):
    source = make_llama31(tmp_path / "source", hidden=128, layers=1)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\nhello")
    (source / "LICENSE").write_text("licence")
    (source / "pytorch_model.bin").write_text("not copied")
    out = tmp_path / "out"
    quantize_checkpoint(source, out, bits=3, lm_head=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists() and not (out / STATE).exists()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0\n" in card and "base_model: org/base\n" in card
    assert "vllm serve . --quantization flute" in card and str(tmp_path) not in card
    assert "lm_head" in {info.name for info in check_checkpoint(out)}
    config = json.loads((out / "config.json").read_text())
    plain_config = json.loads((source / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == plain_config


def test_group_size_adjusts_to_k(tmp_path):
    """K=72 takes no supported size but itself; K=96 takes 32."""
    source = make_tiny(tmp_path / "source", hidden=96, intermediate=72, layers=1)
    report = quantize_checkpoint(source, tmp_path / "out", group_size=128)
    assert {(layer.k, layer.group_size) for layer in report.layers} == {(96, 32), (72, 72)}
    assert all(layer.adjusted for layer in report.layers)
    overrides = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["overrides"]
    assert len(overrides) == 7 and overrides[DOWN.format(0)] == {"bits": 4, "group_size": 72}
    check_checkpoint(tmp_path / "out")


def test_a_whole_row_as_group(plain, tmp_path):
    report = quantize_checkpoint(plain, tmp_path / "out", group_size=0)
    assert all(layer.group_size == layer.k and not layer.adjusted for layer in report.layers)
    check_checkpoint(tmp_path / "out")


def test_a_tied_head_is_untied(tmp_path):
    source = make_tiny(tmp_path / "source", layers=1, tied=True)
    quantize_checkpoint(source, tmp_path / "out", lm_head=True)
    made = Checkpoint(tmp_path / "out")
    assert made.config["tie_word_embeddings"] is False
    embedding = Checkpoint(source).tensor("model.embed_tokens.weight")
    assert torch.equal(made.tensor("model.embed_tokens.weight"), embedding)
    assert torch.equal(made.tensor("lm_head.qweight"), quantize(embedding).qweight)
    assert "lm_head" not in made.config["quantization_config"]["ignore"]
    check_checkpoint(tmp_path / "out")


def test_a_tied_head_stays_tied(tmp_path):
    source = make_tiny(tmp_path / "source", layers=1, tied=True)
    quantize_checkpoint(source, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").config["tie_word_embeddings"] is True
    check_checkpoint(tmp_path / "out")


def test_biases_and_extensions_are_dequantized_too():
    generator = torch.Generator().manual_seed(0)
    t = quantize(torch.randn(8, 64, generator=generator), 4, 32)
    offsets = torch.randn(t.scales.shape, generator=generator).to(t.scales.dtype)
    perm = torch.randperm(64, generator=generator, dtype=torch.int32)
    parts = t.parts() | {"offsets": offsets, "perm": perm}
    others = {"a.up_proj.bias": torch.ones(8), "a.norm.weight": torch.zeros(3)}
    found = dequantized({f"a.up_proj.{part}": tensor for part, tensor in parts.items()} | others)
    assert found.keys() == others.keys() | {"a.up_proj.weight"}
    assert all(found[name] is tensor for name, tensor in others.items())
    plain = t.dequantize() + offsets.float().repeat_interleave(32, 1)
    torch.testing.assert_close(found["a.up_proj.weight"][:, perm.long()], plain, rtol=1e-6, atol=1e-6)


def test_what_is_no_linear_layer_stays(tmp_path):
    """Biases, routers, and float32 tensors among bf16 ones; matrices are named, because a server asks for them."""
    layer = "model.layers.0"
    tensors = {
        f"{layer}.self_attn.q_proj.weight": torch.randn(16, 64).bfloat16(),
        f"{layer}.self_attn.q_proj.bias": torch.randn(16),
        f"{layer}.mlp.gate.weight": torch.randn(4, 64),
        f"{layer}.mlp.experts.bias": torch.arange(4),
        "model.embed_tokens.weight": torch.randn(16, 64).half(),
    }
    source = tmp_path / "source"
    source.mkdir()
    save_sharded(source, tensors, 2)
    (source / "config.json").write_text('{"tie_word_embeddings": true}')
    quantize_checkpoint(source, tmp_path / "out")
    made = Checkpoint(tmp_path / "out")
    for name in list(tensors)[1:]:
        assert made.tensor(name).dtype == tensors[name].dtype and torch.equal(made.tensor(name), tensors[name])
    assert f"{layer}.self_attn.q_proj.qweight" in made.headers
    assert made.config["quantization_config"]["ignore"] == ["lm_head", "mlp.gate"]


def test_overrides_by_pattern(plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "out", overrides={DOWN.format(1): (2, 0), "down_proj": (3, 32)})
    found = {info.name: (info.bits, info.group_size) for info in check_checkpoint(tmp_path / "out")}
    assert found[DOWN.format(1)] == (2, 128) and found[DOWN.format(0)] == (3, 32)
    assert found["model.layers.0.mlp.up_proj"] == (4, 64)


def test_a_given_codebook(plain, tmp_path):
    table = torch.tensor([-1.0, -0.25, 0.25, 1.0])
    quantize_checkpoint(plain, tmp_path / "out", bits=2, codebook=table)
    made = Checkpoint(tmp_path / "out")
    assert made.config["quantization_config"]["codebook"] == "custom"
    assert torch.equal(made.tensor(f"{DOWN.format(0)}.codebook"), table)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_interrupted_run_continues(plain, tmp_path, monkeypatch, shards, error):
    quantize_checkpoint(plain, tmp_path / "whole")
    written = []

    def failing(tensors, path, **kwargs):
        if len(written) == shards:
            path.write_bytes(b"half")
            raise error
        written.append(path.name)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(output, "save_file", failing)
    with pytest.raises((KeyboardInterrupt, FluteError)):
        quantize_checkpoint(plain, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    first, shards = len(written), -1  # never again
    report = quantize_checkpoint(plain, tmp_path / "out")
    assert len(written) - first == 5 - first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report == quantize_checkpoint(plain, tmp_path / "again")


KILLED = """
import os, signal, sys
from vllm_flute.checkpoint import output, quantize_checkpoint

def save(tensors, path, save_file=output.save_file, **kwargs):
    save_file(tensors, path, **kwargs)
    if "00003-of" in path.name:
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)

output.save_file = save
quantize_checkpoint(sys.argv[1], sys.argv[2])
"""


def test_a_killed_process_continues(plain, tmp_path):
    """SIGKILL while the third shard is half written."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(plain), str(tmp_path / "out")])
    assert process.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model-00002-of-00005.safetensors" in names and ".model-00003-of-00005.safetensors.tmp" in names
    assert "config.json" not in names and "model-00003-of-00005.safetensors" not in names
    quantize_checkpoint(plain, tmp_path / "out")
    quantize_checkpoint(plain, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupt(source, out, **options) -> None:
    """Leave an unfinished run in ``out``."""

    def stop(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, progress=stop, **options)


def test_a_changed_run_does_not_continue(plain, tmp_path):
    interrupt(plain, tmp_path / "out")
    with pytest.raises(FluteError, match="unfinished run with another source or other options.*--overwrite"):
        quantize_checkpoint(plain, tmp_path / "out", bits=3)
    quantize_checkpoint(plain, tmp_path / "out", bits=3, overwrite=True)
    assert {info.bits for info in check_checkpoint(tmp_path / "out")} == {3}


def test_a_changed_source_does_not_continue(tmp_path):
    source = make_tiny(tmp_path / "source")
    interrupt(source, tmp_path / "out")
    os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(FluteError, match="another source"):
        quantize_checkpoint(source, tmp_path / "out")


def test_overwrite_removes_only_its_own(plain, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(make_tiny(tmp_path / "more", layers=4), out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FluteError, match="is not empty: give --overwrite"):
        quantize_checkpoint(plain, out)
    quantize_checkpoint(plain, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("*.safetensors"))) == 5
    check_checkpoint(out)


def test_overwrite_refuses_weights_of_others(plain, tmp_path):
    other = make_tiny(tmp_path / "other")
    before = contents(other)
    with pytest.raises(FluteError, match="weights that vllm-flute did not write"):
        quantize_checkpoint(plain, other, overwrite=True)
    assert contents(other) == before


def test_two_processes_do_not_write_one_directory(plain, tmp_path):
    with output.Output(tmp_path / "out", {}, False), pytest.raises(FluteError, match="by another process"):
        quantize_checkpoint(plain, tmp_path / "out")


def broken(path, name: str, value) -> None:
    """A one-layer source with one tensor replaced."""
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 64), name: value}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(llama_config(64, 64, 1, torch.float32)))


UP = "model.layers.0.mlp.up_proj"
OPTIONS = {
    "bits": (["--bits", "5"], "unsupported bits: 5"),
    "group size": (["--group-size", "7"], "unsupported group size 7"),
    "fp4 at 3 bits": (["--bits", "3", "--codebook", "fp4"], "'fp4' exists only at 4 bits"),
    "unknown codebook": (["--codebook", "nf5"], "unknown codebook 'nf5'"),
    "unknown method": (["--method", "best"], "unknown method 'best'"),
    "missing table": (["--codebook", "@nothing.json"], "nothing.json cannot be read"),
    "no table": (["--codebook", "{path}/config.json"], "config.json does not hold a JSON list"),
    "override's form": (["--override", "down_proj"], "expected NAME=BITS:GROUP_SIZE"),
    "override's bits": (["--override", "down_proj=5:64"], "--override down_proj: unsupported bits: 5"),
    "override's group": (["--override", "o_proj=4:128"], "group size 128 does not divide K=64 of model.layers.0"),
    "override of one of three": (["--override", "q_proj=3:64"], "vLLM fuses .*q_proj: 3 bits"),
    "ignore of one of two": (["--ignore", "up_proj"], "vLLM fuses .*up_proj: not quantized"),
    "ignore of nothing": (["--ignore", "dwon_proj"], "--ignore 'dwon_proj' names no linear layer"),
    "ignore of all": (["--ignore", "model"], "nothing to quantize"),
    "contradiction": (["--lm-head", "--ignore", "lm_head"], "contradict"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_impossible_options(plain, tmp_path, cli, case):
    args, message = OPTIONS[case]
    args = [arg.replace("{path}", str(plain)) for arg in args]
    code, _, err = cli("quantize", plain, "-o", tmp_path / "out", *args)
    assert_one_line(code, err, message)
    assert not (tmp_path / "out").exists()


def assert_one_line(code: int, err: str, message: str) -> None:
    assert code == 1
    assert err.startswith("vllm-flute: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(message, err), err


SOURCES = {
    "not finite": (UP + ".weight", torch.full((8, 64), float("nan")), rf"{UP}.weight has values that are not finite"),
    "integers": (UP + ".weight", torch.zeros(8, 64, dtype=torch.int32), rf"{UP}.weight is torch.int32"),
    "odd K": (DOWN.format(0) + ".weight", torch.zeros(8, 60), "down_proj has K=60.*give --ignore model.layers.0"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_impossible_sources(tmp_path, cli, case):
    name, value, message = SOURCES[case]
    broken(tmp_path / "source", name, value)
    code, _, err = cli("quantize", tmp_path / "source", "-o", tmp_path / "out")
    assert_one_line(code, err, message)


def test_a_quantized_source_is_refused(plain, tmp_path, cli):
    quantize_checkpoint(plain, tmp_path / "once")
    code, _, err = cli("quantize", tmp_path / "once", "-o", tmp_path / "twice")
    assert_one_line(code, err, "already quantized .quant_method 'flute'.")


def test_a_source_without_linear_layers(tmp_path, cli):
    broken(tmp_path / "source", "x", torch.zeros(1))
    save_file({"x": torch.zeros(1)}, tmp_path / "source" / "model.safetensors")
    assert_one_line(*cli("quantize", tmp_path / "source", "-o", tmp_path / "out")[::2], "no linear layers")


def test_output_is_the_source(plain, cli):
    assert_one_line(*cli("quantize", plain, "-o", plain, "--overwrite")[::2], "is the source itself")


def test_quantize_inspect_and_dequantize_by_command(plain, tmp_path, cli):
    table = tmp_path / "table.json"
    table.write_text("[-1, -0.3, 0.3, 1.0]")
    out = tmp_path / "out"
    args = ["--bits", 2, "--codebook", table, "--ignore", "model.layers.1", "--override", "down_proj=3:32"]
    args += ["--report", tmp_path / "report.json"]
    code, text, err = cli("quantize", plain, "-o", out, *args, "--lm-head", "--scale-dtype", "float16")
    assert (code, err) == (0, "")
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "report.json").read_text())["layers"]}
    assert layers["lm_head"]["bits"] == 2 and layers[DOWN.format(0)]["bits"] == 3 and len(layers) == 8
    assert 0 < layers[DOWN.format(0)]["error"] < layers["lm_head"]["error"] < 1
    code, _, err = cli("quantize", plain, "-o", tmp_path / "x", "--report", tmp_path / "nowhere" / "r.json")
    assert_one_line(code, err, "nowhere is no directory")
    assert not (tmp_path / "x").exists()
    assert "7 of 2 bits" in text and "1 of 3 bits" in text and "vllm serve" in text
    code, text, _ = cli("inspect", out, "--json")
    summary = json.loads(text)
    assert code == 0 and [(g["bits"], g["layers"], g["scales"]) for g in summary["groups"]] == [
        (2, 7, "F16"),
        (3, 1, "F16"),
    ]
    assert summary["quantized_bytes"] + summary["other_bytes"] == Checkpoint(out).nbytes
    code, text, _ = cli("inspect", out)
    assert code == 0 and "sound" in text
    code, text, _ = cli("dequantize", out, "-o", tmp_path / "back", "--dtype", "float32")
    assert code == 0 and Checkpoint(tmp_path / "back").config["torch_dtype"] == "float32"
    (out / "model-00002-of-00005.safetensors").write_bytes(b"")
    assert_one_line(*cli("inspect", out)[::2], "00002-of-00005.safetensors is truncated")


def test_ctrl_c_says_how_to_continue(plain, tmp_path, cli, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_file", stop)
        code, _, err = cli("quantize", plain, "-o", tmp_path / "out")
    assert code == 130 and err == "vllm-flute: error: interrupted; run the same command again to continue\n"
    assert cli("quantize", plain, "-o", tmp_path / "out")[0] == 0


def test_usage_errors_are_one_line(cli):
    for args in (
        ["quantize"],
        ["quantize", "x", "-o", "y", "--bits", "four"],
        ["nonsense"],
        ["inspect", "--what", "x"],
    ):
        code, _, err = cli(*args)
        assert code == 2 and err.startswith("vllm-flute: error: ") and err.count("\n") == 1 and "--help" in err


@pytest.mark.parametrize("command", ["quantize", "dequantize", "inspect", "demo-model", "doctor", "eval", "bench"])
def test_every_command_has_help(cli, command):
    code, text, _ = cli(command, "--help")
    assert code == 0 and "Usage: vllm-flute" in text


def test_doctor(cli):
    code, text, _ = cli("doctor", "--json")
    found = json.loads(text)
    assert code == 0 and found["versions"]["torch"] == torch.__version__
    device = found["devices"]["cpu"]
    assert any(kernel["available"] and kernel["arithmetic"] for kernel in device["kernels"])
    assert set(device["choices"]) == {"ternary", "2", "3", "4"} and "table" in device
    code, text, _ = cli("doctor")
    assert code == 0 and "ternary" in text and (device["table"] or "analytic default") in text.replace("\n", "")
    assert ("no units" in text) != found["cpu"]["bf16_products"]
