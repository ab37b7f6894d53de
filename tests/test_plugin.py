"""The plugin's linear method on vLLM's own layers: loading, sharding and the operator, rank by rank in one process."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_within_bound
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.backends import rows as rows_layout
from vllm_flute.backends import triton
from vllm_flute.checkpoint import LutConfig
from vllm_flute.layout import ROWS, Layout
from vllm_flute.ops import lut_linear_op
from vllm_flute.vllm_plugin import config as config_module
from vllm_flute.vllm_plugin.config import FluteConfig
from vllm_flute.vllm_plugin.linear import FluteLinearMethod

PLAIN = {"bias": False, "params_dtype": torch.float32}


def flute_config(bits=4, group_size=64, ignore=(), overrides=None) -> FluteConfig:
    d = {"quant_method": "flute", "format": "lut-v1", "bits": bits, "group_size": group_size, "codebook": "nf"}
    config = FluteConfig(LutConfig.from_dict(d | {"ignore": list(ignore), "overrides": overrides or {}}))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def ranks(monkeypatch):
    """ranks(size, make): the layers that ``make()`` builds on each rank of a tensor-parallel group."""

    def build(size, make):
        layers = []
        for rank in range(size):
            for module in (vllm_linear, vllm_embedding):
                monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
                monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
            monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: size)
            layers.append(make())
        return layers

    return build


def tensor(n, k, bits=4, group=64, seed=0, codebook=None, dtype=torch.bfloat16) -> LutTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return quantize(weight, bits, group, "nf" if codebook is None else codebook, scale_dtype=dtype)


def load(layer, t: LutTensor, *shard_id) -> None:
    for part, stored in t.parts().items():
        param = getattr(layer, part)
        param.weight_loader(param, stored, *shard_id)


def finish(layer) -> None:
    assert isinstance(layer.quant_method, FluteLinearMethod)
    layer.quant_method.process_weights_after_loading(layer)
    # What was loaded is freed: one packed tensor stays.
    assert {name for name, _ in layer.named_parameters()} <= {"weight_packed", "bias"}


def row_parallel(ranks, size, make, t: LutTensor, x: torch.Tensor) -> torch.Tensor:
    """The sum of what each of ``size`` ranks computes from its share of x ``[M, K]``."""
    y, k = 0, x.shape[1] // size
    for rank, layer in enumerate(ranks(size, make)):
        load(layer, t)
        finish(layer)
        y = y + layer(x[:, rank * k : (rank + 1) * k])[0]
    return y


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_column_parallel_with_bias(ranks, bits, dtype):
    t, x, bias = tensor(96, 128, bits, dtype=torch.float16), torch.randn(5, 128).to(dtype), torch.randn(96).to(dtype)
    config = flute_config(bits)
    make = partial(
        vllm_linear.ColumnParallelLinear, 128, 96, bias=True, params_dtype=dtype, quant_config=config, prefix="a"
    )  # noqa: E731
    out = []
    for layer in ranks(2, make):
        load(layer, t)
        layer.bias.weight_loader(layer.bias, bias)
        finish(layer)
        out.append(layer(x)[0])
    assert_within_bound(torch.cat(out, dim=-1), x, t, bias)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size, group", [(1, 64), (2, 64), (3, 64), (3, 192), (2, 192), (1, 576)])
def test_row_parallel_with_groups_cut_by_a_rank(ranks, bits, size, group):
    """K=576 on 2 ranks is 288: groups of 64 and 192 straddle the cut and become groups of 32 and 96, exactly."""
    t, x = tensor(40, 576, bits, group), torch.randn(3, 576)
    config = flute_config(bits, group)
    make = partial(
        vllm_linear.RowParallelLinear, 576, 40, **PLAIN, reduce_results=False, quant_config=config, prefix="down_proj"
    )
    assert_within_bound(row_parallel(ranks, size, make, t, x), x, t)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_with_a_codebook_each_and_replicated_heads(ranks, bits, size):
    """8 query and 2 key/value heads of 16: on 4 ranks each key/value head is on two of them."""
    books = [torch.randn(2**bits, generator=torch.Generator().manual_seed(i)).sort().values for i in range(3)]
    q, k, v = (tensor(n, 64, bits, 32, i, b) for i, (n, b) in enumerate(zip((128, 32, 32), books, strict=True)))
    config, x = flute_config(bits, 32), torch.randn(6, 64)
    make = partial(vllm_linear.QKVParallelLinear, 64, 16, 8, 2, **PLAIN, quant_config=config, prefix="l.qkv_proj")
    for rank, layer in enumerate(ranks(size, make)):
        for t, shard in ((q, "q"), (k, "k"), (v, "v")):
            load(layer, t, shard)
        finish(layer)
        queries, kv = 128 // size, max(16, 32 // size)
        parts = layer(x)[0].split([queries, kv, kv], dim=-1)
        kv_rank = rank * 2 // size if size > 2 else rank
        for part, t, rows, at in ((parts[0], q, queries, rank), (parts[1], k, kv, kv_rank), (parts[2], v, kv, kv_rank)):
            mine = LutTensor(t.qweight[at * rows :][:rows], t.scales[at * rows :][:rows], t.codebook)
            assert_within_bound(part, x, mine)


def test_merged_column_with_a_codebook_each(ranks):
    gate, up = tensor(96, 64, 3, 64, 1), tensor(96, 64, 3, 64, 2, torch.linspace(-1, 1, 8))
    config, x = flute_config(3), torch.randn(2, 64)
    make = partial(
        vllm_linear.MergedColumnParallelLinear, 64, [96, 96], **PLAIN, quant_config=config, prefix="mlp.gate_up_proj"
    )
    out = []
    for layer in ranks(3, make):
        load(layer, gate, 0)
        load(layer, up, 1)
        finish(layer)
        out.append(layer(x)[0].chunk(2, dim=-1))
    assert_within_bound(torch.cat([o[0] for o in out], dim=-1), x, gate)
    assert_within_bound(torch.cat([o[1] for o in out], dim=-1), x, up)


def test_replicated(ranks):
    t, x = tensor(24, 64), torch.randn(2, 64)
    make = partial(vllm_linear.ReplicatedLinear, 64, 24, **PLAIN, quant_config=flute_config(), prefix="r")
    for layer in ranks(2, make):
        load(layer, t)
        finish(layer)
        assert_within_bound(layer(x)[0], x, t)


@pytest.mark.parametrize("size", [1, 2])
def test_head_with_a_padded_vocabulary(ranks, size):
    """A vocabulary of 1000 is padded to 1024 rows; the padding gives zeros."""
    t, x = tensor(1000, 64, 3), torch.randn(2, 64)
    make = partial(
        vllm_embedding.ParallelLMHead,
        1000,
        64,
        params_dtype=torch.float32,
        quant_config=flute_config(3),
        prefix="lm_head",
    )
    out = []
    for layer in ranks(size, make):
        load(layer, t)
        finish(layer)
        out.append(layer.quant_method.apply(layer, x))
    y = torch.cat(out, dim=-1)
    assert y.shape == (2, 1024) and y[:, 1000:].abs().max() == 0
    assert_within_bound(y[:, :1000], x, t)


def test_ignored_layers_stay_unquantized():
    config = flute_config(ignore=["lm_head", "model.layers.0.mlp"])
    head = vllm_embedding.ParallelLMHead.__new__(vllm_embedding.ParallelLMHead)
    linear = vllm_linear.ReplicatedLinear.__new__(vllm_linear.ReplicatedLinear)
    assert config.get_quant_method(head, "lm_head") is None
    for name in ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"):
        assert isinstance(config.get_quant_method(linear, name), vllm_linear.UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "model.layers.1.mlp.down_proj"), FluteLinearMethod)
    assert config.get_quant_method(torch.nn.Module(), "") is None


@pytest.mark.parametrize(
    "units, dtype, warned", [(False, torch.bfloat16, 1), (True, torch.bfloat16, 0), (False, torch.float32, 0)]
)
def test_a_plain_head_on_a_cpu_without_bf16_units_is_said(monkeypatch, units, dtype, warned):
    said = []
    monkeypatch.setattr(config_module, "has_bf16_products", lambda: units)
    monkeypatch.setattr(config_module.logger, "warning_once", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    head = vllm_embedding.ParallelLMHead.__new__(vllm_embedding.ParallelLMHead)
    assert flute_config(ignore=["lm_head"]).get_quant_method(head, "lm_head") is None
    assert [text.split(",")[0] for text in said] == ["lm_head is not quantized"] * warned


def test_overrides_reach_fused_layers():
    over = {f"l.{p}": {"bits": 3, "group_size": 32} for p in ("q_proj", "k_proj", "v_proj")}
    assert flute_config(overrides=over).layer_spec("l.qkv_proj") == (3, 32)
    assert flute_config(overrides=over).layer_spec("m.qkv_proj") == (4, 64)


@pytest.mark.parametrize("change", [{"overrides": {"l.k_proj": {"bits": 3}}}, {"ignore": ["l.k_proj"]}])
def test_parts_of_a_fused_layer_that_differ(change):
    with pytest.raises(FluteError, match=r"l\.qkv_proj is one layer in vLLM, but its parts differ: .*l\.k_proj"):
        flute_config(**change).layer_spec("l.qkv_proj")


def test_errors_while_loading(ranks):
    config = flute_config()
    make = partial(vllm_linear.ReplicatedLinear, 64, 24, **PLAIN, quant_config=config, prefix="model.r")
    (layer,) = ranks(1, make)
    with pytest.raises(FluteError, match=r"model\.r\.qweight is missing from the checkpoint"):
        finish(layer)

    wide = partial(vllm_linear.RowParallelLinear, 192, 24, **PLAIN, quant_config=config, prefix="model.d")
    with pytest.raises(
        FluteError, match=r"model\.d: tensor parallel size 16 .* sizes that work .* 1, 2, 3, 4, 6, 8, 12,"
    ):
        ranks(16, wide)
    with pytest.raises(FluteError, match=r"model\.d: group size 128 does not divide its K=192"):
        config.lut = LutConfig.from_dict(config.lut.to_dict() | {"group_size": 128})
        ranks(1, wide)

    qkv = partial(
        vllm_linear.QKVParallelLinear, 64, 16, 2, 2, **PLAIN, quant_config=flute_config(), prefix="l.qkv_proj"
    )
    (layer,) = ranks(1, qkv)
    load(layer, tensor(32, 64), "q")
    with pytest.raises(FluteError, match=r"l\.qkv_proj\.scales: .* torch\.bfloat16 and torch\.float16"):
        load(layer, tensor(32, 64, dtype=torch.float16), "k")


def test_register_is_idempotent():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vllm_flute.vllm_plugin import register

    register()
    register()
    assert QUANTIZATION_METHODS.count("flute") == 1
    assert get_quantization_config("flute") is FluteConfig


def test_a_quantized_head_refuses_lora(ranks):
    config = VllmConfig()
    config.lora_config = object()
    with (
        set_current_vllm_config(config),
        pytest.raises(FluteError, match="--enable-lora does not work with a quantized"),
    ):
        ranks(1, lambda: vllm_embedding.ParallelLMHead(64, 64, quant_config=flute_config(), prefix="lm_head"))


def test_apply_is_one_operator_call(ranks):
    """Traced on tensors without data: a host read of one raises, as it would end a graph capture."""
    make = partial(vllm_linear.ReplicatedLinear, 64, 24, **PLAIN, quant_config=flute_config(), prefix="r")
    (layer,) = ranks(1, make)
    load(layer, tensor(24, 64))
    finish(layer)
    held = SimpleNamespace(weight_packed=layer.weight_packed.to("meta"), header=layer.header, flute_n=layer.flute_n)
    held.flute_perm = held.flute_offsets = None
    x, bias = torch.empty(3, 64, device="meta"), torch.empty(24, device="meta")
    graph = make_fx(lambda x, bias: layer.quant_method.apply(held, x, bias))(x, bias).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [lut_linear_op.default]


@pytest.mark.parametrize("m", [1, 2, 300])
def test_the_triton_backend_reads_no_device_data_on_the_host(monkeypatch, m):
    """Its launches are left out; the rest of a call runs on tensors without data, whose host read raises."""
    triton_kernels = pytest.importorskip("vllm_flute.backends.triton_kernels")
    launched = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(grid)

    for name in ("gemv", "gemm", "add_slices"):
        monkeypatch.setattr(triton_kernels, name, Launch())
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    t = tensor(256, 512)
    header = Layout(ROWS, 4, 64, 512, torch.bfloat16, (256,)).header()
    packed = rows_layout.pack(t.qweight, t.scales, t.codebook[None], header)
    y = triton.linear(torch.empty(m, 512, dtype=torch.bfloat16, device="meta"), packed.to("meta"), header, None)
    assert y.shape == (m, 256) and y.is_meta and launched
    with pytest.raises((RuntimeError, NotImplementedError)):
        y.sum().item()


def test_native_launches_neither_wait_nor_allocate():
    """What a CUDA graph cannot capture: waiting for the device, copying to the host, memory outside torch's."""
    forbidden = re.compile(r"Synchronize\s*\(|DeviceToHost|cudaMalloc|cudaFree|cudaMemcpy\s*\(|cudaMemset\s*\(")
    root = Path(__file__).resolve().parent.parent / "kernels"
    sources = [path for path in (*(root / "cuda").iterdir(), *(root / "torch").iterdir()) if path.is_file()]
    assert len(sources) > 10
    for path in sources:
        found = forbidden.search(path.read_text())
        assert not found, f"{path.name}: {found[0]}"


def test_lora_finds_the_device_of_a_packed_layer(ranks):
    make = partial(vllm_linear.ReplicatedLinear, 64, 24, **PLAIN, quant_config=flute_config(), prefix="r")
    (layer,) = ranks(1, make)
    load(layer, tensor(24, 64))
    finish(layer)
    assert _get_lora_device(layer) == torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dummy_weights_are_of_all_codes(ranks, monkeypatch, bits):
    """What --load-format dummy measures: codes of no pattern, weights of a plausible size."""
    monkeypatch.setattr("vllm_flute.vllm_plugin.linear.is_dummy_load", lambda: True)
    make = partial(vllm_linear.ReplicatedLinear, 128, 64, quant_config=flute_config(bits), prefix="a", **PLAIN)
    (layer,) = ranks(1, make)
    finish(layer)
    weight = layer(torch.eye(128))[0].T
    assert torch.isfinite(weight).all() and 0.001 < weight.std() < 0.1
    assert len(weight.unique()) == 2**bits
