"""GPTQ, AutoRound and AWQ checkpoints: exact, against the formula ``scale * (code - zero)`` and others' packers."""

import json
import shutil

import pytest
import torch
from checkpoints import save_sharded
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from source_checkpoints import HIDDEN, make_awq, make_gptq, pack_gptq

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint
from vllm_flute.checkpoint.sources import gptq
from vllm_flute.checkpoint.sources.zero_points import affine


def assert_exact(made, work, extensions=()):
    """Import it, dequantize that in float32, and compare every tensor bit by bit."""
    report = import_checkpoint(made.path, work / "out")
    assert all(layer.exact for layer in report.layers) and len(report.layers) == 14
    assert report.config.extensions == extensions
    config = json.loads((work / "out" / "config.json").read_text())["quantization_config"]
    assert tuple(config.get("extensions", ())) == extensions
    plain = Checkpoint(dequantize_checkpoint(work / "out", work / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        assert torch.equal(plain.tensor(name), weight), name
    return report


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric(tmp_path, bits, v2):
    report = assert_exact(make_gptq(tmp_path / "source", bits, v2=v2), tmp_path)
    assert report.kind == "gptq" and {(layer.bits, layer.group_size) for layer in report.layers} == {(bits, 64)}


@pytest.mark.parametrize("bits, symmetric", [(2, True), (3, True), (4, True), (3, False), (4, False)])
def test_act_order(tmp_path, bits, symmetric):
    made = make_gptq(tmp_path / "source", bits, symmetric=symmetric, v2=True, act_order=True)
    assert_exact(made, tmp_path, ("perm",) if symmetric else ("offsets", "perm"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric(tmp_path, bits):
    assert_exact(make_gptq(tmp_path / "source", bits, symmetric=False, v2=True), tmp_path, ("offsets",))


def test_autoround_and_whole_rows(tmp_path):
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "sym": True}
    report = assert_exact(make_gptq(tmp_path / "source", 4, 128, settings=settings), tmp_path)
    assert report.kind == "auto-round"


def test_awq(tmp_path):
    report = assert_exact(make_awq(tmp_path / "source"), tmp_path, ("offsets",))
    assert report.kind == "awq"


@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**32), st.booleans())
def test_zero_points(bits, seed, v2):
    """Any zero points, with the wrap-around of those that are 0; 2 and 4 bits borrow through whole words."""
    zeros = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(seed))
    stored = pack_gptq(zeros.T, bits).T
    if not v2 and bits == 3:
        stored = pack_gptq(((zeros - 1) % 8).T, bits).T
    elif not v2:
        stored = gptq._plus(stored, [-sum(1 << i for i in range(0, 32, bits))])
    assert torch.equal(gptq.zero_points(stored, bits, v2, symmetric=False).long(), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stored", ["less one", "as it is", "old words"])
def test_a_symmetric_layer_is_read_in_whichever_way_it_was_stored(bits, stored):
    middle = torch.full((2, 32), 2 ** (bits - 1))
    words = pack_gptq(middle.T, bits).T
    if stored == "less one":
        words = pack_gptq(middle.T - 1, bits).T
    elif stored == "old words":
        if bits != 3:
            return
        words = gptq._plus(words, [-word for word in gptq._OLD_WORDS])
    assert torch.equal(gptq.zero_points(words, bits, v2=False, symmetric=True).long(), middle)


def test_fp32_scales_are_rounded_and_said_to_be():
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    scales = torch.rand(8, 1) + 0.1
    made = affine(codes, scales, torch.randint(0, 16, (8, 1)), 4, "layer")
    assert not made.exact and "2^-11" in made.note
    assert (made.lut.scales.float() / scales - 1).abs().max() <= 2**-11


def change(path, edit):
    """Apply ``edit(name, tensor) -> tensor or None`` to every stored tensor; None removes it."""
    (path / "model.safetensors.index.json").unlink()  # all go into one file
    stored = {}
    for file in path.glob("*.safetensors"):
        stored |= {name: edit(name, tensor) for name, tensor in load_file(file).items()}
        file.unlink()
    save_file({name: t for name, t in stored.items() if t is not None}, path / "model.safetensors")


def settings(path, **values):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= values
    (path / "config.json").write_text(json.dumps(config))


def test_orders_that_differ_within_a_fused_layer_are_refused(tmp_path):
    made = make_gptq(tmp_path / "source", act_order=True)
    change(made.path, lambda name, t: t.flip(0) if name.endswith("layers.1.self_attn.k_proj.g_idx") else t)
    with pytest.raises(FluteError, match="are one layer in vLLM, but act-order sorts their inputs differently"):
        import_checkpoint(made.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # the first decoder layer had been written


BAD = {
    "lacks model.layers.0.mlp.up_proj.scales": lambda n, t: None if n.endswith("0.mlp.up_proj.scales") else t,
    "scales is I32": lambda n, t: t.int() if n.endswith("0.mlp.up_proj.scales") else t,
    "do not agree on 4 bits": lambda n, t: t[:, :-1].contiguous() if n.endswith("0.mlp.up_proj.scales") else t,
    "values that are not finite": lambda n, t: t * torch.inf if n.endswith("0.mlp.up_proj.scales") else t,
    "g_idx does not give each": lambda n, t: t * 0 if n.endswith("0.mlp.up_proj.g_idx") else t,
    "has 8 bits": lambda n, t: t.repeat(1, 2) if n.endswith("0.mlp.up_proj.qzeros") else t,
}


def test_a_router_stays_and_is_named(tmp_path):
    """A server asks for every matrix that it multiplies by."""
    made = make_gptq(tmp_path / "source")
    source = Checkpoint(made.path)
    tensors = {name: source.tensor(name) for name in source.headers}
    router = torch.ones(4, HIDDEN, dtype=torch.float16)
    save_sharded(made.path, tensors | {"model.layers.0.mlp.gate.weight": router}, shards=2)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.config.ignore == ("gate", "lm_head")
    assert torch.equal(Checkpoint(tmp_path / "out").tensor("model.layers.0.mlp.gate.weight").half(), router)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_gptq(tmp_path_factory.mktemp("gptq") / "source").path


@pytest.mark.parametrize("message", BAD)
def test_broken_layers(sound, tmp_path, message):
    shutil.copytree(sound, tmp_path / "source")
    change(tmp_path / "source", BAD[message])
    with pytest.raises(FluteError, match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_that_are_not_read(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "source")
    settings(tmp_path / "source", checkpoint_format="marlin")
    with pytest.raises(FluteError, match="checkpoint_format 'marlin' is not supported"):
        import_checkpoint(tmp_path / "source", tmp_path / "out")
    made = make_awq(tmp_path / "awq")
    settings(made.path, version="gemv")
    with pytest.raises(FluteError, match="AWQ version 'gemv' is not supported"):
        import_checkpoint(made.path, tmp_path / "out")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Both extensions, in lut-v1."""
    work = tmp_path_factory.mktemp("imported")
    made = make_gptq(work / "source", symmetric=False, v2=True, act_order=True)
    import_checkpoint(made.path, work / "out")
    assert len(check_checkpoint(work / "out")) == 14
    return work / "out"


NAME = "model.layers.0.self_attn.q_proj"
BROKEN = {
    f"{NAME}.offsets is F32 .* expected F32": lambda t: t | {f"{NAME}.offsets": t[f"{NAME}.offsets"][:, :1].clone()},
    f"{NAME}.perm is I64": lambda t: t | {f"{NAME}.perm": t[f"{NAME}.perm"].long()},
    f"{NAME}.perm is no permutation": lambda t: t | {f"{NAME}.perm": t[f"{NAME}.perm"] * 0},
    "inputs are in different orders": lambda t: t | {f"{NAME}.perm": t[f"{NAME}.perm"].flip(0)},
    "q_proj into one layer, but": lambda t: {k: v for k, v in t.items() if k != f"{NAME}.perm"},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_extensions_end_in_one_line_before_a_server_starts(imported, tmp_path, message):
    shutil.copytree(imported, tmp_path / "out")
    stored = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        stored |= load_file(file)
        file.unlink()
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    save_file(BROKEN[message](stored), tmp_path / "out" / "model.safetensors")
    with pytest.raises(FluteError, match=message):
        check_checkpoint(tmp_path / "out")


def test_config_must_list_the_extensions_in_use(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "out")
    settings(tmp_path / "out", extensions=["perm"])
    with pytest.raises(FluteError, match="extensions must list 'offsets'"):
        check_checkpoint(tmp_path / "out")
    settings(tmp_path / "out", extensions=["perm", "rotation"])
    with pytest.raises(FluteError, match="extensions is .*this version knows .*upgrade vllm-flute"):
        check_checkpoint(tmp_path / "out")
