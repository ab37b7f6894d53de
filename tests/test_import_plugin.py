"""What imported checkpoints need of the plugin: offsets and permuted inputs on vLLM's own layers, rank by rank."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from source_checkpoints import make_upstream_flute, pack_awq, pack_gptq, pack_upstream
from test_plugin import PLAIN, finish, load, ranks, row_parallel, vllm_config  # noqa: F401 (fixtures)
from tolerance import allowed_error, assert_within_bound
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

from vllm_flute import FluteError, LutTensor, lut_linear
from vllm_flute.checkpoint import LutConfig
from vllm_flute.checkpoint.sources import awq
from vllm_flute.ops import lut_linear_op
from vllm_flute.packing import unpack_codes
from vllm_flute.vllm_plugin.config import FluteConfig


def config(extensions, group=64, bits=4) -> FluteConfig:
    d = {"quant_method": "flute", "format": "lut-v1", "bits": bits, "group_size": group, "codebook": "gptq"}
    made = FluteConfig(LutConfig.from_dict(d | {"extensions": list(extensions)}))
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def tensor(n, k, bits=4, group=64, seed=0, offsets=True, perm=None) -> LutTensor:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=random, dtype=torch.uint8)
    scales = (torch.rand(n, k // group, generator=random) * 0.1 + 0.01).half()
    table = torch.arange(2**bits) - 2.0 ** (bits - 1)
    moved = torch.randn(n, k // group, generator=random) * 0.1 if offsets else None
    return LutTensor.from_codes(codes, scales, table, bits, offsets=moved, perm=perm)


def order(k, seed=1) -> torch.Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed)).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_lut_linear_is_the_oracle(dtype, m):
    t = tensor(48, 128, perm=order(128))
    x = torch.randn(m, 128).to(dtype)
    weight = t.dequantize()
    codes = t.codes().float() - 8
    by_hand = codes * t.scales.float().repeat_interleave(64, 1) + t.offsets.repeat_interleave(64, 1)
    assert torch.equal(weight[:, t.perm.long()], by_hand)
    expected = x.float() @ weight.T
    # The codes' share, which may be larger than the sum, is rounded to x's dtype before the offsets' is added.
    share = LutTensor(t.qweight, t.scales, t.codebook + 0.5)
    bound = allowed_error(x[:, t.perm], share) + x.float().abs() @ weight.abs().T * torch.finfo(dtype).eps
    for kernel in (None, "reference"):
        error = (lut_linear(x, t, kernel=kernel).float() - expected).abs()
        assert (error <= bound).all(), kernel


def test_a_table_far_from_zero_loses_nothing_in_bf16():
    """Codes 0 to 15 and offsets of -8 scales, inputs with a mean: two shares that nearly cancel."""
    centre = tensor(64, 1024)
    far = LutTensor(
        centre.qweight, centre.scales, centre.codebook + 8, offsets=centre.offsets - 8 * centre.scales.float()
    )
    x = (torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    exact = x.double() @ far.dequantize().double().T
    rounded = (x.float() @ far.dequantize(torch.bfloat16).float().T).bfloat16()
    error, plain = (lut_linear(x, far) - exact).norm(), (rounded - exact).norm()
    assert error <= 1.5 * plain, (error, plain)


@pytest.mark.parametrize("size, group", [(1, 64), (2, 64), (3, 192)])
def test_offsets_of_row_parallel_groups_that_a_rank_cuts(ranks, size, group):  # noqa: F811
    t, x = tensor(40, 576, 4, group), torch.randn(3, 576)
    make = partial(
        vllm_linear.RowParallelLinear,
        576,
        40,
        **PLAIN,
        reduce_results=False,
        quant_config=config(["offsets"], group),
        prefix="down_proj",
    )
    assert_within_bound(row_parallel(ranks, size, make, t, x), x, t)


@pytest.mark.parametrize("size", [1, 2])
def test_qkv_where_one_part_has_offsets_and_all_have_one_order(ranks, size):  # noqa: F811
    perm, x = order(128), torch.randn(5, 128)
    parts = [tensor(n, 128, seed=i, offsets=i == 1, perm=perm) for i, n in enumerate((128, 32, 32))]
    quant_config = config(["offsets", "perm"])
    make = partial(
        vllm_linear.QKVParallelLinear, 128, 16, 8, 2, **PLAIN, quant_config=quant_config, prefix="l.qkv_proj"
    )
    for rank, layer in enumerate(ranks(size, make)):
        for t, shard in zip(parts, "qkv", strict=True):
            load(layer, t, shard)
        finish(layer)
        for y, t in zip(layer(x)[0].split([128 // size, 32 // size, 32 // size], dim=-1), parts, strict=True):
            rows = slice(rank * y.shape[1], (rank + 1) * y.shape[1])
            mine = {part: s[rows] if s.shape[0] == t.shape[0] and s.dim() == 2 else s for part, s in t.parts().items()}
            assert_within_bound(y, x, LutTensor.from_parts(mine))


def test_layers_without_the_parts_are_as_before(ranks):  # noqa: F811
    t, x = tensor(32, 64, offsets=False), torch.randn(2, 64)
    make = partial(vllm_linear.ReplicatedLinear, 64, 32, **PLAIN, quant_config=config(["offsets", "perm"]), prefix="a")
    (layer,) = ranks(1, make)
    load(layer, t)
    finish(layer)
    assert layer.flute_offsets is None and layer.flute_perm is None
    assert_within_bound(layer(x)[0], x, t)


def test_orders_that_cannot_be_served(ranks):  # noqa: F811
    make = partial(
        vllm_linear.RowParallelLinear, 128, 32, **PLAIN, quant_config=config(["perm"]), prefix="model.o_proj"
    )
    layer = ranks(2, make)[0]
    with pytest.raises(FluteError, match=re.escape("model.o_proj has its inputs permuted (act-order)")):
        load(layer, tensor(32, 128, offsets=False, perm=order(128)))
    make = partial(
        vllm_linear.QKVParallelLinear, 128, 16, 8, 2, **PLAIN, quant_config=config(["perm"]), prefix="l.qkv_proj"
    )
    (layer,) = ranks(1, make)
    load(layer, tensor(128, 128, offsets=False, perm=order(128)), "q")
    with pytest.raises(FluteError, match="in different orders"):
        load(layer, tensor(32, 128, offsets=False, perm=order(128, 2)), "k")
    load(layer, tensor(32, 128, offsets=False), "k")
    load(layer, tensor(32, 128, offsets=False), "v")
    with pytest.raises(FluteError, match="only some parts of the layer have a perm"):
        layer.quant_method.process_weights_after_loading(layer)


def test_the_packers_of_the_sources_are_those_of_vllm():
    codes = torch.randint(0, 16, (64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(gptq_pack(codes, 4, 64, 48), pack_gptq(codes, 4))
    assert torch.equal(gptq_pack(codes % 4, 2, 64, 48), pack_gptq(codes % 4, 2))
    assert torch.equal(awq_pack(codes, 4, 64, 48), pack_awq(codes))
    assert torch.equal(unpack_codes(awq.qweight(awq_pack(codes, 4, 64, 48)), 4).int(), codes.T)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_upstream_tensors_are_loaded_as_they_are(ranks, bits, size):  # noqa: F811
    quant_config = FluteConfig.from_config({"quant_method": "flute", "num_bits": bits, "group_size": 64})
    quant_config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    parts, x = [tensor(512, 128, bits, seed=i, offsets=False) for i in range(2)], torch.randn(3, 128)
    make = partial(
        vllm_linear.MergedColumnParallelLinear,
        128,
        [512, 512],
        **PLAIN,
        quant_config=quant_config,
        prefix="mlp.gate_up_proj",
    )
    out = []
    for layer in ranks(size, make):
        for i, t in enumerate(parts):
            table = t.codebook.half()
            stored = {"weight": pack_upstream(t.codes(), bits), "scales": t.scales, "tables": table}
            stored["tables2"] = torch.cartesian_prod(table, table).view(torch.float32)
            for part, value in stored.items():
                param = getattr(layer, part)
                param.weight_loader(param, value, i)
        finish(layer)
        out.append(layer(x)[0].chunk(2, dim=-1))
    for i, t in enumerate(parts):
        assert_within_bound(torch.cat([o[i] for o in out], dim=-1), x, t)


@pytest.mark.parametrize("older", [False, True])
def test_upstream_checkpoints_are_recognised_and_checked(tmp_path, older):
    path = make_upstream_flute(tmp_path / "source", older=older).path
    found = json.loads((path / "config.json").read_text()).get("quantization_config")
    made = FluteConfig.from_config(found) if found else FluteConfig()
    made.maybe_update_config(str(path))
    assert made.upstream and not made.online
    assert made.layer_spec("model.layers.0.mlp.down_proj") == (4, 64) and made.lut.is_ignored("lm_head")
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(FluteError, match="is truncated"):
        made.maybe_update_config(str(path))


def test_a_call_reads_no_data_on_the_host(ranks):  # noqa: F811
    """Traced on tensors without data, as in test_plugin.py: the parts beside the kernel can be captured too."""
    make = partial(vllm_linear.ReplicatedLinear, 128, 24, **PLAIN, quant_config=config(["offsets", "perm"]), prefix="r")
    (layer,) = ranks(1, make)
    load(layer, tensor(24, 128, perm=order(128)))
    finish(layer)
    names = ("weight_packed", "flute_perm", "flute_offsets")
    held = SimpleNamespace(header=layer.header, flute_n=24, **{name: getattr(layer, name).to("meta") for name in names})
    x = torch.empty(3, 128, device="meta")
    graph = make_fx(lambda x: layer.quant_method.apply(held, x))(x).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called[0] == torch.ops.aten.index_select.default and lut_linear_op.default in called
