"""SwiGLU joined to the gate and up projections: the operator, and the pass that puts it into vLLM's compiled graphs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_flute import quantize
from vllm_flute.backends import cuda
from vllm_flute.dispatch import pack_parts
from vllm_flute.ops import lut_linear_op, lut_linear_silu_op
from vllm_flute.vllm_plugin import fusion
from vllm_flute.vllm_plugin.fusion import SiluFusion

K, HALF = 64, 96
PLAIN, FUSED = "lut_linear_v1", "lut_linear_silu_v1"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def gate_up() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [quantize(torch.randn(HALF, K, generator=generator), bits=4, group_size=32, codebook="nf") for _ in "gu"]
    stacked = torch.cat([t.qweight for t in parts]), torch.cat([t.scales for t in parts])
    return pack_parts(*stacked, torch.stack([t.codebook for t in parts]), 32, [HALF, HALF])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_operator_is_both(dtype):
    packed, header = gate_up()
    for m in (1, 7, 40):
        x = torch.randn(2, m, K).to(dtype)
        separate = SiluAndMul.forward_native(lut_linear_op(x, packed, header, None, 2 * HALF, ""))
        assert torch.equal(lut_linear_silu_op(x, packed, header, None, 2 * HALF, ""), separate)


class Mlp(torch.nn.Module):
    """As vLLM's LLaMA calls them; ``between`` is what LoRA would do, ``twice`` a second reader of the projection."""

    def __init__(self, between=False, twice=False, bias=None):
        super().__init__()
        self.packed, self.header = gate_up()
        self.between, self.twice, self.bias = between, twice, bias

    def forward(self, x):
        y = lut_linear_op(x, self.packed, self.header, self.bias, 2 * HALF, "")
        if self.between:
            y = y + x[:, :1]
        gated = SiluAndMul.forward_native(y)
        return (gated, y) if self.twice else gated


def compiled(module, dtype: torch.dtype, *sizes: int):
    """(results, code) of the module compiled with the pass for any number of tokens."""
    torch._dynamo.reset()
    call = torch.compile(module, fullgraph=True, options={"post_grad_custom_post_pass": SiluFusion(dtype, "cpu")})
    inputs = [torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(dtype) for m in sizes]
    torch._dynamo.mark_dynamic(inputs[0], 0)
    first, (code,) = run_and_get_code(call, inputs[0])
    return [(x, y) for x, y in zip(inputs, [first, *map(call, inputs[1:])], strict=True)], code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_graph_has_one_call_of_both(dtype):
    module = Mlp()
    results, code = compiled(module, dtype, 5, 1, 33)
    assert FUSED in code and f"{PLAIN}." not in code
    for x, y in results:
        torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize("change", [{"between": True}, {"twice": True}, {"bias": torch.zeros(2 * HALF).bfloat16()}])
def test_what_is_something_else_stays(change):
    module = Mlp(**change)
    _, code = compiled(module, torch.bfloat16, 5)
    assert PLAIN in code and FUSED not in code


def test_it_is_installed_where_the_native_gpu_library_runs(monkeypatch):
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16), compilation_config=CompilationConfig())
    passes = config.compilation_config.inductor_compile_config
    fusion.install(config, "cpu")
    assert fusion._KEY not in passes
    monkeypatch.setattr(fusion, "backend", lambda device: (cuda, ""))
    fusion.install(config, "cuda")
    ours = passes[fusion._KEY]
    fusion.install(config, "cuda")
    assert isinstance(ours, SiluFusion) and passes[fusion._KEY] is ours
    # vLLM copies it, and names its cache of graphs by it.
    assert copy.deepcopy(ours).uuid() == ours.uuid() != SiluFusion(torch.float16, "cuda").uuid()
    plain = CompilationConfig()
    assert config.compilation_config.compute_hash() != plain.compute_hash()
    plain.inductor_compile_config[fusion._KEY] = users = object()
    fusion.install(SimpleNamespace(model_config=config.model_config, compilation_config=plain), "cuda")
    assert plain.inductor_compile_config[fusion._KEY] is users
