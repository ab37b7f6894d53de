"""`vllm-flute import` as a whole: what it writes, what it refuses, what it leaves behind."""

import json
import shutil
import weakref

import pytest
import torch
from checkpoints import make_tiny
from corruption import assert_converted_or_refused, corrupted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_checkpoints import make_gptq, make_upstream_flute, pack_awq, pack_gptq, pack_upstream

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint
from vllm_flute.checkpoint.sources.upstream_flute import UpstreamFlute
from vllm_flute.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_upstream_flute(tmp_path_factory.mktemp("import") / "source")


@pytest.mark.parametrize("older", [False, True])
def test_the_output_is_the_sources_weights(tmp_path, older):
    made = make_upstream_flute(tmp_path / "source", older=older)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.kind == "flute-upstream" and len(report.layers) == 14 and all(layer.exact for layer in report.layers)
    assert {layer.name for layer in check_checkpoint(tmp_path / "out")} == {layer.name for layer in report.layers}
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        assert torch.equal(plain.tensor(name), weight), name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "README.md"} <= files and "flute_config.json" not in files


def test_a_broken_source_leaves_nothing_behind(source, tmp_path):
    """The last shard's words lose their meaning only when they are read: the headers are sound."""
    broken = tmp_path / "broken"
    shutil.copytree(source.path, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError, match=r"scales is \[\d+, \d\].*expected"):
        import_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ignored_layers_become_plain(source, tmp_path):
    report = import_checkpoint(source.path, tmp_path / "out", ignore=["model.layers.1", "down_proj"])
    plain = [layer for layer in report.layers if not layer.bits]
    assert len(plain) == 8 and all(layer.note == "as plain float16" and not layer.exact for layer in plain)
    made = Checkpoint(tmp_path / "out")
    for layer in plain:
        assert torch.equal(made.tensor(f"{layer.name}.weight"), source.weights[f"{layer.name}.weight"].half())
    assert len(check_checkpoint(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    "ignore, message",
    [
        (["gate_proj"], "fuses .*gate_proj: not quantized.* into one layer"),
        (["nothing"], "'nothing' names no quantized layer"),
        (["model"], "no layer is left to import"),
    ],
)
def test_what_cannot_be_ignored(source, tmp_path, ignore, message):
    with pytest.raises(FluteError, match=message):
        import_checkpoint(source.path, tmp_path / "out", ignore=ignore)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_import_continues(source, tmp_path, monkeypatch):
    whole = import_checkpoint(source.path, tmp_path / "whole")
    convert, layers = UpstreamFlute.convert, []

    def stop_in_the_second_block(self, layer):
        if "layers.1" in layer:
            raise KeyboardInterrupt
        return convert(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(UpstreamFlute, "convert", stop_in_the_second_block)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(source.path, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(UpstreamFlute, "convert", lambda self, layer: layers.append(layer) or convert(self, layer))
    assert import_checkpoint(source.path, tmp_path / "out") == whole
    assert layers and all("layers.1" in layer for layer in layers)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_layer_is_in_memory_at_a_time(source, tmp_path, monkeypatch):
    """A layer's parts are gone, but for the block that is being written, when the next is converted."""
    convert, alive = UpstreamFlute.convert, weakref.WeakSet()
    most = 0

    def counted(self, layer):
        nonlocal most
        made = convert(self, layer)
        alive.add(made.lut.qweight)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(UpstreamFlute, "convert", counted)
    import_checkpoint(source.path, tmp_path / "out")
    assert most <= 7 + 1  # linears of a block, and one that takes the next place


def test_what_is_no_source(tmp_path, source):
    plain = make_tiny(tmp_path / "plain")
    with pytest.raises(FluteError, match="no quantization that is known.*'vllm-flute quantize'"):
        import_checkpoint(plain, tmp_path / "out")
    import_checkpoint(source.path, tmp_path / "lut")
    with pytest.raises(FluteError, match="is in lut-v1 already"):
        import_checkpoint(tmp_path / "lut", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FluteError, match="config.json does not exist"):
        import_checkpoint(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FluteError, match="is the source itself"):
        import_checkpoint(source.path, source.path)
    assert not (tmp_path / "out").exists()


def test_import_and_inspect_by_command(tmp_path, monkeypatch, capsys):
    made = make_gptq(tmp_path / "source", 3, symmetric=False, v2=True, act_order=True)

    def cli(*args) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vllm-flute", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    code, text, err = cli("import", made.path, "-o", tmp_path / "out")
    assert (code, err) == (0, "") and "14 of 14 layers equal the source" in text and "vllm serve" in text
    found = {}
    for name in ("source", "out"):
        code, text, _ = cli("inspect", tmp_path / name, "--json")
        found[name] = json.loads(text)
        assert code == 0
        code, text, _ = cli("inspect", tmp_path / name)
        assert code == 0 and "offsets, perm" in text and "M = 512" in text
    before, after = found["source"], found["out"]
    assert (before["format"], after["format"]) == ("gptq", "lut-v1")
    # What inspect foretells of the source is what import writes.
    assert [row.pop("exact") for row in before["groups"]] == [True] and before["groups"][0].pop("note") == ""
    assert before["groups"] == after["groups"] and before["bits_per_weight"] == after["bits_per_weight"]
    assert before["groups"][0]["tables"] == [[-4, -3, -2, -1, 0, 1, 2, 3]]
    assert before["groups"][0]["kernels"].keys() == {"1", "8", "64", "512"}
    code, _, err = cli("import", tmp_path / "out", "-o", tmp_path / "again")
    assert code == 1 and err.startswith("vllm-flute: error: ") and err.count("\n") == 1


def small(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and config.json of one quantized layer [512, 64] in a kind of source."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (512, 64), generator=random, dtype=torch.uint8)
    scales = torch.rand(512, 2, generator=random).half()
    zeros = torch.randint(0, 16, (512, 2), generator=random)
    found = {"quant_method": kind, "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    match kind:
        case "flute":
            parts = {"weight": pack_upstream(codes, 4), "scales": scales, "tables": torch.rand(16).half()}
            found = {"quant_method": "flute", "num_bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head"]}
        case "gptq":
            parts = {"qweight": pack_gptq(codes.T, 4), "qzeros": pack_gptq(zeros, 4).T, "scales": scales.T}
            parts["g_idx"] = torch.arange(64, dtype=torch.int32) // 32
        case "awq":
            parts = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zeros.T), "scales": scales.T}
            found |= {"version": "gemm"}
    return {f"model.layers.0.mlp.up_proj.{part}": t for part, t in parts.items()}, {"quantization_config": found}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(("flute", "gptq", "awq")))
def test_only_our_error_escapes(tmp_path, data, kind):
    path = data.draw(corrupted(tmp_path / "broken", *small(kind)))
    assert_converted_or_refused(path)
