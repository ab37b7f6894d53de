"""Mixtures of experts: the quantizer, the operator, and vLLM's own expert layer, against the oracle."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import llama_tensors, save_sharded
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.checkpoint import Checkpoint, LutConfig, check_checkpoint, quantize_checkpoint
from vllm_flute.ops import lut_linear_op
from vllm_flute.vllm_plugin.config import FluteConfig
from vllm_flute.vllm_plugin.moe import FluteMoEMethod, _experts_dense, experts_op

EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 64, 96
PREFIX = "model.layers.0.block_sparse_moe.experts"
NAMES = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def weights() -> dict[tuple[int, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {(e, name): torch.randn(s, generator=generator) for e in range(EXPERTS) for name, s in NAMES.items()}


def tensors(bits: int = 4) -> dict[tuple[int, str], LutTensor]:
    """Every matrix with a codebook of its own, w2 in groups of 32."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for (e, name), w in weights().items():
        book = torch.randn(2**bits, generator=generator).sort().values
        made[e, name] = quantize(w, bits, 32 if name == "w2" else 64, book)
    return made


def moe_config(rank: int = 0, size: int = 1, **changes) -> SimpleNamespace:
    parallel = SimpleNamespace(tp_rank=rank, tp_size=size, use_ep=changes.pop("use_ep", False))
    fields = {"activation": MoEActivation.SILU, "has_bias": False, "is_lora_enabled": False, "swiglu_limit": None}
    return SimpleNamespace(moe_parallel_config=parallel, **fields | changes)


class Experts(torch.nn.Module):
    """What `FluteMoEMethod` needs of vLLM's RoutedExperts."""

    apply_router_weight_on_input = False
    ckpt_gate_proj_name, ckpt_down_proj_name, ckpt_up_proj_name = "w1", "w2", "w3"
    global_num_experts = EXPERTS


def make(config: FluteConfig, moe=None) -> tuple[FluteMoEMethod, Experts]:
    layer, moe = Experts(), moe or moe_config()
    layer.moe_config = moe
    method = config._moe_method(layer, PREFIX)
    method.create_weights(layer, EXPERTS, HIDDEN, INNER // moe.moe_parallel_config.tp_size, torch.float32)
    return method, layer


def config(bits: int = 4, **options) -> FluteConfig:
    overrides = {f"{PREFIX}.{e}.w2": {"group_size": 32} for e in range(EXPERTS)}
    d = {"quant_method": "flute", "format": "lut-v1", "bits": bits, "group_size": 64, "overrides": overrides}
    return FluteConfig(LutConfig.from_dict(d | options))


def load(layer, stored: dict[tuple[int, str], LutTensor], part_names=("qweight", "scales", "codebook")) -> None:
    for (e, name), t in stored.items():
        for part in part_names:
            param = getattr(layer, f"{'w2' if name == 'w2' else 'w13'}_{part}")
            tensor = t if part == "weight" else getattr(t, part)
            assert param.weight_loader(param, tensor, f"{name}.{part}", shard_id=name, expert_id=e, return_success=True)


def routing(m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and ids; expert 3 gets no token."""
    generator = torch.Generator().manual_seed(m)
    scores = torch.randn(m, EXPERTS, generator=generator)
    scores[:, 3] = -torch.inf
    share, ids = scores.softmax(-1).topk(TOP_K)
    return torch.randn(m, HIDDEN, generator=generator), share, ids.to(torch.int32)


def oracle(x, share, ids, stored) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    dense = {key: t.dequantize().double() for key, t in stored.items()}
    for token in range(len(x)):
        for p, e in zip(share[token].double(), ids[token].tolist(), strict=True):
            row = x[token].double()
            y[token] += p * dense[e, "w2"] @ (F.silu(dense[e, "w1"] @ row) * (dense[e, "w3"] @ row))
    return y


# fp32 sums of at most 96 terms, twice, of magnitudes around sqrt(96): K * 2^-24 of the sum of magnitudes each.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-3}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 3])
def test_experts_are_the_oracles(bits, ranks):
    """Three ranks have 32 of the 96 inner rows each; their partial results sum up."""
    stored, m = tensors(bits), 7
    x, share, ids = routing(m)
    y = torch.zeros(m, HIDDEN)
    for rank in range(ranks):
        method, layer = make(config(bits), moe_config(rank, ranks))
        load(layer, stored)
        method.process_weights_after_loading(layer)
        assert {name for name, _ in layer.named_parameters()} == {"w13_weight_packed", "w2_weight_packed"}
        y += method.apply(layer, x, share, ids, None, None)
    torch.testing.assert_close(y.double(), oracle(x, share, ids, stored), **FLOAT32)


def arguments(layer) -> tuple:
    """Of the operator, after x, weights and ids."""
    w13 = layer.w13_weight_packed, layer.w13_headers, layer.w13_bytes
    return *w13, layer.w2_weight_packed, layer.w2_headers, layer.w2_bytes, 2 * INNER, "silu"


@pytest.mark.parametrize("m", [1, 2, 33])
def test_the_form_for_gpus_gives_the_same(m):
    method, layer = make(config())
    load(layer, tensors())
    method.process_weights_after_loading(layer)
    x, share, ids = routing(m)
    args = arguments(layer)
    torch.testing.assert_close(_experts_dense(x, share, ids, *args), experts_op(x, share, ids, *args), **FLOAT32)


def test_the_form_for_gpus_reads_nothing_on_the_host():
    """Traced on tensors without data: a host read of one raises, as it would end a graph capture."""
    method, layer = make(config())
    load(layer, tensors())
    method.process_weights_after_loading(layer)
    on_cpu = layer.w13_headers, layer.w2_headers
    x, share, ids, *layer_args = (
        a.to("meta") if isinstance(a, torch.Tensor) and not any(a is h for h in on_cpu) else a
        for a in (*routing(5), *arguments(layer))
    )
    graph = make_fx(lambda x, share, ids: _experts_dense(x, share, ids, *layer_args))(x, share, ids).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called.count(lut_linear_op.default) == 2 * EXPERTS


def test_the_operator_is_one_node_of_a_compiled_graph():
    method, layer = make(config())
    load(layer, tensors())
    method.process_weights_after_loading(layer)
    graphs = []
    call = torch.compile(
        partial(method.apply, layer), fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g
    )
    for m in (5, 9):
        x, share, ids = routing(m)
        torch.testing.assert_close(call(x, share, ids), method.apply(layer, x, share, ids))
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes] == [experts_op] * len(graphs)


def test_online_experts_are_those_of_the_offline_quantizer():
    online = FluteConfig.from_config({"quant_method": "flute", "online": True})
    method, layer = make(online)
    load(layer, weights(), ["weight"])
    stored = {(e, name): quantize(w, 4, 32 if name == "w2" else 64) for (e, name), w in weights().items()}
    reference_method, reference = make(config())
    load(reference, stored)
    for a, b in ((method, layer), (reference_method, reference)):
        a.process_weights_after_loading(b)
    assert torch.equal(layer.w13_weight_packed, reference.w13_weight_packed)
    assert torch.equal(layer.w2_weight_packed, reference.w2_weight_packed)
    assert "w13_weight" not in dict(layer.named_parameters())


def test_missing_expert_tensors_are_named():
    method, layer = make(config())
    stored = tensors()
    del stored[2, "w3"]
    load(layer, stored)
    with pytest.raises(FluteError, match=r"experts: 1 tensors for w13_qweight are missing"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"has_bias": True}, "a bias"),
        ({"activation": MoEActivation.SWIGLUOAI}, "the activation 'swigluoai'"),
        ({"swiglu_limit": 7.0}, "a limit on SwiGLU"),
        ({"use_ep": True}, "expert parallelism"),
        ({"is_lora_enabled": True}, "LoRA"),
    ],
)
def test_what_experts_do_not_do_is_refused(change, message):
    with pytest.raises(FluteError, match=f"experts do not support {message}"):
        make(config(), moe_config(**change))


def test_ignored_experts_stay_plain():
    layer = Experts()
    assert config(ignore=["experts"], overrides={})._moe_method(layer, PREFIX) is None


def save_mixtral(path) -> None:
    """A tiny checkpoint with Mixtral's names: LLaMA's without the MLP, and experts with a router."""
    path.mkdir()
    plain = {n: t for n, t in llama_tensors(HIDDEN, INNER, 1, torch.bfloat16).items() if ".mlp." not in n}
    plain |= {f"{PREFIX}.{e}.{name}.weight": w.bfloat16() for (e, name), w in weights().items()}
    plain[PREFIX.replace("experts", "gate.weight")] = torch.randn(EXPERTS, HIDDEN).bfloat16()
    save_sharded(path, plain, shards=2)
    (path / "config.json").write_text('{"tie_word_embeddings": false}')


def test_the_quantizer_takes_mixtrals_experts(tmp_path):
    save_mixtral(tmp_path / "mixtral")
    report = quantize_checkpoint(tmp_path / "mixtral", tmp_path / "out", method="absmax")
    layers = {info.name: info for info in check_checkpoint(tmp_path / "out")}
    assert len(report.layers) == len(layers) == 4 + 3 * EXPERTS
    assert {layers[f"{PREFIX}.{e}.w2"].group_size for e in range(EXPERTS)} == {32}
    assert Checkpoint(tmp_path / "out").headers[PREFIX.replace("experts", "gate.weight")].dtype == "BF16"
    with pytest.raises(FluteError, match=r"all experts one layer, but .*experts\.0\.w2 .* and .*experts\.1\.w2"):
        quantize_checkpoint(tmp_path / "mixtral", tmp_path / "x", overrides={"experts.1.w2": (3, 32)}, method="absmax")
