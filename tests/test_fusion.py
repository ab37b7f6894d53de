"""SwiGLU and norms joined to the layers beside them: the operators, and the pass that puts them into vLLM's graphs."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from vllm import ir
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_flute import quantize
from vllm_flute.backends import cuda
from vllm_flute.dispatch import pack_parts
from vllm_flute.ops import (
    NORM_TOKENS,
    lut_linear_add_norm_op,
    lut_linear_normed_op,
    lut_linear_normed_silu_op,
    lut_linear_op,
    lut_linear_silu_op,
)
from vllm_flute.vllm_plugin import fusion
from vllm_flute.vllm_plugin.fusion import LayerFusion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "load_tests"))
from gpu_serving_models import Variant, write_dummy  # noqa: E402

K, HALF = 64, 96
PLAIN, FUSED = "lut_linear_v1", "lut_linear_silu_v1"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_graph_of_another_run():
    """From Inductor's cache a graph comes without a pass having seen it."""
    with inductor_config.patch(force_disable_caches=True):
        yield


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
    call = torch.compile(module, fullgraph=True, options={"post_grad_custom_post_pass": LayerFusion(dtype, "cpu")})
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


def test_a_used_pass_can_be_copied_and_pickled():
    """As vLLM does with its configuration."""
    used = LayerFusion(torch.bfloat16, "cpu")
    used(torch.fx.symbolic_trace(lambda x: x.relu()).graph)
    assert used._patterns is not None
    for other in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert other._patterns is None and other.uuid() == used.uuid()


def test_it_is_installed_where_the_native_gpu_library_runs(monkeypatch):
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16), compilation_config=CompilationConfig())
    passes = config.compilation_config.inductor_compile_config
    fusion.install(config, "cpu")
    assert fusion._KEY not in passes
    monkeypatch.setattr(fusion, "backend", lambda device: (cuda, ""))
    fusion.install(config, "cuda")
    ours = passes[fusion._KEY]
    fusion.install(config, "cuda")
    assert isinstance(ours, LayerFusion) and passes[fusion._KEY] is ours
    # vLLM names its cache of graphs by it.
    assert ours.uuid() != LayerFusion(torch.float16, "cuda").uuid()
    plain = CompilationConfig()
    assert config.compilation_config.compute_hash() != plain.compute_hash()
    plain.inductor_compile_config[fusion._KEY] = users = object()
    fusion.install(SimpleNamespace(model_config=config.model_config, compilation_config=plain), "cuda")
    assert plain.inductor_compile_config[fusion._KEY] is users


EPSILON = 1e-5
ADD_NORM, NORMED, NORMED_SILU = (f"lut_linear_{name}_v1" for name in ("add_norm", "normed", "normed_silu"))


def square(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = quantize(torch.randn(K, K, generator=torch.Generator().manual_seed(seed)), bits=4, group_size=32, codebook="nf")
    return pack_parts(t.qweight, t.scales, t.codebook[None], 32, [K])


def hidden(m: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, NORM_TOKENS, NORM_TOKENS + 1])
def test_a_divided_norm_is_the_norm(m, dtype):
    before, after, gate = square(1), square(2), gate_up()
    x, residual, weight = hidden(m, dtype, 3), hidden(m, dtype, 4), 1 + hidden(1, dtype, 5)[0] / 4
    scaled, total, squares = lut_linear_add_norm_op(x, residual, weight, EPSILON, *before, None, K, "")
    y = lut_linear_op(x, *before, None, K, "")
    normed, expected = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(y, residual, weight, EPSILON)
    assert torch.equal(total, expected) and squares.shape == (NORM_TOKENS, K // 16)
    if m > NORM_TOKENS:
        assert torch.equal(scaled, normed)
    for op, plain, layer, n in (
        (lut_linear_normed_op, lut_linear_op, after, K),
        (lut_linear_normed_silu_op, lut_linear_silu_op, gate, 2 * HALF),
    ):
        found, exact = op(scaled, squares, EPSILON, *layer, None, n, ""), plain(normed, *layer, None, n, "")
        # Their inputs are rounded at different places.
        assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


class Block(torch.nn.Module):
    """What vLLM's LLaMA has between two attentions. ``change``: what must not be joined."""

    def __init__(self, change: str = ""):
        super().__init__()
        (self.o, self.o_header), (self.down, self.down_header) = square(1), square(2)
        (self.gate, self.gate_header), self.change = gate_up(), change
        self.register_buffer("up", torch.randn(K, HALF, generator=torch.Generator().manual_seed(0)) / 8)
        self.register_buffer("bias", torch.linspace(-1, 1, 2 * HALF))
        self.register_buffer("weight", 1 + hidden(1, torch.float32, 5)[0] / 4)

    def forward(self, x, residual):
        y = lut_linear_op(x, self.o, self.o_header, None, K, "")
        if self.change == "between":
            y = y + x
        size = 32 if self.change == "part" else None
        weight = None if self.change == "no weight" else self.weight
        normed, residual = torch.ops.vllm_ir.fused_add_rms_norm(y, residual, weight, EPSILON, size)
        bias = self.bias if self.change == "bias" else None
        gated = SiluAndMul.forward_native(lut_linear_op(normed, self.gate, self.gate_header, bias, 2 * HALF, ""))
        narrow = torch.nn.functional.linear(gated, self.up)
        y = lut_linear_op(narrow, self.down, self.down_header, None, K, "")
        normed_again, residual = torch.ops.vllm_ir.fused_add_rms_norm(y, residual, self.weight, EPSILON)
        if self.change == "read":
            return normed_again, residual, normed
        return normed_again, residual  # the first is what the head reads


@pytest.mark.parametrize("change", ["", "bias"])  # with one SwiGLU stays a kernel of its own
def test_the_norm_between_two_layers_is_joined_to_them(change):
    module = Block(change).to(torch.bfloat16)
    torch._dynamo.reset()
    joins = LayerFusion(torch.bfloat16, "cpu")
    call = torch.compile(module, fullgraph=True, options={"post_grad_custom_post_pass": joins})
    for m in (5, 1, 40):
        inputs = hidden(m, torch.bfloat16, m), hidden(m, torch.bfloat16, 7)
        if m == 5:
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 0)
            found, (code,) = run_and_get_code(call, *inputs)
        else:
            found = call(*inputs)
        for mine, plain in zip(found, module(*inputs), strict=True):
            assert (mine - plain).abs().max() <= 0.02 * plain.abs().max()
    assert ADD_NORM in code and (NORMED if change else NORMED_SILU) in code
    assert joins.norms > 0 and joins.matched == (0 if change else joins.norms)  # one a graph, of any tokens or of one
    assert f"{PLAIN}." in code  # the last layer's, whose norm the head reads


@pytest.mark.parametrize("change", ["between", "part", "no weight", "read", "fp16"])
def test_another_norm_stays(change):
    dtype = torch.float16 if change == "fp16" else torch.bfloat16
    module = Block(change).to(dtype)
    torch._dynamo.reset()
    joins = LayerFusion(dtype, "cpu")
    call = torch.compile(module, fullgraph=True, options={"post_grad_custom_post_pass": joins})
    found = call(hidden(3, dtype, 3), hidden(3, dtype, 7))
    assert joins.norms == 0
    for mine, plain in zip(found, module(hidden(3, dtype, 3), hidden(3, dtype, 7)), strict=True):
        assert (mine - plain).abs().max() <= 0.02 * plain.abs().max()


ENGINE = """
import sys
import vllm.ir
from vllm import LLM, SamplingParams
from vllm_flute.backends import cuda
from vllm_flute.vllm_plugin import fusion

fusion.backend = lambda device: (cuda, "")  # as where the native GPU library runs
# Norms are operators until vLLM lowers them, and functional by a pass of vLLM's that it has for GPUs only.
wrap, norm = vllm.ir.set_default_torch_wrap, vllm.ir.ops.fused_add_rms_norm
vllm.ir.set_default_torch_wrap, norm.maybe_inplace.torch_op = lambda enable: wrap(True), norm.torch_op
options = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 2}
llm = LLM(sys.argv[1], skip_tokenizer_init=True, **options)
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
(output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
assert len(output.outputs[0].token_ids) == 4
passes = llm.llm_engine.vllm_config.compilation_config.inductor_compile_config
print("joined", passes[fusion._KEY].matched, passes[fusion._KEY].norms)
"""


@pytest.mark.e2e
def test_vllm_compiles_a_model_with_it(tmp_path):
    """A real engine with Inductor: every graph with an MLP has the joined operator, and its norms but the last one."""
    model = write_dummy(tmp_path / "tiny", "tiny", Variant.parse("flute-4-g64"))
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
    environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    command = [sys.executable, "-c", ENGINE, model]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    joined = done.stdout.splitlines()[-1].removeprefix("joined ").split()
    assert [int(n) for n in joined] == [2, 3], done.stdout[-3000:]  # of two layers
