"""Reading and checking checkpoints: the configuration, broken files, what inspect says, the way back."""

import json
import math
import shutil

import pytest
import torch
from checkpoints import make_tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.checkpoint import (
    Checkpoint,
    LayerSpec,
    LutConfig,
    check_checkpoint,
    dequantize_checkpoint,
    quantize_checkpoint,
)
from vllm_flute.checkpoint.config import check_fused, matches

Q0 = "model.layers.0.self_attn.q_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
INDEX = "model.safetensors.index.json"
GOOD = {
    "quant_method": "flute",
    "format": "lut-v1",
    "bits": 4,
    "group_size": 64,
    "codebook": "nf",
    "ignore": ["lm_head"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / "plain")


@pytest.fixture(scope="module")
def sound(plain):
    quantize_checkpoint(plain, plain.parent / "sound", overrides={DOWN0: (3, 128)})
    return plain.parent / "sound"


@pytest.fixture
def copy(sound, tmp_path):
    """A sound checkpoint for a test to break."""
    return shutil.copytree(sound, tmp_path / "copy")


def edit_json(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(checkpoint, name: str, change) -> None:
    """Apply ``change`` to the tensors of the shard that holds ``name``, and to the index."""
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    shard = weight_map[name]
    tensors = load_file(checkpoint / shard)
    change(tensors)
    save_file(tensors, checkpoint / shard)
    kept = {key: file for key, file in weight_map.items() if file != shard} | dict.fromkeys(tensors, shard)
    edit_json(checkpoint / INDEX, lambda index: index.update(weight_map=kept))


def test_config_round_trip():
    d = GOOD | {"overrides": {DOWN0: {"bits": 3, "group_size": 128}}}
    config = LutConfig.from_dict(d)
    assert config.to_dict() == d
    assert config.layer(DOWN0) == LayerSpec(3, 128) and config.layer(Q0) == LayerSpec(4, 64)
    assert config.is_ignored("lm_head") and not config.is_ignored(Q0)


def test_an_override_may_name_only_what_differs():
    assert LutConfig.from_dict(GOOD | {"overrides": {Q0: {"bits": 2}}}).layer(Q0) == LayerSpec(2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq', expected 'flute'"),
        ({"format": "lut-v2"}, "unknown format 'lut-v2'.*upgrade"),
        ({"bits": 5}, "unsupported bits: 5"),
        ({"bits": "4"}, "bits is '4', expected a whole number"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 7}, "unsupported group size 7"),
        ({"group_size": 0}, "unsupported group size 0"),
        ({"ignore": "lm_head"}, "expected a list"),
        ({"ignore": ["re:("]}, "not a regular expression"),
        ({"ignore": [""]}, "empty name"),
        ({"codebook": [1.0]}, "codebook"),
        ({"ignored": []}, "unknown keys ignored"),
        ({"overrides": {"a": {"bit": 3}}}, "override of a"),
        ({"overrides": {"a": {"bits": 1}}}, "override of a: unsupported bits: 1"),
        ({"overrides": []}, "expected an object"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(FluteError, match=message):
        LutConfig.from_dict(GOOD | change)


@given(st.lists(st.sampled_from(["model", "layers", "0", "10", "mlp", "down_proj"]), min_size=1, max_size=6), st.data())
def test_an_entry_matches_whole_components(parts, data):
    name = ".".join(parts)
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first + 1, len(parts)))
    assert matches(".".join(parts[first:last]), name)
    assert not matches("x" + parts[first], name) and not matches(name + "x", name)


def test_regular_expressions_match_whole_names():
    assert matches(r"re:model\.layers\.[01]\..*", Q0)
    assert not matches("re:layers", Q0)


def test_fused_layers_must_agree():
    a, b = LayerSpec(4, 64), LayerSpec(3, 64)
    check_fused({"x.q_proj": a, "x.k_proj": a, "x.v_proj": a, "x.o_proj": b, "y.q_proj": b})
    with pytest.raises(FluteError, match="x.gate_proj: 4 bits, group 64, x.up_proj: not quantized"):
        check_fused({"x.gate_proj": a, "x.up_proj": None})
    with pytest.raises(FluteError, match="fuses"):
        check_fused({"x.q_proj": a, "x.k_proj": b, "x.v_proj": a})


def test_a_sound_checkpoint(sound):
    layers = {info.name: info for info in check_checkpoint(sound)}
    assert len(layers) == 14
    down = layers[DOWN0]
    assert (down.n, down.k, down.bits, down.group_size, down.scale_dtype) == (64, 128, 3, 128, "BF16")
    assert down.nbytes == 64 * 128 * 3 // 8 + 64 * 2 + 8 * 4
    assert layers[Q0].bits == 4 and layers[Q0].group_size == 64


def test_a_single_file_without_an_index(sound, tmp_path):
    shutil.copy(sound / "config.json", tmp_path)
    tensors = {}
    for shard in sound.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(i.name for i in check_checkpoint(tmp_path)) == sorted(i.name for i in check_checkpoint(sound))


def set_tensor(name, value):
    return lambda c: edit_tensors(c, name, lambda t: t.update({name: value(t[name])}))


def drop_tensor(name):
    return lambda c: edit_tensors(c, name, lambda t: t.pop(name))


def set_config(**changes):
    return lambda c: edit_json(c / "config.json", lambda d: d.update(changes))


def set_quantization(**changes):
    return lambda c: edit_json(c / "config.json", lambda d: d["quantization_config"].update(changes))


def truncate(c):
    shard = c / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def plain_q(c):
    def change(t):
        for part in ("qweight", "scales", "codebook"):
            del t[f"{Q0}.{part}"]
        t[f"{Q0}.weight"] = torch.zeros(64, 64)

    edit_tensors(c, f"{Q0}.qweight", change)


def quantized_head(c):
    t = quantize(torch.randn(1024, 64))
    parts = {"lm_head.qweight": t.qweight, "lm_head.scales": t.scales, "lm_head.codebook": t.codebook}
    edit_tensors(c, "lm_head.weight", lambda tensors: (tensors.clear(), tensors.update(parts)))
    set_config(tie_word_embeddings=True)(c)
    set_quantization(ignore=[])(c)


BROKEN = {
    "truncated shard": (truncate, r"model-00002-of-00005.safetensors is truncated"),
    "not safetensors": (
        lambda c: (c / "model-00001-of-00005.safetensors").write_bytes(b"\xff" * 64),
        "truncated or not a",
    ),
    "empty shard": (lambda c: (c / "model-00001-of-00005.safetensors").write_bytes(b""), "truncated or not a"),
    "missing shard": (
        lambda c: (c / "model-00003-of-00005.safetensors").unlink(),
        "00003-of-00005.* is missing although",
    ),
    "missing tensor": (
        lambda c: edit_json(c / INDEX, lambda d: d["weight_map"].update(ghost="model-00001-of-00005.safetensors")),
        "lacks the tensor ghost",
    ),
    "broken index": (lambda c: (c / INDEX).write_text("{"), "index.json is not valid JSON"),
    "empty index": (lambda c: (c / INDEX).write_text("{}"), "has no weight_map"),
    "no config": (lambda c: (c / "config.json").unlink(), "config.json does not exist"),
    "config is a list": (lambda c: (c / "config.json").write_text("[]"), "expected a JSON object"),
    "no scales": (drop_tensor(f"{Q0}.scales"), f"{Q0}.scales is missing"),
    "no qweight": (drop_tensor(f"{Q0}.qweight"), f"{Q0}.qweight is missing"),
    "no codebook": (drop_tensor(f"{Q0}.codebook"), f"{Q0}.codebook is missing"),
    "scales of another group": (
        set_tensor(f"{Q0}.scales", lambda t: t.repeat(1, 2)),
        r"q_proj.scales is BF16 \[64, 2\]",
    ),
    "scales in fp32": (set_tensor(f"{Q0}.scales", lambda t: t.float()), "expected BF16 or F16"),
    "short codebook": (
        set_tensor(f"{Q0}.codebook", lambda t: t[:8].clone()),
        r"codebook is F32 \[8\].*expected F32 \[16\]",
    ),
    "codebook in bf16": (set_tensor(f"{Q0}.codebook", lambda t: t.bfloat16()), "codebook is BF16"),
    "codebook with a NaN": (set_tensor(f"{Q0}.codebook", lambda t: t * math.nan), "codebook has values that are not"),
    "signed codes": (set_tensor(f"{Q0}.qweight", lambda t: t.to(torch.int8)), "qweight is I8"),
    "flat codes": (set_tensor(f"{Q0}.qweight", lambda t: t.flatten()), "qweight is U8"),
    "codes of a shorter row": (
        set_tensor(f"{Q0}.qweight", lambda t: t[:, :16].clone()),
        "multiple of the group size, not 32",
    ),
    "codes of fewer rows": (set_tensor(f"{Q0}.qweight", lambda t: t[:8].clone()), r"expected BF16 or F16 \[8, 1\]"),
    "other bits": (set_quantization(bits=2), "codebook is"),
    "unknown format": (set_quantization(format="lut-v9"), "config.json.*unknown format 'lut-v9'"),
    "override of nothing": (
        set_quantization(overrides={DOWN0: {"bits": 3, "group_size": 128}, "nothing": {"bits": 3}}),
        "overrides name nothing",
    ),
    "ignored and quantized": (set_quantization(ignore=["lm_head", "o_proj"]), "o_proj is quantized, but.*ignore"),
    "neither": (plain_q, rf"{Q0}.weight is F32 \[64, 64\].*says that the layer is quantized"),
    "fused by half": (
        lambda c: (plain_q(c), set_quantization(ignore=["lm_head", Q0])(c)),
        "vLLM fuses .*not quantized",
    ),
    "head not ignored": (set_quantization(ignore=[]), "lm_head.weight is"),
    "quantized head, tied": (quantized_head, "lm_head is quantized.*write false there"),
    "tied head not ignored": (
        lambda c: (
            drop_tensor("lm_head.weight")(c),
            set_config(tie_word_embeddings=True)(c),
            set_quantization(ignore=[])(c),
        ),
        "ignore must name 'lm_head'",
    ),
    "weights twice": (
        lambda c: edit_tensors(c, f"{Q0}.qweight", lambda t: t.update({f"{Q0}.weight": torch.zeros(1)})),
        "has both",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(copy, case):
    break_it, message = BROKEN[case]
    break_it(copy)
    with pytest.raises(FluteError, match=message) as error:
        check_checkpoint(copy)
    assert "\n" not in str(error.value)


def test_an_unquantized_checkpoint_is_said_to_be_one(plain):
    with pytest.raises(FluteError, match="not LUT-quantized.*vllm-flute quantize"):
        check_checkpoint(plain)


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(FluteError, match="does not exist, and is not the id"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(FluteError, match="is a file"):
        Checkpoint(__file__)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FluteError, match="neither model.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FluteError, match="convert it first"):
        Checkpoint(tmp_path)


def test_a_hub_id_is_fetched_or_refused_in_one_line(monkeypatch, plain):
    import huggingface_hub

    asked = {}

    def snapshot(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(plain)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert Checkpoint("organisation/model").path == plain
    assert asked["repo"] == "organisation/model" and "*.safetensors" in asked["patterns"]

    def offline(repo, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache.\nSecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FluteError, match="hub did not give it .LocalEntryNotFoundError: not in the cache") as error:
        Checkpoint("organisation/model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_writes_the_oracles_weights(plain, sound, tmp_path, dtype):
    out = dequantize_checkpoint(sound, tmp_path / "out", dtype)
    made, stored, source = Checkpoint(out), Checkpoint(sound), Checkpoint(plain)
    assert set(made.headers) == set(source.headers)
    assert "quantization_config" not in made.config and made.config["torch_dtype"] == dtype
    for name in made.headers:
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" in stored.headers:
            parts = [stored.tensor(f"{layer}.{part}") for part in ("qweight", "scales", "codebook")]
            expected = LutTensor(*parts).dequantize(getattr(torch, dtype))
        else:
            expected = source.tensor(name).to(getattr(torch, dtype))
        assert torch.equal(made.tensor(name), expected), name


def test_dequantize_errors(plain, sound, tmp_path):
    with pytest.raises(FluteError, match="unsupported dtype 'int8'"):
        dequantize_checkpoint(sound, tmp_path / "out", "int8")
    with pytest.raises(FluteError, match="not LUT-quantized"):
        dequantize_checkpoint(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
