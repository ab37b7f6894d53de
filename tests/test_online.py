"""Online quantization: plain weights through vLLM's own layers and loaders give what the offline quantizer writes."""

import json
import logging
from functools import partial

import pytest
import torch
from checkpoints import make_tiny
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_flute import FluteError, quantize
from vllm_flute.checkpoint import LutConfig, quantize_checkpoint
from vllm_flute.ops import lut_unpack_op
from vllm_flute.vllm_plugin.config import FluteConfig
from vllm_flute.vllm_plugin.online import OnlineConfig

ONLINE = {"quant_method": "flute", "online": True}
LAYER = "model.layers.0.self_attn"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(autouse=True)
def set_rank(monkeypatch):
    """set_rank(rank, size) of the tensor-parallel group; one rank until it is called."""

    def set_rank(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_embedding, vllm_parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    set_rank(0, 1)
    return set_rank


def online(**options) -> FluteConfig:
    config = FluteConfig.from_config(ONLINE | options)
    config.packed_modules_mapping = FUSED
    return config


def offline(bits: int, group_size: int) -> FluteConfig:
    config = FluteConfig(LutConfig(bits, group_size, "nf"))
    config.packed_modules_mapping = FUSED
    return config


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def load(layer, tensors: dict, *shard_id) -> None:
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *shard_id)


def parts(w: torch.Tensor, *args, **kwargs) -> dict[str, torch.Tensor]:
    t = quantize(w, *args, **kwargs)
    return {"qweight": t.qweight, "scales": t.scales, "codebook": t.codebook}


def assert_same(a, b) -> None:
    """The same packed weights; rows that pad a vocabulary count by their scales only, which are 0."""
    for layer in (a, b):
        layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(a.header, b.header)
    (codes_a, scales_a, books_a), (codes_b, scales_b, books_b) = (
        lut_unpack_op(layer.weight_packed, layer.header) for layer in (a, b)
    )
    used = (scales_b != 0).any(dim=1)
    assert torch.equal(codes_a[used], codes_b[used]) and used.sum() >= len(used) - 24
    assert torch.equal(scales_a, scales_b) and torch.equal(books_a, books_b)
    assert "weight" not in dict(a.named_parameters())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "options, settings",
    [
        ({}, {"bits": 4, "group_size": 64, "codebook": "nf", "method": "scale-search"}),
        ({"bits": 3}, {"bits": 3, "group_size": 64, "codebook": "nf", "method": "scale-search"}),
        (
            {"bits": 3, "method": "absmax", "codebook": "lloyd-max"},
            {"bits": 3, "group_size": 64, "codebook": "lloyd-max", "method": "absmax"},
        ),
        (
            {"bits": 2, "codebook": "ternary", "method": "absmax", "group_size": 0},
            {"bits": 2, "codebook": "ternary", "method": "absmax", "group_size": 192},
        ),
    ],
)
def test_codes_are_those_of_the_offline_quantizer_on_every_rank(set_rank, ranks, options, settings):
    """K=192 on 2 ranks is 96: a group of 64 straddles the cut, online as offline. vLLM loads at a bf16 default."""
    down, shards = weight(40, 192), {"q": weight(64, 192, 1), "k": weight(32, 192, 2), "v": weight(32, 192, 3)}
    configs = online(**options), offline(settings["bits"], settings["group_size"])
    for rank in range(ranks):
        set_rank(rank, ranks)
        row = partial(vllm_linear.RowParallelLinear, 192, 40, reduce_results=False, prefix=f"{LAYER}.o_proj")
        qkv = partial(vllm_linear.QKVParallelLinear, 192, 16, 4, 2, prefix=f"{LAYER}.qkv_proj")
        with set_default_torch_dtype(torch.bfloat16):
            rows, fused = ([make(bias=False, quant_config=c) for c in configs] for make in (row, qkv))
            load(rows[0], {"weight": down})
            for shard, w in shards.items():
                load(fused[0], {"weight": w}, shard)
        load(rows[1], parts(down, **settings))
        for shard, w in shards.items():
            load(fused[1], parts(w, **settings), shard)
        assert_same(*rows)
        assert_same(*fused)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_head_from_its_own_weight_or_the_embedding(set_rank, tied, ranks):
    """A vocabulary of 1000 is padded to 1024 rows, half of them on each of two ranks."""
    w = weight(1000, 64)
    make = partial(vllm_embedding.ParallelLMHead, 1000, 64, params_dtype=torch.bfloat16, prefix="lm_head")
    for rank in range(ranks):
        set_rank(rank, ranks)
        a, b = make(quant_config=online(lm_head=True)), make(quant_config=offline(4, 64))
        if tied:
            embedding = vllm_embedding.VocabParallelEmbedding(1000, 64, params_dtype=torch.bfloat16)
            a = a.tie_weights(embedding)
            embedding.weight.weight_loader(embedding.weight, w)
            before = embedding.weight.clone()
        else:
            load(a, {"weight": w})
        load(b, parts(w))
        assert_same(a, b)
        assert not tied or torch.equal(embedding.weight, before)


def test_a_plain_weight_takes_no_memory_before_it_comes():
    layer = vllm_linear.ReplicatedLinear(64, 24, bias=False, quant_config=online(), prefix=f"{LAYER}.o_proj")
    assert layer.weight.is_meta
    with pytest.raises(FluteError, match=r"o_proj\.qweight is missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_group_sizes_that_do_not_fit(caplog):
    """K=96 takes groups of 32; K=100 cannot be packed and stays as it is, which the log says."""
    make = partial(vllm_linear.ReplicatedLinear, bias=False, quant_config=online(), prefix=f"{LAYER}.o_proj")
    assert make(96, 24).scales.shape == (24, 3)
    logger = logging.getLogger("vllm.flute")
    logger.addHandler(caplog.handler)  # vLLM's loggers do not pass on to the root, where caplog listens
    layer = make(100, 24)
    logger.removeHandler(caplog.handler)
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod) and not layer.weight.is_meta
    assert "o_proj stays" in caplog.text


def test_what_is_quantized():
    lut = OnlineConfig.from_dict(ONLINE | {"ignore": ["model.layers.1"], "overrides": {"down_proj": {"bits": 3}}})
    assert not lut.is_ignored("model.layers.0.mlp.down_proj")
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate", "model.embed_tokens", "lm_head"):
        assert lut.is_ignored(name)
    assert lut.layer("model.layers.0.mlp.down_proj") == (3, 64) and lut.layer("model.layers.0.mlp.up_proj") == (4, 64)
    assert not OnlineConfig.from_dict(ONLINE | {"lm_head": True}).is_ignored("lm_head")
    assert FluteConfig().lut == OnlineConfig() == OnlineConfig.from_dict(ONLINE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bit": 3}, "unknown keys bit"),
        ({"bits": 5}, r"unsupported bits: 5"),
        ({"group_size": 48}, "unsupported group size 48"),
        ({"codebook": "fp5"}, "unknown codebook 'fp5'"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"overrides": {"down_proj": 3}}, "override down_proj"),
        ({"lm_head": "yes"}, "lm_head is 'yes'"),
    ],
)
def test_settings_that_are_wrong(options, message):
    with pytest.raises(FluteError, match=message):
        FluteConfig.from_config(ONLINE | options)


def test_quantized_checkpoints_are_refused(tmp_path):
    plain = make_tiny(tmp_path / "plain", layers=1)
    quantize_checkpoint(plain, tmp_path / "flute")
    online().maybe_update_config(str(plain))
    with pytest.raises(FluteError, match=r"flute is quantized already \(quant_method 'flute'\).*without the online"):
        online().maybe_update_config(str(tmp_path / "flute"))


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    """vLLM's configuration lets the plugin's own line through."""
    path = make_tiny(tmp_path / "gptq", layers=1)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError, match="--quantization flute, but config.json says quant_method 'gptq'"):
        EngineArgs(str(path), quantization="flute", skip_tokenizer_init=True).create_model_config()
