"""MXFP4, NVFP4 and packed integers against compressed-tensors' own decompression, or the formula of their documents."""

import json
import math

import pytest
import torch
from corruption import assert_converted_or_refused, corrupted, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_checkpoints import (
    E2M1,
    compressed,
    integer_parts,
    make_mxfp4,
    make_nvfp4,
    make_pack_quantized,
    mxfp4_parts,
    nvfp4_parts,
)

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint
from vllm_flute.checkpoint.sources import fp4, open_source

LAYER = "model.layers.0.mlp.up_proj"


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def decompress(compressor, parts: dict, **arguments) -> torch.Tensor:
    """compressed-tensors' reading of a layer, in float32."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    return compressor.decompress(parts, scheme)["weight"]


def opened(path, layer_parts: dict[str, torch.Tensor], config: dict):
    tensors = {f"{LAYER}.{part}": t for part, t in layer_parts.items()}
    return open_source(write_small(path, tensors, {"torch_dtype": "bfloat16", "quantization_config": config}))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), groups=st.integers(1, 9), seed=st.integers(0, 1000))
def test_mxfp4_equals_compressed_tensors(n, groups, seed):
    from compressed_tensors.compressors import MXFP4PackedCompressor

    packed, scales, exact = mxfp4_parts(random_weight(n, 32 * groups, seed))
    made = fp4.mxfp4(packed, scales, "layer")
    assert made.exact and made.lut.group_size == 32 and torch.equal(made.lut.dequantize(), exact)
    parts = {"weight_packed": packed, "weight_scale": scales}
    theirs = decompress(MXFP4PackedCompressor, parts, num_bits=4, type="float", group_size=32, strategy="group")
    assert torch.equal(made.lut.dequantize(torch.bfloat16), theirs)


def test_every_e8m0_scale():
    """2^(byte - 127) for all bytes but 255, a NaN: the products with e2m1 in float64 are the ones in lut-v1."""
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    packed = (torch.arange(16, dtype=torch.uint8) * 17).expand(255, 16)  # each code twice
    made = fp4.mxfp4(packed, scales, "layer")
    table = torch.cat([E2M1, -E2M1]).double().repeat_interleave(2)
    expected = (table * torch.exp2(scales.double() - 127)).float()
    assert torch.equal(made.lut.dequantize(), expected)
    with pytest.raises(FluteError, match="hold 255, which is a NaN"):
        fp4.mxfp4(packed[:1], torch.tensor([[255]], dtype=torch.uint8), "layer")


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 9),
    factor=st.floats(1e-6, 10),
    divide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nvfp4_equals_its_definition(n, groups, factor, divide, seed):
    """e2m1 * e4m3 * factor: float64's product to 2^-22; compressed-tensors' one, of float32, to the same or bf16's last
    bit, as which it comes out with more than one group.
    """
    from compressed_tensors.compressors import NVFP4PackedCompressor

    stored = 1 / torch.tensor([factor]) if divide else torch.tensor([factor])
    packed, scales, values = nvfp4_parts(random_weight(n, 16 * groups, seed) * factor, factor / 448)
    made = fp4.nvfp4(packed, scales, stored, divide, "layer")
    wide = scales.double().repeat_interleave(16, 1)
    exact = values.double() * (wide / stored.double() if divide else wide * stored.double())
    got = made.lut.dequantize()
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-22).all()
    assert made.exact == (math.frexp(stored.item())[0] == 0.5) and made.exact == ("2^-22" not in made.note)
    if divide:
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": stored}
        arguments = dict(num_bits=4, type="float", group_size=16, strategy="tensor_group")
        theirs = decompress(NVFP4PackedCompressor, parts, **arguments)
        assert theirs.dtype == (torch.bfloat16 if groups > 1 else torch.float32)
        torch.testing.assert_close(got.to(theirs.dtype), theirs, rtol=2**-7 if groups > 1 else 2**-21, atol=0)


def test_nvfp4_with_a_power_of_two_is_exact():
    packed, scales, values = nvfp4_parts(random_weight(8, 64), 2.0**-12)
    for factor, divide in ((2.0**-12, False), (2.0**12, True)):
        made = fp4.nvfp4(packed, scales, torch.tensor(factor), divide, "layer")
        expected = values * (scales.float() * 2.0**-12).repeat_interleave(16, 1)
        assert made.exact and torch.equal(made.lut.dequantize(), expected)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e-38])
def test_absurd_factor(factor):
    packed, scales, _ = nvfp4_parts(random_weight(2, 16), 1.0)
    with pytest.raises(FluteError, match="factor of layer is .* expected a positive number"):
        fp4.nvfp4(packed, scales, torch.tensor(factor), True, "layer")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits, k, group", [(4, 256, 128), (4, 96, 96), (3, 256, 64), (2, 64, 32), (4, 1024, 512)])
def test_integers_equal_compressed_tensors(tmp_path, bits, k, group, dtype, order, zeros):
    from compressed_tensors.compressors import PackedQuantizationCompressor

    parts, exact = integer_parts(random_weight(12, k), bits, group, dtype, zeros, order)
    source = opened(tmp_path, parts, compressed("int", group, bits))
    made = source.convert(LAYER)
    stored_group = min(group, 256) if group < k else k
    assert source.quantized() == {LAYER: (bits, stored_group)} == {LAYER: (made.lut.bits, made.lut.group_size)}
    assert (made.lut.offsets is not None) == zeros and (made.lut.perm is not None) == (order and k > group)
    assert made.exact == (dtype != torch.float32)
    got = made.lut.dequantize()
    if made.exact:
        assert torch.equal(got, exact)
    else:  # of a sum, the error is relative to what is added
        bound = exact.abs().amax() * 2 if zeros else exact.abs()
        assert ((got - exact).abs() <= bound * 2**-11 * 1.001).all() and "2^-11" in made.note
    wide = parts | {"weight_scale": parts["weight_scale"].float()}
    arguments = dict(num_bits=bits, type="int", group_size=group, strategy="group", symmetric=not zeros)
    assert torch.equal(exact, decompress(PackedQuantizationCompressor, wide, **arguments))


@pytest.mark.parametrize(
    "make, kind, exact",
    [
        (make_mxfp4, "compressed-tensors mxfp4-pack-quantized", True),
        (lambda path: make_mxfp4(path, blocks=True), "mxfp4", True),
        (make_nvfp4, "compressed-tensors nvfp4-pack-quantized", False),
        (lambda path: make_nvfp4(path, modelopt=True), "modelopt NVFP4", False),
        (make_pack_quantized, "compressed-tensors pack-quantized", True),
        (lambda path: make_pack_quantized(path, zeros=True), "compressed-tensors pack-quantized", True),
    ],
    ids=["mxfp4", "blocks", "nvfp4", "modelopt", "integers", "zero points"],
)
def test_a_whole_checkpoint(tmp_path, make, kind, exact):
    made = make(tmp_path / "source")
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.kind == kind and len(report.layers) == 14 and {layer.exact for layer in report.layers} == {exact}
    assert len(check_checkpoint(tmp_path / "out")) == 14
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        torch.testing.assert_close(plain.tensor(name), weight, rtol=0 if exact else 2**-22, atol=0)


def test_modelopts_own_settings_file(tmp_path):
    """Older exports have no quantization_config; the file is not the output's."""
    made = make_nvfp4(tmp_path / "source", modelopt=True)
    config = json.loads((made.path / "config.json").read_text())
    del config["quantization_config"]
    (made.path / "config.json").write_text(json.dumps(config))
    settings_file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (made.path / "hf_quant_config.json").write_text(json.dumps(settings_file))
    assert import_checkpoint(made.path, tmp_path / "out").kind == "modelopt NVFP4"
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_refused(tmp_path):
    parts, _ = integer_parts(random_weight(8, 64), 4, 32)
    config = compressed("int", 32)
    for part in ("weight_zero_point", "weight_g_idx"):
        with pytest.raises(FluteError, match=f"{part} is I32 .*, expected I32"):
            opened(tmp_path, parts | {part: torch.zeros(8, 2, dtype=torch.int32)}, config).quantized()
    uneven = parts | {"weight_g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(FluteError, match="does not give each of 2 groups 32 inputs"):
        opened(tmp_path, uneven, config).convert(LAYER)
    with pytest.raises(FluteError, match="transforms"):
        opened(tmp_path, parts, config | {"transform_config": {"config_groups": {"a": {}}}})
    float8 = {"weight": torch.zeros(8, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(8, 1)}
    with pytest.raises(FluteError, match="no weight_packed"):
        opened(tmp_path, float8, config | {"format": "float-quantized"})
    eight, _ = integer_parts(random_weight(8, 64), 8, 32)
    with pytest.raises(FluteError, match="expected words of 2, 3 or 4 bits"):
        opened(tmp_path, eight, compressed("int", 32, 8)).quantized()
    experts = {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 64, 2, 16, dtype=torch.uint8)}
    with pytest.raises(FluteError, match="gpt-oss's experts"):
        open_source(write_small(tmp_path, experts, {"quantization_config": {"quant_method": "mxfp4"}}))
    scaled = {"weight_scale_2": torch.ones(1), "pre_quant_scale": torch.ones(64)}
    with pytest.raises(FluteError, match="AWQ"):
        opened(tmp_path, scaled, {"quant_method": "modelopt"})


def small(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    weight = random_weight(8, 64)
    if kind in ("nvfp4", "modelopt"):
        packed, scales, _ = nvfp4_parts(weight, 1e-4)
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        names = names if kind == "nvfp4" else ("weight", "weight_scale", "weight_scale_2")
        parts = dict(zip(names, (packed, scales, torch.tensor([1e-4])), strict=True))
    elif kind == "int":
        parts, _ = integer_parts(weight, 3, 32, zeros=True, order=True)
    else:
        packed, scales, _ = mxfp4_parts(weight)
        parts = {"weight_packed": packed, "weight_scale": scales}
        if kind == "blocks":
            parts = {"weight_blocks": packed.view(8, 2, 16), "weight_scales": scales}
    config = {"blocks": {"quant_method": "mxfp4"}, "modelopt": {"quant_method": "modelopt"}}
    settings_of = config.get(kind) or compressed(kind, 32, 3 if kind == "int" else 4)
    return {f"{LAYER}.{part}": t for part, t in parts.items()}, {"quantization_config": settings_of}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(("mxfp4", "blocks", "nvfp4", "modelopt", "int")))
def test_only_our_error_escapes(tmp_path, data, kind):
    path = data.draw(corrupted(tmp_path / "broken", *small(kind)))
    assert_converted_or_refused(path)


def test_older_names_of_the_settings(tmp_path):
    parts, exact = integer_parts(random_weight(8, 64), 4, 32)
    tensors = {f"{LAYER}.{part}": t for part, t in parts.items()}
    source = open_source(write_small(tmp_path, tensors, {"compression_config": compressed("int", 32), "vocab_size": 5}))
    assert source.config() == {"vocab_size": 5} and torch.equal(source.convert(LAYER).lut.dequantize(), exact)
