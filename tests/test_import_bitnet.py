"""BitNet b1.58 against transformers' own layers."""

import contextlib

import pytest
import torch
from corruption import assert_converted_or_refused, corrupted, write_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_checkpoints import make_bitnet, pack_bitnet

from vllm_flute import FluteError
from vllm_flute.backends import cpu
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint
from vllm_flute.checkpoint.sources import bitnet, open_source
from vllm_flute.layout import TERNARY16, TRIT20

LAYER = "model.layers.0.mlp.up_proj"
PACKED = {"quant_method": "bitnet"}
OFFLINE = PACKED | {"linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = OFFLINE | {"quantization_mode": "online"}


@contextlib.contextmanager
def eager():
    """transformers compiles these functions, for half a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def ternary_values(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(seed)).float()


def opened(path, tensors: dict[str, torch.Tensor], config: dict):
    named = {f"{LAYER}.{part}": t for part, t in tensors.items()}
    return open_source(write_small(path, named, {"torch_dtype": "bfloat16", "quantization_config": config}))


@settings(max_examples=25, deadline=None)
@given(quarters=st.integers(1, 9), octets=st.integers(1, 9), seed=st.integers(0, 1000))
def test_packing_equals_transformers(quarters, octets, seed):
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    values = ternary_values(4 * quarters, 8 * octets, seed)
    packed = pack_weights(values.clone())
    assert torch.equal(packed, pack_bitnet(values))
    lut = bitnet.ternary(bitnet.repack(packed, "layer"), 8 * octets, 1.0, "layer")
    with eager():
        assert torch.equal(lut.dequantize(), unpack_weights(packed, torch.float32))


@pytest.mark.parametrize("scale", [0.0173, 57.25, 1.0, 3.0e-5])
def test_a_packed_layer_divides_by_its_scale(tmp_path, scale):
    """The outputs of transformers' BitLinear, for inputs that its rounding to 8 bits does not change."""
    from transformers.integrations.bitnet import BitLinear

    values, scale = ternary_values(16, 64), torch.tensor([scale])
    made = opened(tmp_path, {"weight": pack_bitnet(values), "weight_scale": scale}, PACKED).convert(LAYER)
    assert made.exact and torch.equal(made.lut.dequantize(), values * (1 / scale))
    x = torch.randint(-127, 128, (3, 64)).float()
    x[:, 0] = 127
    layer = BitLinear(64, 16, bias=False, dtype=torch.float32)
    layer.weight, layer.weight_scale = pack_bitnet(values), scale
    with eager():
        torch.testing.assert_close(x @ made.lut.dequantize().T, layer(x), rtol=1e-5, atol=1e-4 / scale.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_an_auto_layer_multiplies_with_its_scale(tmp_path, dtype, packed):
    """The outputs of transformers' AutoBitLinear; offline checkpoints hold either packed or plain values."""
    from transformers.integrations.bitnet import AutoBitLinear

    values, scale = ternary_values(16, 64), torch.tensor([0.37], dtype=dtype)
    weight = pack_bitnet(values) if packed else values.to(dtype)
    made = opened(tmp_path, {"weight": weight, "weight_scale": scale}, OFFLINE).convert(LAYER)
    assert made.exact and torch.equal(made.lut.dequantize(), values * scale.float())
    x = torch.randint(-127, 128, (3, 64)).float()
    x[:, 0] = 127
    layer = AutoBitLinear(64, 16, bias=False)
    layer.weight, layer.weight_scale = torch.nn.Parameter(values), scale.float()
    with eager(), torch.no_grad():
        torch.testing.assert_close(x @ made.lut.dequantize().T, layer(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_online_rounds_as_transformers_does(tmp_path, dtype):
    from transformers.integrations.bitnet import WeightQuant

    weight = (torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    made = opened(tmp_path, {"weight": weight}, ONLINE).convert(LAYER)
    with eager():
        assert torch.equal(made.lut.dequantize(), WeightQuant.apply(weight).float())


@pytest.mark.parametrize("mode", ["packed", "unpacked", "online"])
def test_a_whole_checkpoint(tmp_path, mode):
    made = make_bitnet(tmp_path / "source", mode)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.kind == "bitnet" and len(report.layers) == 14 and all(layer.exact for layer in report.layers)
    assert {(layer.bits, layer.group_size) for layer in report.layers} == {(2, 256), (2, 512)}
    assert "8 bits" in report.notes[0] and len(check_checkpoint(tmp_path / "out")) == 14
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        assert torch.equal(plain.tensor(name), weight), name


def test_the_ternary_kernels_serve_it():
    """Layers that vLLM fuses keep a scale each: the tables differ, the layout is still the ternary one."""
    luts = [bitnet.ternary(bitnet.repack(pack_bitnet(ternary_values(8, 64)), ""), 64, v, "") for v in (0.01, 0.3)]
    books = torch.stack([t.codebook for t in luts])
    found = {cpu.layout(books, one_scale=one) for one in (True, False)}
    assert found <= {TERNARY16, TRIT20}, found


def test_refused(tmp_path):
    values = ternary_values(8, 64)
    scale = torch.tensor([0.5])
    with pytest.raises(FluteError, match="code 3, which is no ternary weight"):
        opened(tmp_path, {"weight": pack_bitnet(values) | 3, "weight_scale": scale}, PACKED).convert(LAYER)
    with pytest.raises(FluteError, match="values other than -1, 0 and 1"):
        opened(tmp_path, {"weight": values * 0.5, "weight_scale": scale}, OFFLINE).convert(LAYER)
    with pytest.raises(FluteError, match="a bitlinear layer is packed"):
        opened(tmp_path, {"weight": values, "weight_scale": scale}, PACKED).quantized()
    with pytest.raises(FluteError, match="use_rms_norm"):
        opened(tmp_path, {"weight": pack_bitnet(values), "weight_scale": scale}, PACKED | {"use_rms_norm": True})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        parts = {"weight": pack_bitnet(values), "weight_scale": torch.tensor([bad])}
        with pytest.raises(FluteError, match="expected a positive number"):
            opened(tmp_path, parts, PACKED).convert(LAYER)


def small(mode: str) -> tuple[dict[str, torch.Tensor], dict]:
    values = ternary_values(8, 64)
    weight = {"packed": pack_bitnet(values), "unpacked": values.bfloat16(), "online": values.bfloat16() * 0.02}[mode]
    tensors = {f"{LAYER}.weight": weight, "model.norm.weight": torch.ones(8)}
    if mode != "online":
        tensors[f"{LAYER}.weight_scale"] = torch.tensor([0.02])
    config = {"packed": PACKED, "unpacked": OFFLINE, "online": ONLINE}[mode]
    return tensors, {"quantization_config": config | {"modules_to_not_convert": ["lm_head"]}}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), mode=st.sampled_from(("packed", "unpacked", "online")))
def test_only_our_error_escapes(tmp_path, data, mode):
    path = data.draw(corrupted(tmp_path / "broken", *small(mode)))
    assert_converted_or_refused(path)
