"""bitsandbytes' NF4 and FP4 against bitsandbytes' own dequantization on the CPU."""

import json

import pytest
import torch
from corruption import assert_converted_or_refused, corrupted, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_checkpoints import bitsandbytes_parts, make_bitsandbytes

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint
from vllm_flute.checkpoint.sources import bitsandbytes as source
from vllm_flute.checkpoint.sources import open_source

LAYER = "model.layers.0.mlp.up_proj"
CONFIG = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def converted(parts: dict[str, torch.Tensor]):
    blob = next(key for key in parts if "quant_state" in key)
    return source.to_lut(parts, source.parse_state(parts[blob], blob), "layer")


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    blocks=st.integers(1, 5),
    block=st.sampled_from((32, 64, 128, 256, 512, 1024, 4096)),
    table=st.sampled_from(("nf4", "fp4")),
    nested=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    seed=st.integers(0, 1000),
)
def test_equals_bitsandbytes(n, blocks, block, table, nested, dtype, seed):
    """Bit by bit where 16 bits hold the scales, else within the bound that the note gives."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, blocks * block, generator=generator) * 0.05).to(dtype)
    parts, exact = bitsandbytes_parts(weight, table, block, nested)
    made = converted(parts)
    assert made.lut.shape == weight.shape and made.lut.bits == 4
    assert made.lut.group_size == (block if block <= 256 or blocks == 1 else 256)
    got = made.lut.dequantize()
    if made.exact:
        assert torch.equal(got, exact) and made.note == ""
    else:
        # 2^-11 of the scale, and float32's rounding of the product.
        assert ((got - exact).abs() <= exact.abs() * 2**-11 * 1.001 + 2**-25).all() and "2^-11" in made.note
    assert made.exact or nested or dtype == torch.float32
    expected = torch.bfloat16 if dtype != torch.float16 and made.exact else torch.float16
    assert nested or made.lut.scales.dtype == expected


def test_bytes_stored_as_another_dtype():
    """bnb_4bit_quant_storage, for shards of one dtype."""
    parts, exact = bitsandbytes_parts((torch.randn(8, 128) * 0.1).bfloat16())
    parts["weight"] = parts["weight"].view(1, -1).view(torch.bfloat16)
    assert torch.equal(converted(parts).lut.dequantize(), exact)


def test_blocks_that_straddle_rows_are_refused():
    parts, _ = bitsandbytes_parts((torch.randn(4, 96) * 0.1).bfloat16())
    with pytest.raises(FluteError, match="blocks of 64 weights in rows of 96: a block that straddles rows"):
        converted(parts)


@pytest.mark.parametrize("table, block, nested", [("nf4", 64, False), ("fp4", 128, True)])
def test_a_whole_checkpoint(tmp_path, table, block, nested):
    made = make_bitsandbytes(tmp_path / "source", table, block, nested)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.kind == f"bitsandbytes-{table}" and len(report.layers) == 14
    assert {(layer.bits, layer.group_size, layer.exact) for layer in report.layers} == {(4, block, not nested)}
    assert len(check_checkpoint(tmp_path / "out")) == 14
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        if nested:
            torch.testing.assert_close(plain.tensor(name), weight, rtol=2**-11 * 1.001, atol=2**-25)
        else:
            assert torch.equal(plain.tensor(name), weight), name


def small(nested: bool) -> dict[str, torch.Tensor]:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    parts, _ = bitsandbytes_parts(weight.bfloat16(), nested=nested)
    return {f"{LAYER}.{key}": t for key, t in parts.items()} | {"model.norm.weight": torch.ones(8)}


def test_8_bits_are_refused(tmp_path):
    path = write_small(tmp_path, small(False) | {f"{LAYER}.SCB": torch.ones(8)}, CONFIG)
    with pytest.raises(FluteError, match="8-bit format"):
        open_source(path)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"blocksize": 0}, "blocksize is 0"),
        ({"blocksize": 10**30}, "blocksize is 1000"),
        ({"shape": [8]}, r"shape is \[8\]"),
        ({"shape": [10**9, 10**9]}, "expected 1000000000 x 1000000000 4-bit codes"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"nested_offset": "x"}, "nested_offset is 'x'"),
        (None, "is not JSON"),
    ],
)
def test_absurd_state(tmp_path, change, found):
    tensors = small(True)
    key = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[key].tolist()))
    text = b"\xff{" if change is None else json.dumps(state | change).encode()
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(FluteError, match=found):
        open_source(write_small(tmp_path, tensors, CONFIG)).quantized()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), nested=st.booleans())
def test_only_our_error_escapes(tmp_path, data, nested):
    path = data.draw(corrupted(tmp_path / "broken", small(nested), CONFIG))
    assert_converted_or_refused(path)
